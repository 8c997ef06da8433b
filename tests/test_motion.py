"""Motion channels: the authors' own, both forms against a plain loop, what they may look at, and the stream."""

import math

import numpy as np
import pytest
import torch

from kdmos.motion import MotionStream, motion_channels, moving_by_rule
from kdmos.settings import MotionSettings, ResidualGrid

COARSE = ResidualGrid(rows=10, columns=12)


@pytest.fixture(scope="module")
def sequence(golden):
    """The 14 scans of the golden sequence, their LiDAR poses, the authors' channels."""
    with np.load(golden("a1_residual.npz")) as file:
        splits = np.cumsum(file["n_points"])[:-1]
        return np.split(file["scans"], splits), file["velo_poses"], np.split(file["residual"], splits)


def drive(num_scans, num_points=50, seed=0):
    """A sensor that moves and turns, in a cloud so dense for COARSE that things come and go all the time."""
    rng = np.random.default_rng(seed)
    scans, poses = [], []
    for f in range(num_scans):
        scans.append(rng.uniform((-30, -30, -3, 0), (30, 30, 1, 1), (num_points + f % 3, 4)).astype(np.float32))
        yaw = 0.1 * f
        pose = np.eye(4)
        pose[:2, :2] = [[math.cos(yaw), -math.sin(yaw)], [math.sin(yaw), math.cos(yaw)]]
        pose[:3, 3] = (1000 + 1.5 * f, -500 + 0.3 * f, 0.02 * f)
        poses.append(pose)
    return scans, np.stack(poses)


def cells_of(points, transform, grid):
    """Residual cell of each point or None, and its height, in the frame of the transform."""
    moved = (points[:, :3].astype(np.float64) @ transform[:3, :3].T + transform[:3, 3]).astype(np.float32)
    cells = []
    for x, y, z in moved:
        distance = np.sqrt(x * x + y * y + z * z)
        if not (0 < distance < grid.max_range and grid.z[0] < z < grid.z[1]):
            cells.append(None)
            continue
        row = math.floor(np.float32(0.5) * (np.arctan2(y, x) / np.float32(math.pi) + np.float32(1)) * grid.rows)
        column = math.floor((np.float32(1) - distance / np.float32(grid.max_range)) * np.float32(grid.columns))
        cells.append((min(max(row, 0), grid.rows - 1), min(max(column, 0), grid.columns - 1)))
    return cells, moved[:, 2]


def step_by_hand(scans, poses, t, newer, older, read, grid):
    """The differences at the points of scan `read`, in the frame of scan t; windows are lists of scans."""
    placed = {f: cells_of(scans[f], np.linalg.inv(poses[t]) @ poses[f], grid) for f in {*newer, *older, read}}

    def heights(window):
        seen = {}
        for f in window:
            for cell, z in zip(*placed[f]):
                if cell is not None:
                    low, high = seen.get(cell, (z, z))
                    seen[cell] = (min(low, z), max(high, z))
        return {cell: high - low for cell, (low, high) in seen.items() if high > low}

    new, old = heights(newer), heights(older)
    first, second = (new, old) if read in newer else (old, new)
    values = []
    for cell in placed[read][0]:
        extent, other = first.get(cell, np.float32(0)), second.get(cell, np.float32(0))
        visible = cell is not None and any((cell[0], column) in second for column in range(cell[1] + 1))
        kept = visible and np.float32(0.2) * extent >= other and np.float32(0.4) <= extent <= 4
        values.append(extent - other if kept else 0.0)
    return np.array(values, np.float32)


def channels_by_hand(scans, poses, num_channels, form, grid):
    """Both forms as their definitions say, one channel of one scan at a time."""
    half, out = num_channels // 2, []
    for f, points in enumerate(scans):
        channels = np.zeros((len(points), num_channels), np.float32)
        for k in range(num_channels):
            if form == "published":
                t = f + k
                if num_channels - 1 <= t < len(scans):
                    newer, older = range(t - half + 1, t + 1), range(t - 2 * half + 1, t - half + 1)
                    channels[:, k] = step_by_hand(scans, poses, t, newer, older, f, grid)
            elif f >= num_channels - 1 + k:
                newer, older = range(f - half + 1, f + 1), range(f - 2 * half + 1 - k, f - half - k + 1)
                channels[:, k] = step_by_hand(scans, poses, f, newer, older, f, grid)
        out.append(channels)
    return out


