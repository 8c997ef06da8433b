"""The Bayes filter over voxels: by hand, against a table of all places, and what it cannot be set to."""

import numpy as np
import pytest
import torch

from kdmos.smoothing import BayesFilter


def logit(p):
    return np.log(p / (1 - p))


def test_bayes_filter_by_hand():
    fuse, places = BayesFilter(horizon=2, voxel=1.0), torch.tensor([[0.5, 0.5, 0.5], [5.5, 0.5, 0.5]])
    first = fuse.update(places, np.eye(4), torch.tensor([0.8, 0.1]))
    assert torch.allclose(first, torch.tensor([0.8, 0.1]))
    moved = np.eye(4)
    moved[0, 3] = 5.0  # the sensor is 5 m farther: its first point lies where the second one lay
    second = fuse.update(places, moved, torch.tensor([0.7, 0.6]))
    expected = 1 / (1 + np.exp(-(logit(0.7) + logit(0.1))))
    assert torch.allclose(second, torch.tensor([expected, 0.6], dtype=torch.float32))
    fuse.update(places, moved, torch.tensor([0.5, 0.5]))  # the first scan leaves the horizon
    assert torch.allclose(fuse.update(places, np.eye(4), torch.tensor([0.8, 0.5])), torch.tensor([0.8, 0.5]))
    fuse.reset()
    assert torch.allclose(fuse.update(places, np.eye(4), torch.tensor([0.3, 0.4])), torch.tensor([0.3, 0.4]))


def test_bayes_filter_takes_the_mean_of_a_voxel_and_bounds_it():
    fuse = BayesFilter(horizon=3, voxel=1.0, certain=0.1)
    same = torch.full((4, 3), 0.5)
    assert torch.allclose(fuse.update(same, np.eye(4), torch.tensor([0.2, 0.4, 0.0, 1.0])), torch.full((4,), 0.4))
    assert torch.allclose(BayesFilter(certain=0.1).update(same[:1], np.eye(4), torch.ones(1)), torch.tensor([0.9]))
    assert not len(fuse.update(same[:0], np.eye(4), torch.zeros(0)))
    assert torch.allclose(fuse.update(same[:1], np.eye(4), torch.tensor([0.5])), torch.tensor([0.4]))


def test_bayes_filter_settings():
    for wrong in ({"horizon": 0}, {"voxel": 0.0}, {"prior": 1.0}, {"certain": 0.5}):
        with pytest.raises(ValueError, match="BayesFilter"):
            BayesFilter(**wrong)


@pytest.mark.parametrize("origin", [(0, 0, 0), (500_000, -5_000_000, 300)])  # as UTM: far from where it was reset
def test_bayes_filter_is_a_sum_over_places(origin):
    rng, voxel, prior, horizon = np.random.default_rng(0), 0.5, 0.3, 3
    fuse, said = BayesFilter(horizon, voxel, prior), []
    fuse.update(torch.zeros(1, 3), np.eye(4), torch.zeros(1))
    fuse.reset()
    for number in range(5):
        pose = np.eye(4)
        pose[:3, 3] = np.add(origin, (number * voxel, 0, -number * voxel))
        points, p = rng.uniform(-2, 2, (300, 3)).astype(np.float32), rng.uniform(0.1, 0.9, 300).astype(np.float32)
        found = fuse.update(torch.from_numpy(points), pose, torch.from_numpy(p)).numpy()
        cells = [tuple(cell) for cell in np.floor((points + (pose[:3, 3] - origin)) / voxel).astype(int)]
        table = {}
        for cell, value in zip(cells, p):
            table.setdefault(cell, []).append(value)
        said.append({cell: logit(np.mean(values)) - logit(prior) for cell, values in table.items()})
        odds = [logit(prior) + sum(scan.get(cell, 0) for scan in said[-horizon:]) for cell in cells]
        np.testing.assert_allclose(found, 1 / (1 + np.exp(-np.array(odds))), rtol=1e-5)  # float32 sums
