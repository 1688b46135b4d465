"""MeZO and FedKSeed: what is replayed is where the client walked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedllm.errors import WireError
from fedllm.tensors import fingerprint, pack
from strategies.base import Exchange, Replay, Reply
from strategies.session import Session
from tests.conformance.federation import ask, commit, federate, reply_of, session_for, start
from tests.parts import quick


@pytest.fixture(params=quick([0, 16], 16))
def session(request: pytest.FixtureRequest, tiny_encoder: Path, tiny_texts: Path) -> Session:
    return session_for(
        tiny_encoder,
        tiny_texts,
        "mezo",
        tuning={"rank": 1, "targets": ("query",)},
        training={"local_steps": 4, "batch_size": 8, "learning_rate": 1e-2},
        options={"candidates": request.param},
    )


def test_one_clients_replay_is_its_own_walk(session: Session) -> None:
    state = start(session)
    answer = ask(session, state, Exchange("fit"), 1)
    walked = session.model.read()
    assert len(pack(answer.tensors)) == 4 * (session.method.options.candidates or 4)  # type: ignore[attr-defined]
    assert (answer.passes.forward, answer.passes.backward) == (8.0, 0.0)
    acc = session.method.fold(session.method.begin(state, 1), "fit", reply_of(answer, 1))
    proposal = session.method.step(state, acc).proposal
    assert isinstance(proposal, Replay)
    replayed = session.method.replay(state.tensors, proposal.record)
    for name, value in walked.items():
        torch.testing.assert_close(replayed[name], value, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(walked[n], state.tensors[n]) for n in walked)


def test_what_lies_below_the_trained_layers_is_computed_once_and_changes_nothing(
    tiny_encoder: Path, tiny_texts: Path
) -> None:
    """Heads alone: of 8 passes over 8 texts what is left is the first over the client's own."""
    answers = []
    for cache in (True, False):
        session = session_for(
            tiny_encoder,
            tiny_texts,
            "mezo",
            tuning={"peft": "head"},
            training={"local_steps": 4, "batch_size": 8, "learning_rate": 1e-2},
            options={"cache": cache},
        )
        found = [ask(session, start(session), Exchange("fit"), 1) for _ in range(2)]
        texts = len(session.client_tokens(1)[0])
        assert [one.passes.forward for one in found] == ([texts / 8, 0.0] if cache else [8.0, 8.0])
        answers.append(found[1])
    slopes = [answer.tensors["slopes"] for answer in answers]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_order_of_clients_does_not_show(session: Session) -> None:
    one, two = (federate(session, start(session), 2, nodes) for nodes in ((0, 1, 3), (3, 0, 1)))
    assert fingerprint(one.tensors) == fingerprint(two.tensors)


def test_the_step_is_the_mean_of_the_walks_by_numbers_of_texts(session: Session) -> None:
    state = start(session)
    answers = {node: ask(session, state, Exchange("fit"), node) for node in (1, 2)}

    def moved(**texts: int) -> dict[str, torch.Tensor]:
        replies = [reply_of(answers[int(key[1:])], int(key[1:]), count) for key, count in texts.items()]
        after = commit(session, state, 1, "fit", replies)
        return {name: value.double() - state.tensors[name] for name, value in after.tensors.items()}

    one, two, both = moved(n1=10), moved(n2=10), moved(n1=30, n2=10)
    for name, step in both.items():
        torch.testing.assert_close(step, 0.75 * one[name] + 0.25 * two[name], rtol=1e-3, atol=1e-7)
    assert max(float((both[n] - (one[n] + two[n]) / 2).abs().max()) for n in both) > 1e-5


@pytest.mark.parametrize(("schedule", "share"), [("constant", 1.0), ("linear", 0.5)])
def test_the_schedule_shortens_the_walk(
    schedule: str, share: float, tiny_encoder: Path, tiny_texts: Path
) -> None:
    """Round 6 of 10: half of the run is done. The same slopes along the same shared directions."""
    session = session_for(
        tiny_encoder,
        tiny_texts,
        "mezo",
        tuning={"rank": 1, "targets": ("query",)},
        training={"local_steps": 4, "learning_rate": 1e-2, "schedule": schedule},
        options={"candidates": 4},
    )
    state = start(session)
    reply = Reply(0, {"slopes": torch.tensor([1.0, -2.0, 0.0, 3.0])}, 10, {})
    first, sixth = (commit(session, state, round, "fit", [reply]) for round in (1, 6))
    for name, before in state.tensors.items():
        step = first.tensors[name].double() - before
        torch.testing.assert_close(sixth.tensors[name].double() - before, share * step, rtol=1e-3, atol=1e-7)
        assert step.abs().max() > 1e-3


@pytest.mark.parametrize("record", [b"", b"o", b"k123", b"z" + bytes(20)])
def test_damaged_records_are_refused(session: Session, record: bytes) -> None:
    with pytest.raises(WireError):
        session.method.replay(start(session).tensors, record)