def test_equals_the_authors(sequence):
    scans, poses, expected = sequence
    channels = motion_channels(scans, poses)
    assert [c.shape for c in channels] == [(len(scan), 8) for scan in scans]
    assert all(c.dtype == np.float32 for c in channels)
    channels, expected = np.concatenate(channels), np.concatenate(expected)
    assert np.mean(channels == expected) >= 0.9999
    # Only 4 % of the entries are not zero; they must agree by themselves too.
    occupied = (channels != 0) | (expected != 0)
    assert occupied.mean() > 0.03
    assert np.mean(channels[occupied] == expected[occupied]) >= 0.9999


@pytest.mark.parametrize("lookahead", [0, 1, 3, 4, 6])
def test_lookahead_masks_the_authors_channels(sequence, lookahead):
    scans, poses, expected = (part[:11] for part in sequence)
    channels = motion_channels(scans, poses, lookahead=lookahead)
    for f, (ours, theirs) in enumerate(zip(channels, expected)):
        alive = np.array([k <= lookahead and f + k < 11 for k in range(8)])
        assert np.mean(ours == theirs * alive) >= 0.9999


@pytest.mark.parametrize("form", ["published", "causal"])
@pytest.mark.parametrize(("num_channels", "num_scans"), [(2, 6), (4, 13), (8, 18)])
def test_equals_the_definition(num_channels, num_scans, form):
    scans, poses = drive(num_scans)
    channels = motion_channels(scans, poses, num_channels, form=form, grid=COARSE)
    expected = channels_by_hand(scans, poses, num_channels, form, COARSE)
    for ours, by_hand in zip(channels, expected):
        np.testing.assert_array_equal(ours, by_hand)
    share = np.concatenate(expected).astype(bool).mean(0)
    assert (share > 0.002).all()  # every channel has something to say


@pytest.mark.parametrize("num_channels", [4, 8])
def test_every_lookahead_is_a_mask(num_channels):
    scans, poses = drive(2 * num_channels + 2)
    full = motion_channels(scans, poses, num_channels, grid=COARSE)
    for lookahead in range(num_channels):
        masked = motion_channels(scans, poses, num_channels, lookahead, grid=COARSE)
        for ours, channels in zip(masked, full):
            np.testing.assert_array_equal(ours[:, : lookahead + 1], channels[:, : lookahead + 1])
            assert not ours[:, lookahead + 1 :].any()


@pytest.mark.parametrize(
    ("form", "num_channels", "lookahead"),
    [("causal", 4, 0), ("causal", 8, 0), ("published", 4, 0), ("published", 4, 2), ("published", 8, 7)],
)
def test_uses_no_scan_after_its_lookahead(form, num_channels, lookahead):
    scans, poses = drive(20)
    other_scans, other_poses = drive(20, seed=1)
    other_poses[:, 2, 3] += 0.5
    expected = motion_channels(scans, poses, num_channels, lookahead, form, COARSE)
    for f in (7, 12, 16):
        seen = f + lookahead + 1
        mixed = motion_channels(
            scans[:seen] + other_scans[seen:],
            np.concatenate([poses[:seen], other_poses[seen:]]),
            num_channels,
            lookahead,
            form,
            COARSE,
        )
        np.testing.assert_array_equal(mixed[f], expected[f])
        if form == "published" and lookahead and seen < 20:
            assert any((a != b).any() for a, b in zip(mixed[f + 1 : seen], expected[f + 1 : seen]))


