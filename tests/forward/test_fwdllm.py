"""FwdLLM on a tiny model: what is sent, what is rebuilt from it, when a round ends."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedllm.errors import ConfigError, RunFailed, WireError
from fedllm.models.evaluation import evaluate
from fedllm.randomness import stream
from fedllm.tensors import Tensors, fingerprint, pack, spec_of
from strategies.base import Commit, Exchange, Replay, State
from strategies.forward.cohort import halves
from strategies.forward.directions import Direction, flat
from strategies.fwdllm.method import FwdLLM, decay
from strategies.registry import load_method
from strategies.session import Session
from tests.conformance.federation import ask, federate, reply_of, session_for, start
from tests.parts import quick

P = 6


def session_with(
    encoder: Path, texts: Path, *, top: bool = True, server: dict[str, Any] | None = None, **options: Any
) -> Session:
    targets = ("layer.1.attention.self.query",) if top else ("query", "value")
    return session_for(
        encoder,
        texts,
        "fwdllm",
        rounds=20,
        tuning={"rank": 1, "targets": targets},
        training={"batch_size": 8},
        server=server or {},
        options={"directions": P, **options},
    )


@pytest.fixture
def session(tiny_encoder: Path, tiny_texts: Path) -> Session:
    return session_with(tiny_encoder, tiny_texts)


@pytest.fixture
def no_graph(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail as soon as autograd keeps anything for a backward pass, or one is asked for."""

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("autograd recorded a graph")

    monkeypatch.setattr(torch.Tensor, "backward", fail)
    monkeypatch.setattr(torch.autograd, "grad", fail)
    with torch.autograd.graph.saved_tensors_hooks(fail, fail):
        yield


def vector(tensors: Tensors) -> np.ndarray:
    return torch.cat([tensors[n].double().reshape(-1) for n in sorted(tensors)]).numpy()


@pytest.mark.parametrize("estimator", quick(["jvp", "antithetic"], "antithetic"))
@pytest.mark.usefixtures("no_graph")
def test_a_whole_run_records_no_graph_and_calls_no_backward(
    tiny_encoder: Path, tiny_texts: Path, estimator: str
) -> None:
    session = session_with(tiny_encoder, tiny_texts, estimator=estimator, warm_start="means")
    state = federate(session, start(session), 2, range(4), first=0)
    assert fingerprint(state.tensors) != fingerprint(start(session).tensors)
    assert ask(session, state, Exchange("fit"), 0).passes.backward == 0
    assert any(p.requires_grad for p in session.model.module.parameters())


def test_the_fixture_would_notice_a_graph(session: Session, no_graph: None) -> None:
    batch = session.test_tokens.batch(range(4))
    with pytest.raises(AssertionError, match="recorded a graph"):
        session.model.forward(batch)


def test_a_reply_is_p_floats_and_nothing_else(session: Session) -> None:
    answer = ask(session, start(session), Exchange("fit"), 1)
    assert list(answer.tensors) == ["slopes"]
    assert len(pack(answer.tensors)) == 4 * P
    assert spec_of(answer.tensors) == session.method.spec(Exchange("fit"), start(session).tensors)


def test_slopes_are_the_gradients_projections(session: Session) -> None:
    """Backpropagation on the same batch, found by trying: only one subset's loss has this gradient norm."""
    state, node = start(session), 1
    answer = ask(session, state, Exchange("fit"), node, 3, 0)
    train, _ = session.client_tokens(node)
    from fedllm.randomness import stream

    order = stream(session.config.seed, "batches", 3, node).permutation(len(train))[:8]
    session.method.load(session.model, state.tensors)
    session.model.module.eval()
    parameters = session.model.trainable()
    loss = session.model.forward(train.batch(order)).loss
    assert loss is not None
    grads = torch.autograd.grad(loss, list(parameters.values()))
    truth = vector(dict(zip(parameters, grads, strict=True)))
    want = [flat(Direction(0, 3, node, i), len(truth)) @ truth for i in range(P)]
    np.testing.assert_allclose(answer.tensors["slopes"], want, rtol=1e-4, atol=1e-5 * np.linalg.norm(truth))


