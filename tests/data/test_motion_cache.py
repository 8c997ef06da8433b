"""The motion cache: what is read equals what was computed, only what lacks is made, nothing stale is read."""

import os
import shutil

import numpy as np
import pytest
import safetensors.numpy
import torch

from kdmos.data.motion_cache import MotionCache, default_cache
from kdmos.data.semantic_kitti import Sequence, find_sequences
from kdmos.errors import InputError
from kdmos.motion import motion_channels
from kdmos.settings import MotionSettings, ResidualGrid

FRAMES = 14


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The scans are small: more threads only get into each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path, write_sequence):
    return write_sequence(tmp_path / "00")


def open_sequence(folder) -> Sequence:
    (sequence,) = find_sequences(folder)
    return sequence


@pytest.fixture
def sequence(folder):
    return open_sequence(folder)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def expected(tmp_path_factory, write_sequence):
    """expected(settings) -> channels of every scan of the sequence, computed at once and only once."""
    sequence = open_sequence(write_sequence(tmp_path_factory.mktemp("whole") / "00"))
    known = {}

    def compute(settings: MotionSettings) -> list[np.ndarray]:
        if settings not in known:
            known[settings] = channels_of(sequence, settings)
        return known[settings]

    return compute


def channels_of(sequence: Sequence, settings: MotionSettings) -> list[np.ndarray]:
    scans = [sequence.read_points(frame) for frame in sequence.frames]
    return motion_channels(
        scans, sequence.poses(), settings.num_channels, settings.lookahead, settings.form, settings.grid
    )


def assert_reads(cache: MotionCache, channels: list[np.ndarray]) -> None:
    assert len(channels) == len(cache.sequence.frames)
    for frame, one in zip(cache.sequence.frames, channels):
        found = cache.read(frame, len(one))
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, one)


def times(cache: MotionCache) -> dict[str, int]:
    return {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(cache.folder)}


# ---- what is stored


@pytest.mark.parametrize(
    ("form", "num_channels"), [("published", 8), ("published", 4), ("published", 10), ("causal", 8), ("causal", 4)]
)
def test_built_and_read_is_what_is_computed_at_once(form, num_channels, sequence, root, expected):
    settings = MotionSettings(form, num_channels)
    cache = MotionCache(root, sequence, settings)
    assert cache.missing() == list(range(FRAMES))
    cache.build()
    assert cache.missing() == []
    assert any(channels.any() for channels in expected(settings))
    assert_reads(cache, expected(settings))
    assert sorted(os.listdir(cache.folder)) == [f"{frame:06d}.safetensors" for frame in range(FRAMES)]


def test_another_grid(sequence, root, expected):
    settings = MotionSettings(num_channels=4, grid=ResidualGrid(90, 60, 30.0, (-3.0, 1.0), 0.5, 0.3, 2.0))
    cache = MotionCache(root, sequence, settings)
    cache.build()
    assert_reads(cache, expected(settings))


def test_the_published_form_equals_the_authors(golden, sequence, root):
    cache = MotionCache(root, sequence, MotionSettings())
    cache.build()
    with np.load(golden("a1_residual.npz")) as data:
        authors = np.split(data["residual"], np.cumsum(data["n_points"])[:-1])
    total, other = 0, 0
    for frame, channels in enumerate(authors):
        # A point within 1e-5 of a cell border may lie in another cell: at most 1e-4 of them.
        other += (cache.read(frame, len(channels)) != channels).sum()
        total += channels.size
    assert other <= 1e-4 * total


@pytest.mark.parametrize("lookahead", [0, 2, 6])
def test_lookahead_masks_on_reading_and_shares_the_folder(lookahead, sequence, root, expected):
    whole = MotionCache(root, sequence, MotionSettings())
    limited = MotionCache(root, sequence, MotionSettings(lookahead=lookahead))
    assert limited.folder == whole.folder
    limited.build()
    assert whole.missing() == []
    assert_reads(whole, expected(MotionSettings()))  # all channels are stored, whoever built them
    assert_reads(limited, expected(MotionSettings(lookahead=lookahead)))
    assert not limited.read(5, len(expected(MotionSettings())[5]))[:, lookahead + 1 :].any()