@pytest.mark.parametrize(("form", "history"), [("published", 3), ("causal", 6)])
def test_uses_no_scan_before_its_history(form, history):
    scans, poses = drive(12)
    other_scans, _ = drive(12, seed=1)
    settings = MotionSettings(form, 4, grid=COARSE)
    assert settings.history == history
    f = 8
    expected = motion_channels(scans, poses, 4, form=form, grid=COARSE)[f]
    for changed, same in ((f - history, True), (f - history + 1, False)):
        mixed = motion_channels(other_scans[:changed] + scans[changed:], poses, 4, form=form, grid=COARSE)[f]
        assert np.array_equal(mixed, expected) == same


def test_first_and_last_channels_are_zero():
    scans, poses = drive(14)
    published = motion_channels(scans, poses, 4, grid=COARSE)
    causal = motion_channels(scans, poses, 4, form="causal", grid=COARSE)
    for f in range(14):
        for k in range(4):
            assert published[f][:, k].any() == (3 <= f + k < 14)
            assert causal[f][:, k].any() == (f >= 3 + k)


@pytest.mark.parametrize("form", ["published", "causal"])
def test_world_frame_does_not_matter(form):
    scans, poses = drive(10)
    moved = np.eye(4)
    moved[:3, :3] = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    moved[:3, 3] = (10, 20, 30)
    expected = motion_channels(scans, poses, 4, form=form, grid=COARSE)
    for ours, theirs in zip(motion_channels(scans, moved @ poses, 4, form=form, grid=COARSE), expected):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["published", "causal"])
@pytest.mark.parametrize("where", [[5], [0], [11], [4, 5, 6, 7], range(12)])
def test_scans_without_points(form, where):
    scans, poses = drive(12)
    for f in where:
        scans[f] = np.zeros((0, 4), np.float32)
    channels = motion_channels(scans, poses, 4, form=form, grid=COARSE)
    assert [c.shape for c in channels] == [(len(scan), 4) for scan in scans]
    for ours, by_hand in zip(channels, channels_by_hand(scans, poses, 4, form, COARSE)):
        np.testing.assert_array_equal(ours, by_hand)


def test_points_that_are_not_finite_get_zero():
    scans, poses = drive(10)
    expected = motion_channels(scans, poses, 4, grid=COARSE)
    for bad in (np.nan, np.inf, -np.inf):
        broken = [np.insert(scan, 3, np.float32([bad, 1, 0, 0]), axis=0) for scan in scans]
        for ours, theirs in zip(motion_channels(broken, poses, 4, grid=COARSE), expected):
            assert not ours[3].any()
            np.testing.assert_array_equal(np.delete(ours, 3, axis=0), theirs)


def test_arrays_in_arrays_out_and_tensors_in_tensors_out():
    scans, poses = drive(9)
    arrays = motion_channels(scans, poses, 4, grid=COARSE)
    assert all(isinstance(c, np.ndarray) and c.dtype == np.float32 for c in arrays)
    for tensor_poses in (torch.from_numpy(poses), poses):
        tensors = motion_channels([torch.from_numpy(scan) for scan in scans], tensor_poses, 4, grid=COARSE)
        assert all(isinstance(c, torch.Tensor) and c.dtype == torch.float32 for c in tensors)
        assert all(np.array_equal(c.numpy(), array) for c, array in zip(tensors, arrays))
    # float64 arrays, three columns, a strided view: the same
    for other in (
        [scan.astype(np.float64) for scan in scans],
        [scan[:, :3] for scan in scans],
        [np.repeat(scan, 2, axis=0)[::2] for scan in scans],
    ):
        channels = motion_channels(other, list(poses), 4, grid=COARSE)
        assert all(c.dtype == np.float32 and np.array_equal(c, array) for c, array in zip(channels, arrays))


def test_the_scans_are_left_alone():
    scans, poses = drive(9)
    copies = [scan.copy() for scan in scans]
    motion_channels(scans, poses, 4, grid=COARSE)
    assert all(np.array_equal(scan, copy) for scan, copy in zip(scans, copies))


def test_no_scan_and_one_scan():
    assert motion_channels([], np.zeros((0, 4, 4))) == []
    scans, poses = drive(1)
    (channels,) = motion_channels(scans, poses)
    assert channels.shape == (50, 8)
    assert not channels.any()