def test_the_step_is_the_trust_ratio_along_the_weighted_mean(session: Session) -> None:
    """Rebuilt here naively from the directions' definition."""
    state, round = start(session), 2
    acc = session.method.begin(state, round)
    answers = {node: ask(session, state, Exchange("fit"), node, round) for node in (0, 2)}
    for node, answer in answers.items():
        acc = session.method.fold(acc, "fit", reply_of(answer, node))
    proposal = session.method.step(state, acc).proposal
    assert isinstance(proposal, Replay)
    after = vector(session.method.replay(state.tensors, proposal.record))
    w, total = vector(state.tensors), sum(a.examples for a in answers.values())
    g = sum(
        (a.examples / total)
        * np.mean(
            [c * flat(Direction(0, round, n, i), len(w)) for i, c in enumerate(a.tensors["slopes"].numpy())],
            axis=0,
        )
        for n, a in answers.items()
    )
    t = 1 / 20
    rate = 0.1 * (1 - 3 * t**2 + 2 * t**3)
    want = w - rate * np.linalg.norm(w) * g / np.linalg.norm(g)
    np.testing.assert_allclose(after, want, rtol=1e-5, atol=1e-6 * np.abs(w).max())


@pytest.mark.parametrize("candidates", quick([1, 5], 5))
def test_a_client_that_missed_rounds_catches_up_bit_for_bit(
    tiny_encoder: Path, tiny_texts: Path, candidates: int
) -> None:
    session = session_with(tiny_encoder, tiny_texts, warm_start="means", candidates=candidates)
    state, records = start(session), []
    for round in range(4):
        acc, index = session.method.begin(state, round), 0
        while isinstance(exchange := session.method.plan(state, acc), Exchange):
            for node in (3, 0):
                acc = session.method.fold(
                    acc, exchange.kind, reply_of(ask(session, state, exchange, node, round, index), node)
                )
            index += 1
        step = session.method.step(state, acc)
        proposal, memory = step.proposal, step.memory
        assert isinstance(proposal, Replay)
        records.append(proposal.record)
        state = State(state.version + 1, session.method.replay(state.tensors, proposal.record), memory)
    assert len(records[1]) == 1 + 9 + 2 * (10 + (4 if candidates == 1 else 6) * P)
    late = Session(session.config)
    tensors = late.initial
    for record in records:
        tensors = late.method.replay(tensors, record)
    assert fingerprint(tensors) == fingerprint(state.tensors)


def test_both_sides_choose_the_same_directions_by_the_previous_round(
    tiny_encoder: Path, tiny_texts: Path
) -> None:
    """The second step, rebuilt from the slopes that a client without any choice would have measured."""
    session = session_with(tiny_encoder, tiny_texts, candidates=8)
    state = federate(session, start(session), 1, (0, 3))
    acc = session.method.begin(state, 2)
    exchange = session.method.plan(state, acc)
    assert isinstance(exchange, Exchange)
    answer = ask(session, state, exchange, 1, 2)
    assert len(pack(answer.tensors)) == 4 * P
    acc = session.method.fold(acc, "fit", reply_of(answer, 1))
    chosen = acc.cohort.indices[1]
    assert len(chosen) == P
    assert chosen.max() >= P  # beyond those that an even choice would have taken
    everything = session_with(tiny_encoder, tiny_texts, directions=8 * P)
    measured = ask(everything, state, Exchange("fit"), 1, 2).tensors["slopes"].numpy()
    np.testing.assert_allclose(answer.tensors["slopes"], measured[chosen], rtol=1e-3, atol=1e-5)
    weights = acc.cohort.slopes[1] / answer.tensors["slopes"].numpy()
    assert np.ptp(weights) > 0.1
    assert weights.max() < 2.01


def test_a_guide_that_is_no_record_is_refused(tiny_encoder: Path, tiny_texts: Path) -> None:
    session = session_with(tiny_encoder, tiny_texts, candidates=8)
    for guide in ("~ no base85 \x00", "0000"):
        with pytest.raises(WireError):
            ask(session, start(session), Exchange("fit", {"guide": guide}), 0, 2)


def test_dense_uploads_lead_to_the_same_step(tiny_encoder: Path, tiny_texts: Path) -> None:
    scalars, dense = (
        session_with(tiny_encoder, tiny_texts, upload=upload) for upload in ("scalars", "dense")
    )
    one, two = (federate(s, start(s), 1, (0, 1, 3)) for s in (scalars, dense))
    np.testing.assert_allclose(vector(one.tensors), vector(two.tensors), rtol=1e-4, atol=1e-6)