def test_size_on_disk(sequence, root, expected):
    """A scan of 120 k points takes about 0.1 MB where 2 % of the entries are not 0; these have 4 %."""
    cache = MotionCache(root, sequence, MotionSettings())
    cache.build()
    sizes = [cache.path(frame).stat().st_size for frame in range(FRAMES)]
    share = np.mean([(channels != 0).mean() for channels in expected(MotionSettings())])
    print(f"bytes a scan: {min(sizes)} to {max(sizes)}, {100 * share:.1f} % of the entries are not 0")
    assert max(sizes) < 60_000


def test_points_that_are_not_finite_keep_their_place(folder, root, expected):
    points = np.fromfile(folder / "velodyne/000008.bin", np.float32).reshape(-1, 4)
    broken = np.insert(points, [3, 100], np.float32([[np.nan] * 4, [1, np.inf, 0, 0]]), axis=0)
    broken.tofile(folder / "velodyne/000008.bin")
    cache = MotionCache(root, open_sequence(folder), MotionSettings())
    cache.build()
    found = cache.read(8, len(broken))
    assert not found[[3, 101]].any()
    np.testing.assert_array_equal(np.delete(found, [3, 101], axis=0), expected(MotionSettings())[8])
    np.testing.assert_array_equal(cache.read(7, len(expected(MotionSettings())[7])), expected(MotionSettings())[7])


def test_frame_numbers_with_gaps(folder, root):
    for frame in (2, 6):
        (folder / f"velodyne/{frame:06d}.bin").unlink()
    sequence, settings = open_sequence(folder), MotionSettings(num_channels=4)
    cache = MotionCache(root, sequence, settings)
    cache.build()
    assert not cache.path(2).exists() and cache.path(13).exists()
    assert_reads(cache, channels_of(sequence, settings))


def test_a_sequence_shorter_than_the_windows(tmp_path, root, write_sequence):
    sequence = open_sequence(write_sequence(tmp_path / "short", frames=3))
    cache = MotionCache(root, sequence, MotionSettings())
    cache.build()
    for frame in range(3):
        num_points = len(sequence.read_points(frame))
        np.testing.assert_array_equal(cache.read(frame, num_points), np.zeros((num_points, 8), np.float32))


# ---- building


def test_progress_and_a_second_build_does_nothing(sequence, root):
    cache, calls = MotionCache(root, sequence, MotionSettings(num_channels=4)), []
    cache.build(lambda *call: calls.append(call))
    assert calls == [(done, FRAMES) for done in range(1, FRAMES + 1)]
    before = times(cache)
    MotionCache(root, sequence, MotionSettings(num_channels=4, lookahead=1)).build(lambda *call: calls.append(call))
    assert times(cache) == before and len(calls) == FRAMES


@pytest.mark.parametrize("settings", [MotionSettings(), MotionSettings("causal", 4)], ids=["published", "causal"])
def test_an_interrupted_build_goes_on(settings, sequence, root, expected):
    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    cache = MotionCache(root, sequence, settings)
    with pytest.raises(KeyboardInterrupt):
        cache.build(stop)
    assert cache.missing() == list(range(5, FRAMES))
    before, calls = times(cache), []
    assert len(before) == 5  # and no temporary file
    cache.build(lambda *call: calls.append(call))
    assert calls == [(done, FRAMES - 5) for done in range(1, FRAMES - 4)]
    assert {name: time for name, time in times(cache).items() if name in before} == before
    assert_reads(cache, expected(settings))


