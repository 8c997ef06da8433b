"""Decoupled distillation: against its definition, one point at a time, for every table and normaliser."""

import math
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from kdmos.ops import wdcd_loss

NORMALISERS = ("point", "weight", "class")
# (tckd, nckd, weight) per class
TABLES = {
    "moving": ((0, 0, 0, 1), (0, 3, 3, 3), (0, 1, 1, 1)),
    "authors": ((0, 0, 0, 1), (0, 3, 3, 3), (0.0, 1.0716, 22.0882, 421.3364)),
    "mixed": ((0.5, 0, 2, 1), (1, 0, 3, 0.25), (0.1, 2, 0, 7)),
    "tckd only": ((1, 1, 1, 1), (0, 0, 0, 0), (1, 1, 1, 1)),
}


def softmax(logits):
    weights = [math.exp(value - max(logits)) for value in logits]
    return [weight / sum(weights) for weight in weights]


def divergence(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q))


def by_hand(student, teacher, labels, tckd, nckd, weight, temperature, normaliser, offsets=None, floor=0.0):
    """The definition in scalar float64, no array operation."""
    num_points, num_classes = len(labels), len(weight)
    offsets = [0, num_points] if offsets is None else list(offsets)
    labelled = [i for i in range(num_points) if 0 <= labels[i] < num_classes]
    loss = 0.0
    for start, stop in pairwise(offsets):
        for i in (i for i in labelled if start <= i < stop):
            t = int(labels[i])
            s, z = ([float(v) / temperature for v in row[i]] for row in (student, teacher))
            p, r = softmax(s), softmax(z)
            rest = [c for c in range(num_classes) if c != t]
            wrong = sum(p[c] for c in rest)
            target = divergence((r[t], sum(r[c] for c in rest)), (p[t] + floor, wrong + (num_classes - 1) * floor))
            others = divergence(softmax([z[c] for c in rest]), softmax([s[c] for c in rest]))
            if normaliser == "point":
                by_target = by_others = sum(weight[labels[j]] != 0 for j in labelled)
            elif normaliser == "weight":
                by_target = sum(weight[labels[j]] for j in labelled if tckd[labels[j]] != 0)
                by_others = sum(weight[labels[j]] for j in labelled)
            else:
                same = sum(labels[j] == t for j in labelled if start <= j < stop)
                by_target = by_others = same * (len(offsets) - 1)
            loss += tckd[t] * weight[t] * target / by_target if by_target else 0.0
            loss += nckd[t] * weight[t] * others / by_others if by_others else 0.0
    return loss


