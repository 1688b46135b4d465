"""No client decides for itself how much it counts, nor how far it moves the model."""

from __future__ import annotations

import itertools
import math
import tomllib
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from flwr.app import Error, RecordDict

from client.node import CONFIG_KEY, FOLDER_KEY
from fedllm.codecs import parse
from fedllm.codecs.base import CodecContext
from fedllm.config import ServerConfig, TrainingConfig
from fedllm.errors import ConfigError, RejectedReply
from fedllm.models.training import descend, stride
from fedllm.protocol import wire
from fedllm.protocol.uplink import ROUNDING, clipped
from fedllm.protocol.wire import Instruction, Reply
from fedllm.runs import checkpoint
from fedllm.runs.reader import Run
from fedllm.tensors import TensorSpec, norm_of, pack
from server.rounds import gates
from server.rounds.conduct import Transport
from server.rounds.conduct import conduct as conduct_run
from server.rounds.state import ServerState
from simulations.bench.reply_fuzz.replies import HONEST, LIARS, Answerer, conduct
from simulations.engines.loopback import LoopbackGrid, loopback
from strategies.fwdllm.warm_start import counted
from strategies.registry import resolve_run
from tests.parts import quick
from tests.rounds.federation import configuration
from tests.rounds.scripted import Mean, constant, play, scripted, send

CLIENTS = HONEST + LIARS
ALL = {"quorum": 1, "retries": 0}


def scaled(factor: float, liar: int = 3, since: int = 1) -> Answerer:
    """Let one client multiply its update; the configuration must send float32 as it is."""

    def answer(asked: Instruction, node: int, honest: Reply) -> RecordDict | Error:
        if node == liar and asked.kind == "fit" and asked.round >= since:
            head, body = honest.payload[:9], honest.payload[9:]
            values = torch.frombuffer(bytearray(body), dtype=torch.float32) * factor
            update = {"": values}
            payload, _ = parse("none").encode(update, {}, CodecContext())
            assert payload[:5] == head[:5]
            return wire.pack_reply(replace(honest, payload=payload))
        return wire.pack_reply(honest)

    return answer


def honestly(asked: Instruction, node: int, honest: Reply) -> RecordDict | Error:
    return wire.pack_reply(honest)


@pytest.mark.parametrize(
    ("name", "since", "factor"),
    quick(
        [
            (*first, factor)
            for first in (("by norm", 1), ("by norm", 2), ("slopes", 2))
            for factor in (100.0, 1e6)
        ],
        ("by norm", 2, 100.0),
    ),
)
def test_an_update_blown_up_is_rejected_by_default(
    factor: float, name: str, since: int, tmp_path: Path
) -> None:
    """From FwdLLM's second round on: in the first, a trust step has its length whatever the slopes are."""
    found = conduct(name, tmp_path / "run", scaled(factor, since=since), **ALL)
    rows = [row for row in Run(tmp_path / "run").nodes(node=3) if row.round >= since]
    assert {row.status for row in rows} == {"rejected"}
    assert all("server.norm_ratio = 10 times the" in str(row.reason) for row in rows)

    def absent(asked: Instruction, node: int, honest: Reply) -> RecordDict | Error:
        lost = node == 3 and asked.kind == "fit" and asked.round >= since
        return Error(0, "boom") if lost else wire.pack_reply(honest)

    assert found == conduct(name, tmp_path / "without", absent, **ALL)


def test_honest_rounds_are_measured_by_the_server(tmp_path: Path) -> None:
    def claim(asked: Instruction, node: int, honest: Reply) -> RecordDict | Error:
        return wire.pack_reply(replace(honest, metrics={**honest.metrics, "update_norm": 1e-9}))

    conduct("by norm", tmp_path / "run", claim, **ALL)
    rows = [row for row in Run(tmp_path / "run").nodes() if row.exchange == "fit"]
    assert {row.status for row in rows} == {"accepted"}
    values = 4 * 16 + 24 * 4 + 3 * 8 + 3  # drawn with a standard deviation of 0.01
    assert median(float(row.update_norm or 0.0) for row in rows) == pytest.approx(0.01 * values**0.5, rel=0.1)


