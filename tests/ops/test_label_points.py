"""Labels and moving probabilities from logits: by hand, against argmax and softmax, ties, NaN, pinned memory."""

import math

import pytest
import torch
from torch.testing import assert_close

from kdmos.ops import label_points, native

NAN, INF = math.nan, math.inf
needs_native = pytest.mark.skipif(not native.BUILT, reason="the native ops are not built")


def labelled(logits, moving, raw):
    labels = torch.full((len(logits),), 77, dtype=torch.uint32)
    probability = torch.full((len(logits),), 7.0)
    label_points(logits, moving, raw, labels, probability)
    return labels.long(), probability


def decided(logits, moving):
    """Class and moving probability, as torch has them."""
    return logits.argmax(1), logits.softmax(1)[:, moving]


def random_logits(num_points, num_classes, seed=0):
    return torch.randn(num_points, num_classes, generator=torch.Generator().manual_seed(seed)) * 5


@pytest.mark.parametrize(
    ("logits", "label", "probability"),
    [
        ((0.0, 0.0, math.log(2)), 251, 0.5),
        ((1.0, 1.0, 0.0), 0, 1 / (1 + 2 * math.e)),  # a tie: the first
        ((0.0, 1.0, 1.0), 9, math.e / (1 + 2 * math.e)),
        ((3.0, 3.0, 3.0), 0, 1 / 3),
        ((100.0, 0.0, -100.0), 0, 0.0),
        ((0.0, 0.0, 1000.0), 251, 1.0),
        ((-1000.0, -1001.0, -1001.0), 0, 1 / (math.e + 2)),
        ((-INF, 0.0, 0.0), 9, 0.5),
        ((0.0, INF, 0.0), 9, NAN),  # as torch's softmax
        ((-INF, -INF, -INF), 0, NAN),
        ((0.0, NAN, 5.0), 9, NAN),  # NaN is the largest, as in torch; of several the first
        ((NAN, NAN, INF), 0, NAN),
        ((1.0, INF, NAN), 251, NAN),
    ],
)
def test_a_point_worked_by_hand(logits, label, probability):
    points = torch.tensor([[0.0, 1.0, 0.0], logits, [0.0, 0.0, 1.0]])
    labels, found = labelled(points, 2, [0, 9, 251])
    assert labels.tolist() == [9, label, 251]
    assert_close(found[1], torch.tensor(probability), atol=1e-6, rtol=0, equal_nan=True)


