"""The native ops as torch sees them: schemas, fakes, gradients, compilation, types, and the choice of a backend."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import _disable_current_modes

import kdmos
from kdmos import ops
from kdmos.ops import native
from kdmos.settings import PolarGrid, ResidualGrid

GRID = PolarGrid(bins=(16, 20, 8))
needs_native = pytest.mark.skipif(not native.BUILT, reason="the native ops are not built")
LIMITS = ([6, 8], [60.0, -4.0, 2.0, 0.2, 0.4, 4.0])


def cloud(num_points=200, seed=0):
    return torch.randn(num_points, 4, generator=torch.Generator().manual_seed(seed)) * 12


def random(*size, seed=0, grad=False, dtype=torch.float64):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_(grad)


def image(*size, seed=0, grad=False):
    batch, channels, height, width = size
    x = random(batch, height, width, channels, seed=seed).permute(0, 3, 1, 2)
    return x.requires_grad_(grad)


def samples():
    """op -> arguments, small and of every kind the wrappers pass."""
    cell = torch.randint(0, 7, (50,), generator=torch.Generator().manual_seed(1))
    order = tuple(torch.ops.kdmos.sort_by_cell(cell, 7)) if native.BUILT else (None, None)
    rows, start = random(50, 5, grad=True), order[1]
    grid = (list(GRID.lower), list(GRID.upper), list(GRID.interval), list(GRID.bins))
    eye = torch.eye(4, dtype=torch.float64)
    voxels = torch.tensor([3, 4, 40, 2559])
    labels = torch.randint(0, 4, (50,), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    scans = [cloud(20, seed)[:, :3].contiguous() for seed in range(4)]
    scan = [random(*size, grad=True) for size in ((70, 5), (70, 5), (5, 3), (70, 3), (70, 3), (5,), (70, 5), (5,))]
    scan[2] = (-scan[2].detach().exp()).requires_grad_()
    statistics = (random(5), random(5, seed=1).square(), random(5, seed=2), random(5, seed=3))
    return {
        "polar_grid": (cloud(), torch.tensor([0, 120, 200]), *grid),
        "sort_by_cell": (cell, 7),
        "voxel_label": (labels, *order, 4),
        "polar_scatter": (rows, *order),
        "polar_scatter_backward": (random(7, 5), torch.zeros(7, 5, dtype=torch.int64), *order, 50),
        "polar_scatter_bev": (rows.detach(), *order, torch.arange(7) * 2, 20),
        "cell_max": (rows.detach(), *order),
        "cells_to_bev": (random(7, 5, grad=True), torch.arange(7) * 2, 20),
        "height_residual": (
            scans,
            eye.repeat(4, 1, 1),
            *LIMITS,
            [2, 4, 0, 2],
            [1, 3],
            [torch.zeros(20, 3), torch.zeros(20, 1)],
            [2, 0],
        ),
        "cells_to_image": (
            random(7, 5, dtype=torch.float32),
            torch.arange(7) * 2,
            random(5, seed=1, dtype=torch.float32),
            random(5, seed=2, dtype=torch.float32),
            20,
            torch.bfloat16,
        ),
        "copy_scan": (cloud(20), torch.zeros(20, 4), 2.0),
        "label_points": (
            random(50, 4).float(),
            3,
            [0, 9, 250, 251],
            torch.zeros(50, dtype=torch.uint32),
            torch.zeros(50),
        ),
        "bias_activation": (image(2, 3, 4, 5), random(3), 0.01),
        "height_residual_sequence": (scans, eye.repeat(3, 2, 1, 1), *LIMITS),
        "selective_scan": (*scan, torch.tensor([0, 20, 70]), True),
        "selective_scan_backward": (
            random(70, 5, seed=1),
            *(t.detach() for t in scan),
            torch.tensor([0, 20, 70]),
            random(2, 3, 5, seed=2),
        ),
        "dysample": (image(2, 8, 3, 5, grad=True), image(2, 32, 3, 5, seed=1, grad=True), 2, 4, False),
        "dysample_backward": (image(2, 8, 6, 10), image(2, 8, 3, 5), image(2, 32, 3, 5, seed=1), 2, 4, False),
        "voxel_head": (image(1, 6, 16, 20, grad=True), voxels, random(24, 6, grad=True), random(24, grad=True), 8),
        "voxel_head_backward": (random(4, 3), image(1, 6, 16, 20), voxels, random(24, 6), 8),
        "wdcd_loss": (random(50, 4, grad=True), random(50, 4, seed=1), labels, random(3, 4), None, 4.0, 1, 0.0, True),
        "add_rows": (random(7, 5), cell[:20], random(20, 5)),
        "masked_conv": (
            [image(2, 4, 4, 5).float(), image(2, 2, 4, 5, seed=1).float()],
            random(16, 6, 3, 3, dtype=torch.float32),
            random(16, dtype=torch.float32),
            0.01,
            torch.ones(2, 4, 5, dtype=torch.uint8).tril(),
            0,
            True,
        ),
        "mlp_max": (
            random(50, 9, dtype=torch.float32),
            [random(32, 9, dtype=torch.float32), random(32, 32, dtype=torch.float32)],
            [random(32, dtype=torch.float32)],
            *order,
        ),
        "winograd_conv": (
            [image(2, 32, 5, 6).float(), image(2, 16, 4, 5, seed=1).float()],
            random(16, 1, 48, 32, 1, dtype=torch.float32),
            random(32, dtype=torch.float32),
            0.01,
        ),
        "wrap_around": ([image(2, 3, 4, 5, grad=True), image(2, 2, 4, 5, seed=1, grad=True)], 1),
        "wrap_around_backward": (image(2, 5, 4, 7), [3, 4, 5, 2, 4, 5], 1),
        "co_attention": (
            *(image(2, channels, 5, 6, seed=channels) for channels in (4, 3, 2)),
            *(random(*size) for size in ((2, 2, 3, 3), (2,), (1, 3, 1, 1), (1,), (4, 4, 1, 1), (4,))),
        ),
        "norm_activation": (rows, random(5, seed=1, grad=True), random(5, seed=2, grad=True), 1e-5, 0.01),
        "norm_activation_again": (rows.detach(), *statistics, 1e-5, 0.01),
        "norm_activation_backward": (random(50, 5, seed=3), rows.detach(), *statistics, 1e-5, 0.01),
    }, start


@needs_native
@pytest.mark.parametrize("op", sorted(samples()[0]))
def test_opcheck(op, backend):
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"kdmos::{op}", "CPU"):
        pytest.skip("this build has no vector instructions for it")
    if backend == "native":
        torch.library.opcheck(getattr(torch.ops.kdmos, op).default, samples()[0][op])


@needs_native
def test_opcheck_of_fixed_size(backend):
    if backend == "native":
        points, _, *grid = samples()[0]["polar_grid"]
        torch.library.opcheck(torch.ops.kdmos.polar_grid.default, (points, torch.tensor([0, 50, 120]), *grid, True))


@needs_native
def test_every_op_is_checked():
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "kdmos::" in name}
    assert names == set(samples()[0])


def pipeline(points, offsets, residual, x, offset, weight, bias):
    """Every differentiable op once."""
    gridded = ops.polar_grid(points, offsets, GRID)
    cells = gridded.cells.shape[0]
    maximum, _ = ops.polar_scatter(residual, gridded.cell_rank, cells, gridded.by_cell)
    bev = ops.cells_to_bev(maximum, gridded.cells, 1, GRID)
    features = ops.wrap_around([bev, ops.dysample(x, offset, 2, 2)], 1)[..., 1:-1]
    logits = ops.voxel_head(features, gridded.voxels, weight, bias, GRID)
    tables = torch.tensor([[0.0, 0, 0, 1], [0, 1, 1, 1], [0, 1, 1, 1]]).unbind()
    return ops.wdcd_loss(
        logits, logits.detach() * 0.5, torch.ones_like(logits[:, 0], dtype=torch.uint8), *tables, 4.0, "point"
    )


def inputs():
    x, offset = random(1, 4, 8, 10, dtype=torch.float32), random(1, 16, 8, 10, seed=1, dtype=torch.float32)
    weight, bias = random(32, 7, 1, 1, dtype=torch.float32), random(32, dtype=torch.float32)
    leaves = [random(200, 3, dtype=torch.float32), x, offset, weight, bias]
    return [cloud(), torch.tensor([0, 200]), *(leaf.requires_grad_() for leaf in leaves)]


@needs_native
def test_compiles_without_graph_breaks(backend):
    if backend != "native":
        pytest.skip("the reference is plain torch")
    arguments = inputs()
    eager = pipeline(*arguments)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(pipeline, fullgraph=True, backend="aot_eager")(*arguments)
    assert_close(compiled, eager)
    leaves = arguments[2:]
    for ours, wanted in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves)):
        assert_close(ours, wanted)


@needs_native
def test_backends_agree_forward_and_backward(backend):
    arguments = inputs()
    loss = pipeline(*arguments)
    with native.backend("reference"):
        expected = pipeline(*arguments)
    assert_close(loss, expected)
    leaves = arguments[2:]
    for ours, wanted in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)):
        assert_close(ours, wanted)


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_the_result(threads, backend):
    """Bit for bit, gradients included: sums are made in an order of their own."""
    if backend != "native":
        pytest.skip("the reference sums as torch does")
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            x, offset = image(1, 8, 40, 12, grad=True), image(1, 32, 40, 12, seed=1, grad=True)
            out = ops.dysample(x, offset)
            head, bias = random(32, 8, 1, 1, grad=True), random(32, grad=True)
            voxels = torch.arange(0, 16 * 20 * 8, 3)
            logits = ops.voxel_head(out[:, :, :16, :20], voxels, head, bias, GRID)
            results.append([logits, *torch.autograd.grad(logits.square().sum(), (x, offset, head, bias))])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results))


@needs_native
def test_ops_run_elsewhere_forward_and_backward(on_device, backend):
    """What the CUDA tests rely on, here with the CPU as the other device."""
    if backend != "native":
        pytest.skip("one backend will do")
    arguments = inputs()
    expected = pipeline(*arguments)
    wanted = torch.autograd.grad(expected, arguments[2:])
    with on_device("cpu") as elsewhere:
        loss = pipeline(*arguments)
        forward = elsewhere.calls
        gradients = torch.autograd.grad(loss, arguments[2:])
    assert (forward, elsewhere.calls) == (7, 11)
    assert torch.equal(loss, expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients, wanted))


@needs_native
def test_indices_that_would_read_elsewhere_are_refused(backend):
    if backend != "native":
        pytest.skip("torch checks its own")
    features, weight = torch.zeros(1, 6, 16, 20), torch.zeros(24, 6, 1, 1)
    for voxels in ([3, 2561], [2560, 3], [-1, 3], [-1, 2560], [4, 3]):  # 2560 itself ends them as padding
        with pytest.raises(RuntimeError, match="voxel_head: voxels must ascend within 0 and 2560"):
            ops.voxel_head(features, torch.tensor(voxels), weight, torch.zeros(24), GRID)
    for cells in ([3, 321], [320, 3], [4, 3]):
        with pytest.raises(RuntimeError, match="cells must ascend within 0 and 320"):
            ops.cells_to_bev(torch.zeros(2, 1), torch.tensor(cells), 1, GRID)


POINTED = ["add_rows", "cell_max", "cells_to_bev", "polar_scatter", "polar_scatter_backward", "polar_scatter_bev"]
POINTED += [
    "selective_scan",
    "selective_scan_backward",
    "voxel_head",
    "voxel_head_backward",
    "voxel_label",
    "wdcd_loss",
]


@needs_native
@pytest.mark.parametrize("op", POINTED)
def test_tensors_that_would_be_read_wrongly_are_refused(op, backend):
    """One after the other of another type or with holes; on a GPU also on another device: ops read raw memory."""
    if backend == "reference":
        pytest.skip("torch checks its own")
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in samples()[0][op]]
    call, name = getattr(torch.ops.kdmos, op), op.removesuffix("_backward")
    places = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)]
    single = sum(arguments[i].is_floating_point() for i in places) == 1  # sets the type
    on_a_gpu = backend == "cuda" and "KDMOS_CUDA_ON_HOST" not in os.environ
    for i in places:
        tensor, wrong = arguments[i], []
        if not (single and tensor.is_floating_point()):
            wrong.append(tensor.half() if tensor.is_floating_point() else tensor.int())
        if not on_a_gpu:  # on its way there a copy closes the holes
            wrong.append(torch.stack([tensor, tensor], -1)[..., 0])
        for other in wrong:
            with pytest.raises(RuntimeError, match=name):
                call(*arguments[:i], other, *arguments[i + 1 :])
        if on_a_gpu and len(places) > 1:
            there = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
            with _disable_current_modes(), pytest.raises(RuntimeError, match=name):
                call(*there[:i], tensor, *there[i + 1 :])


def test_choosing_a_backend(backend):
    inside = []
    with native.backend("reference"):
        inside.append(native._chosen)
    assert inside == ["reference"]
    assert native._chosen == ("reference" if backend == "reference" else "native")
    with pytest.raises(ValueError, match=r"backend must be one of \('native', 'reference'\), got 'cuda'"):
        native.backend("cuda")


@needs_native
def test_without_the_library_there_is_one_warning_and_plain_torch(tmp_path):
    """A copy of the package without its compiled part."""
    folder = Path(kdmos.__file__).parent
    shutil.copytree(folder, tmp_path / "kdmos", ignore=shutil.ignore_patterns("*.so", "weights", "__pycache__"))
    code = (
        "import torch, kdmos.ops, kdmos.models; from kdmos.ops import native;"
        "print(kdmos.ops.polar_scatter(torch.ones(2, 1), torch.tensor([0, 0]), 1)[0].item(), native.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1.0", str(tmp_path / "kdmos/ops/native.py")]
    assert done.stderr.count("kdmos: the native ops are not built; plain torch is used instead") == 1


def test_residual_forms_agree():
    """The sequence form is the one-step form, step by step."""
    generator = torch.Generator().manual_seed(3)
    scans = [torch.randn(n, 3, generator=generator) * 10 for n in (300, 200, 0, 250, 310, 290)]
    transforms = torch.eye(4, dtype=torch.float64).repeat(3, 4, 1, 1)
    transforms[:, :, :3, 3] = torch.randn(3, 4, 3, generator=generator, dtype=torch.float64)
    grid = ResidualGrid(rows=12, columns=16)
    together = ops.height_residual_sequence(scans, transforms, grid).split([len(scan) for scan in scans])
    assert sum(part.count_nonzero() for part in together) > 50
    expected = [torch.zeros(len(scan), 4) for scan in scans]
    for step in range(3):
        window = scans[step : step + 4]
        residual = ops.height_residual(window, transforms[step], grid, (2, 4), ((0, 2),), (0, 4))
        for i, part in enumerate(residual[:, 0].split([len(scan) for scan in window])):
            expected[step + i][:, 3 - i] = part
    for ours, wanted in zip(together, expected):
        assert torch.equal(ours, wanted)
    with pytest.raises(ValueError, match="height_residual_sequence: expected transforms"):
        ops.height_residual_sequence(scans, transforms[:2], grid)


def test_linear_max_never_differs_from_the_whole_product():
    rows, weight, bias = random(9000, 6, grad=True), random(5, 6, seed=1, grad=True), random(5, seed=2, grad=True)
    sizes = torch.randint(1, 40, (9000,), generator=torch.Generator().manual_seed(4)).cumsum(0)
    start = torch.cat([torch.tensor([0]), sizes[sizes < 9000], torch.tensor([9000])])
    cell = torch.repeat_interleave(start.diff())
    out = ops.linear_max(rows, weight, bias, start)
    with native.backend("reference"):
        expected, _ = ops.polar_scatter(rows @ weight.T + bias, cell, len(start) - 1)
    assert_close(out, expected)
    upstream = random(*out.shape, seed=5)
    inputs = (rows, weight, bias)
    for ours, wanted in zip(*(torch.autograd.grad(result, inputs, upstream) for result in (out, expected))):
        assert_close(ours, wanted)
