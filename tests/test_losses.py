"""Losses: values and gradients of the authors' code, the definitions as plain loops, and what counts nothing."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from kdmos.losses import (
    AUTHORS_WEIGHTS,
    DISTILLATION,
    DKD,
    KD,
    OFA,
    WDCD,
    DecoupledDistillation,
    LogitStdKD,
    Table,
    cross_entropy,
    lovasz_softmax,
)

# The authors' sum taken apart; what is asked of the others is NCKD in "nckd" and nothing in "tckd".
TERMS = {
    "nckd": WDCD(beta=1.0, moving_parts=(False, True)),
    "tckd": WDCD(moving_parts=(True, False), other_parts=(False, False)),
    "kd": WDCD(),
}
FAMILY = {"wdcd": WDCD(), "paper": WDCD("paper"), "dcd": WDCD("dcd"), "dkd": DKD(), "kd": KD(), "ofa": OFA()}
FAMILY["logit_std_kd"] = LogitStdKD()
SEGMENTATION = {"cross_entropy": cross_entropy, "lovasz_softmax": lovasz_softmax}


@pytest.fixture(scope="module")
def goldens(golden):
    with np.load(golden("a5_losses.npz")) as file:
        return dict(file)


@pytest.fixture
def points(goldens):
    """case -> student (a leaf), teacher, labels."""

    def find(case):
        student, teacher, labels = (
            torch.from_numpy(goldens[f"{case}_{name}"].copy()) for name in ("student", "teacher", "label")
        )
        return student.requires_grad_(), teacher, labels

    return find


def rows(grid):
    """[B, C, R, A, Z] -> [voxels, C]."""
    return torch.from_numpy(grid).movedim(1, -1).flatten(0, -2)


def relative_error(actual, expected):
    """Norm of the difference over the norm of what is expected."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    return ((actual.double() - expected).norm() / expected.norm()).item()


