"""What training reads, and in which order: items in step with their points, epochs that resume at the very batch."""

import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdmos.data.batch import ScanId
from kdmos.data.dataset import EpochOrder, MosDataset, ResumableLoader, step_seed
from kdmos.data.labels import CLASSES, RAW_IDS
from kdmos.data.motion_cache import MotionCache
from kdmos.data.semantic_kitti import find_sequences
from kdmos.data.teacher_logits import TeacherLogits
from kdmos.errors import InputError
from kdmos.motion import motion_channels
from kdmos.settings import MotionSettings

FRAMES = 10
MOTION = MotionSettings(num_channels=4)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The scans are small: more threads only get into each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def open_dataset(folder, root, teacher=None, classes=CLASSES[4], motion=MOTION, frames=None) -> MosDataset:
    """The scans of one bare sequence folder, its motion cache below `root`."""
    (sequence,) = find_sequences(folder)
    cache = MotionCache(root, sequence, motion)
    cache.build()
    scans = [(sequence, frame) for frame in frames or sequence.frames]
    return MosDataset(scans, classes, {sequence.name: cache}, teacher)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, write_sequence):
    """A dataset that no test changes."""
    folder = tmp_path_factory.mktemp("whole")
    return open_dataset(write_sequence(folder / "00", FRAMES), folder / "cache")


@pytest.fixture
def folder(tmp_path, write_sequence):
    return write_sequence(tmp_path / "00", FRAMES)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