def test_asked_again_a_client_probes_the_same_batch_further_on(
    tiny_encoder: Path, tiny_texts: Path, session: Session
) -> None:
    state = start(session)
    parts = [ask(session, state, Exchange("fit"), 2, 1, index).tensors["slopes"] for index in (0, 1)]
    double = session_with(tiny_encoder, tiny_texts, directions=2 * P)
    whole = ask(double, state, Exchange("fit"), 2, 1, 0).tensors["slopes"]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("threshold", "exchanges"), quick([(1e-9, 1), (1e9, 4)], (1e-9, 1)))
def test_pacing_asks_until_the_gate_or_the_cap(
    tiny_encoder: Path, tiny_texts: Path, threshold: float, exchanges: int
) -> None:
    session = session_with(
        tiny_encoder, tiny_texts, pacing="ratio", threshold=threshold, directions=40, parallel=40
    )
    state, acc, index = start(session), session.method.begin(start(session), 1), 0
    while isinstance(session.method.plan(state, acc), Exchange):
        for node in range(4):
            acc = session.method.fold(
                acc, "fit", reply_of(ask(session, state, Exchange("fit"), node, 1, index), node)
            )
        index += 1
    assert index == exchanges
    report = session.method.step(state, acc).report
    assert float(report["directions"]) == 4 * 40 * exchanges
    a, b = halves(acc.cohort, 0, vector(state.tensors).size)  # of all that was sent, at the cap too
    assert float(report["ratio"]) == pytest.approx((a @ b) / (((a - b) ** 2).sum() / 4), rel=1e-5)


def test_a_round_of_one_exchange_tells_its_signal_to_noise_too(session: Session) -> None:
    """From every other direction of each client, rebuilt here from their definition."""
    acc, width = session.method.begin(start(session), 1), vector(start(session).tensors).size
    sides: list[list[np.ndarray]] = [[], []]
    answers = {node: ask(session, start(session), Exchange("fit"), node, 1) for node in (0, 1)}
    total = sum(answer.examples for answer in answers.values())
    for rank, (node, answer) in enumerate(answers.items()):
        acc = session.method.fold(acc, "fit", reply_of(answer, node))
        for i, slope in enumerate(answer.tensors["slopes"].numpy()):
            share = answer.examples / total / (P / 2)
            sides[(rank + i) % 2].append(share * slope * flat(Direction(0, 1, node, i), width))
    report = session.method.step(start(session), acc).report
    a, b = (np.sum(side, axis=0) for side in sides)
    want = (a @ b) / (((a - b) ** 2).sum() / 4)
    assert float(report["ratio"]) == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize(("threshold", "exchanges"), [(1e9, 1), (1e-30, 3)])
def test_the_papers_rule_asks_while_the_variance_is_above(
    tiny_encoder: Path, tiny_texts: Path, threshold: float, exchanges: int
) -> None:
    session = session_with(
        tiny_encoder,
        tiny_texts,
        pacing="variance",
        threshold=threshold,
        max_exchanges=3,
        pacing_tensor="head.bias",
    )
    acc, index = session.method.begin(start(session), 1), 0
    while isinstance(session.method.plan(start(session), acc), Exchange):
        for node in (0, 1):
            answer = ask(session, start(session), Exchange("fit"), node, 1, index)
            acc = session.method.fold(acc, "fit", reply_of(answer, node))
        index += 1
    assert index == exchanges


@pytest.mark.slow
def test_it_learns_from_slopes_alone(tiny_encoder: Path, tiny_texts: Path) -> None:
    session = session_with(tiny_encoder, tiny_texts, directions=20, learning_rate=0.3)
    before = evaluate(session.model, session.test_tokens, 64)
    state = federate(session, start(session), 5, range(3))
    session.method.load(session.model, state.tensors)
    after = evaluate(session.model, session.test_tokens, 64)
    assert after["loss"] < before["loss"] - 0.05


def test_a_collapsing_run_is_stopped_with_a_reason(tiny_encoder: Path, tiny_texts: Path) -> None:
    session = session_with(tiny_encoder, tiny_texts, learning_rate=3.0)
    with pytest.raises(RunFailed, match=r"grown to .* lower fwdllm.learning_rate"):
        federate(session, start(session), 5, (0, 1))