def random_case(num_points=40, num_classes=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 3 * torch.randn(2, num_points, num_classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, num_classes, (num_points,), generator=generator)
    labels[:num_classes] = torch.arange(num_classes)  # all classes are there
    return student.to(dtype), teacher.to(dtype), labels


def parts_by_hand(student, teacher, target, temperature):
    """TCKD and NCKD of one point, scalar float64."""

    def softmax(logits):
        weights = [math.exp(value - max(logits)) for value in logits]
        return [weight / sum(weights) for weight in weights]

    def divergence(p, q):
        return sum(a * math.log(a / b) for a, b in zip(p, q))

    student, teacher = ([value / temperature for value in logits] for logits in (student, teacher))
    b_student, b_teacher = ((softmax(z)[target], 1 - softmax(z)[target]) for z in (student, teacher))
    q_student, q_teacher = (softmax([v for c, v in enumerate(z) if c != target]) for z in (student, teacher))
    return divergence(b_teacher, b_student), divergence(q_teacher, q_student)


# --- The authors' distillation -----------------------------------------------------------------------


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("case", ["mixed", "typical", "extreme"])
def test_wdcd_equals_the_authors(goldens, points, case, term):
    """In "extreme" some probabilities are far below the 1e-8 that the authors add inside the logarithm of TCKD.

    There a point that the student is certain to get wrong counts no more and has no gradient; "authors" keeps that.
    """
    student, teacher, labels = points(case)
    value = TERMS[term](student, teacher, labels)
    # The 1e-8 in their NCKD, which ours leaves out, shifts its value by 1e-5, three times that in the sum.
    assert abs(value.item() - goldens[f"{case}_values"][list(TERMS).index(term)]) < 1e-4
    value.backward()
    assert relative_error(student.grad, goldens[f"{case}_grad_{term}_loss"]) < 1e-5


def test_tckd_without_the_authors_constant_is_the_definition(points):
    """Where a probability is 1e-15, the plain divergence is 5 % above the authors' and keeps its gradient."""
    student, teacher, labels = points("extreme")

    def plain(num_classes):
        return Table((0, 0, 0, 1), (0,) * 4, AUTHORS_WEIGHTS)

    value = DecoupledDistillation(plain, 4.0, "weight")(student, teacher, labels)
    value.backward()
    ours = student.grad
    student = student.detach().double().requires_grad_()
    moving = labels == 3
    s, t = (F.log_softmax(z[moving] / 4, 1) for z in (student, teacher.double()))
    s, t = ([z[:, 3], torch.logsumexp(z[:, :3], 1)] for z in (s, t))
    expected = sum((b.exp() * (b - a)).sum() for a, b in zip(s, t)) / moving.sum()
    expected.backward()
    assert_close(value, expected.detach().float())
    assert relative_error(ours, student.grad) < 1e-5
    assert value.item() > 1.05 * TERMS["tckd"](student, teacher, labels).item()


def test_wdcd_without_moving_points(goldens, points):
    """The authors' TCKD is NaN here, and so is their sum."""
    assert np.isnan(goldens["no_moving_values"]).tolist() == [False, True, True]
    student, teacher, labels = points("no_moving")
    assert TERMS["tckd"](student, teacher, labels).item() == 0
    nckd = TERMS["nckd"](student, teacher, labels)
    assert abs(nckd.item() - goldens["no_moving_values"][0]) < 1e-4
    total = TERMS["kd"](student, teacher, labels)
    assert_close(total, 3 * nckd)
    total.backward()
    assert relative_error(student.grad, 3 * goldens["no_moving_grad_nckd_loss"]) < 1e-5


@pytest.mark.parametrize("loss", FAMILY)
def test_no_labelled_point_is_zero(goldens, points, loss):
    assert np.isnan(goldens["all_unlabeled_values"]).all()
    student, teacher, labels = points("all_unlabeled")
    for nothing in (labels, torch.full_like(labels, 255)):
        student.grad = None
        value = FAMILY[loss](student, teacher, nothing, torch.tensor([0, 20, 50]))
        assert value.item() == 0
        value.backward()
        assert torch.equal(student.grad, torch.zeros_like(student))


def test_dkd_part_equals_the_authors_other_helper(goldens):
    """Their own decoupled loss at T = 4 for every point is another code path of theirs: TCKD alone, no T^2."""
    student, teacher, labels = (torch.from_numpy(goldens[f"util_{name}"]) for name in "stl")
    value = DKD(alpha=1.0, beta=0.0, ignore_index=-1)(student, teacher, labels) / 16
    assert_close(value, torch.tensor(goldens["util_tckd_T4"], dtype=torch.float32))


def test_standardised_logits_equal_the_authors(goldens):
    """KD between logits that their helper has standardised is LogitStdKD."""
    standard = torch.from_numpy(goldens["util_normalize"])
    raw = torch.from_numpy(goldens["util_s"])
    labels = torch.ones(len(raw), dtype=torch.int64)
    zeros = torch.zeros_like(raw)  # standardised, nothing is nothing
    assert_close(LogitStdKD()(raw, zeros, labels), KD()(standard, zeros, labels))


# --- The variants of WDCD ----------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [3, 4, 8])
@pytest.mark.parametrize("offsets", [None, [0, 40], [0, 11, 40], [0, 11, 11, 30, 40]])
def test_paper_is_the_mean_over_scans_of_the_sum_of_class_means(offsets, num_classes):
    student, teacher, labels = random_case(num_classes=num_classes)
    if offsets and len(offsets) == 5:
        labels[30:] = 0  # the second scan has no point, the last one no labelled point
    moving, beta = num_classes - 1, 2.0
    expected = 0.0
    bounds = offsets or [0, 40]
    for start, stop in pairwise(bounds):
        for c in range(1, num_classes):
            of_class = [i for i in range(start, stop) if labels[i] == c]
            for i in of_class:
                tckd, nckd = parts_by_hand(student[i].tolist(), teacher[i].tolist(), c, 4.0)
                expected += ((tckd if c == moving else 0.0) + beta * nckd) / len(of_class)
    expected /= len(bounds) - 1
    scan_offsets = None if offsets is None else torch.tensor(offsets)
    value = WDCD("paper", beta=beta)(student, teacher, labels, scan_offsets)
    assert_close(value, torch.tensor(expected, dtype=torch.float64))


def weighted_by_hand(student, teacher, labels, weights, moving_parts, other_parts, beta, moving):
    """NCKD: weighted mean over the points; TCKD: mean over the points that have it, weighted alike."""
    target, others = [], []
    for i, c in enumerate(labels.tolist()):
        tckd, nckd = parts_by_hand(student[i].tolist(), teacher[i].tolist(), c, 4.0)
        use_tckd, use_nckd = moving_parts if c == moving else other_parts
        if use_tckd:
            target.append((weights[c], tckd))
        others.append((weights[c], beta * nckd if use_nckd else 0.0))
    return sum(sum(w * v for w, v in part) / (sum(w for w, _ in part) or 1.0) for part in (target, others))


FLAGS = [(True, True), (True, False), (False, True), (False, False)]


@pytest.mark.parametrize("other_parts", FLAGS)
@pytest.mark.parametrize("moving_parts", FLAGS)
def test_table_five(moving_parts, other_parts):
    """TCKD and NCKD, on and off, on moving points and on the others: authors' weights, and plain means."""
    student, teacher, labels = random_case()
    flags = {"moving_parts": moving_parts, "other_parts": other_parts}
    arguments = (student.tolist(), teacher.tolist(), labels)
    student, teacher = (torch.tensor(z, dtype=torch.float64) for z in arguments[:2])
    expected = weighted_by_hand(student, teacher, labels, AUTHORS_WEIGHTS, moving_parts, other_parts, 3.0, 3)
    # "authors" adds 1e-8 to the student's probabilities: invisible here, but not to float64
    value = WDCD(**flags)(student, teacher, labels)
    assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7)

    expected, labelled = 0.0, [i for i, c in enumerate(labels.tolist()) if c]
    for i in labelled:
        tckd, nckd = parts_by_hand(student[i].tolist(), teacher[i].tolist(), int(labels[i]), 4.0)
        use_tckd, use_nckd = moving_parts if labels[i] == 3 else other_parts
        expected += (use_tckd * tckd + use_nckd * 3.0 * nckd) / len(labelled)
    value = WDCD("dcd", **flags)(student, teacher, labels)
    assert_close(value, torch.tensor(expected, dtype=torch.float64))