def write_logits(store: TeacherLogits, dataset: MosDataset, num_classes: int = 4) -> None:
    """Logits that say which point they belong to; float16 holds each number exactly."""
    for sequence, frame in dataset.scans:
        row = np.arange(len(sequence.read_points(frame)))
        logits = np.stack([row % 100, row // 100, np.full(len(row), frame), -row % 7], 1)[:, :num_classes]
        store.write(sequence.scan(frame), sequence.points_path(frame), logits, {})


# ---- items


def test_items_are_the_files(whole):
    assert len(whole) == FRAMES
    sequence, _ = whole.scans[0]
    scans = [sequence.read_points(frame) for frame in sequence.frames]
    channels = motion_channels(scans, sequence.poses(), num_channels=4)
    index = {raw: CLASSES[4].index(name) for name, ids in RAW_IDS.items() for raw in ids}
    for frame in (0, 4, 9):
        item = whole[frame]
        assert set(item) == {"scan", "points", "residual", "labels"}
        assert item["scan"] == ScanId("00", frame)
        np.testing.assert_array_equal(item["points"], scans[frame])
        np.testing.assert_array_equal(item["residual"], channels[frame])
        raw = np.fromfile(sequence.labels_path(frame), np.uint32) & 0xFFFF
        np.testing.assert_array_equal(item["labels"], [index[one] for one in raw])
        dtypes = (item["points"].dtype, item["residual"].dtype, item["labels"].dtype)
        assert dtypes == (np.float32, np.float32, np.uint8)


def test_the_models_classes(whole):
    two = MosDataset(whole.scans, CLASSES[2], whole.caches)
    four, two = whole[5]["labels"], two[5]["labels"]
    expected = np.array([255, 0, 0, 1])[four]  # unlabeled: no class; static, movable: static; moving
    np.testing.assert_array_equal(two, expected)


def test_the_scan_is_known_by_its_frame_not_its_place(whole):
    sequence, _ = whole.scans[0]
    some = MosDataset([(sequence, 7), (sequence, 2)], CLASSES[4], whole.caches)
    assert [some[i]["scan"] for i in range(len(some))] == [ScanId("00", 7), ScanId("00", 2)]
    for name in ("points", "residual", "labels"):
        np.testing.assert_array_equal(some[0][name], whole[7][name])


def test_sequences_have_their_own_caches(folder, root, tmp_path):
    other = tmp_path / "01"
    shutil.copytree(folder, other)
    (other / "poses.txt").write_text("1 0 0 0 0 1 0 0 0 0 1 0\n" * FRAMES)  # a sensor that stands still
    one, two = open_dataset(folder, root), open_dataset(other, root)
    both = MosDataset([one.scans[5], two.scans[5]], CLASSES[4], {**one.caches, **two.caches})
    assert [both[i]["scan"] for i in (0, 1)] == [ScanId("00", 5), ScanId("01", 5)]
    np.testing.assert_array_equal(both[0]["residual"], one[5]["residual"])
    np.testing.assert_array_equal(both[1]["residual"], two[5]["residual"])
    assert not np.array_equal(both[0]["residual"], both[1]["residual"])


def test_teacher_logits(whole, tmp_path):
    store = TeacherLogits(tmp_path / "logits", "oracle")
    write_logits(store, whole)
    taught = MosDataset(whole.scans, CLASSES[4], whole.caches, store)
    item = taught[6]
    row = np.arange(len(item["points"]))
    assert item["teacher_logits"].dtype == np.float16
    np.testing.assert_array_equal(
        item["teacher_logits"], np.stack([row % 100, row // 100, np.full(len(row), 6), -row % 7], 1)
    )
    for name in ("points", "residual", "labels"):
        np.testing.assert_array_equal(item[name], whole[6][name])


def test_points_that_are_not_finite_are_left_out_of_every_column(folder, root, tmp_path):
    path = folder / "velodyne/000004.bin"
    points = np.fromfile(path, np.float32).reshape(-1, 4)
    points[3, 0], points[17, 2], points[500, 3], points[-1] = np.nan, np.inf, -np.inf, np.nan
    points.tofile(path)
    finite = np.delete(np.arange(len(points)), [3, 17, 500, len(points) - 1])
    dataset = open_dataset(folder, root, TeacherLogits(tmp_path / "logits", "oracle"))
    write_logits(dataset.teacher, dataset)
    item = dataset[4]
    assert {len(item[name]) for name in item if name != "scan"} == {len(finite)}
    assert item["scan"] == ScanId("00", 4)
    np.testing.assert_array_equal(item["points"], points[finite])
    (cache,), (sequence, frame) = dataset.caches.values(), dataset.scans[4]
    np.testing.assert_array_equal(item["residual"], cache.read(frame, len(points))[finite])
    logits = item["teacher_logits"].astype(int)
    np.testing.assert_array_equal(logits[:, 0] + 100 * logits[:, 1], finite)  # each logit is its own point's
    raw = sequence.read_labels(frame, len(points))[finite] & 0xFFFF
    np.testing.assert_array_equal(item["labels"] == 3, np.isin(raw, RAW_IDS["moving"]))


# ---- faults


def cut_scan(folder, dataset):
    path = folder / "velodyne/000004.bin"
    path.write_bytes(path.read_bytes()[:-4])


def delete_scan(folder, dataset):
    (folder / "velodyne/000004.bin").unlink()


def shorten_labels(folder, dataset):
    path = folder / "labels/000004.label"
    path.write_bytes(path.read_bytes()[:-4])


def delete_labels(folder, dataset):
    (folder / "labels/000004.label").unlink()


def unknown_label(folder, dataset):
    path = folder / "labels/000004.label"
    raw = np.fromfile(path, np.uint32)
    raw[5] = 7 << 16 | 77
    raw.tofile(path)


def delete_channels(folder, dataset):
    next(iter(dataset.caches.values())).path(4).unlink()


def cut_channels(folder, dataset):
    path = next(iter(dataset.caches.values())).path(4)
    path.write_bytes(path.read_bytes()[:-4])


def delete_logits(folder, dataset):
    dataset.teacher.path(ScanId("00", 4)).unlink()


def swap_logits(folder, dataset):
    shutil.copy(dataset.teacher.path(ScanId("00", 5)), dataset.teacher.path(ScanId("00", 4)))


def logits_of_two_classes(folder, dataset):
    write_logits(dataset.teacher, dataset, num_classes=2)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (cut_scan, r"velodyne/000004\.bin: the scan is truncated"),
        (delete_scan, r"velodyne/000004\.bin: the scan file does not exist"),
        (shorten_labels, r"labels/000004\.label: the label file has \d+ labels, but its scan has \d+ points"),
        (delete_labels, r"labels/000004\.label: the label file does not exist"),
        (unknown_label, r"labels/000004\.label: 1 of \d+ labels have an unknown raw id \(77\)"),
        (delete_channels, r"cache/00-published-\w+/000004\.safetensors: .*No such file"),
        (cut_channels, r"cache/00-published-\w+/000004\.safetensors: damaged"),
        (delete_logits, r"logits/oracle/00/000004\.safetensors: no logits of teacher 'oracle' for scan 00/000004"),
        (swap_logits, r"logits/oracle/00/000004\.safetensors: logits of \d+ points, the scan has \d+"),
        (logits_of_two_classes, r"logits/oracle/00/000004\.safetensors: the teacher has 2 classes, the student 4"),
    ],
)
def test_errors_name_the_file(spoil, match, folder, root, tmp_path):
    dataset = open_dataset(folder, root, TeacherLogits(tmp_path / "logits", "oracle"), frames=(3, 4, 5))
    write_logits(dataset.teacher, dataset)
    spoil(folder, dataset)
    with pytest.raises(InputError, match=match):
        dataset[1]


def test_a_scan_that_changed_after_the_cache_was_built(folder, root):
    dataset = open_dataset(folder, root)
    for name, suffix, size in (("velodyne", "bin", 16), ("labels", "label", 4)):
        path = folder / name / f"000004.{suffix}"
        path.write_bytes(path.read_bytes()[:-size])
    with pytest.raises(InputError, match=r"000004\.safetensors: motion cache of \d+ points, the scan has \d+"):
        dataset[4]


def test_logits_of_a_changed_scan(folder, root, tmp_path):
    dataset = open_dataset(folder, root, TeacherLogits(tmp_path / "logits", "oracle"))
    write_logits(dataset.teacher, dataset)
    points = np.fromfile(folder / "velodyne/000004.bin", np.float32)
    points[0] += 1
    points.tofile(folder / "velodyne/000004.bin")
    with pytest.raises(InputError, match=r"oracle/00/000004\.safetensors: logits of another scan"):
        dataset[4]


# ---- the order of an epoch


def flat(order: EpochOrder) -> list[int]:
    return [index for batch in order for index in batch]


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed: int, epoch: int) -> list[int]:
        made = EpochOrder(50, 4, seed, shuffle=True)
        made.set_epoch(epoch)
        return flat(made)

    assert order(0, 3) == order(0, 3)
    orders = {tuple(order(seed, epoch)) for seed in range(4) for epoch in range(5)}
    assert len(orders) == 4 * 5
    made = EpochOrder(50, 4, 0, shuffle=True)
    epochs = []
    for epoch in (3, 0, 3):  # whatever came before
        np.random.seed(epoch)
        made.set_epoch(epoch)
        epochs.append(flat(made))
    assert epochs == [order(0, 3), order(0, 0), order(0, 3)]
    assert list(made) == list(made)  # read twice, the same


@given(
    length=st.integers(1, 60),
    batch_size=st.integers(1, 9),
    world=st.integers(1, 4),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 200),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_every_scan_once_in_whole_batches(length, batch_size, world, seed, epoch):
    for shuffle in (True, False):
        orders = [EpochOrder(length, batch_size, seed, shuffle, rank, world) for rank in range(world)]
        for order in orders:
            order.set_epoch(epoch)
            batches = list(order)
            assert len(order) == len(batches)
            sizes = [len(batch) for batch in batches]
            assert all(size == batch_size for size in sizes[:-1])
            assert not sizes or 0 < sizes[-1] <= batch_size  # a last, smaller batch is kept
        parts = [flat(order) for order in orders]
        together = sorted(index for part in parts for index in part)
        if shuffle:
            assert {len(part) for part in parts} == {math.ceil(length / world)}
            assert set(together) == set(range(length))
            assert len(together) - length < world  # repeated only to make the parts equal
        else:
            assert together == list(range(length))  # no repeats: a scan must not be scored twice
            assert all(part == sorted(part) for part in parts)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_scans(world):
    parts = [EpochOrder(12, 4, 0, True, rank, world) for rank in range(world)]
    parts = [flat(order) for order in parts]
    assert {len(part) for part in parts} == {12 // world}
    assert sorted(index for part in parts for index in part) == list(range(12))
    alone = flat(EpochOrder(12, 4, 0, True))
    assert all(part == alone[rank::world] for rank, part in enumerate(parts))  # one order, dealt out


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (0, 2), (1, 2), (2, 3)])
def test_resumed_order_is_the_tail_and_only_in_its_epoch(rank, world):
    def order() -> EpochOrder:
        return EpochOrder(31, 4, 0, True, rank, world)

    whole, resumed = order(), order()
    resumed.resumed = (2, 2)
    for epoch in (2, 3, 1, 2):
        whole.set_epoch(epoch)
        resumed.set_epoch(epoch)
        assert list(resumed) == list(whole)[2 if epoch == 2 else 0 :]
        assert resumed.done == (2 if epoch == 2 else 0)
        assert len(resumed) == len(whole)  # of the whole epoch: the learning rate counts by it


