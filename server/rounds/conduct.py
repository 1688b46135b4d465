"""One run from the server's side: open or restore it, run the engine, write the result."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from cryptography import x509
from flwr.serverapp import Grid

from fedllm.config import RunConfig
from fedllm.data.digests import require_same_inputs
from fedllm.devices import described
from fedllm.errors import ConfigError, DataError, FedllmError, ModelError, RunFailed, StoreError
from fedllm.measures import in_order
from fedllm.models.readback import Unchecked, require_true
from fedllm.runs import checkpoint
from fedllm.runs.checkpoint import Checkpoint
from fedllm.runs.folder import BEST_RESULTS, RESULTS, write_partition
from fedllm.runs.provenance.card import write_card
from fedllm.runs.provenance.chain import Signer, own_signer, require_signer
from fedllm.runs.provenance.identity import provenance, require_same, require_unedited
from fedllm.runs.reader import Run
from fedllm.runs.records import CHECKING, FILE
from fedllm.runs.summary import Status, ended_early
from fedllm.runs.writer import RunStore
from fedllm.tasks.metrics import by_class
from fedllm.tensors import Tensors, dense_bytes
from fedllm.wording import human_bytes
from server.rounds.admission import Proven
from server.rounds.earlier import Start, require_same_start, start_of
from server.rounds.engine import Engine
from server.rounds.privacy import Privacy
from server.rounds.rehearsal import few_texts, rehearse
from server.rounds.signatures import Signatures
from server.rounds.state import ServerState
from server.rounds.timing.clock import Clock
from server.rounds.timing.work import clock_of
from strategies import robust
from strategies.attack import backdoor_success, poisoned
from strategies.private import promise
from strategies.session import Session, open_session

__all__ = ["Transport", "conduct"]

_UNFINISHED = ".adapter-best-"
"""Begins the name of the folder in which the result of the best round is made."""


@dataclass(frozen=True)
class Transport:
    """What only a deployment's transport can tell.

    Attributes:
        traffic: returns the bytes up and down that it counted; None where that is not known.
        proven: which client each node's key stands for; None where it was started without keys.
        bound: lets replies have so many bytes, and no more.
        signer: the key that signs the rounds of this federation; None makes one for the run.
        authority: the certificate by which nodes' replies are known; None where they have no keys.
    """

    traffic: Callable[[], tuple[int | None, int | None]]
    proven: Proven | None
    bound: Callable[[int], None]
    signer: Signer | None = None
    authority: x509.Certificate | None = None


def conduct(
    grid: Grid, config: RunConfig, folder: Path, *, transport: Transport | None = None
) -> dict[str, Any]:
    """Conduct a run to its end and return its summary.

    Args:
        grid: Flower's connection to the nodes.
        config: the run.
        folder: the run folder. A run that lies there already is continued after its last checkpoint, and the
            numbers come out as if it had never stopped.
        transport: of a deployment; a simulation has none.

    Raises:
        FedllmError: what ended the run; it is also the summary's last event.
    """
    begun = (folder / FILE).is_file()
    extended = begun and Run(folder).goes_on_to is not None
    signer = transport.signer if transport else None
    killed_checking = begun and Run(folder).phase.get("name") == CHECKING
    with _taken_back_if_refused(folder, begun):
        session = open_session(config.to_json())  # as clients of this process ask for it
        config = config.placed(deployed=transport is not None)
        if config.privacy.noised and config.privacy.noise_multiplier is None:
            raise ConfigError(
                f"privacy.target_epsilon = {config.privacy.target_epsilon:g} was not turned into noise: give "
                "the run privacy.noise_multiplier as well, or resolve its configuration first"
            )
        run = _same_run(folder, config, deployed=transport is not None) if begun else uuid4().hex[:12]
        if begun:
            require_signer(folder, signer)
        _prepare(session, begun)
        if config.attack.kind != "none":  # and a simulation, whose texts are all here
            poisoned(config, session.model, session.test_tokens)  # refuses what cannot be done to them
        known = Run(folder).provenance.get("inputs", {}) if begun else session.inputs
        require_same_inputs(folder, config, known, session.inputs)
        saved = _checkpoint(folder) if begun else None
        start = start_of(session) if saved is None else Start(saved.groups["tensors"])
        if begun and saved is None:  # it was cut short before its first checkpoint
            require_same_start(folder, Run(folder).provenance, start)
        notes = [*start.notes, *rehearse(session)] if saved is None else []
        clock = clock_of(session)
        if extended and config.privacy.hides == "example" and config.privacy.target_epsilon is not None:
            raise ConfigError(
                "clients have chosen the noise on their steps so that the rounds first asked for spend "
                f"privacy.target_epsilon = {config.privacy.target_epsilon:g}: begin another run"
            )
        if extended and config.privacy.noised and saved is not None:
            Privacy(config, folder, begun=True).require(saved.number + 1, config.rounds)
    last = saved.number if saved else -1
    made = provenance(run=run, inputs=known, **start.facts)
    with RunStore.open(folder) if begun else RunStore.create(folder, config, made) as store:

        def finish(status: Status, reason: str | None = None) -> dict[str, Any]:
            up, down = transport.traffic() if transport else (None, None)
            return store.finish(status, reason=reason, wire_up=up, wire_down=down)

        store.sign(run, signer or own_signer(folder))
        # In this order: what is cut short in between is done again by whoever resumes the run next.
        checkpoint.forget(folder / "checkpoints", last)
        _forget_result(folder)
        _note_return(store, last)
        if begun:
            _note_versions(store, made)
        store.truncate(last)
        if extended:
            store.extend(config.rounds)
        if not known:
            store.event("inputs", "begun by a fedllm that kept no digests: data and model go unchecked")
        if start.source:
            store.event("start", start.sentence)
        for note in () if begun else session.model.notes:
            store.event("model", note)
        for note in () if begun else session.notes:
            store.event("data", note)
        if clock is not None and not begun:
            store.event("devices", described(clock.devices), devices=[one.name for one in clock.devices])
        for note in notes:
            store.event("warning", note)
        try:
            state = start.state() if saved is None else ServerState.load(saved)
            privacy = Privacy(config, folder, begun=saved is not None) if config.privacy.noised else None
            if config.privacy.hides and not begun:
                store.event("start", promise(config))
            engine = _compose(config, session, store, run, transport, state, clock, privacy)
            engine.start(grid)
            if not engine.finished:
                _write_best(store, session, check=not killed_checking)
                return finish("stopped", "the operator asked to stop")
            _write_result(engine, session, check=not killed_checking)
            _write_best(store, session, check=not killed_checking)
        except KeyboardInterrupt:
            # A deployed run goes down with its SuperLink, not at its user's wish, and whoever serves the
            # federation next says what becomes of it: server/federation/watch.py.
            if transport is None:
                finish("stopped", "interrupted")
            raise
        except FedllmError as error:
            finish("failed", str(error))
            raise
        return finish("finished", ended_early(store.config, store.rounds))


@contextmanager
def _taken_back_if_refused(folder: Path, begun: bool) -> Iterator[None]:
    """Prepare a run, in the block; one that cannot go on as was said stays what it was."""
    try:
        yield
    except FedllmError:
        if begun:
            with suppress(StoreError):
                Run(folder).stay()
        raise


def _prepare(session: Session, begun: bool) -> None:
    """Load texts and model; where that fails only now, what they were when the run was begun is gone."""
    try:
        session.prepare()
    except (DataError, ModelError) as error:
        if not begun:
            raise
        raise type(error)(
            f"{error}; it did not stand in the run's way when it was begun: bring back what was there, or "
            "begin another run in another folder"
        ) from error


def _same_run(folder: Path, config: RunConfig, *, deployed: bool) -> str:
    """Return the identity of the run in a folder, once it has proved to be the one that is asked for."""
    stored = Run(folder)
    require_unedited(folder, stored.config, stored.goes_on_as)
    # One begun before there was such a default holds nothing where the default now stands.
    require_same(folder, stored.goes_on_as.placed(deployed=deployed), config)
    return stored.identity


def _checkpoint(folder: Path) -> Checkpoint | None:
    """Return the checkpoint from which a run is to go on: its last, or the one that an operator chose.

    Raises:
        StoreError: the chosen one is damaged.
    """
    chosen = Run(folder).goes_on_from
    if chosen is not None:
        return checkpoint.load(folder / "checkpoints", chosen)
    return checkpoint.latest(folder / "checkpoints")


def _compose(
    config: RunConfig,
    session: Session,
    store: RunStore,
    run: str,
    transport: Transport | None,
    state: ServerState,
    clock: Clock | None,
    privacy: Privacy | None,
) -> Engine:
    """Note who holds what, and put the engine together."""
    if not (store.folder / "partition.json").exists():
        train, test = session.split
        labels = None if train.labels is None else train.labels.tolist()
        held_out = range(len(test)) if test.numbers is None else test.numbers.tolist()
        parts = [part.tolist() for part in session.partition]
        write_partition(store.folder, parts, labels, train.label_names, held_out)
    authority = transport.authority if transport else None
    reference = 4 * session.method.reference_parameters(session.model)
    evaluates = config.evaluation.every > 0

    def evaluate(tensors: Tensors) -> dict[str, float]:
        test = session.test_tokens  # may ask the model about the texts
        session.method.load(session.model, tensors)
        found = session.method.score(session.model, test)
        _require_measured(config.metric, found)
        if config.attack.kind == "backdoor":
            found["backdoor_success"] = backdoor_success(config, session.model, test)
        return found

    engine = Engine(
        config,
        session.method,
        session.codecs,
        store,
        state=state,
        run=run,
        reference_bytes=reference,
        evaluate=evaluate if evaluates else None,
        networked=transport is not None,
        proven=transport.proven if transport else None,
        bound=transport.bound if transport else None,
        privacy=privacy,
        clock=clock,
        signatures=Signatures(authority, run) if authority else None,
        shared=session.shared,
    )
    engine.summary()
    if robust.keeps(config.server):
        most = config.answers * dense_bytes(session.method.updates(state.current.tensors))
        said = f'server.robust = "{config.server.robust}" keeps a round\'s updates until it ends'
        store.event("start", f"{said}: up to {human_bytes(most)} of memory")
    return engine


def _require_measured(metric: str, found: Mapping[str, float]) -> None:
    """Refuse a metric that decides and that this test set does not give, such as one of single classes."""
    if metric not in found:
        measured = ", ".join(in_order(by_class(found)[0]))
        raise ConfigError(
            f"evaluation.metric = {metric!r} is not measured on this test set, but {measured}: "
            "name one of these, or hold out other texts"
        )


def _note_return(store: RunStore, last: int) -> None:
    """Say which rounds are forgotten; what a kill left without a checkpoint comes again as it was."""
    forgotten = store.last_round - last
    if forgotten < 1 or (forgotten == 1 and Run(store.folder).goes_on_from is None):
        return
    start = f"goes on after round {last}" if last >= 0 else "begins anew, having no whole checkpoint"
    sentence = f"{start}: what came after it, up to round {store.last_round}, is forgotten"
    if forgotten > 1:
        sentence += "; clients that no longer have what they kept of their own at that round begin it afresh"
    store.event("rolled back", sentence, round=max(last, 0))


def _note_versions(store: RunStore, made: Mapping[str, Any]) -> None:
    """Say with what a run goes on where that is not what began it, which alone ``provenance.json`` names."""
    began = Run(store.folder).provenance
    before, now = (
        dict(told.get("versions", {})) | {"commit": (told.get("git") or {}).get("commit")}
        for told in (began, made)
    )
    other = [
        f"{name} {now.get(name) or 'none'} in place of {before.get(name) or 'none'}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if other:
        store.event("warning", f"goes on with {', '.join(other)}: later rounds may have other last digits")


def _forget_result(folder: Path) -> None:
    """Delete the results, which are those of the last checkpoint and of the best, or are not there."""
    for place in (*(folder / name for name in (*RESULTS, *BEST_RESULTS)), *folder.glob(f"{_UNFINISHED}*")):
        shutil.rmtree(place, ignore_errors=True)


def _write_result(engine: Engine, session: Session, *, check: bool) -> None:
    """Save the model of the last round."""
    store = engine.store
    store.phase("saving")
    place = session.method.save(session.model, engine.state.current.tensors, store.folder)
    _conclude(store, session, place, store.last_round, check=check)


def _write_best(store: RunStore, session: Session, *, check: bool) -> None:
    """Save the model of the best round: from its checkpoint, or as a copy where it is the last."""
    best = store.bests.get(store.last_round)
    if best is None:
        return
    store.phase("saving")
    last = next((place for name in RESULTS if (place := store.folder / name).is_dir()), None)
    with TemporaryDirectory(prefix=_UNFINISHED, dir=store.folder) as beside:
        if best.round == store.last_round and last is not None:
            made = shutil.copytree(last, Path(beside) / last.name)
            made.rename(store.folder / f"{made.name}-best")
            return
        try:
            tensors = checkpoint.load(store.folder / "checkpoints", best.round).groups["tensors"]
        except StoreError as error:
            message = f"the result of the best round, {best.round}, cannot be saved: {error}"
            store.event("warning", message, round=store.last_round)
            return
        made = session.method.save(session.model, tensors, Path(beside))
        place = made.rename(store.folder / f"{made.name}-best")
    _conclude(store, session, place, best.round, check=check)


def _conclude(store: RunStore, session: Session, place: Path, round: int, *, check: bool) -> None:
    """Compare what was saved with the model in hand; the card, which tells people of it, comes last."""
    store.phase(CHECKING)
    try:
        if not check:
            reason = "the process was killed over that the last time, most likely for want of memory"
            raise Unchecked(place, reason, starved=True)
        require_true(session.model, place, few_texts(session).whole())
    except Unchecked as error:
        store.event("warning", str(error), round=store.last_round)
    except RunFailed:
        _forget_result(store.folder)
        raise
    write_card(Run(store.folder), place, round)
