"""Pictures: the right things in the right places and colours, and what cannot be drawn."""

import io
import sys

import numpy as np
import pytest

from kdmos import picture
from kdmos.errors import InputError
from kdmos.picture import DriveMap, Panel, bev_picture, error_marks, moving_marks, panels_picture, read_panels

image = pytest.importorskip("matplotlib.image")
colors = pytest.importorskip("matplotlib.colors")


def blob(x, y, count=30):
    """A few points around (x, y), as an object gives them."""
    points = np.random.default_rng(0).normal(0, 0.3, (count, 4)).astype(np.float32)
    return points + np.float32([x, y, 0, 0])


def places(path, colour):
    """(x, y) in 0..1 of the pixels of a colour, from the lower left corner, legends below the panels left out."""
    pixels = image.imread(path)[:, :, :3]
    row, column = np.nonzero(np.abs(pixels - colors.to_rgb(colour)).max(2) < 0.02)
    x, y = column / pixels.shape[1], 1 - row / pixels.shape[0]
    return np.stack([x, y], 1)[y > 0.1]


@pytest.fixture
def scene():
    """Found ahead (up), missed on the left, false alarm on the right, a static one behind."""
    points = np.concatenate([blob(20, 0), blob(0, 20), blob(0, -20), blob(-20, 0)])
    kind = np.repeat(np.arange(4), 30)
    return points, kind <= 1, (kind == 0) | (kind == 2)


