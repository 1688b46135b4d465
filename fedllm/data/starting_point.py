"""What a run over one's own texts starts from, where nobody says it: chosen from the texts.

The presets' numbers were found for their texts. Here are rules instead: from how many texts there are and how
long they are to how much of each is read, how many steps are taken, in how many rounds, and how large they
are. They are plain functions of counts: the same texts, model and settings give the same choice, whatever the
seed. A setting that was given is never chosen, and those that are chosen follow it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedllm.config import RunConfig
from fedllm.data.partition import DRAWN

__all__ = [
    "SETTINGS",
    "Base",
    "Choice",
    "Texts",
    "balanced",
    "choose",
    "limits",
    "skew",
    "unset",
    "with_choices",
]

Table = np.ndarray[Any, np.dtype[np.int64]]
Value = int | float | str | tuple[float, ...]

COVERED = 0.95
"""Share of the texts that are read to their end."""
LONGEST = 256
"""Tokens of a text beyond which a run does not go by itself: a step's time grows with them."""
PASSES = 5.0
"""Times that each text is trained on."""
TOKENS = 1_500_000
"""Tokens that a simulation's clients train on together: minutes on two cores for a model like MiniLM."""
DEVICE_TOKENS = 400_000
"""Tokens that each device of a deployment trains on; they compute at the same time."""
LEAST_STEPS = 40
"""Steps below which a fresh head and adapter have not settled, however few texts there are."""
ROUNDS = 12
"""Rounds into which the steps are shared out: a tenth of a run each, so that clients do not drift apart."""
BATCH = 16
"""Texts a step; fewer where a client has fewer."""
UNEVEN = 20.0
"""Times the rarest class that the commonest has, from which on classes are weighed: at 9 weights did harm, at
20 they found half of a class that was hardly found without (docs/models-and-data.md)."""
HEAVIEST = 10.0
"""Weight of a class at most: a class of three texts should not drown all others."""

SETTINGS = (
    "data.max_length",
    "training.batch_size",
    "training.local_steps",
    "rounds",
    "training.learning_rate",
    "training.schedule",
    "training.class_weights",
)
"""What is chosen from one's own texts, by key."""

_RATES = {
    **dict.fromkeys(("lora", "dora", "rslora", "adalora"), (3e-3, 1e-4)),
    "full": (2e-4, 1e-5),
}
"""Rates of AdamW by what is tuned: of models up to 384 wide, and the least."""


@dataclass(frozen=True)
class Texts:
    """What is known of the texts.

    Attributes:
        count: texts that the clients train on together.
        lengths: tokens of each text of a sample, special tokens included.
        classes: texts of each class, by its name, in the order of the model's outputs; empty without classes.
    """

    count: int
    lengths: Sequence[int]
    classes: Mapping[str, int]


@dataclass(frozen=True)
class Base:
    """What is known of the base model.

    Attributes:
        positions: tokens it can take; ``None`` where nothing bounds them.
        width: size of its hidden states; ``None`` where its configuration does not say.
    """

    positions: int | None
    width: int | None


@dataclass(frozen=True)
class Choice:
    """A setting's value, and why it is that."""

    key: str
    value: Value
    reason: str


def unset(config: RunConfig) -> frozenset[str]:
    """Return which of :data:`SETTINGS` a configuration was not given.

    >>> sorted(set(SETTINGS) - unset(RunConfig.model_validate({"rounds": 4, "data": {"max_length": 64}})))
    ['data.max_length', 'rounds']
    """

    def given(key: str) -> bool:
        section, _, name = key.rpartition(".")
        return name in (getattr(config, section) if section else config).model_fields_set

    return frozenset(key for key in SETTINGS if not given(key))


def with_choices(config: RunConfig, choices: Sequence[Choice]) -> RunConfig:
    """Return a configuration in which choices stand as if they had been given.

    >>> with_choices(RunConfig(), [Choice("training.local_steps", 3, ""), Choice("rounds", 7, "")]).rounds
    7
    """
    for choice in choices:
        section, _, name = choice.key.rpartition(".")
        if section:
            changed = getattr(config, section).model_copy(update={name: choice.value})
            config = config.model_copy(update={section: changed})
        else:
            config = config.model_copy(update={name: choice.value})
    return config