@pytest.mark.parametrize(
    ("form", "num_channels", "lookahead"),
    [("published", 4, 3), ("published", 4, 1), ("published", 4, 0), ("causal", 4, 0)],
)
def test_stream_gives_scans_in_order(form, num_channels, lookahead):
    scans, poses = drive(12)
    stream = MotionStream(MotionSettings(form, num_channels, lookahead, COARSE))
    expected = motion_channels(scans, poses, num_channels, lookahead, form, COARSE)
    for _ in range(2):  # flush is a fresh start
        out = []
        for f, (scan, pose) in enumerate(zip(scans, poses)):
            done = stream.push(torch.from_numpy(scan), torch.from_numpy(pose))
            assert (done is None) == (f < lookahead)
            out += [] if done is None else [done]
        rest = stream.flush()
        assert len(rest) == lookahead
        assert stream.flush() == []
        assert len(out + rest) == 12
        for ours, theirs in zip(out + rest, expected):
            np.testing.assert_array_equal(ours.numpy(), theirs)


def test_stream_forgets_on_reset():
    scans, poses = drive(12)
    stream = MotionStream(MotionSettings("causal", 4, grid=COARSE))
    for scan, pose in zip(scans, poses):
        stream.push(torch.from_numpy(scan), torch.from_numpy(pose))
    stream.reset()
    assert stream.flush() == []
    for f, (scan, pose) in enumerate(zip(scans, poses)):
        done = stream.push(torch.from_numpy(scan), torch.from_numpy(pose))
        assert done.any().item() == (f >= 3)


def test_stream_memory_is_bounded():
    scans, poses = drive(40, num_points=5)
    stream = MotionStream(MotionSettings("published", 4, 1, COARSE))
    for scan, pose in zip(scans, poses):
        stream.push(torch.from_numpy(scan), torch.from_numpy(pose))
    assert len(stream._window) == stream.settings.history + 1
    assert len(stream.flush()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "future"}, "motion form must be one of .*got 'future'"),
        ({"num_channels": 7}, "num_channels must be even and at least 2, got 7"),
        ({"num_channels": 0}, "num_channels must be even and at least 2, got 0"),
        ({"lookahead": 8}, r"lookahead must lie in 0\.\.7 for the published form with 8 channels, got 8"),
        ({"lookahead": -1}, r"lookahead must lie in 0\.\.7"),
        ({"lookahead": 4, "num_channels": 4}, r"lookahead must lie in 0\.\.3"),
        ({"form": "causal", "lookahead": 1}, r"lookahead must lie in 0\.\.0 for the causal form"),
        ({"grid": {"rows": 0}}, "ResidualGrid: rows, columns and max_range must be positive"),
        ({"grid": {"max_range": -1.0}}, "ResidualGrid: rows"),
        ({"grid": {"z": (2.0, -4.0)}}, "ResidualGrid: .*z ordered"),
    ],
)
def test_refuses_other_settings(change, message):
    scans, poses = drive(1)
    with pytest.raises(ValueError, match=message):
        motion_channels(scans, poses, **{k: ResidualGrid(**v) if k == "grid" else v for k, v in change.items()})


def test_refuses_poses_that_do_not_fit():
    scans, poses = drive(3)
    for wrong, shape in ((poses[:2], r"\[2, 4, 4\]"), (poses[:, :3], r"\[3, 3, 4\]")):
        with pytest.raises(ValueError, match=r"motion_channels: expected poses \[3, 4, 4\] for 3 scans, got " + shape):
            motion_channels(scans, wrong)


def test_default_lookahead_is_what_the_form_can_use():
    assert MotionSettings().lookahead == 7
    assert MotionSettings(num_channels=4).lookahead == 3
    assert MotionSettings("causal").lookahead == 0
    assert (MotionSettings().history, MotionSettings("causal").history) == (7, 14)


def test_rule_is_half_of_the_channels():
    residual = torch.tensor([[0.5, 0, 0, 0], [0.5, -1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert moving_by_rule(residual).tolist() == [False, True, True, False]
    assert moving_by_rule(torch.zeros(0, 8)).shape == (0,)
