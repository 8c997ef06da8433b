"""The teacher-logit store: what is written comes back, and nothing that belongs to another scan does."""

import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from kdmos.data.batch import ScanId
from kdmos.data.teacher_logits import TeacherLogits
from kdmos.errors import InputError

SCAN = ScanId("08", 123)
SETTINGS = {"grid": 0.09, "scans": 8, "seed": 0}


@pytest.fixture
def points():
    return np.random.default_rng(0).random((50, 4), dtype=np.float32)


@pytest.fixture
def logits():
    return np.random.default_rng(1).normal(size=(50, 4)).astype(np.float32)


@pytest.fixture
def scan_path(tmp_path, points):
    path = tmp_path / "000123.bin"
    points.tofile(path)
    return path


@pytest.fixture
def store(tmp_path):
    return TeacherLogits(tmp_path / "logits", "mambamos")


def test_one_file_a_scan_comes_back_in_float16(store, scan_path, logits, tmp_path):
    path = store.write(SCAN, scan_path, logits, SETTINGS)
    assert path == store.path(SCAN) == tmp_path / "logits/mambamos/08/000123.safetensors"
    found = store.read(SCAN, scan_path, 50, 4)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, logits.astype(np.float16))
    assert os.listdir(path.parent) == [path.name]  # no temporary file is left


def test_layout_in_memory_does_not_matter(store, scan_path, logits):
    store.write(SCAN, scan_path, np.asfortranarray(logits), SETTINGS)
    np.testing.assert_array_equal(store.read(SCAN, scan_path, 50, 4), logits.astype(np.float16))


def test_header_tells_where_the_logits_come_from(store, scan_path, logits):
    store.write(SCAN, scan_path, logits, SETTINGS)
    header = store.verify(SCAN, scan_path)
    assert header["settings"] == SETTINGS
    assert (header["teacher"], header["scan"]) == ("mambamos", "08/000123")
    assert (header["format_version"], header["num_points"], header["num_classes"]) == (1, 50, 4)


def test_scan_content_at_hand_spares_the_second_read(store, scan_path, points, logits):
    store.write(SCAN, scan_path, logits, SETTINGS)
    content = scan_path.read_bytes()
    scan_path.unlink()
    for scan_bytes in (points, content):
        assert store.read(SCAN, scan_path, 50, 4, scan_bytes=scan_bytes).shape == (50, 4)
    with pytest.raises(InputError, match="logits of another scan"):
        store.read(SCAN, scan_path, 50, 4, scan_bytes=points + 1)


def test_missing(store, scan_path):
    with pytest.raises(InputError, match=r"000123\.safetensors: no logits of teacher 'mambamos' for scan 08/000123"):
        store.read(SCAN, scan_path, 50, 4)


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_cut_short(store, scan_path, logits, keep):
    path = store.write(SCAN, scan_path, logits, SETTINGS)
    path.write_bytes(path.read_bytes()[:keep])
    for check in (lambda: store.read(SCAN, scan_path, 50, 4), lambda: store.verify(SCAN, scan_path)):
        with pytest.raises(InputError, match=r"000123\.safetensors: cut short or no file of teacher logits"):
            check()


def test_not_our_file(store, scan_path, logits):
    path = store.write(SCAN, scan_path, logits, SETTINGS)
    path.write_bytes(b"hello, this is no safetensors file at all")
    with pytest.raises(InputError, match="no file of teacher logits"):
        store.verify(SCAN, scan_path)
    save_file({"weight": logits}, path)
    with pytest.raises(InputError, match="no file of teacher logits"):
        store.verify(SCAN, scan_path)
    save_file({"logits": logits}, path)
    with pytest.raises(InputError, match=r"not a file of teacher logits \(header: 'format_version'\)"):
        store.verify(SCAN, scan_path)


def rewrite(store, scan_path, payload, **changed):
    """Another payload under the stored header, or other header entries."""
    header = {k: str(v) for k, v in store.verify(SCAN, scan_path).items()} | {"settings": "{}"}
    save_file({"logits": payload}, store.path(SCAN), header | changed)


