"""DySample: the authors' twelve layers, bilinear upsampling as a special case, groups, borders, and the seam of phi."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from kdmos.models import DySample
from kdmos.ops import dysample, native


@pytest.fixture(scope="module")
def goldens(golden):
    with np.load(golden("a4_dysample.npz")) as file:
        return dict(file)


def start(scale, groups):
    """p0 of the paper: places of the sub-pixels inside their pixel, [1, 2 * groups * scale^2, 1, 1]."""
    place = (torch.arange(scale, dtype=torch.float64) + 0.5) / scale - 0.5
    dx, dy = place.repeat(scale), place.repeat_interleave(scale)  # sub-row by sub-row
    return torch.cat([dx.repeat(groups), dy.repeat(groups)]).view(1, -1, 1, 1)


def sampled_by_hand(x, offset, scale, groups, circular=False):
    """The definition, one output pixel at a time."""
    batch, channels, height, width = x.shape
    out = x.new_zeros(batch, channels, scale * height, scale * width)
    shift = offset.reshape(batch, 2, groups, scale, scale, height, width)
    share = channels // groups
    for b, g, i, j, h, w in np.ndindex(batch, groups, scale, scale, height, width):
        dx, dy = shift[b, :, g, i, j, h, w].tolist()
        row = min(max(h + dy, 0.0), height - 1)
        column = (w + dx) % width if circular else min(max(w + dx, 0.0), width - 1)
        r, c = int(row), int(column)
        below = min(r + 1, height - 1)
        right = (c + 1) % width if circular else min(c + 1, width - 1)
        u, v = row - r, column - c
        part = x[b, g * share : (g + 1) * share]
        out[b, g * share : (g + 1) * share, scale * h + i, scale * w + j] = (1 - u) * (
            (1 - v) * part[:, r, c] + v * part[:, r, right]
        ) + u * ((1 - v) * part[:, below, c] + v * part[:, below, right])
    return out


def random_case(batch, channels, height, width, scale=2, groups=4, spread=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(height * width)
    x = torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64)
    offset = torch.randn(batch, 2 * groups * scale**2, height, width, generator=generator, dtype=torch.float64)
    return x.to(dtype), (offset * spread + start(scale, groups)).to(dtype)


@pytest.mark.parametrize("case", range(12))
def test_equals_the_authors(goldens, case):
    spec = json.loads(goldens["cases_json"].tobytes())[case]
    values = {name[4:]: torch.from_numpy(v) for name, v in goldens.items() if name.startswith(f"c{case:02d}_")}
    layer = DySample(spec["C"], spec["scale"], spec["style"], spec["groups"], spec["dyscope"], scope_bias=True)
    layer.load_state_dict({name[2:]: value for name, value in values.items() if name.startswith("w_")})
    assert torch.equal(layer.start, values["init_pos"])
    x = values["x"].requires_grad_()
    y = layer(x)
    assert_close(y, values["y"])
    y.backward(values["grad_y"])
    for gradient, name in [(x.grad, "grad_x")] + [(p.grad, f"gw_{n}") for n, p in layer.named_parameters()]:
        # Sums over all pixels, of values up to 50, in another order: 6e-7 of the largest entry seen.
        assert_close(gradient, values[name], rtol=0, atol=1e-5 * max(1.0, values[name].abs().max().item()))


def test_as_initialised(goldens):
    layer = DySample(16)
    assert torch.equal(layer.start, torch.from_numpy(goldens["init_pos_lp_g4"]))
    weight = torch.from_numpy(goldens["default_w"])
    assert layer.offset.weight.shape == weight.shape
    # 512 draws from a normal distribution of deviation 0.001: the sample's own is within 10 % of that
    assert layer.offset.weight.std().item() == pytest.approx(0.001, rel=0.1)
    assert weight.std().item() == pytest.approx(0.001, rel=0.1)
    assert not layer.offset.bias.any()
    layer.load_state_dict({"offset.weight": weight, "offset.bias": torch.from_numpy(goldens["default_b"])})
    assert_close(layer(torch.from_numpy(goldens["default_x"])), torch.from_numpy(goldens["default_y"]))


@pytest.mark.parametrize(("style", "dyscope"), [("lp", False), ("pl", False), ("lp", True), ("pl", True)])
@pytest.mark.parametrize("scale", [2, 3])
def test_begins_as_bilinear_upsampling(style, dyscope, scale):
    torch.manual_seed(0)
    layer = DySample(36, scale, style, dyscope=dyscope)
    torch.nn.init.zeros_(layer.offset.weight)
    x = torch.randn(2, 36, 5, 4)
    # float32 places at x up to 12 output pixels are 1e-6 apart
    assert_close(layer(x), F.interpolate(x, scale_factor=scale, mode="bilinear"), rtol=0, atol=1e-5)
    assert sorted(name for name, _ in layer.named_parameters()) == (
        ["offset.bias", "offset.weight"] + (["scope.weight"] if dyscope else [])
    )


def test_layer_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="DySample: style must be 'lp' or 'pl', got 'nearest'"):
        DySample(16, style="nearest")
    with pytest.raises(ValueError, match="DySample: 18 channels do not divide"):
        DySample(18)
    with pytest.raises(ValueError, match="DySample: 12 channels do not divide"):
        DySample(12, scale=5, style="pl")


@pytest.mark.parametrize(
    ("dx", "row"),
    [
        # every sub-pixel samples its own pixel: nearest neighbour
        (0.0, [10, 10, 20, 20, 40, 40]),
        (0.5, [15, 15, 30, 30, 40, 40]),
        (-0.5, [10, 10, 15, 15, 30, 30]),
        (1.0, [20, 20, 40, 40, 40, 40]),
        (0.25, [12.5, 12.5, 25, 25, 40, 40]),
        (100.0, [40] * 6),
        (-100.0, [10] * 6),
    ],
)
def test_one_row_worked_by_hand(dx, row):
    x = torch.tensor([10.0, 20.0, 40.0]).view(1, 1, 1, 3)
    offset = torch.zeros(1, 8, 1, 3)
    offset[:, :4] = dx
    out = dysample(x, offset, scale=2, groups=1)
    assert_close(out[0, 0], torch.tensor([row, row], dtype=torch.float32))


@pytest.mark.parametrize(
    ("dx", "row"),
    [
        (0.5, [15, 15, 30, 30, 25, 25]),  # between the last and the first
        (1.0, [20, 20, 40, 40, 10, 10]),
        (-0.5, [25, 25, 15, 15, 30, 30]),
        (-1.0, [40, 40, 10, 10, 20, 20]),
        (3.0, [10, 10, 20, 20, 40, 40]),  # once round
        (-301.0, [40, 40, 10, 10, 20, 20]),
    ],
)
def test_one_circular_row_worked_by_hand(dx, row):
    x = torch.tensor([10.0, 20.0, 40.0]).view(1, 1, 1, 3)
    offset = torch.zeros(1, 8, 1, 3)
    offset[:, :4] = dx
    out = dysample(x, offset, scale=2, groups=1, circular=True)
    assert_close(out[0, 0], torch.tensor([row, row], dtype=torch.float32))


def test_channels_of_the_offset():
    """(x or y, group, sub-row, sub-column): each one moves one sub-pixel of one group along one axis."""
    x = torch.arange(12.0).view(1, 1, 3, 4).repeat(1, 2, 1, 1) * torch.tensor([1.0, 100.0]).view(1, 2, 1, 1)
    still = dysample(x, torch.zeros(1, 16, 3, 4), scale=2, groups=2)
    for axis, group, i, j in np.ndindex(2, 2, 2, 2):
        offset = torch.zeros(1, 2, 2, 2, 2, 3, 4)
        offset[:, axis, group, i, j, 1, 2] = 1.0  # pixel (1, 2), one pixel to the right, or down
        moved = dysample(x, offset.view(1, 16, 3, 4), scale=2, groups=2) - still
        assert moved.count_nonzero() == 1
        step = 1.0 if axis == 0 else 4.0
        assert_close(moved[0, group, 2 + i, 4 + j].item(), step * (1.0, 100.0)[group])


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize(
    ("batch", "channels", "height", "width", "scale", "groups"),
    [(1, 1, 1, 1, 2, 1), (2, 8, 3, 5, 2, 4), (1, 6, 5, 2, 3, 3), (1, 4, 7, 1, 2, 2), (1, 2, 2, 3, 1, 1)],
)
def test_equals_the_definition(batch, channels, height, width, scale, groups, circular):
    x, offset = random_case(batch, channels, height, width, scale, groups, spread=3.0, dtype=torch.float64)
    out = dysample(x, offset, scale, groups, circular)
    assert_close(out, sampled_by_hand(x, offset, scale, groups, circular))


@pytest.mark.parametrize("circular", [False, True])
def test_odd_size(circular):
    x, offset = random_case(1, 4, 41, 401)
    out = dysample(x, offset, circular=circular)
    assert out.shape == (1, 4, 82, 802)
    expected = dysample(x.double(), offset.double(), circular=circular)
    # A float32 place near 401 has a step of 3e-5, and neighbouring pixels differ by up to 6.
    assert_close(out, expected.float(), rtol=0, atol=1e-3)


def test_rolling_the_input_rolls_a_circular_output():
    x, offset = random_case(2, 8, 5, 9, spread=2.0, dtype=torch.float64)
    out = dysample(x, offset, circular=True)
    rolled = dysample(x.roll(4, 3), offset.roll(4, 3), circular=True)
    assert_close(rolled, out.roll(8, 3))
    # away from the seam, circular or not is the same
    x, offset = random_case(1, 4, 5, 9, spread=0.0, dtype=torch.float64)
    assert_close(dysample(x, offset)[..., 1:-1], dysample(x, offset, circular=True)[..., 1:-1])


def test_circular_layer_knows_no_seam():
    torch.manual_seed(0)
    layer = DySample(8, circular=True).double()
    torch.nn.init.normal_(layer.offset.weight, std=0.5)
    x = torch.randn(1, 8, 4, 6, dtype=torch.float64)
    assert_close(layer(x.roll(1, 3)), layer(x).roll(2, 3))


@pytest.mark.parametrize("circular", [False, True])
def test_gradcheck(circular):
    x, offset = random_case(1, 4, 3, 4, groups=2, dtype=torch.float64)
    # Bilinear sampling has kinks at whole pixels and at the border: stay a tenth of a pixel away from them.
    place = offset.frac().abs().clamp(0.1, 0.9) * offset.sign() + offset.trunc().clamp(-1, 1)
    inputs = (x.requires_grad_(), place.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, offset: dysample(x, offset, 2, 2, circular), inputs)


def test_non_contiguous_input():
    x, offset = random_case(2, 8, 5, 6)
    expected = dysample(x, offset)
    inputs = [t.to(memory_format=torch.channels_last) for t in (x, offset)]
    assert_close(dysample(*inputs), expected)
    inputs = [torch.stack([t, t + 1], -1)[..., 0].requires_grad_() for t in (x, offset)]
    assert not inputs[0].is_contiguous()
    out = dysample(*inputs)
    assert_close(out, expected)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    x, offset = x.requires_grad_(), offset.requires_grad_()
    wanted = torch.autograd.grad(dysample(x, offset), (x, offset), weight)
    for gradient, expected in zip(torch.autograd.grad(out, inputs, weight), wanted):
        assert_close(gradient, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("circular", [False, True])
def test_half_precision_input_keeps_float32_places(dtype, circular):
    """The places stay exact: in bfloat16, those at column 100 of 200 would be half a pixel apart."""
    x, offset = random_case(1, 8, 6, 200)
    x = x.to(dtype)
    out = dysample(x, offset, circular=circular)
    assert out.dtype == dtype
    # Blending four values below 4 in bfloat16, where a step is 0.016, is all that may be lost.
    assert_close(out.float(), dysample(x.float(), offset, circular=circular), rtol=0, atol=0.04)


def test_refuses_what_does_not_fit():
    x = torch.zeros(1, 6, 3, 4)
    with pytest.raises(ValueError, match=r"dysample: expected offset \[1, 16, 3, 4\] for x \[1, 6, 3, 4\], got \[1, 8"):
        dysample(x, torch.zeros(1, 8, 3, 4), groups=2)
    with pytest.raises(ValueError, match="dysample: expected offset"):
        dysample(x, torch.zeros(1, 16, 3, 5), groups=2)
    with pytest.raises(ValueError, match="dysample: 6 channels do not divide into 4 groups"):
        dysample(x, torch.zeros(1, 32, 3, 4), groups=4)


def test_the_kernel_itself_refuses_what_it_would_read_beyond(backend):
    if backend != "cuda":
        pytest.skip("of the GPU")
    x, offset = (native.channels_last(image) for image in random_case(2, 8, 3, 5))
    gradient = torch.zeros(2, 8, 6, 10).to(memory_format=torch.channels_last)
    sizes = (2, 4, False)
    for bad in (offset.double(), offset[:1], offset[..., :4], offset.contiguous()):
        with pytest.raises(RuntimeError, match="dysample: offset"):
            torch.ops.kdmos.dysample(x, bad, *sizes)
    for bad in (gradient.half(), gradient.view(2, 8, 10, 6), gradient.contiguous()):
        with pytest.raises(RuntimeError, match="dysample_backward: gradient"):
            torch.ops.kdmos.dysample_backward(bad, x, offset, *sizes)
