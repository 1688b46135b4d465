"""The same run on every engine and with any number of workers: five rounds, three of six clients in each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedllm.config import RunConfig
from fedllm.runs.reader import Run
from simulations.engines.flower import simulate as on_flower
from simulations.engines.loopback import simulate as in_process
from strategies.registry import load_method, method_names
from tests.conformance.test_methods import METHODS
from tests.rounds.federation import configuration

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


OTHERS: dict[str, dict[str, Any]] = {
    "fed-sb": {"method": "lora", "options": {"rule": "fed-sb"}},
    "fedavg-blocks": {"method": "fedavg", "tuning": {"blocks": 2, "block_order": "random"}},
}
"""What holds exchanges or sends steps of its own."""
NEEDS = {row["method"]: {"training": row["training"]} for row in METHODS.values() if "training" in row}
"""What a method must be told before it runs at all: of the table of methods."""


@pytest.fixture(params=[*method_names(), *OTHERS])
def config(request: pytest.FixtureRequest, tiny_encoder: Path, tiny_texts: Path) -> RunConfig:
    if request.param in OTHERS:
        return configuration(tiny_encoder, tiny_texts, **OTHERS[request.param])
    options = load_method(request.param).Options().model_dump(mode="json", exclude_none=True)
    return configuration(
        tiny_encoder, tiny_texts, method=request.param, options=options, **NEEDS.get(request.param, {})
    )


def outcome(folder: Path) -> dict[str, Any]:
    """What must not depend on who computed it: each round's replies, the numbers, the bytes, the tensors."""
    run = Run(folder)
    summary = run.summary
    replies = {(row.round, row.exchange, row.node, row.status, row.loss) for row in run.nodes()}
    return {
        "replies": replies,
        **{key: summary[key] for key in ("status", "metrics", "bytes", "passes", "failures", "state_sha256")},
    }


def test_engines_and_workers_give_the_same_numbers(config: RunConfig, tmp_path: Path) -> None:
    in_process(config, tmp_path / "alone")
    in_process(config, tmp_path / "pool", workers=2)
    on_flower(config, tmp_path / "flower", workers=2)
    alone = outcome(tmp_path / "alone")
    assert alone["status"] == "finished"
    assert len({node for round, exchange, node, *_ in alone["replies"] if exchange == "fit"}) > 3
    assert outcome(tmp_path / "pool") == alone
    assert outcome(tmp_path / "flower") == alone
