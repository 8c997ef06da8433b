"""Pictures: the right things in the right places and colours, and what cannot be drawn."""

import io
import sys

import numpy as np
import pytest

from kdmos import picture
from kdmos.errors import InputError
from kdmos.picture import bev_picture, read_panels

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
