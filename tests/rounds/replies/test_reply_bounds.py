"""How many bytes a reply may have is told before it is asked for, with room for whatever a codec makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedllm.codecs.base import CodecContext
from fedllm.runs.writer import RunStore
from fedllm.tensors import Tensors
from fedllm.wording import human_bytes
from server.rounds.exchange.messages import LEAST_BOUND
from simulations.engines.loopback import loopback
from tests.conformance.codecs.test_codec_pairs import PAIRS
from tests.rounds.scripted import constant, engine_of, grid_of, scripted, send

MIB = 1 << 20


def test_the_bound_is_told_before_the_first_question_and_again_where_it_grows(tmp_path: Path) -> None:
    """Three floats are twelve bytes; what was told is not told again."""
    config, told = scripted(), list[tuple[str, int]]()
    with loopback(config.clients, {}), RunStore.create(tmp_path / "run", config) as store:
        engine = engine_of(config, store, bound=lambda most: told.append(("bound", most)))

        def script(node: int, asked: object) -> object:
            told.append(("asked", node))
            return send(config, node, asked, constant(1.0))  # type: ignore[arg-type]

        engine.start(grid_of(config, script))  # type: ignore[arg-type]
    assert engine.finished
    bounds = [item for item in told if item[0] == "bound"]
    assert bounds == [("bound", MIB), ("bound", MIB + 4 * 12)]
    assert told.index(bounds[1]) < told.index(("asked", 0))


@pytest.mark.slow
def test_no_codec_makes_more_of_an_update_than_a_reply_may_have() -> None:
    """Tables and paddings are the most of small tensors: 200 bytes each leave room for five thousand."""
    random = torch.Generator().manual_seed(3)
    updates: list[Tensors] = [
        {"a": torch.randn(60, 40, generator=random)},
        {f"t{number}": torch.randn(3, generator=random) for number in range(20)},
    ]
    assert LEAST_BOUND == 5000 * 200 + 48_576
    for update in updates:
        dense = 4 * sum(tensor.numel() for tensor in update.values())
        for codec in PAIRS:
            payload, _ = codec.encode(update, {}, CodecContext(0, ("up", 1, 0), 0.5))
            assert len(payload) < 4 * dense + 200 * len(update), f"{codec}: {human_bytes(len(payload))}"
