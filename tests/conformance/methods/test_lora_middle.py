"""Rule fed-sb against the algorithm written out with torch: gradients by autograd, directions by LAPACK."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.errors import ModelError, RejectedReply
from fedllm.models.training import minibatches
from fedllm.randomness import stream
from fedllm.runs.reader import Run
from fedllm.tensors import Tensors
from strategies.base import Commit, Exchange, Reply, State
from strategies.lora import middle
from strategies.lora.factors import Factors, pairs
from strategies.session import Session
from tests.conformance.federation import ask, commit, federate, logits, reply_of, session_for, start
from tests.conformance.methods.test_lora_rules import opened as opened  # fixtures
from tests.conformance.methods.test_lora_rules import tiny_gpt2 as tiny_gpt2
from tests.rounds.federation import configuration, run
from tests.rounds.killed import conducted

SGD = {"optimizer": "sgd", "local_steps": 1, "batch_size": 8, "learning_rate": 50.0}
SETUP = Exchange("setup")


@pytest.fixture(scope="module")
def session(tiny_encoder: Path, tiny_texts: Path) -> Session:
    options = {"rule": "fed-sb"}
    session = session_for(tiny_encoder, tiny_texts, "lora", options=options, training=SGD)
    start(session)
    return session


def by_autograd(session: Session, tensors: Tensors, batches: Any) -> Tensors:
    """dL/dW of the mean loss of all texts in some batches, with the weights themselves set free."""
    session.method.load(session.model, tensors)
    weights = {
        layer: session.model.module.get_submodule(layer).base_layer.weight  # type: ignore[union-attr]
        for layer in pairs(tensors)
    }
    total, count = dict.fromkeys(weights, torch.tensor(0.0)), 0
    for weight in weights.values():
        weight.requires_grad_(True)
    for batch in batches:
        found = torch.autograd.grad(session.model.loss(batch) * len(batch.input_ids), list(weights.values()))
        total = {layer: total[layer] + g for layer, g in zip(weights, found, strict=True)}
        count += len(batch.input_ids)
    for weight in weights.values():
        weight.requires_grad_(False)
    conv = "c_attn" in next(iter(weights))
    return {layer: (g.T if conv else g).double() / count for layer, g in total.items()}


def directions_of(session: Session) -> State:
    state = start(session)
    return commit(
        session, state, 0, "setup", [reply_of(ask(session, state, SETUP, n, 0), n) for n in range(4)]
    )


@pytest.mark.parametrize("layers", ["Linear", pytest.param("Conv1D", marks=pytest.mark.slow)])
def test_gradients_are_those_of_the_weights_themselves(layers: str, opened: Any) -> None:
    session = opened("fed-sb", layers)
    train = session.client_tokens(1)[0]
    batches = [train.batch(range(5)), train.batch(range(5, 8))]
    wanted = by_autograd(session, session.initial, batches)
    found = middle.gradients(session.model, list(wanted), batches)
    assert found.keys() == wanted.keys()
    for layer, gradient in found.items():
        torch.testing.assert_close(gradient.double() / 8, wanted[layer], rtol=1e-3, atol=1e-7)
    assert all(p.grad is None for p in session.model.trainable().values())


def test_texts_of_the_setup_are_at_most_64_and_each_one_once(session: Session) -> None:
    train = session.client_tokens(0)[0]
    for batch_size, tokens in ((8, train), (48, train), (100, train), (8, train.of_texts(range(5)))):
        batches = middle.texts(tokens, batch_size, 0, 0)
        assert sum(len(batch.input_ids) for batch in batches) >= min(len(tokens), 64)
        assert sum(len(batch.input_ids) for batch in batches[:-1]) < min(len(tokens), 64)
        assert max(len(batch.input_ids) for batch in batches) <= min(batch_size, 64)


def test_setup_and_one_round_of_sgd_are_the_algorithm_written_out(session: Session) -> None:
    """R = -rate s sum p_k B' G_k A', with B and A the leading singular vectors of the clients' gradients."""
    first, rank, scale = session.initial, 4, 8.0 / 4
    texts = {node: session.client_tokens(node)[0] for node in range(4)}
    share = {node: len(found) / sum(map(len, texts.values())) for node, found in texts.items()}
    mean: dict[str, torch.Tensor] = {}
    for node, tokens in texts.items():
        for layer, g in by_autograd(
            session, first, middle.texts(tokens, 8, session.config.seed, node)
        ).items():
            u, s, vt = torch.linalg.svd(g)
            part = u[:, :rank] * (s[:rank] / s[:rank].norm()) @ vt[:rank]
            mean[layer] = mean.get(layer, 0.0) + share[node] * part
    state = directions_of(session)
    for layer, (b, a) in pairs(first).items():
        u, _, vt = torch.linalg.svd(mean[layer])
        found_b, found_a = state.tensors[b].double(), state.tensors[a].double()
        m = len(found_b)
        torch.testing.assert_close(
            found_b @ found_b.T * (rank / m), u[:, :rank] @ u[:, :rank].T, rtol=1e-3, atol=1e-3
        )
        torch.testing.assert_close(found_a.T @ found_a * 3, vt[:rank].T @ vt[:rank], rtol=1e-3, atol=1e-3)
        assert not state.tensors[layer + middle.MIDDLE].any()
    torch.testing.assert_close(logits(session, state.tensors), logits(session, first), rtol=0, atol=0)

    after = federate(session, state, 1, (0, 1, 2, 3))
    wanted = dict.fromkeys(pairs(first), torch.tensor(0.0, dtype=torch.float64))
    for node, tokens in texts.items():
        batches = list(minibatches(tokens, 8, 1, stream(session.config.seed, "batches", 1, node)))
        for layer, g in by_autograd(session, state.tensors, batches).items():
            b, a = (state.tensors[name].double() for name in pairs(first)[layer])
            wanted[layer] = wanted[layer] - 50.0 * scale * share[node] * (b.T @ g @ a.T)
    for layer, (b, a) in pairs(first).items():
        torch.testing.assert_close(
            after.tensors[layer + middle.MIDDLE].double(), wanted[layer], rtol=1e-3, atol=1e-6
        )
        assert wanted[layer].abs().max() > 1e-3
        assert torch.equal(after.tensors[b], state.tensors[b])
        assert torch.equal(after.tensors[a], state.tensors[a])


