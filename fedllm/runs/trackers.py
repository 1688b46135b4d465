"""Optional copies of a run's numbers in TensorBoard or MLflow, through their own libraries.

The run store stays the record; a tracker is told of each round after it was committed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, Self

from fedllm.config import RunConfig
from fedllm.errors import ConfigError
from fedllm.extras import require
from fedllm.runs.records import RoundRecord

__all__ = ["MLflow", "TensorBoard", "Tracker", "opened"]


class Tracker(Protocol):
    """What a run tells its observers."""

    def round(self, record: RoundRecord) -> None:
        """Note one committed round."""
        ...

    def close(self, status: str = "finished") -> None:
        """Write out what is left; ``status`` as in the run store."""
        ...


def _numbers(record: RoundRecord) -> dict[str, float]:
    """Return what a curve can be drawn of, by name."""
    return {
        **{f"metrics/{name}": float(value) for name, value in record.metrics.items()},
        "bytes/up": float(record.bytes_up),
        "bytes/down": float(record.bytes_down),
        "seconds/round": record.seconds,
        "seconds/client_compute": record.client_compute,
        "replies/participants": float(record.participants),
        "replies/failures": float(record.failures),
        "replies/rejected": float(record.rejected),
        "memory/peak_rss_bytes": float(record.peak_rss_bytes),
    }


class TensorBoard:
    """Writes event files that ``tensorboard --logdir FOLDER`` shows.

    Raises:
        ConfigError: the library is not installed.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        require("tensorboard", "--track tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))
        self._writer.add_text("configuration", f"```toml\n{config.to_toml()}```")

    def round(self, record: RoundRecord) -> None:
        """Note one committed round."""
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name, value, record.round, walltime=record.finished_at)
        self._writer.flush()

    def close(self, status: str = "finished") -> None:
        """Write out what is left."""
        self._writer.add_text("status", status)
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close("failed" if exception[0] else "finished")


class MLflow:
    """Logs to the MLflow server or folder of ``uri``, one MLflow run per run.

    Args:
        uri: tracking address; None takes MLflow's own (``MLFLOW_TRACKING_URI``).
        config: becomes the run's parameters, and its name.
        experiment: MLflow experiment, made if missing.

    Raises:
        ConfigError: the library is not installed.
    """

    def __init__(self, config: RunConfig, *, uri: str | None = None, experiment: str = "fedllm") -> None:
        require("mlflow", "--track mlflow")
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        known = self._client.get_experiment_by_name(experiment)
        identity = known.experiment_id if known else self._client.create_experiment(experiment)
        self._run = self._client.create_run(identity, run_name=config.name).info.run_id
        for key, value in _flatten(config.to_document()).items():
            self._client.log_param(self._run, key, value)

    def round(self, record: RoundRecord) -> None:
        """Note one committed round."""
        at = int(record.finished_at * 1000)
        for name, value in _numbers(record).items():
            self._client.log_metric(self._run, name, value, timestamp=at, step=record.round)

    def close(self, status: str = "finished") -> None:
        """Set how the run ended."""
        outcomes = {"finished": "FINISHED", "failed": "FAILED"}
        self._client.set_terminated(self._run, status=outcomes.get(status, "KILLED"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close("failed" if exception[0] else "finished")


@contextmanager
def opened(names: Sequence[str], folder: Path, config: RunConfig) -> Iterator[list[TensorBoard | MLflow]]:
    """Open trackers by name for one run.

    Args:
        names: of ``tensorboard`` (event files in ``tensorboard/`` beside the run) and ``mlflow``.
        folder: the run folder.
        config: the run.

    Raises:
        ConfigError: there is no such tracker, or its library is not installed.
    """
    with ExitStack() as stack:
        made: list[TensorBoard | MLflow] = []
        for name in names:
            if name == "tensorboard":
                logs = folder.parent / "tensorboard" / folder.name
                made.append(stack.enter_context(TensorBoard(logs, config)))
            elif name == "mlflow":
                made.append(stack.enter_context(MLflow(config)))
            else:
                raise ConfigError(f"--track {name}: trackers are tensorboard and mlflow")
        yield made


def _flatten(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
