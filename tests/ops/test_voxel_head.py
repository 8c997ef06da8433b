"""The head at single voxels equals the dense 1x1 convolution, in value and in gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from kdmos.ops import voxel_head
from kdmos.settings import PolarGrid


def dense_head(features, voxels, weight, bias, grid):
    """All voxels, then those asked for: channel height * classes + class of the cell."""
    batch, (rings, sectors, heights) = len(features), grid.bins
    dense = F.conv2d(features, weight, bias).view(batch, heights, -1, rings, sectors)
    return dense.permute(0, 3, 4, 1, 2).flatten(0, 3)[voxels]


def random_case(bins, batch=2, channels=5, classes=3, num_voxels=40, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    total = batch * bins[0] * bins[1] * bins[2]
    voxels = torch.randperm(total, generator=generator)[:num_voxels].sort().values
    inputs = draw(batch, channels, *bins[:2]), voxels, draw(bins[2] * classes, channels, 1, 1), draw(bins[2] * classes)
    return *inputs, PolarGrid(bins=bins)


def test_worked_by_hand():
    # 2 x 3 cells, 2 heights, 2 classes, one channel: logit = feature * weight + bias
    features = torch.arange(12.0).view(2, 1, 2, 3)
    weight = torch.tensor([1.0, 10.0, 100.0, 1000.0]).view(4, 1, 1, 1)  # (height, class)
    bias = torch.tensor([0.0, 0.5, 0.0, 0.25])
    # scan 0, ring 0, sector 1, height 0; the same cell, height 1; scan 1, ring 1, sector 2, height 1
    voxels = torch.tensor([2, 3, 23])
    logits = voxel_head(features, voxels, weight, bias, PolarGrid(bins=(2, 3, 2)))
    assert logits.tolist() == [[1, 10.5], [100, 1000.25], [1100, 11000.25]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("bins", "num_voxels"), [((4, 6, 3), 40), ((41, 401, 5), 3000), ((3, 3, 2), 36), ((2, 2, 2), 1)]
)
def test_equals_the_dense_convolution(bins, num_voxels, dtype):
    case = random_case(bins, num_voxels=num_voxels, dtype=dtype)
    logits = voxel_head(*case)
    assert logits.shape == (min(num_voxels, 2 * bins[0] * bins[1] * bins[2]), 3)
    assert_close(logits, dense_head(*case))


@pytest.mark.parametrize("channels", [5, 32, 130])  # sums for 32, 128 and 2 x 224 threads on a GPU
def test_gradients_equal_those_of_the_dense_convolution(channels):
    features, voxels, weight, bias, grid = random_case((4, 6, 3), channels=channels)
    inputs = [features.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    upstream = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, dense = (head(features, voxels, weight, bias, grid) for head in (voxel_head, dense_head))
    expected = torch.autograd.grad(dense, inputs, upstream)
    for gradient, wanted in zip(torch.autograd.grad(ours, inputs, upstream), expected):
        assert_close(gradient, wanted)


def test_gradcheck():
    features, voxels, weight, bias, grid = random_case((2, 3, 2), batch=1, channels=3, classes=2, num_voxels=7)
    inputs = [features.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    assert torch.autograd.gradcheck(lambda f, w, b: voxel_head(f, voxels, w, b, grid), inputs)


def test_non_contiguous_features():
    features, voxels, weight, bias, grid = random_case((5, 7, 3), dtype=torch.float32)
    expected = voxel_head(features, voxels, weight, bias, grid)
    channels_last = features.to(memory_format=torch.channels_last)
    strided = torch.stack([features, features + 1], -1)[..., 0]
    for other in (channels_last, strided):
        assert not other.is_contiguous()
        assert_close(voxel_head(other, voxels, weight, bias, grid), expected)


def test_no_voxels():
    features, voxels, weight, bias, grid = random_case((4, 6, 3))
    assert voxel_head(features, voxels[:0], weight, bias, grid).shape == (0, 3)


@pytest.mark.parametrize("padding", [1, 700])
def test_padding_gets_zeros(padding):
    features, voxels, weight, bias, grid = random_case((4, 6, 3))
    beyond = torch.full((padding,), 2 * 4 * 6 * 3)
    logits = voxel_head(features, torch.cat([voxels, beyond]), weight, bias, grid)
    assert torch.equal(logits[:40], voxel_head(features, voxels, weight, bias, grid))
    assert logits.shape == (40 + padding, 3)
    assert not logits[40:].any()
    assert not voxel_head(features, beyond, weight, bias, grid).any()


def test_voxels_outside_are_skipped_on_a_gpu(backend):
    """Before, between and after the others: they get zeros, and give no gradient."""
    if backend != "cuda":
        pytest.skip("refused on a CPU")
    features, voxels, weight, bias, grid = random_case((4, 6, 3))
    inputs = [features.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    inside = torch.ones(47, dtype=torch.bool)
    inside[[0, 1, 20, 21, 44, 45, 46]] = False
    stray = torch.tensor([-1, -(2**40), -2, 2 * 4 * 6 * 3, 2**40, 2 * 4 * 6 * 3, 2 * 4 * 6 * 3 + 1])
    mixed = torch.zeros(47, dtype=torch.int64)
    mixed[inside], mixed[~inside] = voxels, stray
    expected, logits = (voxel_head(features, which, weight, bias, grid) for which in (voxels, mixed))
    assert torch.equal(logits[inside], expected) and not logits[~inside].any()
    upstream = torch.randn(47, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad(expected, inputs, upstream[inside])
    for gradient, reference in zip(torch.autograd.grad(logits, inputs, upstream), wanted):
        assert_close(gradient, reference)


def test_refuses_what_does_not_fit():
    features, voxels, weight, bias, grid = random_case((4, 6, 3))
    with pytest.raises(ValueError, match=r"voxel_head: expected features \[B, D, 4, 6\], got \[2, 5, 4, 5\]"):
        voxel_head(features[..., :5], voxels, weight, bias, grid)
    with pytest.raises(ValueError, match="voxel_head: expected features"):
        voxel_head(features[0], voxels, weight, bias, grid)
    with pytest.raises(ValueError, match=r"voxel_head: expected weight \[3 \* classes, 5, 1, 1\], got \[8, 5, 1, 1\]"):
        voxel_head(features, voxels, weight[:8], bias, grid)
    with pytest.raises(ValueError, match="voxel_head: expected weight"):
        voxel_head(features, voxels, weight[:, :4], bias, grid)
