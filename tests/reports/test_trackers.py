"""TensorBoard and MLflow are read back with their own readers."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedllm.config import RunConfig
from fedllm.runs.records import RoundRecord
from fedllm.runs.trackers import MLflow, TensorBoard

ROUNDS = [
    RoundRecord(round=n, metrics={"accuracy": n / 10, "loss": 1.0}, bytes_up=100 * n, finished_at=1000.0 + n)
    for n in (1, 2)
]


def test_tensorboard_shows_each_round(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TensorBoard(tmp_path, RunConfig(name="trial")) as tracker:
        for record in ROUNDS:
            tracker.round(record)
    events = EventAccumulator(str(tmp_path)).Reload()
    points = [(p.step, round(p.value, 6), p.wall_time) for p in events.Scalars("metrics/accuracy")]
    assert points == [(1, 0.1, 1001.0), (2, 0.2, 1002.0)]
    assert [p.value for p in events.Scalars("bytes/up")] == [100, 200]
    (text,) = events.Tensors("configuration/text_summary")
    assert b'name = "trial"' in text.tensor_proto.string_val[0]


@pytest.mark.slow
# MLflow's own models use an option that SQLAlchemy has deprecated.
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
@pytest.mark.parametrize(
    ("failure", "status"), [(None, "FINISHED"), (ValueError("x"), "FAILED")], ids=["finished", "failed"]
)
def test_mlflow_shows_each_round(tmp_path: Path, failure: Exception | None, status: str) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = RunConfig(name="trial", seed=3)

    def track() -> None:
        with MLflow(config, uri=uri) as tracker:
            for record in ROUNDS:
                tracker.round(record)
            if failure:
                raise failure

    if failure:
        with pytest.raises(ValueError, match="x"):
            track()
    else:
        track()
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("fedllm")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "trial"
    assert run.info.status == status
    assert run.data.params["seed"] == "3"
    assert run.data.params["training.local_steps"] == "8"
    history = client.get_metric_history(run.info.run_id, "metrics/accuracy")
    assert [(m.step, m.value, m.timestamp) for m in history] == [(1, 0.1, 1001000), (2, 0.2, 1002000)]