def test_resumed_at_the_end_of_its_epoch():
    order = EpochOrder(10, 3, 0, True)
    order.resumed = (0, 4)
    assert list(order) == []
    order.set_epoch(1)
    assert len(flat(order)) == 10


def test_no_scan():
    for world in (1, 2):
        assert list(EpochOrder(0, 4, 0, True, 0, world)) == list(EpochOrder(0, 4, 0, False, 0, world)) == []


def test_lightning_finds_set_epoch():
    order = EpochOrder(10, 3, 0, True)
    order.sampler.set_epoch(4)
    assert order.epoch == 4


# ---- the loader

WORKERS = pytest.mark.parametrize("workers", [0, 2])


def make_loader(dataset: MosDataset, workers: int, seed: int = 0) -> ResumableLoader:
    return ResumableLoader(dataset, EpochOrder(len(dataset), 3, seed, shuffle=True), workers)


def frames(batches) -> list[list[int]]:
    return [[scan.frame for scan in batch.scans] for batch in batches]


@WORKERS
def test_batches_are_the_items_in_order(workers, whole):
    loader = make_loader(whole, workers)
    assert len(loader) == 4
    for epoch in (0, 1):  # workers live on from epoch to epoch
        loader.order.set_epoch(epoch)
        batches = list(loader)
        assert frames(batches) == list(loader.order)
        for batch in batches:
            items = [whole[scan.frame] for scan in batch.scans]
            np.testing.assert_array_equal(batch.points, np.concatenate([item["points"] for item in items]))
            np.testing.assert_array_equal(batch.labels, np.concatenate([item["labels"] for item in items]))
            np.testing.assert_array_equal(batch.residual, np.concatenate([item["residual"] for item in items]))


