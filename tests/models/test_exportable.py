"""The student in operations that ONNX has: the same logits, from inputs that others can make."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from kdmos import ops
from kdmos.models import build_student
from kdmos.models.exportable import ExportableStudent, dysample, onnx_inputs, wrap_around
from kdmos.models.fast import FastStudent
from kdmos.settings import MotionSettings, PolarGrid


def random(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def one_scan(num_points=700, num_channels=8, seed=0):
    points = random(num_points, 4, seed=seed) * torch.tensor([20.0, 20.0, 1.0, 0.1])
    return points, random(num_points, num_channels, seed=seed + 1).relu()


@pytest.mark.parametrize("halo", [0, 1, 2])
def test_wrap_around(halo):
    for parts in ([random(1, 3, 5, 7)], [random(1, 3, 5, 7), random(1, 2, 4, 6, seed=1)]):
        assert torch.equal(wrap_around(parts, halo), ops.wrap_around(parts, halo))


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize(("scale", "groups"), [(2, 4), (3, 2)])
def test_dysample(scale, groups, circular):
    """Places far outside and on the border itself among them."""
    x, offset = random(1, 8, 5, 7), random(1, 2 * groups * scale**2, 5, 7, seed=1) * 3
    offset[:, ::3] = 0
    offset[:, 1::7] = 100.0
    assert_close(dysample(x, offset, scale, groups, circular), ops.dysample(x, offset, scale, groups, circular))


@pytest.mark.parametrize("name", ["kdmos", "motionbev"])
@pytest.mark.parametrize("bins", [(41, 50, 8), (24, 16, 4)])
def test_it_is_the_fast_student(name, bins, stirred):
    torch.manual_seed(0)
    grid, classes = PolarGrid(bins=bins), {"kdmos": 4, "motionbev": 2}[name]
    student = stirred(build_student(name, classes, grid=grid, motion=MotionSettings("causal", 6)))
    fast, exportable = FastStudent(student), ExportableStudent(student)
    for num_points in (700, 1):
        points, residual = one_scan(num_points, 6)
        inputs = onnx_inputs(points, residual, grid)
        with torch.no_grad():
            found = exportable(**{key: torch.from_numpy(value) for key, value in inputs.items()})
        expected = fast(points, torch.tensor([0, num_points]), residual).point_logits
        # float32 sums of some hundred products in another order, through twenty layers
        assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_inputs_are_what_the_grid_says():
    """Worked by hand: a grid of 1 m, 1 radian and 1 m; two points share a cell, not their height."""
    grid = PolarGrid(rho=(0.0, 15.0), phi=(-3.0, 12.0), z=(0.0, 3.0), bins=(16, 16, 4))
    points = np.array([[2.5, 0, 0.25, 0.5], [7.25, 0, 5, 0], [2.75, 0, 1.5, 1]], np.float32)
    inputs = onnx_inputs(points, np.ones((3, 2), np.float32), grid)
    assert inputs["cells"].tolist() == [2 * 16 + 3, 7 * 16 + 3]
    assert inputs["cell_rank"].tolist() == [0, 1, 0]
    assert inputs["height"].tolist() == [0, 3, 1]
    expected = [
        [0, -0.5, -0.25, 2.5, 0, 0.25, 2.5, 0, 0.5],
        [-0.25, -0.5, 1.5, 7.25, 0, 5, 7.25, 0, 0],
        [0.25, -0.5, 0, 2.75, 0, 1.5, 2.75, 0, 1],
    ]
    np.testing.assert_allclose(inputs["features"], expected)
    assert {key: value.dtype.name for key, value in inputs.items()} == {
        "features": "float32",
        "residual": "float32",
        "cell_rank": "int64",
        "cells": "int64",
        "height": "int64",
    }


@pytest.mark.parametrize("shapes", [((0, 4), (0, 8)), ((5, 4), (4, 8)), ((5, 4), (5,)), ((5, 3), (5, 8))])
def test_inputs_that_do_not_fit(shapes):
    points, residual = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"expected points \[N, 4\]"):
        onnx_inputs(points, residual, PolarGrid())


def test_the_listing_of_the_documentation_makes_the_same_inputs(golden):
    """docs/deployment.md in plain numpy, on a scan of the goldens."""
    text = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text()
    (listing,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(listing, names)
    content, grid = np.load(golden("a1_residual.npz")), PolarGrid()
    points = content["scans"][: content["n_points"][0]]
    residual = np.zeros((len(points), 8), np.float32)
    about = {"grid": {"rho": grid.rho, "phi": grid.phi, "z": grid.z, "bins": grid.bins}}
    theirs, ours = names["inputs"](points, residual, about), onnx_inputs(points, residual, grid)
    assert theirs.keys() == ours.keys()
    # numpy's arctan2 is not ours: of a point that lies on a border, within rounding, the cell may differ
    place = [inputs["cells"][inputs["cell_rank"]] * grid.bins[2] + inputs["height"] for inputs in (theirs, ours)]
    same = place[0] == place[1]
    assert same.mean() >= 1 - 1e-4
    np.testing.assert_allclose(theirs["features"][same], ours["features"][same], rtol=1e-6, atol=2e-6)
    for name, value in theirs.items():
        assert value.dtype == ours[name].dtype, name