def test_bad_header(store, scan_path, logits):
    store.write(SCAN, scan_path, logits, SETTINGS)
    header = {"num_points": "many"}, {"settings": "{"}, {"format_version": "2"}, {"teacher": "other"}
    matches = "header: .*many", "header: ", "format version 2, expected 1", "teacher 'other', expected 'mambamos'"
    for changed, match in zip(header, matches):
        rewrite(store, scan_path, logits.astype(np.float16), **changed)
        with pytest.raises(InputError, match=match):
            store.read(SCAN, scan_path, 50, 4)
        store.write(SCAN, scan_path, logits, SETTINGS)


def test_payload_that_does_not_match_its_header(store, scan_path, logits):
    store.write(SCAN, scan_path, logits, SETTINGS)
    rewrite(store, scan_path, logits)
    with pytest.raises(InputError, match=r"header says float16 \[50, 4\], the logits are float32 \[50, 4\]"):
        store.read(SCAN, scan_path, 50, 4)
    store.write(SCAN, scan_path, logits, SETTINGS)
    rewrite(store, scan_path, logits[:49].astype(np.float16))
    with pytest.raises(InputError, match=r"the logits are float16 \[49, 4\]"):
        store.read(SCAN, scan_path, 50, 4)


def test_one_flipped_bit_is_found(store, scan_path, logits):
    path = store.write(SCAN, scan_path, logits, SETTINGS)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"000123\.safetensors: damaged: the logits do not match their checksum"):
        store.read(SCAN, scan_path, 50, 4)


def test_other_length_class_count_and_scan(store, scan_path, points, logits):
    store.write(SCAN, scan_path, logits, SETTINGS)
    with pytest.raises(InputError, match="logits of 50 points, the scan has 51"):
        store.read(SCAN, scan_path, 51, 4)
    with pytest.raises(InputError, match="the teacher has 4 classes, the student 2"):
        store.read(SCAN, scan_path, 50, 2)
    points[0, 0] += 1  # the same length, another content
    points.tofile(scan_path)
    for check in (lambda: store.read(SCAN, scan_path, 50, 4), lambda: store.verify(SCAN, scan_path)):
        with pytest.raises(InputError, match=r"logits of another scan: .*000123\.bin is not .* named 08/000123"):
            check()
    scan_path.unlink()
    with pytest.raises(InputError, match=r"000123\.bin: the scan cannot be read: No such file"):
        store.read(SCAN, scan_path, 50, 4)


def test_logits_that_cannot_be_stored(store, scan_path, logits):
    for wrong in (logits[:49], logits[0], logits[None]):
        with pytest.raises(InputError, match=r"expected logits \[50, classes\], one row for each point"):
            store.write(SCAN, scan_path, wrong, SETTINGS)
    for value in (np.nan, np.inf, 1e5):  # 1e5 is past float16's 65504
        logits[3, 1] = value
        with pytest.raises(InputError, match="teacher 'mambamos' gave logits that are not finite in float16"):
            store.write(SCAN, scan_path, logits, SETTINGS)
    assert not store.path(SCAN).exists()


def test_a_failed_write_keeps_the_old_file_and_leaves_no_rest(store, scan_path, logits, monkeypatch):
    path = store.write(SCAN, scan_path, logits, SETTINGS)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kdmos.checkpoint.os.replace", full)
    with pytest.raises(InputError, match=r"000123\.safetensors: cannot be written: No space left"):
        store.write(SCAN, scan_path, logits + 1, SETTINGS)
    assert os.listdir(path.parent) == [path.name]
    np.testing.assert_array_equal(store.read(SCAN, scan_path, 50, 4), logits.astype(np.float16))


def test_a_folder_that_cannot_be_made(tmp_path, scan_path, logits):
    with pytest.raises(InputError, match="cannot be written: Not a directory"):
        TeacherLogits(scan_path, "mambamos").write(SCAN, scan_path, logits, SETTINGS)