def test_a_client_counts_for_three_medians_at_most(tmp_path: Path) -> None:
    """Everybody has 50 + its number of texts; client 15 says that it has a million."""

    def greedy(texts: int) -> Answerer:
        def answer(asked: Instruction, node: int, honest: Reply) -> RecordDict | Error:
            return wire.pack_reply(replace(honest, examples=texts) if node == CLIENTS - 1 else honest)

        return answer

    found = conduct("by norm", tmp_path / "million", greedy(1_000_000), **ALL)
    most = 3 * (50 + (CLIENTS - 1) // 2)
    assert found == conduct("by norm", tmp_path / "bounded", greedy(most), **ALL)
    assert found != conduct("by norm", tmp_path / "unbounded", greedy(1_000_000), **ALL, weight_ratio=0.0)
    run = Run(tmp_path / "million")
    rows = [row for row in run.nodes(node=CLIENTS - 1) if row.exchange == "fit"]
    assert {(row.examples, row.metrics["weight"]) for row in rows} == {(1_000_000, float(most))}
    (event,) = [event for event in run.events() if event.kind == "warning"]
    assert f"no client counts for more than {most} texts (server.weight_ratio" in event.message
    assert "so client 15 (1,000,000 texts) for less than it has" in event.message
    assert not any("weight" in row.metrics for row in run.nodes() if row.node != CLIENTS - 1)


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ([80, 100, 1_000_000], 300),
        ([100], 300),
        ([0, 0, 7], 1),
        ([], 500),
        ([10**9] * 3, 500),
    ],
)
def test_the_bound_on_weights_is_order_free(declared: list[int], expected: int) -> None:
    config = ServerConfig(max_examples=500, weight_ratio=3.0)
    for order in itertools.permutations(declared):
        assert gates.limits(config, order, None).examples == expected


def test_the_tighter_of_two_bounds_on_the_norm_is_the_one_named() -> None:
    both = ServerConfig(max_update_norm=5.0)
    assert gates.limits(both, [], 0.4).norm == pytest.approx(4.0)
    assert gates.limits(both, [], 2.0).reason == (
        "server.max_update_norm = 5; raise it if honest updates are longer"
    )
    assert gates.limits(ServerConfig(norm_ratio=0.0), [], 2.0).norm == math.inf
    assert gates.limits(ServerConfig(), [], None).norm == math.inf


def test_a_ratio_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"server.weight_ratio = 0.5 would count most clients for less"):
        resolve_run({}, ["server.weight_ratio=0.5"])


@pytest.mark.parametrize("value", [1e19, -3e38])
def test_values_whose_squares_overflow_are_rejected_whatever_the_bounds(value: float) -> None:
    with pytest.raises(RejectedReply, match=r"tensor slopes reaches .*, no update does"):
        gates.check({"slopes": torch.tensor([1.0, value])}, {"slopes": TensorSpec((2,))}, gates.Limits(1))


@pytest.mark.parametrize(("optimizer", "clip"), [("adamw", 0.0), ("adamw", 1.0), ("sgd", 0.5)])
def test_no_local_training_goes_ten_strides(optimizer: str, clip: float) -> None:
    """On a line that falls for ever every AdamW step is the learning rate long, the stride to the digit."""
    training = TrainingConfig.model_validate(
        {"optimizer": optimizer, "learning_rate": 0.01, "local_steps": 20, "max_grad_norm": clip}
    )
    weight = torch.nn.Parameter(torch.zeros(50))
    batches: list[Any] = [None] * training.local_steps
    descend([weight], lambda batch: weight.sum() * 1e3, batches, training)
    expected = stride(training, {"w": torch.zeros(50)})
    assert float(weight.detach().norm()) == pytest.approx(expected, rel=1e-3)


def clip_of(payload_norm: float, up: str) -> tuple[float, float]:
    """Norms of what a client clipped to 0.5 sends, decoded, and of what the server lets in."""
    generator = torch.Generator().manual_seed(0)
    update = torch.randn(4096, generator=generator)
    update *= payload_norm / update.norm()
    codec, context = parse(up), CodecContext()
    payload, _ = codec.encode({"w": update}, {}, context)
    decoded, _ = codec.decode(payload, {"w": TensorSpec((4096,))}, {}, context)
    norm = norm_of(decoded)
    return norm, norm_of(clipped(decoded, norm, 0.5, ROUNDING))


