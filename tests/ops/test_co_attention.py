"""Co-attention and the maxima that follow: the module that is trained, by hand, odd sizes, the closed circle."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from kdmos.models.blocks import CoAttention
from kdmos.ops import co_attention, native, reference


def random_case(size, channels=(5, 3, 4), dtype=torch.float64, seed=0):
    """appearance, motion, fused [B, C, H, W] of these channels; weight and bias of gate, spatial and channel."""
    generator = torch.Generator().manual_seed(seed)
    batch, height, width = size

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    images = [draw(batch, count, height, width).to(dtype) for count in channels]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    appearance, motion, fused = channels
    shapes = [(2, fused, 3, 3), (1, motion, 1, 1), (appearance, appearance, 1, 1)]
    layers = [(draw(*shape).mul(0.3).to(wide), draw(shape[0]).to(wide)) for shape in shapes]
    return *images, *layers


def expected_of(appearance, motion, fused, gate, spatial, channel):
    return reference.co_attention(appearance, motion, fused, *gate, *spatial, *channel)


@pytest.mark.parametrize("size", [(1, 2, 2), (2, 7, 5), (3, 6, 19), (1, 2, 37), (2, 33, 2), (1, 41, 401)])
@pytest.mark.parametrize("channels", [(5, 3, 4), (32, 16, 32), (1, 1, 1), (33, 40, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_equals_the_reference(size, channels, dtype):
    case = random_case(size, channels, dtype)
    for ours, wanted in zip(co_attention(*case), expected_of(*case)):
        assert ours.dtype == dtype
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert_close(ours, wanted)


@pytest.mark.parametrize(
    "channels",
    [
        (24, 16, 40),  # in vectors, no power of two; more channels for the gates than fit a tile
        (40, 13, 8),  # a motion that has no vectors, beside images that have
        (300, 264, 1),  # more than threads of a block, or lanes of a team
        (520, 8, 4),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_channels_of_all_kinds(channels, dtype):
    case = random_case((2, 5, 6), channels, dtype)
    case[-1][0].mul_(channels[0] ** -0.5)  # or one channel's share of the softmax is all
    for ours, wanted in zip(co_attention(*case), expected_of(*case)):
        assert_close(ours, wanted)


def test_a_large_image():
    """More pixels than parts of fixed size can hold, so that their number, or they, must grow."""
    case = random_case((1, 516, 523), (2, 1, 1), torch.float32)
    for ours, wanted in zip(co_attention(*case), expected_of(*case)):
        assert_close(ours, wanted)


def test_equals_the_module_that_is_trained():
    torch.manual_seed(0)
    module = CoAttention(8, 6).double().eval()
    for name, parameter in module.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3, mean=float("norm.weight" in name))
    appearance, motion = torch.randn(2, 8, 9, 12).double(), torch.randn(2, 6, 9, 12).double()
    with torch.no_grad():
        expected, fused = module(appearance, motion), module.fuse(appearance, motion)
        layers = [(layer.weight, layer.bias) for layer in (module.gate, module.spatial, module.channel)]
        out, half, half_motion = co_attention(appearance, motion, fused, *layers)
    assert_close(out, expected)
    assert_close(half, F.max_pool2d(expected, 2))
    assert torch.equal(half_motion, F.max_pool2d(motion, 2))


def test_worked_by_hand():
    appearance = torch.tensor([[1.0, 2, 3, 4], [10.0, -20, 30, -40]]).view(1, 2, 2, 2)
    motion = torch.tensor([0.0, 0, 0, 7]).view(1, 1, 2, 2)
    logit_of_3_4 = math.log(3)
    gate = torch.zeros(2, 1, 3, 3), torch.tensor([logit_of_3_4, 0.0])  # gates 3/4 and 1/2
    spatial = torch.zeros(1, 1, 1, 1), torch.tensor([0.0])  # s = 1/2
    channel = torch.zeros(2, 2, 1, 1), torch.tensor([logit_of_3_4, 0.0])  # c = 2 * (3/4, 1/4)
    out, half, half_motion = co_attention(appearance, motion, motion, gate, spatial, channel)
    factor = torch.tensor([0.75 * (1 + 0.5 * 1.5), 0.75 * (1 + 0.5 * 0.5)]).view(1, 2, 1, 1)
    assert_close(out, appearance * factor)
    assert_close(half.flatten(), torch.tensor([4 * factor[0, 0].item(), 30 * factor[0, 1].item()]))
    assert half_motion.item() == 7


def test_the_gate_sees_round_the_circle_but_not_over_the_rings():
    """A gate that copies its left or upper neighbour, at one pixel that holds 1."""
    appearance, fused = torch.ones(1, 1, 4, 5), torch.zeros(1, 1, 4, 5)
    fused[0, 0, 3, 4] = 1.0
    spatial, channel = (torch.zeros(1, 1, 1, 1), torch.full((1,), -100.0)), (torch.zeros(1, 1, 1, 1), torch.zeros(1))

    def gate_of(row, column):
        weight = torch.zeros(2, 1, 3, 3)
        weight[0, 0, row, column] = 1.0
        out, *_ = co_attention(appearance, appearance, fused, (weight, torch.zeros(2)), spatial, channel)
        return out[0, 0, 0, 0].item()  # appearance times its gate

    nothing, one = 0.5, (19 * 0.5 + torch.tensor(1.0).sigmoid().item()) / 20
    assert gate_of(1, 0) == pytest.approx(one)  # sector 0 has sector 4 to its left
    assert gate_of(0, 1) == pytest.approx(nothing)  # no ring after the last looks back at it
    assert gate_of(2, 1) == pytest.approx(one)


def test_non_contiguous_images():
    appearance, motion, fused, *layers = random_case((2, 5, 6), dtype=torch.float32)
    expected = co_attention(appearance, motion, fused, *layers)
    strided = [torch.stack([image, image + 1], -1)[..., 0] for image in (appearance, motion, fused)]
    laid_out = [image.to(memory_format=torch.channels_last) for image in (appearance, motion, fused)]
    for images in (strided, laid_out):
        assert not any(image.is_contiguous() for image in images)
        for ours, wanted in zip(co_attention(*images, *layers), expected):
            assert_close(ours, wanted)


def test_scans_of_a_batch_do_not_see_each_other():
    appearance, motion, fused, *layers = random_case((3, 6, 8), dtype=torch.float32)
    together = co_attention(appearance, motion, fused, *layers)
    for scan in range(3):
        alone = co_attention(*(image[scan : scan + 1] for image in (appearance, motion, fused)), *layers)
        for ours, wanted in zip(together, alone):
            assert_close(ours[scan : scan + 1], wanted)
    empty = co_attention(*(image[:0] for image in (appearance, motion, fused)), *layers)
    assert [len(image) for image in empty] == [0, 0, 0]


@pytest.mark.parametrize("size", [(5, 33, 47), (6, 8, 2)])
def test_a_broken_scan_leaves_its_neighbours_alone(backend, size):
    """To the last bit, where sums are made in an order that depends on the size of the image alone."""
    appearance, motion, fused, *layers = random_case(size, (16, 8, 16), torch.float32)
    clean = co_attention(appearance, motion, fused, *layers)
    for image, value in ((appearance, torch.inf), (motion, torch.nan), (fused, torch.nan)):
        image[1] = value
    together = co_attention(appearance, motion, fused, *layers)
    assert together[0][1].isnan().all()
    for scan in set(range(size[0])) - {1}:
        alone = co_attention(*(image[scan : scan + 1] for image in (appearance, motion, fused)), *layers)
        for ours, wanted, before in zip(together, alone, clean):
            if backend == "reference":  # torch's convolution sums in another order for another batch
                assert_close(ours[scan], wanted[0])
            else:
                assert torch.equal(ours[scan], wanted[0])
            assert torch.equal(ours[scan], before[scan])


def test_threads_do_not_change_the_result(backend):
    if backend != "native":
        pytest.skip("the reference sums as torch does")
    case, before, results = random_case((2, 61, 200), (32, 16, 32), torch.bfloat16), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(co_attention(*case))
    finally:
        torch.set_num_threads(before)
    for images in zip(*results):
        assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


def test_large_gates_and_a_value_that_is_not_a_number():
    appearance, motion, fused, (weight, bias), *layers = random_case((1, 4, 4), dtype=torch.float32)
    for scale in (1e3, 1e30):
        case = (appearance, motion, fused * scale, (weight, bias), *layers)
        for ours, wanted in zip(co_attention(*case), expected_of(*case)):
            assert_close(ours, wanted)
    fused[0, 0, 0, 0] = torch.nan
    assert co_attention(appearance, motion, fused, (weight, bias), *layers)[0].isnan().all()


def test_refuses_what_does_not_fit():
    _, motion, fused, gate, spatial, channel = case = random_case((2, 6, 8))

    def refused(message, **changed):
        names = ("appearance", "motion", "fused", "gate", "spatial", "channel")
        with pytest.raises(ValueError, match=message):
            co_attention(**{**dict(zip(names, case)), **changed})

    refused(r"expected motion torch.float64 \[2, '\*', 6, 8\], got .* \[2, 3, 6, 7\]", motion=motion[..., :7])
    refused("expected fused torch.float64 .*, got torch.float32", fused=fused.float())
    refused(r"expected gate \[2, 4, 3, 3\] and \[2\], got \[1, 4, 3, 3\] and \[2\]", gate=(gate[0][:1], gate[1]))
    refused("expected spatial", spatial=(spatial[0][:, :2], spatial[1]))
    refused("expected channel", channel=(channel[0], channel[1][:4]))
    thin = {name: image[..., :1] for name, image in zip(("appearance", "motion", "fused"), case)}
    refused("an image of 6 x 1 pixels has no half", **thin)


@pytest.mark.skipif(not native.BUILT, reason="the native ops are not built")
def test_the_op_itself_refuses_what_it_would_read_beyond(backend):
    if backend != "native":
        pytest.skip("one backend will do")
    appearance, motion, fused, *layers = random_case((1, 4, 6), dtype=torch.float32)
    images = [native.channels_last(image) for image in (appearance, motion, fused)]
    weights = [part for layer in layers for part in layer]
    for bad in (
        [appearance, *images[1:], *weights],
        [*images[:2], images[2][..., :5], *weights],
        [*images, weights[0][:1], *weights[1:]],
        [*images, *weights[:5], weights[5].double()],
    ):
        with pytest.raises(RuntimeError, match="co_attention"):
            torch.ops.kdmos.co_attention(*bad)
