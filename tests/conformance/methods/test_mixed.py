"""Mixed cohorts: updates and slopes of one round, weighed by their errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedllm.errors import ConfigError, ModelError, RunFailed
from fedllm.randomness import stream
from fedllm.tensors import fingerprint
from strategies.base import Commit, Exchange
from strategies.forward.cohort import Cohort
from strategies.forward.directions import Direction, flat
from strategies.forward.vectors import flatten
from strategies.mixed.combining import Spread, descent, error, share_of_probes, square
from strategies.mixed.method import Mixed
from strategies.registry import open_method, resolve_run
from strategies.session import Session
from tests.conformance.federation import ask, commit, federate, reply_of, session_for, start

VALUES = 400


def slopes_of(gradient: np.ndarray, directions: int, round: int, nodes: dict[int, int]) -> Cohort:
    """The slopes that clients of so many texts each measure where all have one gradient."""
    cohort = Cohort(round)
    for node, texts in nodes.items():
        along = np.stack([flat(Direction(5, round, node, i), VALUES) for i in range(directions)])
        cohort.extend(node, along.astype(np.float64) @ gradient, texts)
    return cohort


# --- what is estimated --------------------------------------------------------------------------------


def test_the_variance_of_a_mean_is_estimated_without_bias() -> None:
    """Of a weighted mean of independent updates of variance s^2 it is s^2 sum p_k^2."""
    random, texts = np.random.default_rng(0), {3: 10, 1: 30, 7: 60}
    found = []
    for _ in range(4000):
        updates = {node: 2.0 + 0.5 * random.normal(size=8) for node in texts}
        spread = Spread()
        for node in texts:
            spread.add(node, texts[node], square(updates[node]))
        mean = sum(texts[node] / 100 * updates[node] for node in texts)
        found.append(spread.variance(square(mean)))
    expected = 8 * 0.5**2 * (0.1**2 + 0.3**2 + 0.6**2)
    assert np.mean(found) == pytest.approx(expected, abs=4 * np.std(found) / math.sqrt(len(found)))


def test_one_client_that_trains_is_taken_to_be_as_far_off_as_it_is_long() -> None:
    assert Spread({2: 9}, {2: 4.0}).variance(4.0) == 4.0
    assert Spread({2: 9}, {2: 4.0}).length() == 2.0


def test_probes_point_down_the_gradient_with_the_error_that_is_reckoned() -> None:
    """d = -g / ||g|| in the mean, and E||d - mean||^2 = sum q_j^2 (D - 1) / P_j."""
    random, nodes = np.random.default_rng(1), {4: 10, 0: 30}
    gradient = random.normal(size=VALUES)
    down = -gradient / np.linalg.norm(gradient)
    cohorts = [slopes_of(gradient, 50, round, nodes) for round in range(1, 121)]
    found = np.stack([descent(cohort, 5, VALUES, "rademacher") for cohort in cohorts])
    expected = (0.25**2 + 0.75**2) * (VALUES - 1) / 50
    assert error(cohorts[0], VALUES) == pytest.approx(expected)
    assert np.mean(np.sum((found - down) ** 2, axis=1)) == pytest.approx(expected, rel=0.05)
    assert found.mean(0) @ down == pytest.approx(1.0, abs=0.05)
    # The length of the gradient is nobody's business: a client cannot make itself heard by it.
    longer = descent(slopes_of(1e3 * gradient, 50, 1, nodes), 5, VALUES, "rademacher")
    np.testing.assert_allclose(longer, found[0], rtol=1e-4, atol=1e-6)


def test_a_client_whose_slopes_are_zero_adds_nothing() -> None:
    cohort = Cohort(1, {0: np.zeros(3, dtype=np.float32)}, {0: 5})
    assert not descent(cohort, 5, VALUES, "rademacher").any()


@pytest.mark.parametrize("bias", [0.0, 0.5, 2.0, 10.0, 100.0])
@pytest.mark.parametrize("noise", [0.1, 1.0, 30.0])
def test_the_step_is_never_further_off_than_updates_alone(bias: float, noise: float) -> None:
    """Green and Strawderman: whatever probes are wrong by, their share does no harm in the mean."""
    random, values, draws = np.random.default_rng(2), 200, 400
    variance = 1.0  # of the mean update, all values together
    truth = random.normal(size=values)
    wrong = random.normal(size=values)
    wrong *= bias / np.linalg.norm(wrong)
    alone, together = [], []
    for _ in range(draws):
        mean = truth + math.sqrt(variance / values) * random.normal(size=values)
        told = truth + wrong + math.sqrt(noise / values) * random.normal(size=values)
        step = mean + share_of_probes(variance, noise, square(told - mean)) * (told - mean)
        alone.append(square(mean - truth))
        together.append(square(step - truth))
    lost = np.array(together) - np.array(alone)
    assert lost.mean() < 3 * lost.std() / math.sqrt(draws)
    if bias == 0.0:  # the best of all weights leaves V N / (V + N)
        assert np.mean(together) == pytest.approx(variance * noise / (variance + noise), rel=0.1)


# --- the method ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(tiny_encoder: Path, tiny_texts: Path) -> Any:
    def opened(method: str = "mixed", **options: Any) -> Session:
        return session_for(tiny_encoder, tiny_texts, method, options=options)

    return opened


def mixed(session: Session) -> Mixed:
    assert isinstance(session.method, Mixed)
    return session.method


def test_where_nobody_probes_it_is_lora(opened: Any) -> None:
    ours, plain = opened(share=0.0), opened("lora")
    states = [federate(session, start(session), 2, (0, 2, 3)) for session in (ours, plain)]
    assert fingerprint(states[0].tensors) == fingerprint(states[1].tensors)


def test_probes_that_count_nothing_leave_the_mean_of_those_that_train(opened: Any) -> None:
    ours, plain = opened(nodes=[1, 3], directions=4, weight="none"), opened("lora")
    found = federate(ours, start(ours), 1, (0, 1, 2, 3))
    assert fingerprint(found.tensors) == fingerprint(federate(plain, start(plain), 1, (0, 2)).tensors)


def test_a_round_of_probes_that_count_nothing_ends_the_run_in_a_sentence(opened: Any) -> None:
    session = opened(nodes=[1, 3], directions=4, weight="none")
    begun = commit(session, start(session), 0, "fit", [])
    with pytest.raises(RunFailed, match="nobody who trains answered in round 1"):
        commit(session, begun, 1, "fit", [reply_of(ask(session, begun, Exchange("fit"), 1), 1)])


def test_the_step_is_the_formula(opened: Any) -> None:
    """Reckoned anew from updates and slopes, for heads alone; adapters take the mean update."""
    session = opened(nodes=[1, 3], directions=40, probed=["head.*"])
    state, exchange = start(session), Exchange("fit")
    answers = {node: ask(session, state, exchange, node) for node in range(4)}
    acc = session.method.begin(state, 1)
    for node, answer in answers.items():
        acc = session.method.fold(acc, "fit", reply_of(answer, node))
    step = session.method.step(state, acc)
    assert session.method.plan(state, acc) == Commit()
    texts = {node: answer.examples for node, answer in answers.items()}
    p = {node: texts[node] / (texts[0] + texts[2]) for node in (0, 2)}
    q = {node: texts[node] / (texts[1] + texts[3]) for node in (1, 3)}
    names = sorted(name for name in state.tensors if name.startswith("head."))
    heads = {node: flatten({name: answers[node].tensors[name] for name in names}) for node in (0, 2)}
    u = p[0] * heads[0] + p[2] * heads[2]
    length = math.sqrt(p[0] * heads[0] @ heads[0] + p[2] * heads[2] @ heads[2])
    together = p[0] ** 2 + p[2] ** 2
    variance = (length**2 - u @ u) * together / (1 - together)
    d, noise = np.zeros(len(u)), 0.0
    for node in (1, 3):
        c = answers[node].tensors["slopes"].numpy().astype(np.float64)
        along = np.stack([flat(Direction(session.config.seed, 1, node, i), len(u)) for i in range(40)])
        d -= q[node] * (c @ along) / 40 / math.sqrt(np.mean(c**2))
        noise += q[node] ** 2 * (len(u) - 1) / 40
    a = variance / max(variance + length**2 * noise, np.sum((length * d - u) ** 2))
    expected = flatten({name: state.tensors[name] for name in names}) + u + a * (length * d - u)
    assert 0 < a < 1
    assert step.report["share"] == pytest.approx(a, rel=1e-4)
    assert isinstance(step.proposal, dict)
    found = flatten({name: step.proposal[name] for name in names})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    for name in state.tensors.keys() - set(names):
        mean = sum(p[node] * answers[node].tensors[name].double() for node in (0, 2))
        torch.testing.assert_close(step.proposal[name].double(), state.tensors[name] + mean)


def test_slopes_are_those_of_the_gradient(opened: Any) -> None:
    session = opened(nodes=[1], directions=3)
    state = start(session)
    answer = ask(session, state, Exchange("fit"), 1, round=2)
    moved = sorted(state.tensors)
    train = session.client_tokens(1)[0]
    order = stream(session.config.seed, "batches", 2, 1).permutation(len(train))
    batch = train.batch(order[: session.config.training.batch_size])
    session.method.load(session.model, state.tensors)
    session.model.module.eval()
    loss = session.model.loss(batch)
    parameters = session.model.trainable()
    gradients = torch.autograd.grad(loss, [parameters[name] for name in moved])
    whole = flatten(dict(zip(moved, gradients, strict=True)))
    expected = [whole @ flat(Direction(session.config.seed, 2, 1, i), len(whole)) for i in range(3)]
    np.testing.assert_allclose(answer.tensors["slopes"].numpy(), expected, rtol=1e-3, atol=1e-5)


def test_by_texts_the_two_count_as_their_texts_do(opened: Any) -> None:
    session = opened(nodes=[1, 3], directions=4, weight="texts")
    state = start(session)
    replies = [reply_of(ask(session, state, Exchange("fit"), n), n, 10 * (n + 1)) for n in range(4)]
    acc = session.method.begin(state, 1)
    for reply in replies:
        acc = session.method.fold(acc, "fit", reply)
    assert session.method.step(state, acc).report["share"] == pytest.approx((20 + 40) / (10 + 20 + 30 + 40))


def test_where_only_probes_came_the_step_is_as_long_as_the_last_updates(opened: Any) -> None:
    session = opened(nodes=[1, 3], directions=8)
    begun = federate(session, start(session), 1, (0, 1, 2, 3))
    answer = ask(session, begun, Exchange("fit"), 1, round=2)
    after = commit(session, begun, 2, "fit", [reply_of(answer, 1)])
    cohort = Cohort(2)
    cohort.extend(1, answer.tensors["slopes"].numpy(), answer.examples)
    step = float(begun.memory["length"]) * descent(
        cohort, session.config.seed, sum(t.numel() for t in begun.tensors.values()), "rademacher"
    )
    np.testing.assert_allclose(flatten(after.tensors), flatten(begun.tensors) + step, rtol=1e-5, atol=1e-6)
    fresh = commit(session, start(session), 1, "fit", [reply_of(answer, 1)])
    assert fingerprint(fresh.tensors) != fingerprint(start(session).tensors)
    assert "length" not in fresh.memory


def test_who_probes_follows_from_the_seed_or_is_named(opened: Any) -> None:
    assert mixed(opened(share=0.75)).probing == mixed(opened(share=0.75)).probing
    assert [len(mixed(opened(share=share)).probing) for share in (0.0, 0.25, 1.0)] == [0, 1, 4]
    assert len(mixed(opened()).probing) == 2
    assert mixed(opened(nodes=[3])).probing == {3}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["mixed.nodes=[1, 10]"], "mixed.nodes names client 10, and clients are 0 to 9"),
        (["mixed.nodes=[1]", "mixed.share=0.5"], "leave mixed.share out"),
        (["codec.up=error_feedback(sign)"], "leave feedback out"),
        (["mixed.radius=0.1"], 'mixed.radius is for mixed.estimator = "antithetic"'),
        (["privacy.secure_aggregation=true"], "secure_aggregation"),
        (["server.robust=median"], "server.robust"),
        (["server.mode=async"], "async"),
    ],
)
def test_what_cannot_go_with_it_is_refused(settings: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence.replace("(", r"\(")):
        open_method(resolve_run({}, ["method=mixed", "clients=10", *settings]))


def test_names_that_nothing_has_are_refused(opened: Any) -> None:
    with pytest.raises(ModelError, match=r"mixed.probed = \['haed.*'\] names none of the trained tensors"):
        opened(probed=["haed.*"]).initial  # noqa: B018
