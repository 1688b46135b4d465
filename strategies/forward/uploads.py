"""What sending slopes in place of tensors asks of a configuration: FwdLLM and MeZO alike."""

from __future__ import annotations

from fedllm.codecs import parse
from fedllm.config import RunConfig
from fedllm.errors import ConfigError
from strategies.forward.cohort import MOST_SLOPES

__all__ = ["check_codecs", "check_count", "check_training"]


def check_training(config: RunConfig) -> None:
    """Refuse what changes a step down a gradient, of which there is none.

    Raises:
        ConfigError: names the setting.
    """
    training = config.training
    if training.recomputes:
        raise ConfigError(
            f"{training.recomputing} is for backward passes, and {config.method} makes none; leave it out"
        )
    for name in ("proximal", "weight_decay", "max_grad_norm"):
        if value := getattr(training, name):
            raise ConfigError(
                f"training.{name} = {value:g} is for steps down a gradient, and {config.method} takes none; "
                "leave it out"
            )


def check_codecs(config: RunConfig, *, fresh: str, replayed: bool) -> None:
    """Refuse codecs that cannot do what they say.

    Args:
        config: the run.
        fresh: where directions are new in every exchange, what to take instead; empty where they are not.
        replayed: whether clients take the server's steps from records.

    Raises:
        ConfigError: names the codec and what would be right.
    """
    up, down = config.codec.up, config.codec.down
    if fresh and parse(up).stateful:
        raise ConfigError(
            f"codec.up = {up!r} carries what a message lost over to the next, whose slopes belong to other "
            f"directions; leave feedback out, or take {fresh}"
        )
    if replayed and down != "none":
        raise ConfigError(
            f"codec.down = {down!r} has nothing to encode, for clients replay each step from the cohort's "
            'slopes; leave it at "none"'
        )


def check_count(count: int, keys: str) -> None:
    """Refuse more slopes of a client and round than a record holds.

    Args:
        count: of slopes.
        keys: what makes them so many, as ``name = value``.

    Raises:
        ConfigError: the record's count of them takes two bytes.
    """
    if count > MOST_SLOPES:
        raise ConfigError(
            f"{keys} make {count:,} slopes a client and round, of which a record holds {MOST_SLOPES:,}; "
            "lower it"
        )
