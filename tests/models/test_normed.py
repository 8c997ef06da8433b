"""Layers, norms and activations as one step of autograd: against the modules called one after another."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from kdmos.models import blocks, student
from kdmos.models.blocks import ConvBlock
from kdmos.models.normed import can_be_joined
from kdmos.models.student import PointMlp
from kdmos.ops import native

SIZES = ((2, 3, 9, 12), (2, 5, 8, 11))  # an image and a smaller one beside it


@pytest.fixture(autouse=True, params=native.BACKENDS)
def backend(request):
    if request.param == "native" and not native.BUILT:
        pytest.skip("the native ops are not built")
    with native.backend(request.param):
        yield request.param


@pytest.fixture
def plainly(monkeypatch):
    """plainly(module, *inputs): a call of the modules one after another."""

    def call(module, *inputs):
        with monkeypatch.context() as patch:
            for where in (blocks, student):
                patch.setattr(where, "can_be_joined", lambda norm: False)
            return module(*inputs)

    return call


def random(*size, seed=0, dtype=torch.float64):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def conv_block(dtype=torch.float64, depth=2):
    """Norms that neither multiply by one nor begin at zero."""
    torch.manual_seed(0)
    return varied(ConvBlock(sum(size[1] for size in SIZES), 16, depth).to(dtype))


def varied(module):
    for index, norm in enumerate(m for m in module.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)):
        for values, factor in ((norm.weight, 0.3), (norm.bias, 0.3), (norm.running_mean, 1.0)):
            values.data += factor * random(len(values), seed=index, dtype=values.dtype)
        norm.running_var.data += 0.5
    return module


def images(dtype=torch.float64):
    return [random(*size, seed=i, dtype=dtype).requires_grad_() for i, size in enumerate(SIZES)]


def assert_same_buffers(module, other):
    assert dict(module.named_buffers()).keys() == dict(other.named_buffers()).keys()
    for name, buffer in module.named_buffers():
        assert_close(buffer, other.get_buffer(name), msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_conv_block(plainly, depth):
    """Output, gradients of the inputs and of every parameter, and what the norms remember, over two steps."""
    block, inputs = conv_block(depth=depth), images()
    other = deepcopy(block)
    for step in range(2):
        out, expected = block(*inputs), plainly(other, *inputs)
        assert_close(out, expected)
        upstream = random(*out.shape, seed=7 + step)
        gradients = torch.autograd.grad(out, [*inputs, *block.parameters()], upstream)
        wanted = torch.autograd.grad(expected, [*inputs, *other.parameters()], upstream)
        for ours, theirs in zip(gradients, wanted):
            assert_close(ours, theirs)
        assert_same_buffers(block, other)
    assert block[0].norm.num_batches_tracked == 2


def test_point_mlp(plainly):
    torch.manual_seed(0)
    mlp = varied(PointMlp().double())
    other = deepcopy(mlp)
    features, start = random(50, 9), torch.tensor([0, 4, 30, 50])
    out, expected = mlp(features, start), plainly(other, features, start)
    assert_close(out, expected)
    upstream = random(*out.shape, seed=3)
    for ours, wanted in zip(
        torch.autograd.grad(out, mlp.parameters(), upstream),
        torch.autograd.grad(expected, other.parameters(), upstream),
    ):
        assert_close(ours, wanted)
    assert_same_buffers(mlp, other)


def test_autocast(plainly):
    """Convolutions in bfloat16: as far from float64 as the modules one after another are."""
    block, inputs = conv_block(torch.float32), images(torch.float32)
    truth = deepcopy(block).double()
    exact = plainly(truth, *(image.double() for image in inputs))
    upstream = random(*exact.shape, seed=7, dtype=torch.bfloat16)
    wanted = torch.autograd.grad(exact, truth.parameters(), upstream.double())
    errors = []
    for call in (lambda module, *inputs: module(*inputs), plainly):
        copy = deepcopy(block)
        with torch.autocast("cpu", torch.bfloat16):
            out = call(copy, *inputs)
        assert out.dtype == torch.bfloat16
        gradients = torch.autograd.grad(out, [*inputs, *copy.parameters()], upstream)
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        pairs = [(out, exact), *zip(gradients[len(inputs) :], wanted)]
        errors.append([(a.double() - b).norm().item() / max(1.0, b.norm().item()) for a, b in pairs])
    assert all(ours <= 1.05 * theirs + 0.001 for ours, theirs in zip(*errors))


@pytest.mark.parametrize("needy", [(), (0,), (1,)])
def test_parts_that_need_no_gradient(plainly, needy):
    block, inputs = conv_block(), [image.detach() for image in images()]
    for index in needy:
        inputs[index].requires_grad_()
    leaves = [inputs[index] for index in needy]
    out, expected = block(*inputs), plainly(deepcopy(block), *inputs)
    upstream = random(*out.shape, seed=7)
    out.backward(upstream)
    assert [image.grad is not None for image in inputs] == [index in needy for index in range(2)]
    for leaf, wanted in zip(leaves, torch.autograd.grad(expected, leaves, upstream) if leaves else ()):
        assert_close(leaf.grad, wanted)


def test_frozen_parameters_get_no_gradient():
    block, inputs = conv_block(), images()
    block[0].conv.requires_grad_(False)
    block(*inputs).sum().backward()
    assert block[0].conv.weight.grad is None
    assert block[1].conv.weight.grad is not None


def test_evaluation_is_untouched(plainly):
    block, inputs = conv_block().eval(), images()
    before = deepcopy(block)
    assert torch.equal(block(*inputs), plainly(block, *inputs))
    assert_same_buffers(block, before)


def test_what_can_be_joined():
    assert can_be_joined(nn.BatchNorm2d(3))
    assert can_be_joined(nn.BatchNorm1d(3))
    others = [nn.BatchNorm2d(3).eval(), nn.SyncBatchNorm(3), nn.GroupNorm(1, 3), nn.BatchNorm2d(3, momentum=None)]
    others += [nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, track_running_stats=False)]
    assert not any(can_be_joined(norm) for norm in others)


def test_another_norm_is_called_itself():
    block, inputs = conv_block(), images()
    block[1].norm.momentum = None  # the mean over all batches
    block(*inputs)
    block(*inputs)
    assert block[0].norm.num_batches_tracked == block[1].norm.num_batches_tracked == 2


def test_a_third_is_kept_for_the_backward(plainly):
    """One image a layer, where torch keeps three: padded input, output of the convolution, activation."""
    block, image = conv_block(torch.float32), random(2, 8, 24, 30, dtype=torch.float32)
    parameters = {p.untyped_storage().data_ptr() for p in [*block.parameters(), *block.buffers(), image]}

    def kept(call):
        storages = {}

        def see(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[storage.data_ptr()] = storage.nbytes(), tensor  # held: its address stays its own
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
            out = call()
        storages.pop(out.untyped_storage().data_ptr(), None)  # of what comes after
        return sum(size for size, _ in storages.values())

    one = 2 * 16 * 24 * 30 * 4  # bytes
    ours = kept(lambda: block(image))
    assert 2 * one <= ours < 2.02 * one
    plain = kept(lambda: plainly(block, image))
    assert plain > 3 * one + one // 2  # both outputs, both padded inputs, the first activation


def test_a_single_value_has_no_variance():
    with pytest.raises(ValueError, match="more than one value a channel"):
        ConvBlock(3, 4)(torch.zeros(1, 3, 1, 1))
    block = conv_block()
    with pytest.raises(ValueError, match="more than one value a channel"):
        block(torch.zeros(1, 8, 1, 1, dtype=torch.float64))
    assert block[0].norm.num_batches_tracked == 0


def test_no_rows_leave_the_statistics_alone(plainly):
    torch.manual_seed(0)
    mlp = varied(PointMlp())
    other = deepcopy(mlp)
    out = mlp(torch.zeros(0, 9), torch.tensor([0]))
    expected = plainly(other, torch.zeros(0, 9), torch.tensor([0]))
    assert out.shape == expected.shape == (0, 256)
    assert_same_buffers(mlp, other)
