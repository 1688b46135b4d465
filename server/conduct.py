"""One run from the server's side: open or restore it, run the engine, write the result."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

from flwr.serverapp import Grid

from fedllm import checkpoint
from fedllm.config import RunConfig
from fedllm.errors import FedllmError
from fedllm.provenance import provenance
from fedllm.run_database import FILE
from fedllm.runs import Run
from fedllm.store import RunStore
from fedllm.summary import Status
from fedllm.tensors import Tensors
from strategies.engine import Engine
from strategies.workshop import Workshop, open_workshop

__all__ = ["conduct"]


Traffic = Callable[[], tuple[int | None, int | None]]
"""Returns the bytes up and down that a deployed transport counted; None where that is not known."""


def conduct(grid: Grid, config: RunConfig, folder: Path, *, traffic: Traffic | None = None) -> dict[str, Any]:
    """Conduct a run to its end and return its summary.

    Args:
        grid: Flower's connection to the nodes.
        config: the run.
        folder: the run folder. A run that lies there already is continued after its last checkpoint, and the
            numbers come out as if it had never stopped.
        traffic: of a deployment, asked once the run is over; a simulation has none.

    Raises:
        FedllmError: what ended the run; it is also the summary's last event.
    """
    workshop = open_workshop(config.to_json())
    workshop.prepare()
    begun = (folder / FILE).is_file()
    saved = checkpoint.latest(folder / "checkpoints") if begun else None
    made = provenance(run=uuid4().hex[:12])
    with RunStore.open(folder) if begun else RunStore.create(folder, config, made) as store:

        def finish(status: Status, reason: str | None = None) -> dict[str, Any]:
            up, down = traffic() if traffic else (None, None)
            return store.finish(status, reason=reason, wire_up=up, wire_down=down)

        store.truncate(saved.number if saved else -1)
        try:
            engine = _compose(workshop, store, networked=traffic is not None)
            if saved is not None:
                engine.restore(saved)
            engine.start(grid)
            if not engine.finished:
                return finish("stopped", "the operator asked to stop")
            _write_result(engine, workshop)
        except KeyboardInterrupt:
            finish("stopped", "interrupted")
            raise
        except FedllmError as error:
            finish("failed", str(error))
            raise
        return finish("finished")


def _compose(workshop: Workshop, store: RunStore, *, networked: bool) -> Engine:
    """Note who holds what, and put the engine together."""
    config = workshop.config
    train, _ = workshop.split
    labels = None if train.labels is None else train.labels.tolist()
    store.partition([part.tolist() for part in workshop.partition], labels, train.label_names)
    reference = 4 * workshop.method.reference_parameters(workshop.model)
    evaluates = config.evaluation.every > 0

    def evaluate(tensors: Tensors) -> dict[str, float]:
        workshop.method.load(workshop.model, tensors)
        return workshop.method.score(workshop.model, workshop.test_tokens)

    engine = Engine(
        config,
        workshop.method,
        store,
        initial=workshop.initial,
        run=str(Run(store.folder).provenance["run"]),
        reference_bytes=reference,
        evaluate=evaluate if evaluates else None,
        networked=networked,
    )
    engine.summary()
    return engine


def _write_result(engine: Engine, workshop: Workshop) -> None:
    folder = engine.store.folder
    for name in ("adapter", "model"):
        shutil.rmtree(folder / name, ignore_errors=True)
    engine.store.phase("saving")
    workshop.method.save(workshop.model, engine.state.tensors, folder)