def choose(
    config: RunConfig,
    texts: Texts,
    base: Base,
    *,
    keys: Collection[str],
    deployed: bool = False,
) -> list[Choice]:
    """Choose settings from texts.

    Args:
        config: the run; its values count for all settings but ``keys``.
        texts: what its clients train on.
        base: the model that is tuned.
        keys: those of :data:`SETTINGS` that are to be chosen.
        deployed: devices compute at the same time; else one host computes for all clients.

    Returns:
        A choice for each key that something can be said of, in the order of :data:`SETTINGS`: later ones
        follow from the earlier.
    """
    rules: dict[str, Callable[[RunConfig], Choice | None]] = {
        "data.max_length": lambda _: _length(texts.lengths, base.positions),
        "training.batch_size": lambda run: _batch(int(_own(run, texts.count))),
        "training.local_steps": lambda run: _steps(run, texts, keys, deployed),
        "rounds": lambda run: _rounds(run, texts, deployed),
        "training.learning_rate": lambda run: _rate(run, base.width),
        "training.schedule": lambda _: Choice("training.schedule", "linear", "the last rounds settle"),
        "training.class_weights": lambda _: _weights(texts.classes),
    }
    choices = []
    for key, rule in rules.items():
        if key in keys and (choice := rule(config)) is not None:
            choices.append(choice)
            config = with_choices(config, [choice])
    return choices


def _length(lengths: Sequence[int], positions: int | None) -> Choice:
    """Read most texts to their end: the quantile of their lengths, rounded up to a multiple of 8."""
    ordered = sorted(lengths)
    covering = ordered[max(0, math.ceil(COVERED * len(ordered)) - 1)]
    wanted = 8 * math.ceil(covering / 8)
    bound = LONGEST if positions is None else min(LONGEST, positions)
    value = min(wanted, bound)
    whole = sum(length <= value for length in lengths) / len(lengths)
    reason = f"{whole:.0%} of the texts have no more tokens"
    if value < wanted:
        why = "the model takes no more" if value == positions else "more takes long"
        reason += f"; {why}"
    return Choice("data.max_length", value, reason)


def _own(run: RunConfig, count: int) -> float:
    """Return how many texts a client has on average; above one client per text, each draws a few."""
    return count / run.clients if run.clients <= count else float(min(DRAWN, count))


def _batch(own: int) -> Choice:
    value = max(1, min(BATCH, own))
    reason = "texts a step" if value == BATCH else f"a client has about {own} texts"
    return Choice("training.batch_size", value, reason)


def _wanted_steps(run: RunConfig, texts: Texts, deployed: bool) -> tuple[float, str]:
    """Return how many steps a client should take in the whole run, and why not more or fewer."""
    a_step = run.answers * run.training.batch_size
    enough = PASSES * texts.count / a_step
    tokens = DEVICE_TOKENS * run.answers if deployed else TOKENS
    mean = float(np.minimum(texts.lengths, run.data.max_length).mean())
    affordable = tokens / (a_step * mean)
    if max(enough, LEAST_STEPS) <= affordable:
        return max(enough, LEAST_STEPS), ""
    return max(affordable, LEAST_STEPS), "more takes long"


def _steps(run: RunConfig, texts: Texts, keys: Collection[str], deployed: bool) -> Choice:
    """Share the steps out over the rounds; where these follow, two steps at least and a pass at most."""
    wanted, _ = _wanted_steps(run, texts, deployed)
    own = _own(run, texts.count)
    if "rounds" in keys:
        a_pass = math.ceil(own / run.training.batch_size)
        value = max(2, min(math.ceil(wanted / ROUNDS), a_pass))
    else:
        value = math.ceil(wanted / run.rounds)
    return Choice(
        "training.local_steps",
        value,
        f"{value * run.training.batch_size / own:.2g} passes over a client's {own:.0f} texts a round",
    )