def test_moving_need_not_be_the_last_class():
    student, teacher, labels = random_case(num_classes=3)
    order = [0, 2, 1]
    for variant in ("paper", "dcd"):
        expected = WDCD(variant)(student, teacher, labels)
        swapped = torch.tensor(order)[labels]
        value = WDCD(variant, moving=1)(student[:, order], teacher[:, order], swapped)
        assert_close(value, expected)
        assert abs(WDCD(variant)(student[:, order], teacher[:, order], swapped) - expected) > 1e-3


def test_no_unlabeled_class():
    """With a negative ignore_index, class 0 is a class like the others."""
    student, teacher, labels = random_case(num_classes=3)
    parts = [parts_by_hand(s, t, c, 4.0) for s, t, c in zip(student.tolist(), teacher.tolist(), labels.tolist())]
    expected = sum((t if c == 2 else 0) + 3 * n for (t, n), c in zip(parts, labels.tolist())) / len(parts)
    value = WDCD("dcd", ignore_index=-1)(student, teacher, labels)
    assert_close(value, torch.tensor(expected, dtype=torch.float64))


def test_authors_weights_for_other_classes():
    student, teacher, labels = random_case(num_classes=3)
    weights = (0.0, 2.0, 50.0)
    expected = weighted_by_hand(student, teacher, labels, weights, (True, True), (False, True), 3.0, 2)
    value = WDCD(class_weights=weights)(student, teacher, labels)
    assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7)  # their 1e-8
    with pytest.raises(ValueError, match="WDCD: variant 'authors' has 4 class weights but the logits have 3"):
        WDCD()(student, teacher, labels)


