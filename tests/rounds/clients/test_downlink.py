"""How a node comes to the current global tensors: by increments, or by the tensors whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedllm.codecs import parse
from fedllm.errors import WireError
from fedllm.protocol.increments import receive
from fedllm.protocol.wire import DENSE, Instruction, Reply
from fedllm.tensors import Tensors, dense_bytes, digest, pack, spec_of
from server.rounds.exchange.downlink import Downlink
from strategies.base import Replay
from tests.rounds.scripted import Mean, play, scripted, send

WIDE = 1000
"""Values of the tensor: 4,000 bytes whole, a little over 1,000 as eight-bit codes."""


def committed(versions: int, codec: str = "quantize(bits=8)") -> tuple[Downlink, Tensors, list[Tensors]]:
    """A downlink after so many commits, the newest tensors, and those of every version."""
    config = scripted(codec={"down": codec}, rounds=20)
    downlink, tensors = Downlink(config, parse(codec), Mean(config)), {"w": torch.zeros(WIDE)}
    history, memory = [tensors], dict[str, torch.Tensor]()
    for version in range(versions):
        values = torch.linspace(-1.0, 1.0, WIDE) * (version + 1)
        tensors, memory = downlink.commit(version, tensors, {"w": tensors["w"] + values}, memory)
        history.append(tensors)
    return downlink, tensors, history


def carried(downlink: Downlink, node: int, history: list[Tensors]) -> tuple[int, tuple[int, ...], Tensors]:
    """What a node is sent, and what it makes of it."""
    version = len(history) - 1
    start, sizes, payload = downlink.payload(node, version, history[-1])
    told = Instruction("run", "fit", base=version, start=start, sizes=sizes, payload=payload)
    held = None if start == DENSE else history[start]
    found = receive(told, held, history[0], downlink.config, downlink.codec, downlink.method.replay)
    assert found is not None
    return start, sizes, found


@pytest.mark.parametrize(("known", "increments"), [(0, 3), (1, 2), (2, 1), (3, 0)])
def test_a_node_gets_the_increments_that_it_lacks(known: int, increments: int) -> None:
    downlink, tensors, history = committed(3)
    downlink.sent.known[0] = known
    start, sizes, found = carried(downlink, 0, history)
    assert (start, len(sizes)) == (known, increments)
    assert all(1000 < size < 1100 for size in sizes)
    assert torch.equal(found["w"], tensors["w"])


@pytest.mark.parametrize("known", [None, 0, 3])
def test_increments_larger_than_the_tensors_are_not_sent(known: int | None) -> None:
    """Of seven increments three are kept: with a fourth they would be larger than the tensors."""
    downlink, tensors, history = committed(7)
    assert (downlink.sent.first, len(downlink.sent.increments)) == (4, 3)
    if known is not None:
        downlink.sent.known[0] = known
    start, sizes, found = carried(downlink, 0, history)
    assert (start, sizes) == (DENSE, (4 * WIDE,))
    assert torch.equal(found["w"], tensors["w"])


def test_the_oldest_increment_that_is_kept_is_used() -> None:
    downlink, tensors, history = committed(7)
    downlink.sent.known[0] = 4
    start, sizes, found = carried(downlink, 0, history)
    assert (start, len(sizes)) == (4, 3)
    assert torch.equal(found["w"], tensors["w"])


def test_one_increment_larger_than_the_tensors_is_sent_as_tensors() -> None:
    """A codec that sends every value still adds its header."""
    downlink, tensors, history = committed(1, codec="random_k(fraction=1.0)")
    if sum(map(len, downlink.sent.increments)) < dense_bytes(spec_of(tensors)):
        pytest.fail("the codec saves here: nothing is tested")
    downlink.sent.known[0] = 0
    start, sizes, found = carried(downlink, 0, history)
    assert (start, sizes) == (DENSE, (4 * WIDE,))
    assert torch.equal(found["w"], tensors["w"])


def test_without_a_codec_tensors_travel_whole_but_once() -> None:
    downlink, tensors, _ = committed(2, codec="none")
    downlink.sent.known[0] = 1
    assert downlink.payload(0, 2, tensors) == (DENSE, (4 * WIDE,), pack(tensors))
    downlink.sent.known[0] = 2
    assert downlink.payload(0, 2, tensors) == (2, (), b"")


@pytest.mark.parametrize("base", [1, 3])
def test_increments_that_do_not_lead_to_the_version_are_refused(base: int) -> None:
    downlink, tensors, history = committed(2)
    downlink.sent.known[0] = 0
    start, sizes, payload = downlink.payload(0, 2, tensors)
    told = Instruction("run", "fit", base=base, start=start, sizes=sizes, payload=payload)
    with pytest.raises(WireError, match=f"2 increments from version 0 do not lead to {base}"):
        receive(told, history[0], history[0], downlink.config, downlink.codec, downlink.method.replay)


def test_an_increment_of_no_known_kind_is_refused() -> None:
    config = scripted(codec={"down": "sign"})
    told = Instruction("run", "fit", base=1, start=0, sizes=(3,), payload=b"xyz")
    tensors = {"w": torch.zeros(2)}
    with pytest.raises(WireError, match="unknown kind of increment"):
        receive(told, tensors, tensors, config, parse("sign"), Mean(config).replay)


class Walk(Mean):
    """Clients repeat a step from a record of one byte: how far all values move."""

    replays = True

    def replay(self, tensors: Tensors, record: bytes) -> Tensors:
        return {name: value + record[0] for name, value in tensors.items()}


def test_a_replayed_step_is_taken_on_both_sides_from_its_record() -> None:
    config = scripted(rounds=20)
    downlink, history = Downlink(config, parse("none"), Walk(config)), [{"w": torch.zeros(WIDE)}]
    for version, step in enumerate((3, 4)):
        tensors, memory = downlink.commit(
            version, history[-1], Replay(bytes([step])), {"kept": torch.ones(1)}
        )
        history.append(tensors)
        assert list(memory) == ["kept"]
    assert history[-1]["w"].unique().tolist() == [7.0]
    downlink.sent.known[0] = 0
    start, sizes, found = carried(downlink, 0, history)
    assert (start, sizes) == (0, (2, 2))
    assert torch.equal(found["w"], history[-1]["w"])


def test_whoever_has_lost_the_first_version_says_so() -> None:
    config = scripted(codec={"down": "sign"})
    told = Instruction("run", "fit", base=1, start=0, sizes=(3,), payload=b"xyz")
    assert receive(told, None, {"w": torch.zeros(2)}, config, parse("sign"), Mean(config).replay) is None


def test_the_error_of_the_newest_increment_is_known() -> None:
    """Eight bits: a step is 1/127 of the largest value, the mean square of a rounding error step^2 / 12."""
    downlink, _, _ = committed(1)
    update = torch.linspace(-1.0, 1.0, WIDE).double()
    expected = (1 / 127) ** 2 / 12 / float(update.square().mean())
    assert downlink.error is not None
    assert downlink.error**2 == pytest.approx(expected, rel=0.3)


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_rotation_is_turned_back_with_the_draws_it_was_made_with(way: str, tmp_path: Path) -> None:
    """Draws differ by way, round, exchange and client: with any others, nothing of the update is left."""
    config = scripted(clients=2, rounds=3, codec={way: "rotate | quantize(bits=8)"})
    update, held = {"w": torch.linspace(-1.0, 2.0, 300)}, {0: {"w": torch.zeros(300)}}

    def script(node: int, asked: Instruction) -> Reply:
        known = (
            receive(asked, held[asked.start], held[0], config, parse(config.codec.down), method.replay)
            if asked.sizes
            else held[asked.base]
        )
        assert known is not None
        held[asked.base] = known
        assert digest(known) == asked.digest
        return send(config, node, asked, update)

    method = Mean(config)
    held[DENSE] = held[0]
    engine = play(config, tmp_path / "run", script, method=method, start=held[0])
    assert (engine.state.current.tensors["w"] - 3 * update["w"]).abs().max() < 0.05


# --- the progress of a run drives codecs that change -------------------------------------------------------

ENERGIES = [9.0, 4.0, 2.0, 1.0]
"""Squared singular values of an update: shares of 0.56, 0.25, 0.125 and 0.0625."""
MATRIX = {"w": torch.diag(torch.tensor(ENERGIES).sqrt()).repeat(8, 8) / 8.0}
RISING = 'low_rank(energy="0.5->0.95")'


def ranks(sizes: list[int]) -> list[int]:
    """How many pairs of factors, 32 + 32 values of four bytes each, an increment or a reply holds."""
    return [size // (4 * 64) for size in sizes]


@pytest.mark.parametrize("way", ["up", "down"])
def test_the_energy_of_low_rank_rises_as_the_run_goes_on(way: str, tmp_path: Path) -> None:
    """T(t) = 0.5 + 0.45 t at t = 0, 1/4, 2/4, 3/4 is 0.5, 0.6125, 0.725, 0.8375: 1, 2, 2 and 3 components."""
    config = scripted(rounds=4, clients=1, codec={way: RISING}, server={"quorum": 1})
    sizes: dict[str, list[int]] = {"up": [], "down": []}

    def script(node: int, asked: Instruction) -> Reply:
        if asked.round > 1:
            sizes["down"].append(len(asked.payload))
        told = send(config, node, asked, MATRIX)
        sizes["up"].append(len(told.payload))
        return told

    play(config, tmp_path / "run", script, start={"w": torch.zeros(32, 32)})
    expected = {"up": [1, 2, 2, 3], "down": [1, 2, 2]}
    assert ranks(sizes[way]) == expected[way]