@pytest.mark.parametrize("num_classes", [1, 2, 3, 4, 5, 20, 32])
@pytest.mark.parametrize("num_points", [0, 1, 127, 128, 129, 1001])
def test_equals_what_inference_decides(num_points, num_classes):
    logits = random_logits(num_points, num_classes)
    logits[num_points // 2 :] = logits[num_points // 2 :].round()  # ties
    raw = [7 * k + 3 for k in range(num_classes)]
    for moving in {0, num_classes // 2, num_classes - 1}:
        labels, probability = labelled(logits, moving, raw)
        classes, expected = decided(logits, moving)
        assert torch.equal(labels, torch.tensor(raw)[classes])
        assert_close(probability, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_classes", [2, 3, 4, 6])
def test_logits_that_are_no_numbers(num_classes):
    logits = random_logits(400, num_classes)
    generator = torch.Generator().manual_seed(1)
    odd = torch.tensor([NAN, INF, -INF, -0.0])[torch.randint(0, 4, logits.shape, generator=generator)]
    logits = torch.where(torch.rand(logits.shape, generator=generator) < 0.3, odd, logits)
    labels, probability = labelled(logits, 1, list(range(num_classes)))
    classes, expected = decided(logits, 1)
    assert torch.equal(labels, classes)
    assert_close(probability, expected, atol=1e-6, rtol=0, equal_nan=True)


@pytest.mark.parametrize("num_classes", [2, 3, 4])
def test_memory_that_begins_anywhere(num_classes):
    logits = random_logits(1, 200 * num_classes + 1)[0, 1:].view(200, num_classes)
    labels, probability = labelled(logits, 0, [9] * (num_classes - 1) + [251])
    classes, expected = decided(logits, 0)
    assert torch.equal(labels == 251, classes == num_classes - 1)
    assert_close(probability, expected, atol=1e-6, rtol=0)


def test_the_largest_label_and_other_rows():
    """Logits of every other row are copied first; labels use all of their 32 bits."""
    logits = random_logits(20, 2)[::2]
    labels, _ = labelled(logits, 1, [0, (1 << 32) - 1])
    assert labels.tolist() == [((1 << 32) - 1) * k for k in logits.argmax(1).tolist()]


def test_writes_into_a_part_and_nothing_else():
    labels, probability = torch.full((30,), 77, dtype=torch.uint32), torch.full((30,), 7.0)
    label_points(random_logits(10, 4), 3, [0, 9, 250, 251], labels[5:15], probability[5:15])
    for outside in (labels.long() == 77, probability == 7):
        assert outside.nonzero().flatten().tolist() == [*range(5), *range(15, 30)]


def test_many_points_on_any_number_of_threads():
    logits, before, results = random_logits(100_001, 3), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(labelled(logits, 2, [0, 9, 251]))
    finally:
        torch.set_num_threads(before)
    for labels, probability in results[1:]:
        assert torch.equal(labels, results[0][0])
        assert torch.equal(probability, results[0][1])


def test_refuses_what_does_not_fit():
    logits, labels, probability = torch.zeros(3, 2), torch.zeros(3, dtype=torch.uint32), torch.zeros(3)
    for wrong in (torch.zeros(3), torch.zeros(3, 33), torch.zeros(3, 0), torch.zeros(3, 2).double()):
        with pytest.raises(ValueError, match=r"label_points: expected logits float32 \[n, 1..32\]"):
            label_points(wrong, 1, [9, 251], labels, probability)
    for moving, raw in ((2, [9, 251]), (-1, [9, 251]), (1, [9]), (1, [9, -1]), (1, [9, 1 << 32])):
        with pytest.raises(ValueError, match="label_points: expected 2 raw labels"):
            label_points(logits, moving, raw, labels, probability)
    for wrong in (labels.int(), labels[:2], torch.zeros(6, dtype=torch.uint32)[::2]):
        with pytest.raises(ValueError, match="label_points: expected labels"):
            label_points(logits, 1, [9, 251], wrong, probability)
    for wrong in (probability.half(), probability[:2], torch.zeros(6)[::2]):
        with pytest.raises(ValueError, match="label_points: expected probability"):
            label_points(logits, 1, [9, 251], labels, wrong)


@needs_native
def test_the_op_refuses_what_it_would_read_wrongly(backend):
    if backend == "reference":
        pytest.skip("torch checks its own")
    logits, labels, probability = torch.zeros(3, 2), torch.zeros(3, dtype=torch.uint32), torch.zeros(3)
    for arguments in (
        (logits.T, 1, [9, 251], labels, probability),
        (logits, 2, [9, 251], labels, probability),
        (logits, 0, [9], labels, probability),
        (logits, 1, [9, 251], labels.int(), probability),
        (logits, 1, [9, 251], labels[:2], probability),
        (logits, 1, [9, 251], labels, probability.double()),
    ):
        with pytest.raises(RuntimeError, match="label_points"):
            torch.ops.kdmos.label_points(*arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("num_classes", [2, 3, 4, 5])
def test_a_gpu_writes_into_pinned_memory(num_classes, backend):
    if backend != "cuda":
        pytest.skip("of the CUDA kernel")
    logits, raw = random_logits(10_001, num_classes), list(range(9, 9 + num_classes))
    labels = torch.zeros(10_001, dtype=torch.uint32, pin_memory=True)
    probability = torch.zeros(10_001, pin_memory=True)
    label_points(logits.cuda(), 1, raw, labels, probability)
    torch.cuda.current_stream().synchronize()
    classes, expected = decided(logits, 1)
    assert torch.equal(labels.long(), torch.tensor(raw)[classes])
    assert_close(probability, expected, atol=1e-6, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_refuses_memory_that_is_not_pinned(backend):
    if backend != "native":
        pytest.skip("without the fixture, which would move it to the GPU")
    labels, probability = torch.zeros(3, dtype=torch.uint32), torch.zeros(3, pin_memory=True)
    with pytest.raises(RuntimeError, match="label_points: labels lies in host memory that is not pinned"):
        label_points(torch.zeros(3, 2, device="cuda"), 1, [9, 251], labels, probability)