@pytest.mark.parametrize(
    "settings", [MotionSettings(num_channels=4), MotionSettings("causal", 4)], ids=lambda s: s.form
)
@pytest.mark.parametrize("deleted", [(0,), (11,), (2, 3, 9), (12, 13)], ids=str)
def test_only_what_is_missing_is_made(deleted, settings, sequence, root, expected, monkeypatch):
    cache = MotionCache(root, sequence, settings)
    cache.build()
    for frame in deleted:
        cache.path(frame).unlink()
    assert cache.missing() == list(deleted)
    before, seen, read = times(cache), [], Sequence.read_points
    monkeypatch.setattr(Sequence, "read_points", lambda self, frame: seen.append(frame) or read(self, frame))
    cache.build()
    monkeypatch.undo()
    assert cache.missing() == []
    after = times(cache)
    assert {name: after[name] for name in before} == before
    assert len(after) == FRAMES
    history = settings.history
    assert min(seen) >= deleted[0] - history and max(seen) <= deleted[-1] + history  # and not the whole sequence
    assert_reads(cache, expected(settings))


def test_foreign_and_temporary_files_are_no_scans(sequence, root):
    cache = MotionCache(root, sequence, MotionSettings(num_channels=4))
    cache.folder.mkdir(parents=True)
    for name in (".000003.safetensors.17.part", "000003.safetensors.bak", "notes.txt"):
        (cache.folder / name).touch()
    assert cache.missing() == list(range(FRAMES))


# ---- what the folder stands for


def shorten(folder):
    path = folder / "velodyne/000004.bin"
    time = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes()[:-16])
    os.utime(path, ns=(time, time))


def touch(folder):
    path = folder / "velodyne/000004.bin"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def move_a_pose(folder):
    lines = (folder / "poses.txt").read_text().splitlines()
    numbers = lines[5].split()
    lines[5] = " ".join([*numbers[:11], str(float(numbers[11]) + 0.01)])
    (folder / "poses.txt").write_text("\n".join(lines))


def turn_the_sensor(folder):
    text = (folder / "calib.txt").read_text()
    rows = [row for row in text.splitlines() if not row.startswith("Tr:")]
    (folder / "calib.txt").write_text("\n".join([*rows, "Tr: 0 -1 0 0 0 0 -1 0 1 0 0 0"]))


def drop_a_scan(folder):
    (folder / "velodyne/000013.bin").unlink()


def rename_a_scan(folder):
    """Frame 13 becomes frame 14, at the same place, from the same file."""
    (folder / "velodyne/000013.bin").rename(folder / "velodyne/000014.bin")
    lines = (folder / "poses.txt").read_text().splitlines()
    (folder / "poses.txt").write_text("\n".join([*lines[:14], lines[13]]))


@pytest.mark.parametrize("change", [shorten, touch, move_a_pose, turn_the_sensor, drop_a_scan, rename_a_scan])
def test_a_changed_sequence_is_another_folder(change, folder, root):
    settings = MotionSettings(num_channels=4)
    old = MotionCache(root, open_sequence(folder), settings)
    old.build()
    change(folder)
    sequence = open_sequence(folder)
    new = MotionCache(root, sequence, settings)
    assert new.folder != old.folder
    assert new.missing() == list(sequence.frames)
    new.build()
    assert_reads(new, channels_of(sequence, settings))
    assert len(os.listdir(old.folder)) == FRAMES  # left alone


def test_other_settings_are_another_folder(sequence, root):
    settings = [
        MotionSettings(),
        MotionSettings("causal"),
        MotionSettings(num_channels=4),
        MotionSettings("causal", 4),
        MotionSettings(grid=ResidualGrid(rows=180)),
        MotionSettings(grid=ResidualGrid(columns=240)),
        MotionSettings(grid=ResidualGrid(max_range=50.0)),
        MotionSettings(grid=ResidualGrid(z=(-4.0, 1.0))),
        MotionSettings(grid=ResidualGrid(min_ratio=0.3)),
        MotionSettings(grid=ResidualGrid(min_height=0.3)),
        MotionSettings(grid=ResidualGrid(max_height=3.0)),
    ]
    folders = {MotionCache(root, sequence, one).folder for one in settings}
    assert len(folders) == len(settings)
    assert all(folder.parent == root and folder.name.startswith("00-") for folder in folders)


