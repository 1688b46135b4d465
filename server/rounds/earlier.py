"""What a run begins with: what every node derives, or the result of an earlier run (``init_from``).

The last global tensors of the earlier run, adapter and head, are the new one's; what is not among them must
be the same in both. Server optimiser, codecs and what clients keep to themselves begin afresh.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from fedllm.config import RunConfig
from fedllm.errors import ConfigError, FedllmError, StoreError
from fedllm.models.model import Model
from fedllm.runs import checkpoint
from fedllm.runs.checkpoint import Checkpoint
from fedllm.runs.provenance.identity import difference
from fedllm.runs.reader import Run
from fedllm.tensors import Tensors, fingerprint, spec_of
from server.rounds.state import ServerState
from strategies.registry import open_method
from strategies.session import Session

__all__ = ["Start", "require_same_start", "start_of"]

_KEY = "init_from"


@dataclass(frozen=True)
class Start:
    """The global tensors that a run begins with.

    Attributes:
        tensors: by name.
        source: of which run they are the result: ``folder``, ``run`` (its identity), ``round`` and
            ``state_sha256``; empty where every node derives them for itself.
        notes: what to know of it, in a sentence each.
    """

    tensors: Tensors
    source: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def facts(self) -> dict[str, Any]:
        """What provenance tells of it."""
        return {_KEY: self.source} if self.source else {}

    @property
    def sentence(self) -> str:
        """What the run's log tells of it."""
        return f"begins from round {self.source['round']} of {self.source['folder']}"

    def state(self) -> ServerState:
        """Return the state of a new run."""
        return ServerState.begin(self.tensors, derived=not self.source)


def start_of(session: Session) -> Start:
    """Return what a new run begins with.

    Raises:
        ConfigError: ``init_from`` is no run, or one whose result does not fit this run.
    """
    if session.config.init_from is None:
        return Start(session.initial)
    folder = Path(session.config.init_from)
    try:
        earlier = Run(folder)
        saved = _last(earlier)
        _require_fit(session, earlier, saved.groups["tensors"])
        run = earlier.identity
    except FedllmError as error:
        raise ConfigError(f"{_KEY}: {error}") from error
    tensors = saved.groups["tensors"]
    source = {"folder": str(folder), "run": run, "round": saved.number, "state_sha256": fingerprint(tensors)}
    return Start(session.method.begun_from(tensors), source, _notes(session, earlier))


def _notes(session: Session, earlier: Run) -> tuple[str, ...]:
    if earlier.provenance.get("inputs", {}).get("texts") == session.inputs["texts"]:
        return ()
    return (
        f"the texts, or which of them are held out, are others than in {earlier.folder}: what was trained on "
        "there may be in the test set here, and its scores too good; the same data and seed, or a "
        "data.test_path of its own, keep them apart",
    )


def require_same_start(folder: Path, provenance: Mapping[str, Any], start: Start) -> None:
    """Refuse to go on, before its first checkpoint, with a run that was begun from something else.

    Args:
        folder: the run folder.
        provenance: of the run.
        start: what it would begin from now.

    Raises:
        StoreError: says what to do.
    """
    told, found = provenance.get(_KEY, {}), start.source
    if told.get("state_sha256") != found.get("state_sha256"):
        raise StoreError(
            f"{found['folder']} has changed since {folder} was begun from it, and {folder} has no checkpoint "
            "yet: begin another run in another folder"
        )


def _last(earlier: Run) -> Checkpoint:
    """Return the last checkpoint of a run; an older one in place of a damaged one would be another result."""
    if earlier.pid is not None:
        raise StoreError(f"{earlier.folder} is running: let it end first")
    folder = earlier.folder / "checkpoints"
    numbers = checkpoint.numbers(folder)
    if not numbers:
        raise StoreError(f"{earlier.folder} has no checkpoint yet: let it finish a round first")
    return checkpoint.load(folder, numbers[-1])