def test_what_the_servers_optimiser_does_is_watched_where_it_shows(
    tiny_encoder: Path, tiny_texts: Path
) -> None:
    """A thousand times the gradient is no step of Adam's: the weights that a round begins with are."""
    session = session_with(
        tiny_encoder, tiny_texts, step="mean", learning_rate=1e3, server={"optimizer": "adam"}
    )
    method, state = session.method, start(session)
    assert method.stride(state.tensors) is None
    acc = method.begin(state, 1)
    acc = method.fold(acc, "fit", reply_of(ask(session, state, Exchange("fit"), 0, 1), 0))
    first = method.step(state, acc)
    assert first.report["growth"] == pytest.approx(1.0)
    grown = State(1, {name: 5.0 * tensor for name, tensor in state.tensors.items()}, first.memory)
    with pytest.raises(RunFailed, match=r"grown to 5.0 times"):
        method.step(grown, acc)


@pytest.mark.parametrize("kind", quick(["means", "cosine", "ridge"], "cosine"))
def test_warm_start_is_the_closed_form_of_the_pooled_texts(
    tiny_encoder: Path, tiny_texts: Path, kind: str
) -> None:
    """One client with everything, or four with a part each in another order: the same head."""
    session = session_with(tiny_encoder, tiny_texts, warm_start=kind)
    one, two = (
        federate(session, start(session), 1, nodes, first=0) for nodes in ((0, 1, 2, 3), (2, 0, 3, 1))
    )
    assert fingerprint(one.tensors) == fingerprint(two.tensors)
    features, labels = [], []
    session.method.load(session.model, start(session).tensors)
    session.model.module.eval()
    for node in range(4):
        train, _ = session.client_tokens(node)
        batch = train.batch(range(len(train)))
        with torch.no_grad():
            found = session.model.module.features(batch.input_ids, batch.attention_mask)
        features.append(found.double().numpy() / math.sqrt(32))
        labels.append(batch.labels.numpy())
    x, y = np.concatenate(features), np.concatenate(labels)
    if kind == "ridge":
        # The augmented least-squares problem, by an independent solver; the scale is the only convention.
        rows = np.vstack([x, np.eye(32)])
        want = np.linalg.lstsq(rows, np.vstack([np.eye(3)[y], np.zeros((32, 3))]), rcond=None)[0].T
        want *= 8.0 / math.sqrt(32)
    else:
        want = np.stack([x[y == c].mean(axis=0) for c in range(3)])
        if kind == "cosine":
            want /= np.linalg.norm(want, axis=1, keepdims=True)
    np.testing.assert_allclose(one.tensors["head.weight"].numpy(), want, rtol=1e-4, atol=1e-5)
    assert not one.tensors["head.bias"].any()


def test_a_setup_costs_a_forward_pass_per_batch(tiny_encoder: Path, tiny_texts: Path) -> None:
    session = session_with(tiny_encoder, tiny_texts, warm_start="means", cache=False)
    answer = ask(session, start(session), Exchange("setup"), 2, 0)
    assert answer.passes.forward == pytest.approx(len(session.client_tokens(2)[0]) / 8)
    assert answer.passes.backward == 0


@pytest.mark.parametrize("rate", [0.5, 2.0])
def test_a_step_as_long_as_the_weights_is_the_stride(
    tiny_encoder: Path, tiny_texts: Path, rate: float
) -> None:
    """rate |g| = |w|; P slopes of norm s along directions of norm sqrt(d) make |g| = s sqrt(d) / P."""
    settings = {"step": "mean", "learning_rate": rate}
    dense = session_with(tiny_encoder, tiny_texts, upload="dense", **settings)
    tensors = start(dense).tensors
    width, length = vector(tensors).size, float(np.linalg.norm(vector(tensors)))
    assert length > 1.0
    assert dense.method.stride(tensors) == pytest.approx(length / rate)
    slopes = session_with(tiny_encoder, tiny_texts, **settings).method.stride(tensors)
    assert slopes == pytest.approx(length / rate * P / math.sqrt(width))
    assert session_with(tiny_encoder, tiny_texts).method.stride(tensors) is None


def test_round_zero_commits_at_once_without_a_warm_start(session: Session) -> None:
    state = start(session)
    assert session.method.plan(state, session.method.begin(state, 0)) == Commit()