@WORKERS
@pytest.mark.parametrize("k", [0, 1, 3, 4])
def test_resumed_loader_yields_exactly_the_rest(k, workers, whole):
    epochs = []
    for epoch in (0, 1, 2):
        order = EpochOrder(len(whole), 3, 0, shuffle=True)
        order.set_epoch(epoch)
        epochs.append(list(order))

    first = make_loader(whole, workers)
    first.order.set_epoch(1)
    batches = iter(first)
    done = frames(next(batches) for _ in range(k))
    state = first.state_dict()  # the workers have read ahead of it
    batches.close()
    assert done == epochs[1][:k]
    assert state == {"epoch": 1, "handed_out": k}

    second = make_loader(whole, workers)
    second.load_state_dict(state)
    second.order.set_epoch(1)
    assert frames(second) == epochs[1][k:]
    assert second.state_dict() == {"epoch": 1, "handed_out": 4}  # counted from the epoch's begin
    second.order.set_epoch(2)
    assert frames(second) == epochs[2]  # the next one is whole
    assert second.state_dict() == {"epoch": 2, "handed_out": 4}


def test_resumed_twice(whole):
    order = EpochOrder(len(whole), 3, 0, shuffle=True)
    state = {"epoch": 0, "handed_out": 0}
    for done in range(4):
        loader = make_loader(whole, 0)
        loader.load_state_dict(state)
        batches = iter(loader)
        assert frames([next(batches)]) == [list(order)[done]]
        state = loader.state_dict()
        assert state == {"epoch": 0, "handed_out": done + 1}


def test_state_is_plain_numbers(whole):
    """It goes into a checkpoint that is read without executing anything."""
    assert all(type(value) is int for value in make_loader(whole, 0).state_dict().values())


@pytest.mark.parametrize(
    "workers",
    [0, 2],
)
def test_errors_come_through_the_loader(workers, folder, root):
    dataset = open_dataset(folder, root)
    delete_labels(folder, dataset)
    loader = make_loader(dataset, workers)
    with pytest.raises(InputError) as raised:
        list(loader)
    if loader._iterator is not None:  # at once: left to the garbage collector, torch waits 5 s for each worker
        loader._iterator._shutdown_workers()
    assert str(raised.value).startswith(f"{folder}/labels/000004.label: the label file does not exist")


# ---- the network's randomness


def test_step_seeds_are_distinct_and_repeat():
    places = [(s, e, b, r) for s in range(3) for e in range(6) for b in range(12) for r in range(3)]
    seeds = [step_seed(*place) for place in places]
    assert len(set(seeds)) == len(places)
    assert seeds == [step_seed(*place) for place in places]
    assert all(type(seed) is int and 0 <= seed < 2**63 for seed in seeds)
    assert step_seed(3, 2, 1) == step_seed(3, 2, 1, rank=0)


def test_step_seed_gives_the_same_numbers():
    def draw(*place: int) -> list[float]:
        torch.manual_seed(step_seed(*place))
        return torch.rand(4).tolist()

    first = draw(0, 1, 2)
    torch.rand(3)
    assert draw(0, 1, 2) == first != draw(0, 2, 1)