def random_case(num_points=60, num_classes=4, seed=0, dtype=torch.float64):
    """Logits, and labels with points of no class (255) among them."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, num_points, num_classes, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(0, num_classes, (num_points,), generator=generator)
    labels[::7] = 255
    return student.to(dtype), teacher.to(dtype), labels


def tensors(table, dtype=torch.float64):
    return [torch.tensor(values, dtype=dtype) for values in table]


@pytest.mark.parametrize("floor", [0.0, 1e-8, 1e-2])
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_equals_the_definition(normaliser, table, floor):
    student, teacher, labels = random_case()
    # four scans: the second one without a point, the third without a labelled one
    labels[25:30] = 255
    offsets = torch.tensor([0, 25, 25, 30, 60])
    settings = (4.0, normaliser, offsets, floor)
    expected = by_hand(
        student.tolist(), teacher.tolist(), labels.tolist(), *TABLES[table], 4.0, normaliser, offsets.tolist(), floor
    )
    assert expected > 0.01
    loss = wdcd_loss(student, teacher, labels, *tensors(TABLES[table]), *settings)
    assert loss.shape == ()
    assert_close(loss, torch.tensor(expected, dtype=torch.float64))
    loss = wdcd_loss(student.float(), teacher.float(), labels, *tensors(TABLES[table], torch.float32), *settings)
    assert_close(loss, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("num_classes", [2, 3, 5, 8])
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_any_number_of_classes(normaliser, num_classes):
    student, teacher, labels = random_case(num_classes=num_classes)
    generator = torch.Generator().manual_seed(1)
    table = torch.rand(3, num_classes, generator=generator, dtype=torch.float64)
    loss = wdcd_loss(student, teacher, labels, *table, 2.0, normaliser)
    expected = by_hand(student.tolist(), teacher.tolist(), labels.tolist(), *table.tolist(), 2.0, normaliser)
    assert_close(loss, torch.tensor(expected, dtype=torch.float64))


def test_one_point_worked_by_hand():
    # p = (1/2, 1/4, 1/4) and (1/4, 1/4, 1/2) at T = 1, target 0
    student, teacher = torch.tensor([[2.0, 1.0, 1.0]]).log(), torch.tensor([[1.0, 1.0, 2.0]]).log()
    target = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    others = 1 / 3 * math.log(1 / 3 / 0.5) + 2 / 3 * math.log(2 / 3 / 0.5)
    one, none = torch.ones(3), torch.zeros(3)
    for normaliser in NORMALISERS:
        arguments = (student, teacher, torch.tensor([0]))
        assert_close(wdcd_loss(*arguments, one, none, one, 1.0, normaliser), torch.tensor(target))
        assert_close(wdcd_loss(*arguments, none, one, one, 1.0, normaliser), torch.tensor(others))
        assert_close(wdcd_loss(*arguments, one, one * 2, one, 1.0, normaliser), torch.tensor(target + 2 * others))
        # the scale of the logits is that of the temperature
        scaled = (student * 4, teacher * 4, torch.tensor([0]))
        assert_close(wdcd_loss(*scaled, one, one, one, 4.0, normaliser), torch.tensor(target + others))


@pytest.mark.parametrize("floor", [0.0, 1e-2])
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_gradcheck(normaliser, floor):
    student, teacher, labels = random_case(num_points=15)
    offsets = torch.tensor([0, 6, 15])
    table = tensors(TABLES["mixed"])
    assert torch.autograd.gradcheck(
        lambda s: wdcd_loss(s, teacher, labels, *table, 4.0, normaliser, offsets, floor) * 2.5, student.requires_grad_()
    )


def test_teacher_receives_no_gradient():
    student, teacher, labels = (t.requires_grad_() if t.is_floating_point() else t for t in random_case())
    wdcd_loss(student, teacher, labels, *tensors(TABLES["moving"]), 4.0, "point").backward()
    assert student.grad.any()
    assert teacher.grad is None


def test_an_equal_student_has_no_loss_and_no_gradient():
    student, _, labels = random_case()
    teacher = student + torch.arange(60)[:, None]  # the same probabilities
    loss = wdcd_loss(student.requires_grad_(), teacher, labels, *tensors(TABLES["mixed"]), 4.0, "class")
    loss.backward()
    assert_close(loss, torch.zeros_like(loss))
    assert_close(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("labels", [[255, 255, 255], [-1, 4, 255], []])
@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("num_classes", [2, 4])
def test_no_labelled_point(normaliser, labels, num_classes):
    student = torch.randn(len(labels), num_classes, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ones = torch.ones(num_classes)
    labels = torch.tensor(labels, dtype=torch.int64)
    loss = wdcd_loss(student, -student.detach(), labels, ones, ones, ones, 4.0, normaliser)
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_no_point_with_a_weight(normaliser):
    student, teacher, labels = random_case()
    labels = torch.where(labels == 3, 0, labels)
    loss = wdcd_loss(
        student.requires_grad_(), teacher, labels, *tensors(((0, 0, 0, 1), (0,) * 4, (0, 0, 0, 9))), 4.0, normaliser
    )
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_points_of_no_class_change_nothing(normaliser):
    student, teacher, labels = random_case()
    table = tensors(TABLES["mixed"])
    expected = wdcd_loss(student, teacher, labels, *table, 4.0, normaliser, torch.tensor([0, 20, 60]))
    extra = torch.tensor([255, -1, 4, 200])
    student = torch.cat([student[:20], torch.full((4, 4), 1e4, dtype=torch.float64), student[20:]]).requires_grad_()
    teacher = torch.cat([teacher[:20], -student[20:24].detach(), teacher[20:]])
    labels = torch.cat([labels[:20], extra, labels[20:]])
    loss = wdcd_loss(student, teacher, labels, *table, 4.0, normaliser, torch.tensor([0, 24, 64]))
    assert_close(loss, expected)
    loss.backward()
    assert torch.equal(student.grad[20:24], torch.zeros(4, 4, dtype=torch.float64))


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_large_logits_stay_finite(normaliser):
    generator = torch.Generator().manual_seed(0)
    student = (torch.randn(100, 4, generator=generator) * 1000).requires_grad_()
    teacher = torch.randn(100, 4, generator=generator) * 1000
    labels = torch.randint(0, 4, (100,), generator=generator)
    table = tensors(TABLES["mixed"], torch.float32)
    loss = wdcd_loss(student, teacher, labels, *table, 4.0, normaliser)
    expected = wdcd_loss(
        student.detach().double(), teacher.double(), labels, *(t.double() for t in table), 4.0, normaliser
    )
    assert_close(loss, expected.float())
    loss.backward()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype):
    student, teacher, labels = random_case(dtype=dtype)
    table = tensors(TABLES["authors"], torch.float32)
    loss = wdcd_loss(student.requires_grad_(), teacher, labels, *table, 4.0, "weight")
    assert loss.dtype == torch.float32
    assert torch.equal(loss, wdcd_loss(student.float(), teacher.float(), labels, *table, 4.0, "weight"))
    loss.backward()
    assert student.grad.dtype == dtype


def test_autocast_does_not_reach_it():
    student, teacher, labels = random_case(dtype=torch.float32)
    table = tensors(TABLES["authors"], torch.float32)
    expected = wdcd_loss(student, teacher, labels, *table, 4.0, "weight")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(wdcd_loss(student, teacher, labels, *table, 4.0, "weight"), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_label_types_and_non_contiguous_input(dtype):
    student, teacher, labels = random_case()
    table = tensors(TABLES["mixed"])
    expected = wdcd_loss(student, teacher, labels, *table, 4.0, "class")
    strided = torch.stack([student, teacher], 2)
    labels = torch.stack([labels, labels], 1).to(dtype)[:, 0]
    assert not strided[..., 0].is_contiguous()
    assert not labels.is_contiguous()
    assert_close(wdcd_loss(strided[..., 0], strided[..., 1], labels, *table, 4.0, "class"), expected)
    transposed = [t.T.contiguous().T for t in (student, teacher)]
    assert_close(wdcd_loss(*transposed, labels, *table, 4.0, "class"), expected)


def test_the_order_of_the_points_does_not_matter():
    student, teacher, labels = random_case()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    table = tensors(TABLES["mixed"])
    for normaliser in NORMALISERS:
        expected = wdcd_loss(student, teacher, labels, *table, 4.0, normaliser)
        assert_close(wdcd_loss(student[order], teacher[order], labels[order], *table, 4.0, normaliser), expected)


def test_refuses_what_does_not_fit():
    student, labels, table = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"wdcd_loss: expected student and teacher \[N, C\].*\[3, 4\], \[3, 5\]"):
        wdcd_loss(student, torch.zeros(3, 5), labels, *table, 4.0, "point")
    with pytest.raises(ValueError, match="wdcd_loss: expected student and teacher"):
        wdcd_loss(student, student, labels[:2], *table, 4.0, "point")
    with pytest.raises(ValueError, match="wdcd_loss: expected student and teacher"):
        wdcd_loss(student[0], student[0], labels[0], *table, 4.0, "point")
    with pytest.raises(ValueError, match=r"wdcd_loss: expected tables \[C\] for C = 4"):
        wdcd_loss(student, student, labels, *table[:, :3], 4.0, "point")
    with pytest.raises(ValueError, match="C = 1 >= 2 classes"):
        wdcd_loss(student[:, :1], student[:, :1], labels, *table[:, :1], 4.0, "point")
    with pytest.raises(ValueError, match=r"wdcd_loss: normaliser must be one of .*got 'batch'"):
        wdcd_loss(student, student, labels, *table, 4.0, "batch")