def test_directions_and_colours(tmp_path, scene):
    path = tmp_path / "new" / "a.png"
    bev_picture(path, *scene, "a title", extent=40)
    truth, prediction = (places(path, picture.MOVING)[:, 0] // (1 / 3) == i for i in (0, 1))
    at = places(path, picture.MOVING)
    height = 0.07 + 0.815 / 2  # of the sensor, by the margins of the figure
    # truth, first third: ahead is up, left is left
    assert (at[truth] - [1 / 6, height]).max(0)[1] > 0.15 and (at[truth] - [1 / 6, height]).min(0)[0] < -0.05
    assert at[truth][:, 0].max() < 1 / 6 + 0.02 and at[truth][:, 1].min() > height - 0.03
    # prediction, second third: ahead and right
    assert at[prediction][:, 0].min() > 1 / 2 - 0.02 and at[prediction][:, 0].max() > 1 / 2 + 0.05
    # errors, last third
    found, missed, alarm = (places(path, c) for c in (picture.HIT, picture.MISSED, picture.FALSE_ALARM))
    assert len(found) and np.abs(found[:, 0] - 5 / 6).max() < 0.02 and found[:, 1].min() > height + 0.1
    assert len(missed) and missed[:, 0].max() < 5 / 6 - 0.05 and np.abs(missed[:, 1] - height).max() < 0.03
    assert len(alarm) and alarm[:, 0].min() > 5 / 6 + 0.05 and np.abs(alarm[:, 1] - height).max() < 0.03


def test_points_without_truth_are_no_errors(tmp_path, scene):
    points, truth, predicted = scene
    path = tmp_path / "a.png"
    bev_picture(path, points, truth, predicted, "", scored=np.zeros(len(points), bool))
    assert not any(len(places(path, c)) for c in (picture.HIT, picture.MISSED, picture.FALSE_ALARM))
    assert len(places(path, picture.NO_TRUTH))


def test_the_same_scan_gives_the_same_picture(tmp_path, scene):
    for name in ("a.png", "b.png"):
        bev_picture(tmp_path / name, *scene, "again")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_no_point_in_sight(tmp_path):
    points = np.array([[99, 0, 0, 0], [np.nan, 0, 0, 0], [np.inf, 0, 0, 0]], np.float32)
    for rows in (points, points[:0]):
        mask = np.ones(len(rows), bool)
        bev_picture(tmp_path / "a.png", rows, mask, mask, r"$\bad$ [name]")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_panels_of_a_picture(tmp_path, scene):
    whole = tmp_path / "a.png"
    bev_picture(whole, *scene, "sequence Ünïcode, Ω")
    title, panels = read_panels(whole)
    assert title == "sequence Ünïcode, Ω"
    pixels = [image.imread(io.BytesIO(panel), format="png")[:, :, :3] for panel in panels]
    assert len({panel.shape for panel in pixels}) == 1  # so that they line up

    def has(panel, colour):
        return bool((np.abs(panel - colors.to_rgb(colour)).max(2) < 0.02).any())

    assert [has(panel, picture.MOVING) for panel in pixels] == [True, True, False]
    assert [has(panel, picture.MISSED) for panel in pixels] == [False, False, True]
    square = np.abs(pixels[0] - colors.to_rgb(picture.PANEL)).max(2) < 0.02
    across = np.flatnonzero(square.any(0))
    assert abs(across[0] - (len(square[0]) - 1 - across[-1])) <= 2  # in the middle, nothing of its neighbour


def test_what_has_no_panels(tmp_path):
    with pytest.raises(InputError, match=r"b\.png: not a picture that kdmos drew"):
        read_panels(tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"b\.png: not a picture that kdmos drew"):
        read_panels(tmp_path / "b.png")


def test_what_cannot_be_drawn(tmp_path, scene, monkeypatch):
    points, truth, predicted = scene
    with pytest.raises(InputError, match=r"expected masks of 120 points, got \[120, 119, 120\]"):
        bev_picture(tmp_path / "a.png", points, truth, predicted[1:], "")
    with pytest.raises(InputError, match="must be positive, got 0"):
        bev_picture(tmp_path / "a.png", *scene, "", extent=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/a\.png: cannot be written"):
        bev_picture(tmp_path / "file" / "a.png", *scene, "")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install 'kdmos\[train\]'"):
        bev_picture(tmp_path / "a.png", *scene, "")
    assert not (tmp_path / "a.png").exists()


# --- panels of pixels, and the map


def pixels_of(drawn, colour):
    """(x, y) in pixels from the lower left corner where a picture has exactly this colour."""
    row, column = np.nonzero((np.asarray(drawn) == picture.rgb(colour)).all(2))
    return np.stack([column, drawn.size[1] - 1 - row], 1)


def test_a_panel_of_pixels_has_the_same_places(scene):
    points, truth, predicted = scene
    panels = [
        Panel("truth", moving_marks(truth)),
        Panel("prediction", moving_marks(predicted)),
        Panel("errors", error_marks(truth, predicted, np.ones(120, bool))),
    ]
    drawn = panels_picture(points, panels, "a title", extent=40, size=400)
    assert drawn.size == (3 * 412 + 12, 44 + 30 + 400 + 34)
    middle = np.array([12 + 200, 34 + 200])  # of the first panel, where its sensor is
    step = [412, 0]  # to the next one
    for colour, panel, places in (
        (picture.MOVING, 0, [(0, 100), (-100, 0)]),  # 20 m are 100 pixels: ahead is up, left is left
        (picture.MOVING, 1, [(0, 100), (100, 0)]),
        (picture.HIT, 2, [(0, 100)]),
        (picture.MISSED, 2, [(-100, 0)]),
        (picture.FALSE_ALARM, 2, [(100, 0)]),
    ):
        at = pixels_of(drawn, colour) - middle
        at = at[(at[:, 1] > -200) & (np.abs(at[:, 0] - 412 * panel) < 200)] - np.multiply(step, panel)
        # the points lie within 1.5 m of their place, 7.5 pixels, and a dot's radius is one
        near = np.abs(at[:, None] - np.array(places)).max(2) <= 9
        assert near.any(1).all() and near.any(0).all()


def test_panels_wrap_and_small_ones_have_small_letters(scene):
    points, truth, _ = scene
    drawn = panels_picture(points, [Panel(f"{i}", moving_marks(truth)) for i in range(6)], "", size=101)
    assert drawn.size == (4 * 113 + 12, 44 + 2 * (30 + 101 + 34))
    assert all(side % 2 == 0 for side in panels_picture(points, [Panel("", [])], "", size=101).size)
    text = [
        len(pixels_of(panels_picture(points, [Panel("", [])], "title " * 3, size=size), picture.TEXT))
        for size in (150, 480)
    ]
    assert 0 < text[0] < text[1]


def test_the_trajectory_lies_behind_and_ahead():
    path = np.array([[-20.0, 0], [0, 0], [0, 20]])  # from behind, then to the left
    points = np.zeros((0, 4), np.float32)
    without, drawn = (
        np.asarray(panels_picture(points, [Panel("", [])], "", 40, 400, *more)) for more in ((), (path, 1))
    )
    row, column = np.nonzero((without != drawn).any(2))
    right, up = column - 212, drawn.shape[0] - 1 - row - 234  # of the sensor
    left, below = np.abs(up) <= 2, np.abs(right) <= 2  # a thin line
    assert (left | below).all() and right.max() <= 2 and up.max() <= 2
    assert abs(right[left].min() + 100) <= 2 and abs(up[below].min() + 100) <= 2
    assert left.sum() < 0.7 * below.sum()  # what comes is dotted


def test_residuals_are_marked_by_their_height():
    low, middle, high = (marks.mask for marks in picture.residual_marks(np.array([0, 0.4, 0.99, 1, 1.9, 2, 4])))
    np.testing.assert_array_equal(low, [0, 1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(middle, [0, 0, 0, 1, 1, 0, 0])
    np.testing.assert_array_equal(high, [0, 0, 0, 0, 0, 1, 1])


def test_the_palette_keeps_the_colours_of_what_is_marked(scene):
    points, truth, predicted = scene
    drawn = panels_picture(points, [Panel("", error_marks(truth, predicted, truth | predicted))], "", size=300)
    again = image.imread(io.BytesIO(picture.png(drawn)), format="png")
    for colour in (picture.HIT, picture.MISSED, picture.FALSE_ALARM):
        exact = (np.asarray(drawn) == picture.rgb(colour)).all(2)
        assert exact.any() and np.array_equal(
            np.round(again[exact][:, :3] * 255), np.tile(picture.rgb(colour), (exact.sum(), 1))
        )


def test_no_points_and_no_marks():
    points = np.array([[np.nan, 0, 0, 0], [99, 0, 0, 0]], np.float32)
    for rows in (points, points[:0]):
        nothing = moving_marks(np.ones(len(rows), bool))
        assert panels_picture(rows, [Panel("", nothing), Panel("", [])], r"$\bad$", size=100).size[0] == 2 * 112 + 12


def poses_along(steps):
    poses = np.tile(np.eye(4), (len(steps), 1, 1))
    poses[:, :2, 3] = steps
    return poses


def test_a_map_is_turned_so_that_the_drive_runs_to_the_right():
    # to the north, 5 km from the frame's origin, the sensor looking there
    poses = poses_along([[5000, 7000], [5000, 7030], [5000, 7060]])
    poses[:, :2, :2] = [[0, -1], [1, 0]]
    canvas = DriveMap(poses, extent=20, size=200)
    np.testing.assert_allclose(canvas.path, [[0, 0], [30, 0], [60, 0]], atol=1e-9)
    assert canvas.height.shape == (160, 400)  # 100 x 40 m, at half a pixel
    ahead_left = np.array([[10, 5, 1.0, 0], [10, -5, 0, 0], [30, 0, 0, 0], [np.nan, 0, 0, 0]], np.float32)
    canvas.add(ahead_left, poses[1], np.array([False, True, False, False]))
    # 40 m from the left border (20 + 30 + 10 = 60 m), 5 m above the middle (25 m): four cells a metre
    np.testing.assert_array_equal(np.argwhere(np.isfinite(canvas.height)), [[100, 240]])
    assert canvas.height[100, 240] == 1.0
    np.testing.assert_array_equal(np.argwhere(canvas.moving), [[60, 240]])


@pytest.mark.parametrize("steps", [[[0, 0]], [[0, 0], [0.1, 0], [0, 0]], [[0, 0], [40, 40], [0, 80]]])
def test_maps_of_all_kinds_of_drives(steps):
    canvas = DriveMap(poses_along(steps), extent=10, size=400)
    still = np.random.default_rng(0).uniform(-12, 12, (500, 4)).astype(np.float32)
    points = np.concatenate([still, blob(5, 0, count=5000)])  # dense enough to fill its pixels
    for pose in poses_along(steps):
        canvas.add(points, pose, np.arange(5500) >= 500)
    drawn = canvas.picture("a drive")
    above_each_other = canvas.height.shape[1] >= 1.5 * canvas.height.shape[0]
    x, y = pixels_of(drawn, picture.MOVING).T
    assert len(x) > 20  # and all of them in the first panel, or in the legend below it
    assert y.min() > (drawn.size[1] - 44) / 2 if above_each_other else x.max() < drawn.size[0] / 2


def test_a_map_of_a_long_drive_needs_no_more_than_its_pixels():
    steps = np.stack([np.arange(50_000) * 0.5, np.zeros(50_000)], 1)
    canvas = DriveMap(poses_along(steps), extent=50, size=300)  # all pairs of scans would be 20 GB
    assert canvas.height.shape == (4, 600)
