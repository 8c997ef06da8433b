"""The packed batch: scans of different length behind one another, each column in step with the points."""

import dataclasses

import numpy as np
import pytest
import torch

from kdmos.data.batch import PackedBatch, ScanId, collate, pack

COLUMNS = ("points", "residual", "labels", "teacher_logits")


def sample(length: int, frame: int, columns: tuple[str, ...] = COLUMNS) -> dict:
    rng = np.random.default_rng(frame)
    content = {
        "points": rng.random((length, 4), dtype=np.float32),
        "residual": rng.random((length, 8), dtype=np.float32),
        "labels": rng.integers(0, 4, length).astype(np.uint8),
        "teacher_logits": rng.random((length, 4)).astype(np.float16),
    }
    return {"scan": ScanId("08", frame), **{name: content[name] for name in columns}}


def test_scan_id_reads_like_its_file():
    scan = ScanId("08", 123)
    assert str(scan) == f"{scan}" == "08/000123"
    assert str(ScanId("drive", 1234567)) == "drive/1234567"
    assert scan == ("08", 123) and {scan: 1}[ScanId("08", 123)] == 1
    assert sorted([ScanId("08", 2), ScanId("00", 9), ScanId("08", 1)]) == [("00", 9), ("08", 1), ("08", 2)]


def test_pack():
    parts = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(0, 2), torch.tensor([[5.0, 6.0]])]
    rows, offsets = pack(parts)
    assert rows.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert offsets.dtype == torch.int64 and offsets.tolist() == [0, 2, 2, 3]
    assert [len(part) for part in rows.split(offsets.diff().tolist())] == [2, 0, 1]
    rows, offsets = pack([torch.tensor([7, 8], dtype=torch.uint8)])  # any shape and type behind the first axis
    assert rows.dtype == torch.uint8 and rows.tolist() == [7, 8] and offsets.tolist() == [0, 2]


def test_pack_stays_on_the_device():
    rows, offsets = pack([torch.zeros(3, 4, device="meta"), torch.zeros(2, 4, device="meta")])
    assert rows.shape == (5, 4) and rows.device.type == offsets.device.type == "meta"


def test_collate_keeps_every_column_in_step():
    samples = [sample(5, 3), sample(1, 11), sample(7, 4)]
    batch = collate(samples)
    assert batch.num_scans == 3
    assert batch.offsets.dtype == torch.int64 and batch.offsets.tolist() == [0, 5, 6, 13]
    assert batch.scans == (ScanId("08", 3), ScanId("08", 11), ScanId("08", 4))
    dtypes = (torch.float32, torch.float32, torch.uint8, torch.float16)
    for name, dtype in zip(COLUMNS, dtypes):
        column = getattr(batch, name)
        assert column.dtype == dtype and len(column) == 13
        for part, one in zip(column.split([5, 1, 7]), samples):
            np.testing.assert_array_equal(part.numpy(), one[name])


def test_collate_one_scan():
    batch = collate([sample(5, 3)])
    assert batch.num_scans == 1 and batch.offsets.tolist() == [0, 5] and batch.points.shape == (5, 4)


@pytest.mark.parametrize("columns", [("points",), ("points", "residual"), ("points", "residual", "labels")])
def test_collate_without_optional_columns(columns):
    batch = collate([sample(5, 3, columns), sample(2, 4, columns)])
    for name in COLUMNS:
        assert (getattr(batch, name) is None) == (name not in columns)
    assert batch.num_scans == 2 and len(batch.points) == 7


def test_to_moves_every_tensor_and_keeps_the_rest():
    batch = collate([sample(5, 3), sample(2, 4)])
    moved = batch.to("meta")
    for name in (*COLUMNS, "offsets"):
        one, other = getattr(batch, name), getattr(moved, name)
        assert other.device.type == "meta" and one.device.type == "cpu"  # the old one stays where it was
        assert (other.shape, other.dtype) == (one.shape, one.dtype)
    assert moved.scans == batch.scans and moved.num_scans == 2
    same = batch.to("cpu", non_blocking=True)
    assert all(torch.equal(getattr(same, name), getattr(batch, name)) for name in (*COLUMNS, "offsets"))


def test_to_leaves_out_what_is_not_known():
    moved = collate([sample(5, 3, ("points",))]).to("meta")
    assert moved.residual is None and moved.labels is None and moved.teacher_logits is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a GPU")
def test_pin_memory():
    batch = collate([sample(5, 3)]).pin_memory()
    assert all(getattr(batch, name).is_pinned() for name in (*COLUMNS, "offsets"))
    assert batch.scans == (ScanId("08", 3),)


def test_num_scans_counts_empty_ones():
    assert PackedBatch(torch.zeros(0, 4), torch.tensor([0, 0, 0])).num_scans == 2
    assert PackedBatch(torch.zeros(3, 4), torch.tensor([0, 3])).num_scans == 1


def test_a_batch_does_not_change():
    batch = collate([sample(5, 3)])
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.labels = None