@pytest.mark.parametrize(
    "record", [b"", b"x", b"h123", b"s", b"s" + bytes(8), b"s\1\0\0\0\2\0\0\0\1" + bytes(14)]
)
def test_damaged_records_are_refused(session: Session, record: bytes) -> None:
    with pytest.raises(WireError):
        session.method.replay(start(session).tensors, record)


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"options": {"warm_start": "means"}, "model": {"task": "causal"}}, "warm_start"),
        ({"options": {}, "server": {"optimizer": "adam"}}, "step"),
        ({"options": {"upload": "dense", "pacing": "ratio"}}, "pacing"),
        ({"options": {"upload": "dense", "candidates": 2}}, "candidates"),
        ({"options": {"directions": 1000, "candidates": 100}}, "candidates"),
        ({"options": {"directions": 6554, "pacing": "ratio", "max_exchanges": 10}}, "max_exchanges"),
        ({"options": {"directions": 6554, "pacing": "variance", "max_exchanges": 10}}, "directions"),
    ],
)
def test_impossible_combinations_name_the_key(session: Session, sections: dict[str, Any], key: str) -> None:
    config = type(session.config).model_validate({**session.config.model_dump(), **sections})
    with pytest.raises(ConfigError, match=rf"fwdllm\.{key}"):
        FwdLLM(config)


@pytest.mark.parametrize(
    "options",
    [
        {"directions": 6553, "pacing": "ratio", "max_exchanges": 10},
        {"directions": 9000, "max_exchanges": 10},
        {"directions": 9000, "upload": "dense"},
    ],
)
def test_as_many_slopes_as_a_record_holds_are_taken(session: Session, options: dict[str, Any]) -> None:
    """One exchange a round is all that ``fixed`` has, and dense uploads need no record."""
    method = FwdLLM(type(session.config).model_validate({**session.config.model_dump(), "options": options}))
    taken = method.options.model_dump()
    assert {name: taken[name] for name in options} == options


CODECS = {
    "feedback on slopes": ("fwdllm", {}, {"up": "error_feedback(sign)"}, r'codec\.up.*"dense"'),
    "an estimate of slopes": ("fwdllm", {}, {"up": "ef21(sign)"}, r"codec\.up.*other directions"),
    "feedback inside": ("fwdllm", {}, {"up": "per_tensor(vectors=error_feedback(sign))"}, r"codec\.up"),
    "feedback on a walk": ("mezo", {}, {"up": "error_feedback(sign)"}, r"codec\.up.*mezo\.candidates"),
    "replayed down": ("fwdllm", {}, {"down": "sign"}, r"codec\.down.*replay"),
    "walks down": ("mezo", {"candidates": 8}, {"down": "sign"}, r"codec\.down.*replay"),
    "too long a walk": ("mezo", {}, {}, r"training\.local_steps = 65536.*65,535"),
}


@pytest.mark.parametrize(("method", "options", "codec", "said"), CODECS.values(), ids=CODECS)
def test_what_slopes_cannot_take_is_refused(
    session: Session, method: str, options: dict[str, Any], codec: dict[str, str], said: str
) -> None:
    given = {**session.config.model_dump(), "method": method, "options": options, "codec": codec}
    if not codec:
        given["training"] = {"local_steps": 65_536}
    with pytest.raises(ConfigError, match=said):
        load_method(method)(type(session.config).model_validate(given))


TAKEN = {
    "quantised slopes": ("fwdllm", {}, {"up": "quantize(bits=8)"}),
    "dense gradients": ("fwdllm", {"upload": "dense"}, {"up": "error_feedback(sign)", "down": "sign"}),
    "a server that steps": ("fwdllm", {"step": "mean"}, {"down": "sign"}),
    "shared directions": ("mezo", {"candidates": 8}, {"up": "error_feedback(sign)"}),
}


@pytest.mark.parametrize(("method", "options", "codec"), TAKEN.values(), ids=TAKEN)
def test_what_they_can_is_taken(
    session: Session, method: str, options: dict[str, Any], codec: dict[str, str]
) -> None:
    given = {**session.config.model_dump(), "method": method, "options": options, "codec": codec}
    if options.get("step") == "mean":
        given["server"] = {"optimizer": "adam"}
    made = load_method(method)(type(session.config).model_validate(given))
    assert {way: getattr(made.config.codec, way) for way in codec} == codec


