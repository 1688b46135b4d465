"""FedKD's losses against hand-computed cases, scipy and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from scipy.stats import entropy
from torch.nn import functional

from fedllm.errors import ModelError
from strategies.fedkd.losses import (
    Distillation,
    Losses,
    Projections,
    View,
    attention_distance,
    divergence,
    hidden_distance,
    matched_layers,
)
from tests.parts import quick, task_of

LABELS = torch.tensor([0, 2])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


def test_a_batch_without_a_row_diverges_by_nothing() -> None:
    learner = torch.zeros(0, 5, requires_grad=True)
    value = divergence(torch.zeros(0, 5), learner)
    value.backward()  # type: ignore[no-untyped-call]
    assert value.detach() == 0.0
    assert learner.grad is not None
    assert learner.grad.shape == (0, 5)


def _leaves(seed: int, width: int) -> dict[str, torch.Tensor]:
    """Logits, two hidden states and two attention maps of one model, as leaves of the graph."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "logits": (2, 3),
        "hidden.0": (2, 3, width),
        "hidden.1": (2, 3, width),
        "attention.0": (2, 2, 3, 3),
        "attention.1": (2, 2, 3, 3),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for name, shape in shapes.items()
    }


def _view(leaves: dict[str, torch.Tensor]) -> View:
    return View(
        functional.cross_entropy(leaves["logits"], LABELS),
        leaves["logits"],
        (leaves["hidden.0"], leaves["hidden.1"]),
        (leaves["attention.0"], leaves["attention.1"]),
    )


def _losses(
    objective: Distillation,
    teacher: dict[str, torch.Tensor],
    student: dict[str, torch.Tensor],
    wh: Projections,
) -> Losses:
    return objective(_view(teacher), _view(student), MASK, wh)


def _wh(teacher: int = 4, student: int = 3) -> Projections:
    return Projections(2, teacher, student).double()


def test_layers_are_spread_evenly_and_last_meets_last() -> None:
    assert matched_layers(12, 4) == (3, 6, 9, 12)
    assert matched_layers(5, 5) == (1, 2, 3, 4, 5)
    assert matched_layers(6, 1) == (6,)
    with pytest.raises(ModelError, match="student of 7 layers"):
        matched_layers(6, 7)


def test_divergence_by_hand_in_both_directions() -> None:
    target, learner = torch.log(torch.tensor([[0.5, 0.5]])), torch.log(torch.tensor([[0.9, 0.1]]))
    forward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    reverse = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert divergence(target, learner).item() == pytest.approx(forward, rel=1e-6)
    assert divergence(target, learner, reverse=True).item() == pytest.approx(reverse, rel=1e-6)