def test_refuses_other_settings():
    with pytest.raises(ValueError, match=r"WDCD: variant must be one of .*'authors'.*got 'thesis'"):
        WDCD("thesis")
    with pytest.raises(ValueError, match="WDCD: class_weights belong to variant 'authors'"):
        WDCD("paper", class_weights=(0.0, 1.0))
    for temperature in (0.0, -4.0):
        with pytest.raises(ValueError, match="WDCD: temperature must be positive"):
            WDCD(temperature=temperature)
        with pytest.raises(ValueError, match="DKD: temperature must be positive"):
            DKD(temperature=temperature)


# --- The field's other losses ------------------------------------------------------------------------


def labelled_mean_by_hand(points, labels):
    kept = [value for value, c in zip(points, labels.tolist()) if c not in (0, 255)]
    return torch.tensor(sum(kept) / len(kept), dtype=torch.float32)


@pytest.mark.parametrize("num_classes", range(2, 9))
def test_kd_equals_its_formula(num_classes):
    student, teacher, labels = random_case(num_classes=num_classes)
    labels[-5:] = 255
    s, t = (torch.softmax(z / 2.0, 1) for z in (student, teacher))
    points = 2.0**2 * (t * (t.log() - s.log())).sum(1)
    value = KD(temperature=2.0)(student.float(), teacher.float(), labels)
    assert_close(value, labelled_mean_by_hand(points.tolist(), labels))


@pytest.mark.parametrize("num_classes", range(3, 9))
def test_dkd_equals_its_formula(num_classes):
    student, teacher, labels = random_case(num_classes=num_classes)
    kept = [i for i, c in enumerate(labels.tolist()) if c]
    parts = [parts_by_hand(student[i].tolist(), teacher[i].tolist(), int(labels[i]), 4.0) for i in kept]
    expected = 4.0**2 * sum(t + 8 * n for t, n in parts) / len(kept)
    assert_close(DKD()(student, teacher, labels), torch.tensor(expected, dtype=torch.float64))
    expected = 3.0**2 * sum(
        0.5 * t + 2 * n
        for t, n in (parts_by_hand(student[i].tolist(), teacher[i].tolist(), int(labels[i]), 3.0) for i in kept)
    )
    value = DKD(alpha=0.5, beta=2.0, temperature=3.0)(student, teacher, labels)
    assert_close(value, torch.tensor(expected / len(kept), dtype=torch.float64))


@pytest.mark.parametrize("num_classes", range(3, 9))
def test_logit_standardisation_equals_its_formula(num_classes):
    student, teacher, labels = random_case(num_classes=num_classes)

    def softened(logits):
        logits = logits.numpy()
        deviation = np.sqrt(((logits - logits.mean(1, keepdims=True)) ** 2).sum(1, keepdims=True) / (num_classes - 1))
        return torch.softmax(torch.from_numpy((logits - logits.mean(1, keepdims=True)) / (1e-7 + deviation)) / 4.0, 1)

    s, t = softened(student), softened(teacher)
    points = 4.0**2 * (t * (t / s).log()).sum(1)
    value = LogitStdKD()(student.float(), teacher.float(), labels)
    assert_close(value, labelled_mean_by_hand(points.tolist(), labels))


