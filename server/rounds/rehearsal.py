"""The server's rehearsal before the first round: what cannot work is said then, and not by a client."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from fedllm.codecs import growth
from fedllm.config import RunConfig
from fedllm.data.tokens import Tokens
from fedllm.errors import CodecError, ConfigError, FedllmError, ModelError
from fedllm.tensors import Spec, spec_of
from strategies.base import Commit, Method, State
from strategies.session import Session
from strategies.tryout import require_apart, routed

__all__ = ["few_texts", "rehearse"]

_TEXTS, _TOKENS = 8, 32
"""What a rehearsal reads: little enough to be cheap."""
_ROUTED_TEXTS = 64
"""Texts where tokens choose among experts: enough that most experts are asked."""
_LONGER, _TOO_LONG = 1.1, 2.0
"""Times that a codec may lengthen updates which the server clips: then a warning, then a refusal."""

_FOREIGN = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ImportError)
"""What libraries raise where a model, an adapter and a way of training do not go together."""


def rehearse(session: Session) -> list[str]:
    """Take a few steps on a few texts as clients will, send an update through the codecs, and undo it all.

    Returns:
        What could not be shown or will not be quite as asked for, in a sentence each.

    Raises:
        ModelError: something trained has no gradient or slope, or the model cannot be trained this way.
        ConfigError: a codec does not fit what is sent, or what bounds it.
    """
    count = _ROUTED_TEXTS if any(map(routed, session.model.trainable())) else _TEXTS
    batch = session.prepared(few_texts(session, count)).whole()
    with _explained(session.method):
        if session.model.config.tuning.peft != "full":
            require_apart(session.model, batch)
        notes = session.method.try_out(session.model, batch)
    for way, spec in {
        "up": session.method.updates(session.initial),
        "down": spec_of(session.initial),
    }.items():
        if wrong := getattr(session.codecs, way).misfit(spec):
            raise _unfit(session.config, way, wrong)
    longest = {"up": 1.0, "down": 1.0}
    for way, spec in _sent(session):
        longest[way] = max(longest[way], _growth(session, way, spec))
    return notes + _clipped(session.config, longest["up"])


def few_texts(session: Session, count: int = _TEXTS) -> Tokens:
    """Return the beginnings of the texts of most tokens: one token leaves nothing to predict."""
    lengths = session.train_tokens.lengths
    chosen = np.argsort(-lengths, kind="stable")[:count]
    chosen = chosen[session.task.teaching(session.train_tokens)[chosen]]
    length = min(_TOKENS, session.config.data.max_length)
    texts = session.train_tokens.texts_of(chosen)
    return session.model.tokenise(session.split[0].subset(texts), length)


def _sent(session: Session) -> Iterator[tuple[str, Spec]]:
    """Yield each way with what travels on it: of two rounds, since some methods take turns."""
    method, initial = session.method, session.initial
    for version in (0, 1):
        state = State(version, initial)
        exchange = method.plan(state, method.begin(state, version + 1))
        if not isinstance(exchange, Commit):
            yield "up", method.spec(exchange, method.view(initial, 0))
    if not method.replays:
        yield "down", spec_of(initial)


def _growth(session: Session, way: str, spec: Spec) -> float:
    """Send an update through a codec; return how many times longer it comes out."""
    try:
        return growth(getattr(session.codecs, way), spec)
    except CodecError as error:
        raise _unfit(session.config, way, error) from error


def _unfit(config: RunConfig, way: str, reason: object) -> ConfigError:
    return ConfigError(
        f"codec.{way} = {getattr(config.codec, way)!r} does not fit what is sent: {reason}; "
        'change it, or take "none" (fedllm codecs lists what there is)'
    )


def _clipped(config: RunConfig, longer: float) -> list[str]:
    """Say what the server's clipping does to updates that the codec lengthens after the client's.

    Raises:
        ConfigError: it would cut off most of every update.
    """
    clip = config.privacy.update_clip
    if clip is None or longer <= _LONGER:
        return []
    told = (
        f"codec.up = {config.codec.up!r} makes updates about {longer:.2g} times as long, and the server cuts "
        f"what is longer than privacy.clip = {clip:g} after decoding: an update of that length would count "
        f"for 1/{longer:.2g} of itself"
    )
    if longer > _TOO_LONG:
        raise ConfigError(f"{told}; take a codec that sends all values, such as quantize, or no privacy.clip")
    return [told]


@contextmanager
def _explained(method: Method) -> Iterator[None]:
    """Say which choices do not go together; libraries raise whatever they meet."""
    try:
        yield
    except FedllmError as error:
        raise ModelError(f"{_choices(method)}: {error}") from error
    except _FOREIGN as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(
            f"{_choices(method)}: these do not go together, change one of them"
            f"{_instead(method.config)} (the library that met it says: {reason})"
        ) from error


def _instead(config: RunConfig) -> str:
    """Name the change that is most likely to help."""
    if config.model.quantize != "none":
        return ', such as model.quantize = "none"'
    if config.training.gradient_checkpointing:
        return ", such as training.gradient_checkpointing = false"
    return ', such as tuning.peft = "lora"' if config.tuning.peft != "lora" else ""


def _choices(method: Method) -> str:
    """Name what decides what is trained and how, of the method's options those that were chosen."""
    config, usual = method.config, method.Options().model_dump(mode="json")
    options = [f"method = {config.method!r}", f"tuning.peft = {config.tuning.peft!r}"]
    if config.model.quantize != "none":
        options.append(f"model.quantize = {config.model.quantize!r}")
    if config.training.gradient_checkpointing:
        options.append("training.gradient_checkpointing = true")
    chosen = {key: value for key, value in config.options.items() if value != usual[key]}
    options += [f"{config.method}.{key} = {chosen[key]!r}" for key in sorted(chosen)]
    return f"{', '.join(options)} cannot train {config.model.name}"
