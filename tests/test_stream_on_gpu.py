"""A stream on a GPU: what the CPU says, through pinned memory, graphs and scans that have no room in them."""

import numpy as np
import pytest
import torch

from kdmos.inference import sequence_logits
from kdmos.models import load_student
from kdmos.models.fast import GraphedStudent
from kdmos.stream import MosStream

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
SCANS = 12


def drive(num_points=(30_000, 20_000, 40_000), seed=0):
    """Scans of different sizes, and a block that moves through them, with poses."""
    random = np.random.default_rng(seed)
    for frame in range(SCANS):
        points = random.normal(size=(num_points[frame % len(num_points)], 4)) * [12, 12, 0.8, 0.1]
        points[:, 3] = abs(points[:, 3]) % 1
        points[:500, :3] = random.uniform(size=(500, 3)) * [2, 1, 1.5] + [5 + frame, 3, -1]
        pose = np.eye(4)
        pose[0, 3] = 0.3 * frame
        yield points.astype(np.float32), pose


def results(stream, scans):
    found = [stream.push(points, pose, 0.1 * i) for i, (points, pose) in enumerate(scans)]
    return [result for result in found if result is not None] + stream.flush()


def agree(ours, wanted, share=0.999):
    assert [r.scan_id for r in ours] == [r.scan_id for r in wanted]
    for one, other in zip(ours, wanted):
        assert one.labels.dtype == np.uint32 and one.labels.shape == other.labels.shape
        assert (one.labels == other.labels).mean() >= share  # points between two classes, by rounding
        assert abs(one.moving_probability - other.moving_probability).mean() < 1e-3
        assert one.notes == other.notes


def test_float32_says_what_the_cpu_says():
    agree(results(MosStream(device="cuda"), drive()), results(MosStream(device="cpu"), drive()))


@pytest.mark.parametrize("smoothing", [0, 3])
def test_bfloat16_is_close(smoothing):
    ours = results(MosStream(device="cuda", precision="bfloat16", smoothing=smoothing), drive())
    agree(ours, results(MosStream(device="cpu", smoothing=smoothing), drive()), share=0.99)


def test_results_do_not_change_when_the_next_scan_comes():
    found = results(MosStream(device="cuda"), drive())
    again = results(MosStream(device="cuda"), drive())
    kept = [result.labels.copy() for result in found]
    results(MosStream(device="cuda"), drive(seed=1))
    for one, other, labels in zip(found, again, kept):
        assert np.array_equal(one.labels, other.labels) and np.array_equal(one.labels, labels)


def test_tensors_of_the_gpu_and_bad_points():
    scans = [(points, pose) for points, pose in drive()]
    scans[3][0][::7, 1] = np.nan
    scans[5] = (scans[5][0][:0], scans[5][1])
    expected = results(MosStream(device="cuda"), scans)
    there = ((torch.from_numpy(points).cuda(), pose) for points, pose in scans)
    agree(results(MosStream(device="cuda"), there), expected, share=1.0)
    agree(expected, results(MosStream(device="cpu"), scans))


@pytest.mark.parametrize("limits", [{"max_cells": 500}, {"capacity": 25_000}])
def test_scans_without_room(limits):
    """Cells beyond the graph's, or points: answered all the same."""
    student = load_student("synthetic", "cuda")
    stream = MosStream(GraphedStudent(student, **limits), device="cuda")
    agree(results(stream, drive()), results(MosStream(device="cpu"), drive()))


def test_a_scan_does_not_wait_before_its_labels():
    """From the points to the launch of the last kernel the host reads nothing back."""
    stream = MosStream(device="cuda")
    scans = list(drive())
    for points, pose in scans[:9]:
        stream.push(points, pose)
    decide, stream._way_out.decide = stream._way_out.decide, lambda logits, *_: (np.zeros(len(logits), np.uint32),) * 2
    torch.cuda.set_sync_debug_mode("error")
    try:
        stream.push(*scans[9])
    finally:
        torch.cuda.set_sync_debug_mode("default")
        stream._way_out.decide = decide


def test_offline_says_the_same():
    class Drive:
        """As little of a source as `sequence_logits` asks for."""

        frames = range(SCANS)

        def __init__(self):
            self.scans = list(drive())

        def poses(self):
            return np.stack([pose for _, pose in self.scans])

        def read_points(self, frame):
            return self.scans[frame][0]

        def scan(self, frame):
            return frame

        where = scan

    graphed = GraphedStudent(load_student("synthetic", "cuda"))
    online = results(MosStream(graphed, device="cuda"), drive())
    offline = list(sequence_logits(graphed, Drive(), "cuda"))
    for result, (_, scan) in zip(online, offline):
        assert np.array_equal(result.labels == 251, scan.logits.argmax(1).cpu().numpy() == graphed.moving)