def test_logit_standardisation_of_equal_logits_is_finite():
    student = torch.full((3, 4), 2.0, requires_grad=True)
    teacher = torch.tensor([[1.0, 1, 1, 1], [1, 2, 3, 4], [0, 0, 0, 9]])
    value = LogitStdKD()(student, teacher, torch.ones(3, dtype=torch.int64))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("eps", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("num_classes", range(2, 9))
def test_ofa_equals_its_formula(num_classes, eps):
    student, teacher, labels = random_case(num_classes=num_classes)
    labels[-5:] = 255
    points = []
    for s, t, label in zip(student.softmax(1).tolist(), teacher.softmax(1).tolist(), labels.tolist()):
        truth = [float(c == label) for c in range(num_classes)]
        points.append(-sum(((b + y) ** eps - y) * math.log(a) for a, b, y in zip(s, t, truth)))
    value = OFA(eps=eps)(student.float(), teacher.float(), labels)
    assert_close(value, labelled_mean_by_hand(points, labels))


def test_ofa_temperature():
    student, teacher, labels = random_case(dtype=torch.float32)
    assert_close(OFA(temperature=2.0)(student, teacher, labels), OFA()(student / 2, teacher / 2, labels))


# --- What holds for all of them ----------------------------------------------------------------------


def test_names_of_the_family():
    assert list(DISTILLATION) == ["wdcd", "dkd", "kd", "logit_std_kd", "ofa"]
    assert list(DISTILLATION.values()) == [WDCD, DKD, KD, LogitStdKD, OFA]


@pytest.mark.parametrize("variant", ["authors", "paper", "dcd"])
def test_two_classes_are_refused_where_nothing_can_be_learnt(variant):
    student, teacher, labels = random_case(num_classes=2)
    weights = (1.0, 30.0) if variant == "authors" else None
    with pytest.raises(ValueError, match=r"WDCD: with two classes the non-target part .* use KD"):
        WDCD(variant, ignore_index=-1, class_weights=weights)(student, teacher, labels)
    only_target = WDCD(
        variant, ignore_index=-1, class_weights=weights, moving_parts=(True, False), other_parts=(True, False)
    )
    assert only_target(student, teacher, labels).item() > 0.01


def test_two_classes_in_the_other_losses():
    student, teacher, labels = random_case(num_classes=2)
    with pytest.raises(ValueError, match="DKD: with two classes the non-target part"):
        DKD(ignore_index=-1)(student, teacher, labels)
    with pytest.raises(ValueError, match="LogitStdKD: two standardised logits are the same two numbers"):
        LogitStdKD(ignore_index=-1)(student, teacher, labels)
    # TCKD of two classes is KD
    expected = KD(ignore_index=-1)(student, teacher, labels)
    assert_close(DKD(beta=0.0, ignore_index=-1)(student, teacher, labels), expected)
    assert OFA(ignore_index=-1)(student, teacher, labels).item() > 0.01


@pytest.mark.parametrize("num_classes", range(2, 9))
def test_any_number_of_classes_has_values_and_gradients(num_classes):
    losses = {"kd": KD(), "ofa": OFA()}
    if num_classes > 2:
        losses |= {"paper": WDCD("paper"), "dcd": WDCD("dcd"), "dkd": DKD(), "logit_std_kd": LogitStdKD()}
        losses["wdcd"] = WDCD(class_weights=(0.0, *range(1, num_classes)))
    for name, loss in losses.items():
        student, teacher, labels = random_case(num_classes=num_classes, dtype=torch.float32)
        value = loss(student.requires_grad_(), teacher.requires_grad_(), labels, torch.tensor([0, 15, 40]))
        value.backward()
        assert value.shape == (), name
        assert value.item() > 0.01, name
        assert torch.isfinite(student.grad).all(), name
        # only labelled points learn, and every one of them
        assert torch.equal(student.grad.any(1), labels != 0), name
        assert teacher.grad is None, name


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("loss", FAMILY)
def test_points_without_a_class_count_nothing(loss, dtype):
    student, teacher, labels = random_case(dtype=torch.float32)
    expected = FAMILY[loss](student, teacher, labels, torch.tensor([0, 15, 40]))
    student = torch.cat([student, 1000 * student[:9]]).requires_grad_()
    teacher = torch.cat([teacher, -1000 * teacher[:9]])
    labels = torch.cat([labels.to(dtype), torch.full((9,), 255, dtype=dtype)])
    value = FAMILY[loss](student, teacher, labels, torch.tensor([0, 15, 49]))
    assert_close(value, expected)
    value.backward()
    assert not student.grad[40:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", FAMILY)
def test_distillation_of_half_precision_logits_is_float32(points, loss, dtype):
    """Logits are rounded; class weights, and the loss of the rounded logits, are not."""
    student, teacher, labels = points("typical")
    student, teacher = student.detach().to(dtype), teacher.to(dtype)
    value = FAMILY[loss](student.requires_grad_(), teacher, labels)
    assert value.dtype == torch.float32
    assert_close(value, FAMILY[loss](student.detach().float(), teacher.float(), labels))
    value.backward()
    assert student.grad.dtype == dtype
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("loss", ["paper", "dcd", "dkd"])
def test_gradcheck(loss):
    student, teacher, labels = random_case(num_points=12)
    assert torch.autograd.gradcheck(
        lambda s: FAMILY[loss](s, teacher, labels, torch.tensor([0, 5, 12])), student.requires_grad_()
    )


# --- Segmentation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ce", "lovasz"])
@pytest.mark.parametrize("case", ["vox", "missing", "sparse"])
def test_segmentation_equals_the_authors(goldens, case, name):
    logits = rows(goldens[f"{case}_logits"]).clone().requires_grad_()
    labels = torch.from_numpy(goldens[f"{case}_vlabel"]).flatten()
    value = {"ce": cross_entropy, "lovasz": lovasz_softmax}[name](logits, labels)
    assert abs(value.item() - goldens[f"{case}_{name}"].item()) < 1e-5
    value.backward()
    assert relative_error(logits.grad, rows(goldens[f"{case}_{name}_grad"])) < 1e-5


@pytest.mark.parametrize("loss", SEGMENTATION)
def test_segmentation_without_labels_is_zero(goldens, loss):
    """The authors' cross-entropy is NaN here and their Lovasz loss an empty tensor."""
    for label in (0, 255):
        logits = rows(goldens["void_logits"]).clone().requires_grad_()
        value = SEGMENTATION[loss](logits, torch.full((len(logits),), label))
        assert value.shape == ()
        assert value.item() == 0
        value.backward()
        assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("loss", SEGMENTATION)
def test_segmentation_with_one_labelled_voxel(goldens, loss):
    """The authors' Lovasz loss raises an IndexError here."""
    logits = rows(goldens["onevalid_logits"]).clone().requires_grad_()
    labels = torch.from_numpy(goldens["onevalid_vlabel"]).flatten()
    assert (labels != 0).sum() == 1
    value = SEGMENTATION[loss](logits, labels)
    value.backward()
    probability = logits.detach()[labels == 2].softmax(1)[0, 2]
    expected = 1 - probability if loss == "lovasz_softmax" else -probability.log()
    assert_close(value.detach(), expected)
    assert torch.equal(logits.grad.any(1), labels == 2)


@pytest.mark.parametrize("loss", SEGMENTATION)
def test_segmentation_of_no_row(loss):
    logits = torch.zeros(0, 4, requires_grad=True)
    value = SEGMENTATION[loss](logits, torch.zeros(0, dtype=torch.int64))
    assert value.item() == 0
    value.backward()
    assert logits.grad.shape == (0, 4)


@pytest.mark.parametrize("num_classes", range(2, 9))
@pytest.mark.parametrize("ignore", [0, -1])
def test_cross_entropy_equals_its_formula(num_classes, ignore):
    logits, _, labels = random_case(num_classes=num_classes)
    labels[-6:] = 255
    weights = [0.5 + c for c in range(num_classes)]
    log_p = logits.log_softmax(1).tolist()
    kept = [(i, c) for i, c in enumerate(labels.tolist()) if c not in (ignore, 255)]
    expected = -sum(log_p[i][c] for i, c in kept) / len(kept)
    for dtype in (torch.int64, torch.uint8):
        value = cross_entropy(logits, labels.to(dtype), ignore)
        assert_close(value, torch.tensor(expected, dtype=torch.float64))
    expected = -sum(weights[c] * log_p[i][c] for i, c in kept) / sum(weights[c] for _, c in kept)
    value = cross_entropy(logits, labels, ignore, torch.tensor(weights))
    assert_close(value, torch.tensor(expected, dtype=torch.float64))


def test_cross_entropy_with_weights_of_zero():
    logits, _, labels = random_case()
    value = cross_entropy(logits.requires_grad_(), labels, class_weights=torch.zeros(4))
    assert value.item() == 0
    value.backward()
    assert not logits.grad.any()


def lovasz_by_hand(probabilities, labels, ignore):
    """Berman et al., one class after another: errors sorted downwards times the steps of the Jaccard loss."""
    kept = [i for i, c in enumerate(labels) if c not in (ignore, 255)]
    losses = []
    for c in range(len(probabilities[0])):
        size = sum(labels[i] == c for i in kept)
        if not size:
            continue
        errors = sorted(
            ((abs((labels[i] == c) - probabilities[i][c]), labels[i] == c) for i in kept), key=lambda e: -e[0]
        )
        loss = jaccard = hits = misses = 0.0
        for error, is_class in errors:
            hits, misses = hits + is_class, misses + (not is_class)
            step = 1 - (size - hits) / (size + misses)
            loss, jaccard = loss + error * (step - jaccard), step
        losses.append(loss)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("num_classes", range(2, 9))
@pytest.mark.parametrize("ignore", [0, -1])
def test_lovasz_equals_its_formula(num_classes, ignore):
    logits, _, labels = random_case(num_classes=num_classes)
    labels[-6:] = 255
    labels[labels == num_classes - 1] = num_classes - 2 or 1  # one class is not there
    expected = lovasz_by_hand(logits.softmax(1).tolist(), labels.tolist(), ignore)
    for dtype in (torch.int64, torch.uint8):
        value = lovasz_softmax(logits, labels.to(dtype), ignore)
        assert_close(value, torch.tensor(expected, dtype=torch.float64))


def test_lovasz_worked_by_hand():
    # two classes of one point each, both with probability 3/4 of being right: both errors are 1/4
    logits = torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log()
    assert_close(lovasz_softmax(logits, torch.tensor([0, 1]), ignore_index=-1), torch.tensor(0.25))
    # all right, all wrong
    certain = torch.tensor([[200.0, -200.0], [-200.0, 200.0]])
    assert lovasz_softmax(certain, torch.tensor([0, 1]), ignore_index=-1).item() == 0
    assert lovasz_softmax(certain, torch.tensor([1, 0]), ignore_index=-1).item() == 1


def test_lovasz_gradcheck():
    logits, _, labels = random_case(num_points=15)
    assert torch.autograd.gradcheck(lambda x: lovasz_softmax(x, labels), logits.requires_grad_())


@pytest.mark.parametrize("loss", SEGMENTATION)
def test_ignored_rows_count_nothing(loss):
    logits, _, labels = random_case(dtype=torch.float32)
    expected = SEGMENTATION[loss](logits, labels)
    logits = torch.cat([logits, 100 * logits]).requires_grad_()
    value = SEGMENTATION[loss](logits, torch.cat([labels, torch.tensor([0, 255]).repeat(20)]))
    assert_close(value, expected)
    value.backward()
    assert not logits.grad[40:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", SEGMENTATION)
def test_segmentation_of_half_precision_logits_is_float32(loss, dtype):
    """A scan has 100 000 voxels: no half type can count them or sum their losses."""
    logits, _, labels = random_case(num_points=100_000, dtype=dtype)
    value = SEGMENTATION[loss](logits, labels)
    assert value.dtype == torch.float32
    assert_close(value, SEGMENTATION[loss](logits.float(), labels))


@pytest.mark.parametrize("loss", SEGMENTATION)
def test_segmentation_under_autocast(loss):
    """Mixed precision of a training step: logits leave a bfloat16 layer."""
    features, _, labels = random_case(num_points=2000, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(features, torch.eye(4))
        assert logits.dtype == torch.bfloat16
        value = SEGMENTATION[loss](logits, labels)
    assert_close(value, SEGMENTATION[loss](logits.float(), labels))
