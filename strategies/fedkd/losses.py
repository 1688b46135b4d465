"""Adaptive mutual distillation: the losses of FedKD (Wu et al., Nature Communications 13:2032, 2022).

A private teacher and a shared student read the same batch. With their task losses Lt, Ls, D = Lt + Ls,
class probabilities yt, ys, hidden states Ht, Hs and attention maps At, As of matched layers:

    Ld_t = KL(ys || yt) / D      Ld_s = KL(yt || ys) / D                  (adaptive mutual distillation)
    Lh   = [MSE(Ht, Wh Hs) + MSE(At, As)] / D                            (adaptive hidden loss)

The teacher minimises Lt + Ld_t + Lh, the student Ls + Ld_s + Lh. One backward pass over
Lt + Ls + Ld_t + Ld_s + Lh serves both, because each KL term sees the other model as a constant; Lh
stands in that sum once, since its gradient reaches both models and Wh anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedllm.errors import ModelError
from fedllm.tasks.base import Distribution

__all__ = [
    "Distillation",
    "Losses",
    "Projections",
    "View",
    "attention_distance",
    "divergence",
    "hidden_distance",
    "matched_layers",
]

SMALLEST_SCALE = 2.0
"""D is held above this: what the models learn from each other weighs half of their own tasks at most."""

LITERAL_SCALE = 1e-2
"""The same where the paper is read literally: low enough to let D fall, high enough to divide by."""


def matched_layers(teacher: int, student: int) -> tuple[int, ...]:
    """Spread the student's layers evenly over the teacher's; last meets last.

    Args:
        teacher: number of the teacher's layers.
        student: number of the student's layers, at most ``teacher``.

    Returns:
        For each student layer the teacher layer it is compared with, counted from 1, so that it indexes
        ``hidden_states`` (whose entry 0 holds the embeddings).

    Raises:
        ModelError: the student is deeper than the teacher, or one of them has no layer.

    >>> matched_layers(6, 2), matched_layers(6, 4)
    ((3, 6), (2, 3, 5, 6))
    """
    if not 1 <= student <= teacher:
        raise ModelError(f"a student of {student} layers cannot be matched to a teacher of {teacher} layers")
    return tuple(-(-teacher * layer // student) for layer in range(1, student + 1))


def divergence(
    target: Tensor,
    logits: Tensor,
    *,
    temperature: float = 1.0,
    reverse: bool = False,
    kind: Distribution = "categorical",
) -> Tensor:
    """Kullback-Leibler divergence between two predictions, averaged over rows.

    The sum runs over classes and the mean over rows; a mean over classes as well would weaken the term by the
    number of classes. Without a row, as in a causal batch of texts of one token, it is 0. It is multiplied by
    temperature^2, so that its gradient keeps its size when the temperature changes (Hinton et al., 2015,
    section 2).

    Args:
        target: logits [n, classes] that are held constant: no gradient reaches them.
        logits: logits [n, classes] of the model that learns.
        temperature: divides both logits, > 0.
        reverse: ``KL(model || target)``, which seeks the target's modes instead of covering all of it
            (MiniLLM, Gu et al., ICLR 2024), instead of ``KL(target || model)``.
        kind: what a row parametrises: one of several classes; a yes or no for each, of which the mean is
            taken; or the mean of a normal distribution of variance 1, whose divergence is half the square
            of the difference, at any temperature and in both directions.

    >>> same = torch.tensor([[1.0, -1.0]])
    >>> float(divergence(same, same + 3.0))
    0.0
    """
    if kind == "gaussian":
        return (logits - target.detach()).float().square().sum(-1).mean() / 2
    if kind == "bernoulli":
        # Yes or no is one of two classes whose logits differ by what is given.
        target, logits = (
            torch.stack([one, torch.zeros_like(one)], -1).flatten(0, 1) for one in (target, logits)
        )
    # A vocabulary's worth of bfloat16 probabilities loses the divergence: at least float32.
    precise = torch.promote_types(logits.dtype, torch.float32)
    fixed = functional.log_softmax(target.detach().to(precise) / temperature, dim=-1)
    learned = functional.log_softmax(logits.to(precise) / temperature, dim=-1)
    source, other = (learned, fixed) if reverse else (fixed, learned)
    total = functional.kl_div(other, source, reduction="sum", log_target=True)
    return total / max(len(logits), 1) * temperature**2


def _two_classes(logits: Tensor) -> Tensor:
    return torch.stack([logits, torch.zeros_like(logits)], dim=-1).flatten(0, 1)


def hidden_distance(teacher: Tensor, student: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference of hidden states [b, t, d] over the tokens where mask [b, t] is 1."""
    squared = (teacher - student).square().mean(dim=-1)
    weight = mask.to(squared.dtype)
    return (squared * weight).sum() / weight.sum()


