"""The learning rate's course: the authors' for every step, and its edges."""

import numpy as np
import pytest
import torch

from kdmos.train import learning_rate_factor


def course(steps: int, steps_per_epoch: int, warmup_epochs: float, decay: float) -> np.ndarray:
    factor = learning_rate_factor(steps_per_epoch, warmup_epochs, decay)
    return np.array([factor(step) for step in range(steps)])


def test_equals_the_authors(golden):
    with np.load(golden("a8_warmup_lr.npz")) as data:
        expected, steps_per_epoch, base = data["lr"], int(data["steps_per_epoch"]), float(data["base_lr"])
        warmup_epochs, decay = int(data["warmup_steps"]) / steps_per_epoch, float(data["decay_per_epoch"])
    assert len(expected) == 100
    found = base * course(100, steps_per_epoch, warmup_epochs, decay)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=0)  # both are float64: rounding only


def test_equals_the_authors_through_an_optimizer(golden):
    """The rate that step i is made with, not the one after it."""
    with np.load(golden("a8_warmup_lr.npz")) as data:
        expected, base = data["lr"], float(data["base_lr"])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(20, 1.0, 0.99))
    found = []
    for _ in expected:
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=0)  # both are float64: rounding only


def test_without_warmup():
    np.testing.assert_allclose(course(5, 2, 0, 0.25), [1, 0.5, 0.25, 0.125, 0.0625], rtol=1e-15)


@pytest.mark.parametrize(
    ("warmup_epochs", "expected"),
    [
        (0.5, [0.5, 1, 1, 0.25**0.25, 0.5, 0.25**0.75, 0.25]),
        (1.5, [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 1, 0.25**0.25, 0.5]),
        (0.1, [1, 0.25**0.25, 0.5]),  # less than half a step: none
    ],
)
def test_fractional_warmup(warmup_epochs, expected):
    found = course(len(expected), 4, warmup_epochs, 0.25)
    np.testing.assert_allclose(found, expected, rtol=1e-15)  # both are float64: the last bit of a power


def test_one_step_an_epoch_and_no_decay():
    np.testing.assert_allclose(course(4, 1, 1, 0.5), [1, 1, 0.5, 0.25], rtol=1e-15)
    assert (course(10, 3, 0, 1.0) == 1).all()


@pytest.mark.parametrize("warmup_epochs", [0, 0.3, 1, 2.7])
def test_rises_to_one_then_falls(warmup_epochs):
    found = course(200, 11, warmup_epochs, 0.9)
    warmup = round(11 * warmup_epochs)
    assert found.max() == 1 and (found > 0).all()
    assert (np.diff(found[:warmup]) > 0).all() and (np.diff(found[warmup:]) < 0).all()
    np.testing.assert_allclose(found[warmup + 11 :] / found[warmup:-11], 0.9, rtol=1e-12)  # per epoch
