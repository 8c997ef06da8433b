"""MambaMOS on a GPU: the same logits and gradients as on the CPU."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from kdmos.data.multi_scan import VoxelBatch
from kdmos.models import build_teacher, load_teacher
from kdmos.precision import products

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def moved(batch, device):
    return VoxelBatch(*(tensor.to(device) for tensor in (batch.grid, batch.features, batch.offsets)))


def test_logits_and_gradients_of_the_golden(golden):
    content = np.load(golden("a7_mambamos_small.npz"))
    grid, features = torch.from_numpy(content["grid_coord"]).long(), torch.from_numpy(content["feat"])
    batch = VoxelBatch(grid, features, F.pad(torch.from_numpy(content["offset"]), (1, 0)))
    teacher = load_teacher(golden("a7_mambamos_small_state_dict.pt"))
    teacher.use_backend("native")
    results = {}
    for device in ("cpu", "cuda"):
        teacher = teacher.to(device)
        with products(tf32=False):
            logits = teacher(moved(batch, device))
            gradients = torch.autograd.grad(logits.square().sum(), list(teacher.parameters()))
        results[device] = [tensor.cpu() for tensor in (logits, *gradients)]
    # float32 sums in other orders, through some twenty layers
    assert_close(results["cuda"][0], results["cpu"][0], atol=1e-4, rtol=1e-4)
    for ours, expected in zip(results["cuda"][1:], results["cpu"][1:]):
        assert (ours - expected).abs().max() <= 1e-3 * expected.abs().max() + 1e-5


@torch.inference_mode()
def test_points_of_a_scan():
    torch.manual_seed(0)
    teacher = build_teacher(
        num_scans=3,
        voxel=0.5,
        encoder_depths=(1, 1),
        encoder_channels=(16, 16),
        decoder_depths=(1,),
        decoder_channels=(16,),
    ).eval()
    teacher.use_backend("native")
    scans = [torch.randn(4000, 4) * 10 for _ in range(3)]
    poses = torch.eye(4, dtype=torch.float64).repeat(3, 1, 1)
    expected = teacher.point_logits(scans, poses)
    logits = teacher.cuda().point_logits([scan.cuda() for scan in scans], poses)
    assert_close(logits.cpu(), expected, atol=1e-4, rtol=1e-4)  # float32 sums in another order