def test_what_does_not_matter_is_the_same_folder(folder, root, tmp_path):
    old = MotionCache(root, open_sequence(folder), MotionSettings())
    os.utime(folder / "poses.txt", (0, 0))
    shutil.rmtree(folder / "labels")
    (tmp_path / "elsewhere").mkdir()
    moved = folder.rename(tmp_path / "elsewhere" / "00")
    assert MotionCache(root, open_sequence(moved), MotionSettings()).folder == old.folder


def test_default_folder(sequence, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache() == tmp_path / "xdg" / "kdmos" / "motion"
    assert MotionCache(None, sequence, MotionSettings()).folder.parent == default_cache()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "kdmos" / "motion"


# ---- faults


@pytest.fixture
def built(sequence, root):
    cache = MotionCache(root, sequence, MotionSettings(num_channels=4))
    cache.build()
    return cache


def refused(cache: MotionCache, num_points: int) -> str:
    with pytest.raises(InputError) as raised:
        cache.read(6, num_points)
    message = str(raised.value)
    assert message.startswith(f"{cache.path(6)}: ") and f"delete {cache.folder}" in message
    return message


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_cut_short(keep, built, expected):
    num_points = len(expected(built.settings)[6])
    built.path(6).write_bytes(built.path(6).read_bytes()[:keep])
    assert "damaged motion cache" in refused(built, num_points)
    built.path(6).write_bytes(b"hello, this is no safetensors file at all")
    assert "damaged motion cache" in refused(built, num_points)


def test_missing(built, expected):
    built.path(6).unlink()
    assert "No such file" in refused(built, len(expected(built.settings)[6]))


def test_scan_of_another_length(built, expected):
    num_points = len(expected(built.settings)[6])
    message = f"motion cache of {num_points} points, the scan has {num_points + 1}"
    assert message in refused(built, num_points + 1)


def test_other_tensors(built, expected):
    num_points = len(expected(built.settings)[6])
    built.path(6).write_bytes(safetensors.numpy.save({"weight": np.zeros(3)}, {"num_points": str(num_points)}))
    assert "damaged motion cache" in refused(built, num_points)


DAMAGE = {
    "no header": lambda tensors, header: (tensors, None),
    "another header": lambda tensors, header: (tensors, {"points": "3"}),
    "a value too few": lambda tensors, header: ({**tensors, "value": tensors["value"][:-1]}, header),
    "a flipped channel bit": lambda tensors, header: ({**tensors, "channel": tensors["channel"] ^ 128}, header),
    "a point too few": lambda tensors, header: ({**tensors, "point": tensors["point"][:-1]}, header),
    "a point that is none": lambda tensors, header: ({**tensors, "point": tensors["point"] + 2**30}, header),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_inside(damage, built, expected):
    num_points = len(expected(built.settings)[6])
    tensors, header = damage(safetensors.numpy.load_file(built.path(6)), {"num_points": str(num_points)})
    built.path(6).write_bytes(safetensors.numpy.save(tensors, header))
    assert "damaged motion cache" in refused(built, num_points)


def test_a_scan_that_cannot_be_read_is_named_and_what_is_done_stays(folder, root, expected):
    path = folder / "velodyne/000009.bin"
    path.write_bytes(path.read_bytes()[:-4])
    cache = MotionCache(root, open_sequence(folder), MotionSettings())
    with pytest.raises(InputError, match=r"000009\.bin: the scan is truncated"):
        cache.build()
    assert cache.missing() == list(range(2, FRAMES))  # the last one that needs no scan after 8 is 1
    for frame in (0, 1):
        channels = expected(MotionSettings())[frame]
        np.testing.assert_array_equal(cache.read(frame, len(channels)), channels)


def test_without_poses(folder, root):
    (folder / "poses.txt").unlink()
    with pytest.raises(InputError, match=r"poses\.txt: the poses file does not exist"):
        MotionCache(root, open_sequence(folder), MotionSettings())


def test_a_cache_that_cannot_be_written(sequence, root):
    root.write_text("a file, no folder")
    cache = MotionCache(root, sequence, MotionSettings())
    with pytest.raises(InputError, match=r"000000\.safetensors: cannot be written: "):
        cache.build()