def attention_distance(teacher: Tensor, student: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference of attention maps [b, heads, t, t] over pairs of real tokens and heads."""
    squared = (teacher - student).square().mean(dim=1)
    weight = (mask[:, :, None] * mask[:, None, :]).to(squared.dtype)
    return (squared * weight).sum() / weight.sum()


class Projections(nn.Module):
    """Wh: one trained linear map per matched layer, from the student's width to the teacher's.

    Starts as the identity (its leading rows or columns where widths differ); weights are [teacher, student].

    >>> Projections(layers=2, teacher=3, student=3)(1, torch.eye(3)).tolist() == torch.eye(3).tolist()
    True
    """

    def __init__(self, layers: int, teacher: int, student: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.eye(teacher, student)) for _ in range(layers))

    def forward(self, layer: int, hidden: Tensor) -> Tensor:
        """Map hidden states [..., student] of the student's ``layer`` (from 0) to [..., teacher]."""
        return functional.linear(hidden, self.weights[layer])


class View(NamedTuple):
    """What one forward pass of one model shows to the losses.

    Attributes:
        loss: task loss, 0-dim.
        logits: of each prediction that is scored, [n, outputs]; see :meth:`fedllm.tasks.Task.predictions`.
        hidden: hidden states [b, t, d], one per matched layer; empty where they are not compared.
        attention: attention maps [b, heads, t, t], one per matched layer; empty where not compared.
        kind: what the logits parametrise.
    """

    loss: Tensor
    logits: Tensor
    hidden: tuple[Tensor, ...] = ()
    attention: tuple[Tensor, ...] = ()
    kind: Distribution = "categorical"


class Losses(NamedTuple):
    """The terms of one batch, each a 0-dim tensor.

    Attributes:
        teacher: Lt, task loss of the teacher.
        student: Ls, task loss of the student.
        teacher_divergence: Ld_t.
        student_divergence: Ld_s.
        hidden: Lh, hidden states and attention maps together.
    """

    teacher: Tensor
    student: Tensor
    teacher_divergence: Tensor
    student_divergence: Tensor
    hidden: Tensor

    @property
    def total(self) -> Tensor:
        """What one backward pass descends: every term once."""
        return self.teacher + self.student + self.teacher_divergence + self.student_divergence + self.hidden


@dataclass(frozen=True)
class Distillation:
    """FedKD's objective: maps what one forward pass of each model showed to the terms of the loss.

    Attributes:
        mutual: exchange predictions (Ld_t and Ld_s).
        hidden: compare hidden states of matched layers.
        attention: compare attention maps of matched layers.
        temperature: softens both predictions of the KL terms, > 0.
        reverse: take the KL terms in the other direction, see :func:`divergence`.
        literal: leave D in the graph, as the paper's equations can be read: a model may then lower its
            distillation loss by raising its task loss. By default D only weighs.
        adaptive: divide by D at all; the paper's ablation goes without (its figure 3).
        mutual_weight: multiplies Ld_t and Ld_s, >= 0; the paper has 1.
        hidden_weight: multiplies Lh, hidden states and attention maps together, >= 0; the paper has 1.
    """

    mutual: bool = True
    hidden: bool = True
    attention: bool = True
    temperature: float = 1.0
    reverse: bool = False
    literal: bool = False
    mutual_weight: float = 1.0
    hidden_weight: float = 1.0
    adaptive: bool = True

    def __call__(
        self,
        teacher: View,
        student: View,
        mask: Tensor,
        projections: Projections | None = None,
        share: float = 1.0,
    ) -> Losses:
        """Compute every term of one batch.

        Args:
            teacher: hidden states and attention maps hold one entry per layer of the student.
            student: likewise.
            mask: [b, t], 1 at real tokens.
            projections: Wh; needed where hidden states are compared.
            share: multiplies every term but the task losses: where a ramp stands, in [0, 1].
        """
        task_t, task_s = teacher.loss, student.loss
        divergence_t = divergence_s = apart = torch.zeros_like(task_s)
        # A KL term is minimised by one model alone: the other's task loss inside its D is a constant.
        if self.mutual:
            rows_t, rows_s = teacher.logits, student.logits
            weight = share * self.mutual_weight
            kind = student.kind
            divergence_t = weight * self._divergence(rows_s, rows_t, kind)
            divergence_t = divergence_t / self._scale(task_t, task_s.detach())
            divergence_s = weight * self._divergence(rows_t, rows_s, kind)
            divergence_s = divergence_s / self._scale(task_s, task_t.detach())
        if self.hidden:
            assert projections is not None
            projected = [projections(layer, state) for layer, state in enumerate(student.hidden)]
            apart = apart + _mean(hidden_distance, teacher.hidden, projected, mask)
        if self.attention:
            apart = apart + _mean(attention_distance, teacher.attention, student.attention, mask)
        apart = share * self.hidden_weight * apart / self._scale(task_t, task_s)
        return Losses(task_t, task_s, divergence_t, divergence_s, apart)

    def _scale(self, own: Tensor, other: Tensor) -> Tensor:
        total = own + other
        if not self.adaptive:
            return torch.ones_like(total)
        return total.clamp(min=LITERAL_SCALE) if self.literal else total.detach().clamp(min=SMALLEST_SCALE)

    def _divergence(self, target: Tensor, logits: Tensor, kind: Distribution) -> Tensor:
        return divergence(target, logits, temperature=self.temperature, reverse=self.reverse, kind=kind)


def _mean(
    distance: Callable[[Tensor, Tensor, Tensor], Tensor],
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    mask: Tensor,
) -> Tensor:
    """Average a distance over matched layers, so that a deeper student is not pulled harder."""
    layers = [distance(*pair, mask) for pair in zip(teacher, student, strict=True)]
    return torch.stack(layers).mean()