def test_a_hopeless_run_is_warned_of(
    tiny_encoder: Path, tiny_texts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session = session_for(
        tiny_encoder,
        tiny_texts,
        "fwdllm",
        tuning={"peft": "full"},
        options={"directions": 1},
        server={"sample": 1},
    )
    assert session.initial
    assert "hopeless" in caplog.text


def test_a_large_setup_is_warned_of(
    tiny_encoder: Path, tiny_texts: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strategies.forward.outlook._LARGE_SETUP", 1000)
    assert session_with(tiny_encoder, tiny_texts, warm_start="ridge").initial
    assert 'fwdllm.warm_start = "ridge" makes each client upload' in caplog.text


@pytest.mark.parametrize("candidates", [1, 3])
def test_shared_directions_take_the_step_of_the_weighted_mean_slopes(
    tiny_encoder: Path, tiny_texts: Path, candidates: int
) -> None:
    """Rebuilt from the slopes: everybody has probed client 0's directions, and one mean is recorded."""
    session = session_with(tiny_encoder, tiny_texts, shared=True, candidates=candidates)
    state, round = start(session), 2
    acc = session.method.begin(state, round)
    answers = {node: ask(session, state, Exchange("fit"), node, round) for node in (1, 2)}
    for node, answer in answers.items():
        acc = session.method.fold(acc, "fit", reply_of(answer, node))
    assert isinstance(session.method.plan(state, acc), Commit)
    step = session.method.step(state, acc)
    assert isinstance(step.proposal, Replay)
    assert step.report["directions"] == P
    w, total = vector(state.tensors), sum(a.examples for a in answers.values())
    mean = sum(a.examples / total * a.tensors["slopes"].double().numpy() for a in answers.values())
    g = sum(mean[i] * flat(Direction(0, round, 0, i), len(w)) for i in range(P)) / P
    want = w - 0.1 * decay("cosine", 1 / 20) * np.linalg.norm(w) * g / np.linalg.norm(g)
    after = vector(session.method.replay(state.tensors, step.proposal.record))
    np.testing.assert_allclose(after, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"pacing": "ratio"}, "must be .fixed"), ({"upload": "dense"}, "is a sum already")],
)
def test_shared_directions_are_summed_once_a_round(
    tiny_encoder: Path, tiny_texts: Path, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        session_with(tiny_encoder, tiny_texts, shared=True, **options).method  # noqa: B018  # opens it


def test_all_orthogonal_directions_take_the_step_of_backpropagation(
    tiny_encoder: Path, tiny_texts: Path
) -> None:
    """256 directions for 163 values: no error of directions is left, and the step is the gradient's."""
    session = session_with(
        tiny_encoder, tiny_texts, distribution="orthogonal", directions=256, step="mean", learning_rate=0.5
    )
    state, node, round = start(session), 1, 1
    acc = session.method.begin(state, round)
    acc = session.method.fold(acc, "fit", reply_of(ask(session, state, Exchange("fit"), node, round), node))
    step = session.method.step(state, acc)
    assert isinstance(step.proposal, Replay)
    assert "ratio" not in step.report
    after = vector(session.method.replay(state.tensors, step.proposal.record))
    want = vector(state.tensors) - 0.5 * gradient_of(session, state.tensors, node, round)
    np.testing.assert_allclose(after, want, rtol=1e-4, atol=1e-6)


def gradient_of(session: Session, tensors: Tensors, node: int, round: int) -> np.ndarray:
    """Backpropagate on the batch that a client probes in a round."""
    session.method.load(session.model, tensors)
    session.model.module.eval()
    train, _ = session.client_tokens(node)
    order = stream(session.config.seed, "batches", round, node).permutation(len(train))
    loss = session.model.loss(train.batch(order[: session.config.training.batch_size]))
    parameters = session.model.trainable()
    found = torch.autograd.grad(loss, list(parameters.values()))
    return vector(dict(zip(parameters, found, strict=True)))


@pytest.mark.parametrize(
    ("options", "key"), [({"pacing": "ratio"}, "pacing"), ({"candidates": 2}, "candidates")]
)
def test_orthogonal_directions_are_neither_chosen_nor_asked_for_later(
    tiny_encoder: Path, tiny_texts: Path, options: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError, match=f"leave fwdllm.{key} out"):
        session_with(tiny_encoder, tiny_texts, distribution="orthogonal", **options).method  # noqa: B018