def _rounds(run: RunConfig, texts: Texts, deployed: bool) -> Choice:
    wanted, why = _wanted_steps(run, texts, deployed)
    value = max(1, math.ceil(wanted / run.training.local_steps))
    passes = _passes(run.model_copy(update={"rounds": value}), texts.count)
    return Choice(
        "rounds", value, "; ".join(filter(None, [f"each text is trained on {passes:.2g} times", why]))
    )


def _passes(run: RunConfig, count: int) -> float:
    """Return how many times a run trains on each of ``count`` texts."""
    return run.rounds * run.answers * run.training.local_steps * run.training.batch_size / count


def _rate(run: RunConfig, width: int | None) -> Choice | None:
    """Return a rate for AdamW: it falls with the square of the width, down to what large models take.

    The presets' own rates lie on it: LoRA takes 3e-3 on MiniLM, 384 wide, and 1e-3 on SmolLM2, 576 wide.
    """
    if width is None or run.training.optimizer != "adamw" or run.tuning.peft not in _RATES:
        return None
    most, least = _RATES[run.tuning.peft]
    value = float(f"{max(most * min(1.0, 384 / width) ** 2, least):.1g}")
    return Choice("training.learning_rate", value, f"{run.tuning.peft} on a model {width} wide")


def balanced(classes: Mapping[str, int]) -> tuple[float, ...]:
    """Return a weight for each class, so that all classes count alike and a text counts 1 on average.

    n / (k n_c) for n texts of k classes, n_c of class c (King and Zeng, Logistic Regression in Rare Events
    Data, 2001), rounded to four digits; at most :data:`HEAVIEST`.

    >>> balanced({"spam": 25, "ham": 75})
    (2.0, 0.6667)
    """
    whole = sum(classes.values())
    weights = (whole / (len(classes) * max(1, count)) for count in classes.values())
    return tuple(float(f"{min(HEAVIEST, weight):.4g}") for weight in weights)


def _weights(classes: Mapping[str, int]) -> Choice | None:
    """Weigh classes where one is much rarer than another, for otherwise it would hardly be predicted."""
    if len(classes) < 2 or max(classes.values()) < UNEVEN * min(classes.values()):
        return None
    rarest, commonest = min(classes, key=classes.__getitem__), max(classes, key=classes.__getitem__)
    share = classes[rarest] / classes[commonest]
    reason = f"{rarest!r} has {share:.2g} of the texts of {commonest!r}"
    return Choice("training.class_weights", balanced(classes), reason)


def skew(table: Table) -> float:
    """Return how much clients' classes differ from those of all texts: 0 alike, near 1 nothing in common.

    The total variation between a client's shares of the classes and the shares of all texts, averaged over
    the texts.

    Args:
        table: texts by client and class, [clients, classes].

    >>> skew(np.array([[5, 5], [5, 5]])), skew(np.array([[10, 0], [0, 10]]))
    (0.0, 0.5)
    """
    sizes = table.sum(1)
    whole = table.sum(0) / table.sum()
    differ = np.abs(table / np.maximum(sizes, 1)[:, None] - whole).sum(1) / 2
    return float((differ * sizes).sum() / sizes.sum())


def limits(
    config: RunConfig, texts: Texts, table: Table | None = None, *, descends: bool = True
) -> list[str]:
    """Say what holds a run back from what its texts could give, each with its figure.

    Args:
        config: the run, chosen or given.
        texts: what its clients train on.
        table: texts by client and class, [clients, classes]; None where that is not known.
        descends: whether its steps go down the gradient; of others few passes are no fault.
    """
    said = []
    cut = sum(length > config.data.max_length for length in texts.lengths) / len(texts.lengths)
    if cut > 1.5 * (1 - COVERED):
        said.append(
            f"{cut:.0%} of the texts are cut at {config.data.max_length} tokens: raise data.max_length"
        )
    passes = _passes(config, texts.count)
    if descends and passes < 2:
        said.append(f"each text is trained on {passes:.2g} times: raise rounds = {config.rounds}")
    if table is not None and (apart := skew(table)) > 0.1:
        said.append(
            f"clients' classes differ from the whole's by {apart:.2f} (0: alike, 1: nothing in common), so "
            "their updates pull apart: --set data.partition=iid shows what that costs"
        )
    return said