def test_the_order_of_setup_replies_does_not_matter(session: Session) -> None:
    state = start(session)
    replies = [reply_of(ask(session, state, SETUP, node, 0), node) for node in range(4)]
    one, other = (commit(session, state, 0, "setup", order) for order in (replies, replies[::-1]))
    assert all(torch.equal(one.tensors[name], tensor) for name, tensor in other.tensors.items())


def test_randomised_factors_are_the_best_of_their_rank() -> None:
    generator = torch.Generator().manual_seed(1)
    for m, n, rank in ((60, 40, 3), (7, 50, 5), (6, 6, 6)):
        u, v = (torch.linalg.qr(torch.randn(size, size, generator=generator).double()).Q for size in (m, n))
        s = 0.5 ** torch.arange(min(m, n)).double()
        found = middle.best(5.0 * u[:, : len(s)] * s @ v[:, : len(s)].T, rank, 0, "layer").product()
        wanted = u[:, :rank] * (s[:rank] / s[:rank].norm()) @ v[:, :rank].T
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert not middle.best(torch.zeros(5, 4), 2, 0, "layer").product().any()


def test_a_layer_without_any_gradient_keeps_the_factors_it_was_derived_with() -> None:
    old = Factors(torch.randn(6, 2), torch.randn(2, 5))
    assert middle.directions(Factors(torch.zeros(6, 4), torch.zeros(4, 5)), old) is old


def test_a_longer_gradient_than_all_others_is_rejected(session: Session) -> None:
    state = start(session)
    answer = ask(session, state, SETUP, 0, 0)
    longer = {name: t * (1.1 if "lora_B" in name else 1.0) for name, t in answer.tensors.items()}
    acc = session.method.begin(state, 0)
    with pytest.raises(RejectedReply, match=r"has length 1\.1"):
        session.method.fold(acc, "setup", Reply(0, longer, 9, {}))
    assert acc.sum.count == 0


def test_more_rank_than_directions_is_refused(tiny_encoder: Path, tiny_texts: Path) -> None:
    tuning = {"rank": 33, "targets": ("query",)}
    session = session_for(tiny_encoder, tiny_texts, "lora", options={"rule": "fed-sb"}, tuning=tuning)
    with pytest.raises(ModelError, match=r"32 directions at most in .*query.*lower tuning.rank = 33"):
        start(session)
    tuning = {"rank": 2, "targets": ("word_embeddings",)}
    session = session_for(tiny_encoder, tiny_texts, "lora", options={"rule": "fed-sb"}, tuning=tuning)
    with pytest.raises(ModelError, match="word_embeddings"):
        start(session)


def test_a_result_that_is_begun_from_brings_its_directions(session: Session) -> None:
    state = State(1, session.initial)
    assert session.method.plan(state, session.method.begin(state, 0)) == Commit()


@pytest.mark.slow
def test_a_round_sends_the_middle_and_the_head_alone(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    config = configuration(
        tiny_encoder, tiny_texts, options={"rule": "fed-sb"}, server={"sample": 6}, rounds=2
    )
    run(config, tmp_path)
    rows = Run(tmp_path).traffic(("round", "direction", "exchange", "record"))
    sent = {
        (r["round"], r["direction"]): r["bytes"] / 6 for r in rows if r["record"] == "payload" and r["bytes"]
    }
    layers, head = 4, 3 * 32 + 3  # two layers' query and value of 32 x 32; three classes
    outer, inner = 4 * layers * 2 * 2 * 32, 4 * (layers * 2 * 2 + head)
    framing = {
        way: size - {0: outer, 1: inner, 2: inner}[way[0]] for way, size in sent.items() if way[1] == "up"
    }
    assert sent.keys() == {(0, "up"), (1, "down"), (1, "up"), (2, "down"), (2, "up")}
    assert all(0 <= extra < 64 for extra in framing.values())
    assert 0 <= sent[1, "down"] - outer < 64
    assert 0 <= sent[2, "down"] - inner < 64


@pytest.mark.slow
@pytest.mark.parametrize("when", ["reply:3", "reply:8"])
def test_a_run_killed_in_its_setup_or_behind_it_ends_with_the_same_bits(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, when: str
) -> None:
    config = configuration(tiny_encoder, tiny_texts, options={"rule": "fed-sb"}, rounds=2)
    whole = run(config, tmp_path / "whole")
    assert conducted(config, tmp_path / "killed", when) == -signal.SIGKILL
    again = run(config, tmp_path / "killed")
    assert (again["status"], again["state_sha256"]) == ("finished", whole["state_sha256"])