def test_the_server_clips_what_a_codec_lengthens_or_a_client_did_not_clip() -> None:
    decoded, taken = clip_of(0.5, "rotate | quantize(bits=1)")
    assert decoded > 0.6
    assert taken == pytest.approx(0.5, rel=1e-6)
    assert clip_of(7.0, "none")[1] == pytest.approx(0.5, rel=1e-6)


def test_what_a_client_clipped_itself_keeps_its_bits() -> None:
    update = {"w": torch.randn(1000, generator=torch.Generator().manual_seed(1))}
    norm = norm_of(update)
    own = {"w": update["w"] * (0.5 / norm)}
    assert clipped(own, norm_of(own), 0.5, ROUNDING) is own


def test_the_engine_clips(tmp_path: Path) -> None:
    """A client that ignores privacy.clip changes nothing: the server clips in its place."""
    clip = {"privacy": {"clip": 0.05}}
    honest = conduct("by norm", tmp_path / "honest", honestly, sections=clip, **ALL)
    longer = conduct("by norm", tmp_path / "longer", scaled(2.0), sections=clip, **ALL)
    assert longer == honest
    assert honest != conduct("by norm", tmp_path / "unclipped", honestly, **ALL)


def statistics(counts: list[float], sums: float = 0.1, gram: float = 0.1) -> dict[str, torch.Tensor]:
    return {
        "counts": torch.tensor(counts),
        "sums": torch.full((len(counts), 3), sums),
        "gram": torch.full((6,), gram),
    }


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (statistics([1e6, 1.0]), "do not add up to the 10 texts"),
        (statistics([11.0, -1.0]), "do not add up"),
        (statistics([9.5, 0.5]), "do not add up"),
        (statistics([9.0, 1.0], sums=4.0), "longer than the numbers of texts"),
        (statistics([9.0, 1.0], gram=11.0), "add up to more than the 10 texts"),
    ],
)
def test_statistics_of_texts_that_cannot_be_are_rejected(found: dict[str, torch.Tensor], reason: str) -> None:
    with pytest.raises(RejectedReply, match=reason):
        counted(found, claimed=10, examples=10)


def test_statistics_of_more_texts_than_count_are_scaled_down() -> None:
    found = statistics([6.0, 4.0])
    assert counted(found, claimed=10, examples=10) is found
    half = counted(found, claimed=10, examples=5)
    assert pack(half) == pack({name: tensor / 2 for name, tensor in found.items()})


def outcomes(folder: Path) -> dict[tuple[int, int], str]:
    return {(row.round, row.node): row.status for row in Run(folder).nodes() if row.exchange == "fit"}


@pytest.mark.parametrize("fraction", [0.003, 0.01])
def test_a_codec_that_lengthens_updates_rejects_no_honest_client(fraction: float, tmp_path: Path) -> None:
    """AdamW moves each value by the rate in each step; of every n values one is sent, n times as large."""
    training = {"learning_rate": 0.01, "local_steps": 5}
    config = scripted(
        training=training, codec={"up": f"random_k(fraction={fraction})"}, server={"norm_ratio": 10.0}
    )
    start = {"w": torch.zeros(100, 100)}

    def script(node: int, asked: Instruction) -> Reply:
        signs = torch.randint(2, (100, 100), generator=torch.Generator().manual_seed(node)) * 2.0 - 1.0
        return send(config, node, asked, {"w": 0.05 * signs * (100.0 if node == 3 else 1.0)})

    play(config, tmp_path / "run", script, start=start)
    found = outcomes(tmp_path / "run")
    assert {at for at, status in found.items() if status == "rejected"} == {(1, 3), (2, 3)}
    (row, _) = Run(tmp_path / "run").nodes(node=0)[-2:]
    assert row.update_norm == pytest.approx(0.05 * 100.0 * fraction**-0.5, rel=0.1)