def _require_fit(session: Session, earlier: Run, tensors: Tensors) -> None:
    """Refuse a result that would not be in this run what it was in the earlier one."""
    config, before, folder = session.config, earlier.config, earlier.folder
    if config.method != before.method:
        raise ConfigError(
            f'{folder} is a run of method = "{before.method}", and this one is of method = '
            f'"{config.method}": take the same method'
        )
    # Dropout is about training; a model is known by its weights, not by its name.
    model = config.model.model_copy(update={"name": before.model.name, "dropout": before.model.dropout})
    same = before.model_copy(update={"model": model, "tuning": config.tuning})
    if differs := difference(before, same):
        raise ConfigError(
            f"{folder} has {differs.key} = {differs.first!r}, and this run has {differs.key} = "
            f"{differs.second!r}: take the same"
        )
    _require_same_base(session, earlier)
    if session.task.classed:
        _require_same_classes(session, earlier)
    _require_same_shapes(session, folder, tensors)
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise ConfigError(f"the result of {folder} is not finite: that run came to nothing; take another")
    _require_same_rest(session, earlier, tensors)


def _require_same_base(session: Session, earlier: Run) -> None:
    """Compare weights and tokenizer by digest; a model whose files are nowhere at hand goes by its name."""
    folder, before, name = earlier.folder, earlier.config.model.name, session.config.model.name
    stored, found = (
        {kind: digests[kind] for kind in ("weights", "tokenizer") if kind in digests}
        for digests in (earlier.provenance.get("inputs", {}), session.inputs)
    )
    if stored == found and (stored or before == name):
        return
    if not stored or not found:
        raise ConfigError(
            f"nothing says whether model.name = {name!r} is the base model of {folder}, which had model.name "
            f"= {before!r}: begin from a run that keeps digests of its model's files"
        )
    kind = next(kind for kind in sorted(stored | found) if stored.get(kind) != found.get(kind))
    raise ConfigError(
        f"{folder} was trained with the {kind} that model.name = {before!r} had then, and those of "
        f"model.name = {name!r} are others: take the same base model"
    )


def _require_same_classes(session: Session, earlier: Run) -> None:
    before, classes = tuple(earlier.partition.get("label_names", ())), session.corpus.label_names
    if before != classes:
        raise ConfigError(
            f"{earlier.folder} tells apart the classes {', '.join(before) or 'none'}, and the texts of this "
            f"run have {', '.join(classes)}: set data.classes = {list(before)} if all texts are of these"
        )


def _require_same_shapes(session: Session, folder: Path, tensors: Tensors) -> None:
    before, wanted = spec_of(tensors), spec_of(session.initial)
    for name in sorted(before.keys() | wanted.keys()):
        if before.get(name) != wanted.get(name):
            shapes = [tuple(spec[name].shape) if name in spec else "none" for spec in (before, wanted)]
            raise ConfigError(
                f"{folder} has trained {name} of shape {shapes[0]}, and this run trains {shapes[1]}: take "
                f"the same options of [{session.config.method}]"
            )


def _require_same_rest(session: Session, earlier: Run, tensors: Tensors) -> None:
    """Compare what is frozen, which seed and options can decide too, such as the factors that ffa leaves."""
    config, before = session.config, earlier.config
    if (config.seed, config.options) == (before.seed, before.options):
        return
    surroundings = {"model": config.model, "data": config.data, "plugins": config.plugins, "init_from": None}
    twin: RunConfig = before.model_copy(update=surroundings)
    other = open_method(twin).build(session.corpus.label_names)
    if _rest(other, tensors) == _rest(session.model, tensors):
        return
    key, values = f"options of [{config.method}]", ("others", "")
    if config.seed != before.seed:
        key, values = "seed", (f"seed = {before.seed}", f", seed = {config.seed}")
    raise ConfigError(
        f"frozen parts of the model in {earlier.folder} come of {values[0]}, and those of this run do not"
        f"{values[1]}: take the same {key}"
    )


def _rest(model: Model, tensors: Tensors) -> str:
    """Digest of all that a model holds beside the global tensors."""
    held = chain(model.module.named_parameters(), model.module.named_buffers())
    return fingerprint({name: tensor for name, tensor in held if name not in tensors})