@pytest.mark.parametrize("classes", [2, 50])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergence_sums_classes_and_averages_rows(classes: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(classes)
    target, learner = torch.randn(2, 7, classes, generator=generator, dtype=torch.float64)
    p, q = ((z / temperature).softmax(-1).numpy() for z in (target, learner))
    expected = temperature**2 * entropy(p, q, axis=1).mean()
    assert divergence(target, learner, temperature=temperature).item() == pytest.approx(expected)


@pytest.mark.parametrize("reverse", [False, True])
def test_divergence_moves_the_learner_only(reverse: bool) -> None:
    target = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    learner = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    divergence(target, learner, reverse=reverse).backward()
    assert target.grad is None
    assert torch.autograd.gradcheck(
        lambda z: divergence(target.detach(), z, reverse=reverse, temperature=2.0), (learner,)
    )


def test_divergence_of_bfloat16_logits_is_taken_in_float32() -> None:
    assert divergence(torch.randn(2, 9).bfloat16(), torch.randn(2, 9).bfloat16()).dtype == torch.float32


def test_padding_counts_nowhere() -> None:
    teacher, student = torch.zeros(2, 3, 2), torch.ones(2, 3, 2)
    student[1, 2] = 1e6  # padding, see MASK
    assert hidden_distance(teacher, student, MASK).item() == 1.0
    maps_t, maps_s = torch.zeros(2, 2, 3, 3), torch.full((2, 2, 3, 3), 0.5)
    maps_s[1, :, 2, :] = maps_s[1, :, :, 2] = 1e6
    assert attention_distance(maps_t, maps_s, MASK).item() == 0.25


def test_causal_predictions_are_scored_one_position_later() -> None:
    logits = torch.arange(2 * 3 * 2.0).reshape(2, 3, 2)
    labels = torch.tensor([[5, 1, -100], [-100, -100, 0]])
    assert task_of("causal").predictions(logits, labels, {}).tolist() == [
        logits[0, 0].tolist(),
        logits[1, 1].tolist(),
    ]


def small_case() -> tuple[View, View]:
    """Return a teacher's and a student's view of one text of one token: two classes, width one."""
    teacher = View(
        torch.tensor(0.8),
        torch.log(torch.tensor([[0.5, 0.5]])),
        (torch.tensor([[[3.0]]]),),
        (torch.tensor([[[[1.0]]]]),),
    )
    student = View(
        torch.tensor(1.2),
        torch.log(torch.tensor([[0.9, 0.1]])),
        (torch.tensor([[[1.0]]]),),
        (torch.tensor([[[[0.5]]]]),),
    )
    return teacher, student


def test_every_term_of_a_small_case_by_hand() -> None:
    teacher, student = small_case()
    got = Distillation()(teacher, student, torch.tensor([[1]]), Projections(1, 1, 1))
    student_from_teacher = (0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)) / 2.0
    teacher_from_student = (0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)) / 2.0
    hidden = ((3.0 - 1.0) ** 2 + (1.0 - 0.5) ** 2) / 2.0
    assert got.student_divergence.item() == pytest.approx(student_from_teacher, rel=1e-5)
    assert got.teacher_divergence.item() == pytest.approx(teacher_from_student, rel=1e-5)
    assert got.hidden.item() == pytest.approx(hidden)
    assert got.total.item() == pytest.approx(
        0.8 + 1.2 + student_from_teacher + teacher_from_student + hidden, rel=1e-5
    )


def test_weights_multiply_the_terms_of_the_case_by_hand() -> None:
    """KL((.5, .5) || (.9, .1)) is log(5/3); hidden states differ by 2, maps by a half; D = 2."""
    teacher, student = small_case()
    objective = Distillation(mutual_weight=0.5, hidden_weight=0.25)
    wh = Projections(1, 1, 1)
    got = objective(teacher, student, torch.tensor([[1]]), wh, share=0.4)
    assert (got.teacher.item(), got.student.item()) == pytest.approx((0.8, 1.2))
    assert got.student_divergence.item() == pytest.approx(0.4 * 0.5 * math.log(5 / 3) / 2.0, rel=1e-5)
    teacher_from_student = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    assert got.teacher_divergence.item() == pytest.approx(0.4 * 0.5 * teacher_from_student / 2.0, rel=1e-5)
    assert got.hidden.item() == pytest.approx(0.4 * 0.25 * (4.0 + 0.25) / 2.0)


@pytest.mark.parametrize(("literal", "weight"), [(False, 0.5), (True, 10.0)])
def test_a_batch_that_both_models_fit_weighs_half_at_most(literal: bool, weight: float) -> None:
    """Task losses of 0.05 make D = 0.1; only the literal reading multiplies the distillation terms by ten."""
    views = [View(torch.tensor(0.05), torch.zeros(1, 2), (torch.full((1, 1, 1), h),)) for h in (3.0, 1.0)]
    objective = Distillation(attention=False, literal=literal)
    got = objective(views[0], views[1], torch.tensor([[1]]), Projections(1, 1, 1))
    assert got.hidden.item() == pytest.approx(weight * (3.0 - 1.0) ** 2)


