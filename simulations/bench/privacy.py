"""What a budget takes from an attacker: membership inference by likelihood ratios, with shadow runs.

Whether a text was trained on shows in how sure the model is of its label. The attacker trains many runs like
the one attacked, each on a random half of the texts, and learns how sure models are of each text with it and
without it (LiRA; Carlini et al., S&P 2022, algorithm 1 with one variance for all texts): with
f = log(p / (1 - p)), p the probability of a text's label,

    score  =  log N(f; mu_in, s_in^2)  -  log N(f; mu_out, s_out^2)

Texts are of BBC news, which are mostly easy: only where few are learnt for long does a model know its own
from others. So heads are trained on what MiniLM, which stays as it is, makes of the texts; by ten clients,
with full batches, FedAvg, and noise on each step as ``privacy.unit = "example"`` has it (rate 1). Runs are
computed side by side, as one: the steps are those of :mod:`strategies.steps` for a linear softmax, in closed
form. Noise comes of a seed: a benchmark hides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from fedllm.data.tokens import Tokens
from fedllm.models.model import Model
from fedllm.presets import document
from fedllm.privacy.accounting import least_noise
from strategies.registry import resolve_run
from strategies.session import Session

__all__ = ["Shadows", "advantage", "attacked", "caught", "features", "run", "trained"]

_DELTA = 1e-3
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Shadows:
    """How the runs are trained.

    Attributes:
        runs: half of them are the attacker's, half are attacked.
        clients, rounds, local_steps: of each run.
        learning_rate: of plain steps.
        clip: L2 norm to which the gradient of a text is scaled down.
    """

    runs: int = 128
    clients: int = 10
    rounds: int = 10
    local_steps: int = 2
    learning_rate: float = 5.0
    clip: float = 1.0

    @property
    def steps(self) -> int:
        """Steps that learn from each text."""
        return self.rounds * self.local_steps


def run(
    counts: Sequence[int] = (400, 1600), budgets: Sequence[float] = (math.inf, 8.0, 3.0, 1.0)
) -> dict[str, Any]:
    """Attack under each budget, with so many texts of which each run has half: a minute on an idle core."""
    session = Session(resolve_run(document("quickstart"), ["data.max_length=32"]))
    session.method.load(session.model, session.initial)
    own, held_out = (features(session.model, one) for one in (session.train_tokens, session.test_tokens))
    order = np.random.default_rng(0).permutation(len(own[0]))
    return {
        f"{count // 2} texts": {
            f"epsilon {budget:g}": _cell((own[0][order[:count]], own[1][order[:count]]), held_out, budget)
            for budget in budgets
        }
        for count in counts
    }


def _cell(
    own: tuple[torch.Tensor, torch.Tensor], held_out: tuple[torch.Tensor, torch.Tensor], budget: float
) -> dict[str, float]:
    how = Shadows()
    noise = least_noise(budget, how.steps, 1.0, _DELTA) if math.isfinite(budget) else 0.0
    had = np.random.default_rng(0).random((how.runs, len(own[0]))) < 0.5
    heads = trained(how, *own, had, noise)
    right = (held_out[0] @ heads).argmax(-1) == held_out[1]
    found = attacked(sureness(heads, *own), had)
    return {"noise_multiplier": noise, "accuracy": float(right.double().mean()), **found}


def features(model: Model, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a model's head is given of each text [text, values + 1], and the labels [text].

    Rows have a norm of about 1; the last value is 1 / 16, for the head's bias.
    """
    given: list[torch.Tensor] = []
    head = model.module.head
    assert head is not None
    hook = head.register_forward_hook(lambda _, inputs, __: given.append(inputs[0].detach()))
    found = torch.empty(len(tokens), head.in_features + 1)
    found[:, -1] = math.sqrt(head.in_features) / 16
    training = model.module.training
    model.module.eval()
    with torch.inference_mode():
        for indices in model.batches(tokens, model.config.evaluation.batch_size):
            given.clear()
            model.forward(tokens.batch(indices))
            found[indices, :-1] = given[0]
    model.module.train(training)
    hook.remove()
    return found / math.sqrt(head.in_features), torch.as_tensor(tokens.labels)