@pytest.mark.parametrize("slopes", [1, 2, 3])
@pytest.mark.parametrize("clients", [1, 2])
def test_no_honest_client_with_few_slopes_is_rejected(slopes: int, clients: int) -> None:
    """The norm of one normal slope is more than ten times another's in 2/pi atan(1/10) = 6.3 % of pairs."""
    draws = torch.randn(500, 12, clients, slopes, generator=torch.Generator().manual_seed(0)).norm(dim=3)
    rejected = 0
    for rounds in draws.tolist():
        usual = gates.Usual()
        for norms in rounds:
            bound = gates.limits(ServerConfig(), [], usual.norm if usual.known else None).norm
            rejected += any(norm > bound for norm in norms)
            usual.learn(norms, slopes * clients)
    assert rejected <= 1  # of 6,000 rounds


def test_what_is_usual_is_learnt_from_sixteen_values_on(tmp_path: Path) -> None:
    """Two clients send one value each, and by chance a small one at first; the ninth round knows better."""
    config = scripted(rounds=9, clients=2, server={"norm_ratio": 10.0, "quorum": 1})
    values = {1: 0.001, 2: 1.0, 9: 11.0}

    def script(node: int, asked: Instruction) -> Reply:
        value = values.get(asked.round, 1.0) if node == 1 else values.get(asked.round, 1.0) % 10
        return send(config, node, asked, {"w": torch.tensor([value])})

    method = Mean(config)
    method.stride = lambda tensors: None  # type: ignore[method-assign,assignment]
    engine = play(config, tmp_path / "run", script, method=method, start={"w": torch.zeros(1)})
    found = outcomes(tmp_path / "run")
    assert {at for at, status in found.items() if status == "rejected"} == {(9, 1)}
    saved = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert saved is not None
    recent = [[1.0, 1.0]] * 4 + [[1.0]]
    assert ServerState.load(saved).usual == gates.Usual(1.0, gates.ENOUGH, recent) == engine.state.usual


# --- weights ------------------------------------------------------------------------------------------


SKEWED = {0: 1, 1: 1, 2: 1, 3: 2000}


def skewed(deployed: bool, folder: Path, **server: Any) -> float:
    """Only the client of 2,000 texts moves anything, by 1: returns its share of the mean."""
    config = scripted(rounds=2, server=server).placed(deployed=deployed)

    def script(node: int, asked: Instruction) -> Reply:
        return send(config, node, asked, constant(float(node == 3)), examples=SKEWED[node])

    engine = play(config, folder, script, texts=SKEWED)
    return float(engine.state.current.tensors["b"][0]) / 2


def test_a_simulation_is_fedavg_to_the_text_and_a_deployment_is_bounded(tmp_path: Path) -> None:
    assert skewed(False, tmp_path / "simulated") == pytest.approx(2000 / 2003)
    assert not [event for event in Run(tmp_path / "simulated").events() if event.kind == "warning"]
    assert skewed(True, tmp_path / "deployed") == pytest.approx(3 / 6)
    assert skewed(True, tmp_path / "exact", weight_ratio=0.0) == pytest.approx(2000 / 2003)
    assert skewed(False, tmp_path / "bounded", weight_ratio=2.0) == pytest.approx(2 / 5)


def test_whoever_counts_for_less_is_named_once_in_the_first_round(tmp_path: Path) -> None:
    skewed(True, tmp_path / "run")
    (event,) = [event for event in Run(tmp_path / "run").events() if event.kind == "warning"]
    assert event.round == 1
    assert event.fields["nodes"] == [3]
    assert event.message == (
        "no client counts for more than 3 texts (server.weight_ratio, server.max_examples), and so client "
        "3 (2,000 texts) for less than it has; server.weight_ratio = 0 counts every text"
    )


@pytest.mark.parametrize(("deployed", "ratio"), quick([(False, 0.0), (True, 3.0)], (True, 3.0)))
def test_the_bound_of_a_place_stands_in_the_stored_configuration(
    deployed: bool, ratio: float, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    config = configuration(tiny_encoder, tiny_texts, rounds=1, method="fedavg")
    run_config = {CONFIG_KEY: config.to_json(), FOLDER_KEY: str(tmp_path / "run")}
    transport = Transport(lambda: (None, None), None, lambda most: None) if deployed else None
    with loopback(config.clients, run_config):
        conduct_run(
            LoopbackGrid(config.clients, run_config, None), config, tmp_path / "run", transport=transport
        )
    stored = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert stored["server"]["weight_ratio"] == ratio
    assert Run(tmp_path / "run").config.server.weight_ratio == ratio