def test_without_adaptive_weights_no_term_is_divided() -> None:
    views = [View(torch.tensor(3.0), torch.zeros(1, 2), (torch.full((1, 1, 1), h),)) for h in (3.0, 1.0)]
    objective = Distillation(mutual=False, attention=False, adaptive=False)
    got = objective(views[0], views[1], torch.tensor([[1]]), Projections(1, 1, 1))
    assert got.hidden.item() == pytest.approx((3.0 - 1.0) ** 2)


def _finite_differences(function: Callable[[], float], leaf: torch.Tensor) -> torch.Tensor:
    gradient = torch.empty_like(leaf)
    values, slopes = leaf.detach().view(-1), gradient.view(-1)
    for i, value in enumerate(values.clone()):
        values[i] = value + 1e-6
        above = function()
        values[i] = value - 1e-6
        slopes[i] = (above - function()) / 2e-6
        values[i] = value
    return gradient


@pytest.mark.parametrize(("literal", "reverse"), quick(product((False, True), repeat=2), (False, True)))
@pytest.mark.parametrize("learner", ["teacher", "student", "projections"])
def test_one_backward_pass_gives_each_part_the_gradient_of_its_own_objective(
    literal: bool, reverse: bool, learner: str
) -> None:
    """Teacher: Lt + Ld_t + Lh. Student: Ls + Ld_s + Lh. Wh: Lh. Lh counts once for each."""
    teacher, student, wh = _leaves(1, 4), _leaves(2, 3), _wh()
    parts = {"teacher": teacher, "student": student, "projections": dict(wh.named_parameters())}
    weights = {"mutual_weight": 0.7, "hidden_weight": 1.3}
    objective = Distillation(literal=literal, reverse=reverse, temperature=1.5, **weights)
    _losses(objective, teacher, student, wh).total.backward()
    at_start = _losses(Distillation(), teacher, student, wh)
    scale = (at_start.teacher + at_start.student).item()

    def own_objective() -> float:
        now = _losses(objective, teacher, student, wh)
        # By default D is a weight: it keeps the value it had where the derivative is taken.
        reweigh = 1.0 if literal else (now.teacher + now.student).item() / scale
        return {
            "teacher": now.teacher + (now.teacher_divergence + now.hidden) * reweigh,
            "student": now.student + (now.student_divergence + now.hidden) * reweigh,
            "projections": now.hidden * reweigh,
        }[learner].item()

    for name, leaf in parts[learner].items():
        assert leaf.grad is not None, name
        assert leaf.grad.abs().sum() > 0, name
        torch.testing.assert_close(leaf.grad, _finite_differences(own_objective, leaf), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("literal", "expected"), [(False, True), (True, False)])
def test_by_default_nobody_gains_from_raising_the_task_loss(literal: bool, expected: bool) -> None:
    task = torch.tensor(0.7, requires_grad=True)
    teacher, student = _view(_leaves(1, 4)), _view(_leaves(2, 3))
    objective = Distillation(literal=literal)
    objective(teacher._replace(loss=task), student, MASK, _wh()).total.backward()
    assert (task.grad is not None and task.grad.item() == 1.0) is expected


def test_terms_that_are_off_are_zero_and_need_nothing() -> None:
    bare = [View(torch.tensor(1.0), torch.randn(2, 3)) for _ in range(2)]
    off = Distillation(mutual=False, hidden=False, attention=False)
    got = off(bare[0], bare[1], MASK)
    assert [float(term) for term in got] == [1.0, 1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("literal", [False, True])
def test_a_batch_that_both_models_fit_perfectly_stays_finite(literal: bool) -> None:
    certain = View(torch.tensor(0.0), torch.tensor([[100.0, 0.0, 0.0], [0.0, 0.0, 100.0]]))
    got = Distillation(hidden=False, attention=False, literal=literal)(certain, certain, MASK)
    assert got.total.item() == 0.0


def test_projections_start_as_the_identity_and_are_parameters() -> None:
    wh = Projections(2, 3, 2)
    assert wh(1, torch.tensor([[5.0, 7.0]])).tolist() == [[5.0, 7.0, 0.0]]
    assert sorted(dict(wh.named_parameters())) == ["weights.0", "weights.1"]