def trained(
    how: Shadows, inputs: torch.Tensor, labels: torch.Tensor, had: Bools, noise: float
) -> torch.Tensor:
    """Return the heads [run, values, class] of runs that are trained side by side.

    Args:
        how: they are trained.
        inputs: of the head [text, values].
        labels: of the texts.
        had: which texts each run has [run, text].
        noise: multiplier of each step of each client.
    """
    generator = torch.Generator().manual_seed(0)
    right = functional.one_hot(labels).float()
    heads = torch.zeros(len(had), inputs.shape[1], right.shape[1])
    each = len(inputs) // how.clients
    for _ in range(how.rounds):
        total = torch.zeros_like(heads)
        for client in range(how.clients):
            own = slice(client * each, (client + 1) * each)
            mine = heads.clone()
            for _ in range(how.local_steps):
                there = torch.from_numpy(had[:, own])
                step = clipped_sum(mine, inputs[own], right[own], there, how.clip)
                step += noise * how.clip * torch.randn(step.shape, generator=generator)
                mine -= how.learning_rate / (each / 2) * step
            total += mine
        heads = total / how.clients
    return heads


def clipped_sum(
    heads: torch.Tensor, inputs: torch.Tensor, right: torch.Tensor, there: torch.Tensor, clip: float
) -> torch.Tensor:
    """Return each run's sum of clipped gradients [run, values, class].

    That of a text is x (softmax(W x) - y)', whose norm is the product of the norms of both.
    """
    wrong = torch.softmax(inputs @ heads, -1) - right
    norms = wrong.norm(dim=-1) * inputs.norm(dim=-1)
    scale = torch.clamp(clip / norms.clamp_min(1e-12), max=1.0) * there
    return torch.einsum("rnk,nd->rdk", wrong * scale[..., None], inputs)


def sureness(heads: torch.Tensor, inputs: torch.Tensor, labels: torch.Tensor) -> npt.NDArray[np.float64]:
    """Return log(p / (1 - p)) [run, text], p being the probability of the text's label."""
    logits = (inputs @ heads).double()
    places = labels.expand(len(heads), -1)[..., None]
    others = logits.scatter(-1, places, -math.inf).logsumexp(-1)
    sure: npt.NDArray[np.float64] = (logits.gather(-1, places)[..., 0] - others).numpy()
    return sure


def attacked(sure: npt.NDArray[np.float64], had: Bools) -> dict[str, float]:
    """Attack the second half of the runs with what the first half shows.

    Args:
        sure: how sure each run is of each text [run, text].
        had: which texts it has been trained on [run, text].

    Returns:
        Of all guesses together: the share of trained texts that are found where one in a hundred others is
        taken for one, and one in a thousand; the advantage; and that of a threshold on how sure a run is.
    """
    half = len(sure) // 2
    known, there = sure[:half], had[:half]
    score = np.zeros_like(sure[half:])
    for sign, which in ((1, there), (-1, ~there)):
        mean = (known * which).sum(0) / which.sum(0)
        variance = (((known - mean) ** 2) * which).sum() / which.sum()
        score -= sign * ((sure[half:] - mean) ** 2 / variance + math.log(variance)) / 2
    inside = had[half:]
    members, others = score[inside], score[~inside]
    return {
        "found_at_1_percent": caught(members, others, 0.01),
        "found_at_0.1_percent": caught(members, others, 0.001),
        "advantage": advantage(members, others),
        "advantage_of_a_threshold": advantage(sure[half:][inside], sure[half:][~inside]),
    }


def caught(members: npt.NDArray[np.float64], others: npt.NDArray[np.float64], at: float) -> float:
    """Return the share of members that score above all but a share of the others.

    >>> caught(np.array([1.0, 5.0]), np.arange(4.0), 0.25)
    0.5
    """
    bound = np.sort(others)[::-1][int(at * len(others))]
    return float((members > bound).mean())


def advantage(members: npt.NDArray[np.float64], others: npt.NDArray[np.float64]) -> float:
    """Return the most by which true exceed false positives, over all thresholds: 0 is a coin, 1 is certainty.

    >>> advantage(np.array([0.3, 0.4]), np.array([0.1, 0.2])), advantage(np.ones(3), np.ones(3))
    (1.0, 0.0)
    """
    at = np.concatenate([members, others])
    above = [1 - np.searchsorted(np.sort(one), at, side="left") / len(one) for one in (members, others)]
    return max(0.0, float(np.max(above[0] - above[1])))
