"""Majority labels: the authors' voxel labels, ties, points without a class."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdmos.ops import polar_grid, voxel_label
from kdmos.settings import PolarGrid


def labels_of(*voxels, num_classes=4, dtype=torch.uint8):
    """Labels of voxels that are given by the labels of their points."""
    rank = [v for v, points in enumerate(voxels) for _ in points]
    labels = [label for points in voxels for label in points]
    ranks = torch.tensor(rank, dtype=torch.int64)
    return voxel_label(ranks, torch.tensor(labels, dtype=dtype), len(voxels), num_classes)


@pytest.mark.parametrize("frame", [7, 11])
def test_equals_the_authors(golden, frame):
    with np.load(golden("a1_residual.npz")) as file:
        points = torch.from_numpy(np.split(file["scans"], np.cumsum(file["n_points"])[:-1])[frame])
    with np.load(golden("a2_polar.npz")) as file:
        labels = torch.from_numpy(file[f"f{frame:02d}_point_label"][:, 0])
        expected = torch.from_numpy(file[f"f{frame:02d}_voxel_label"]).flatten()
    gridded = polar_grid(points, torch.tensor([0, len(points)]), PolarGrid())
    dense = torch.zeros_like(expected)
    dense[gridded.voxels] = voxel_label(gridded.voxel_rank, labels, len(gridded.voxels), 4)
    assert torch.equal(dense, expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize(
    ("points", "label"),
    [
        ((3,), 3),
        ((1, 3, 3), 3),
        ((3, 1, 3, 1), 1),  # a tie: the lower class
        ((3, 2), 2),
        ((0, 3), 0),  # unlabeled points vote too
        ((0, 3, 3), 3),
        ((255,), 255),
        ((255, 3), 3),  # no class is above all classes
        ((255, 255, 3), 255),
        ((255, 255, 1, 1), 1),
    ],
)
def test_votes_worked_by_hand(points, label, dtype):
    assert labels_of(points, dtype=dtype).tolist() == [label]


def test_each_voxel_counts_its_own_points():
    labels = labels_of((1, 1, 2), (3,), (2, 2, 1), (0, 1))
    assert labels.dtype == torch.uint8
    assert labels.tolist() == [1, 3, 2, 0]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.sampled_from([0, 1, 2, 3, 4, 255]), min_size=1, max_size=9), min_size=1, max_size=30))
def test_equals_counting_one_by_one(voxels):
    expected = [min(Counter(points).items(), key=lambda vote: (-vote[1], vote[0]))[0] for points in voxels]
    assert labels_of(*voxels, num_classes=5).tolist() == expected


def test_the_order_of_the_points_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    rank = torch.randint(0, 50, (1001,), generator=generator)
    rank[:50] = torch.arange(50)
    labels = torch.randint(0, 4, (1001,), generator=generator)
    order = torch.randperm(1001, generator=generator)
    assert torch.equal(voxel_label(rank, labels, 50, 4), voxel_label(rank[order], labels[order], 50, 4))


def test_no_points():
    labels = voxel_label(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.uint8), 0, 4)
    assert labels.shape == (0,)
    assert labels.dtype == torch.uint8


def test_non_contiguous_input():
    rank, labels = torch.tensor([[0, 9], [1, 9], [1, 9]])[:, 0], torch.tensor([[3, 9], [2, 9], [1, 9]])[:, 0]
    assert not rank.is_contiguous()
    assert voxel_label(rank, labels, 2, 4).tolist() == [3, 1]


def test_points_outside_are_refused_or_do_not_vote(backend):
    """A CPU looks; a GPU, where looking would wait for it, reads nothing elsewhere."""
    labels = torch.tensor([3] * 4 + [1] * 25, dtype=torch.uint8)
    order = torch.arange(29)
    order[[4, 6, 8]] = torch.tensor([-1, 29, 2**40])
    start = torch.tensor([0, 5, 29])
    op = torch.ops.kdmos.voxel_label
    if backend == "native":
        with pytest.raises(RuntimeError, match="voxel_label: order must lie within 0 and 29"):
            op(labels, order, start, 4)
        for wrong in ([0, 30], [5, 4, 29], [-1, 29]):
            with pytest.raises(RuntimeError, match="voxel_label: voxel_start must ascend within 0 and 30"):
                op(labels, torch.arange(29), torch.tensor(wrong), 4)
    if backend == "cuda":
        assert op(labels, order, start, 4).tolist() == [3, 1]
        assert op(labels, torch.arange(29), torch.tensor([-9, 4, 60]), 4).tolist() == [3, 1]
        assert op(labels, torch.full((29,), -1), start, 4).tolist() == [0, 0]


def test_refuses_other_lengths():
    with pytest.raises(ValueError, match="voxel_label: 3 ranks but 2 labels"):
        voxel_label(torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.uint8), 1, 4)
