"""MeZO and FedKSeed: what is replayed is where the client walked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedllm.errors import WireError
from fedllm.tensors import fingerprint, pack
from strategies.base import Exchange, Replay
from strategies.workshop import Workshop
from tests.conformance.federation import ask, federate, reply_of, start, workshop


@pytest.fixture(params=[0, 16])
def shop(request: pytest.FixtureRequest, tiny_encoder: Path, tiny_texts: Path) -> Workshop:
    return workshop(
        tiny_encoder,
        tiny_texts,
        "mezo",
        tuning={"rank": 1, "targets": ("query",)},
        training={"local_steps": 4, "batch_size": 8, "learning_rate": 1e-2},
        options={"candidates": request.param},
    )


def test_one_clients_replay_is_its_own_walk(shop: Workshop) -> None:
    state = start(shop)
    answer = ask(shop, state, Exchange("fit"), 1)
    walked = shop.model.read()
    assert len(pack(answer.tensors)) == 4 * (shop.method.options.candidates or 4)  # type: ignore[attr-defined]
    assert (answer.passes.forward, answer.passes.backward) == (8.0, 0.0)
    acc = shop.method.fold(shop.method.begin(state, 1), "fit", reply_of(answer, 1))
    proposal, _ = shop.method.step(state, acc)
    assert isinstance(proposal, Replay)
    replayed = shop.method.replay(state.tensors, proposal.record)
    for name, value in walked.items():
        torch.testing.assert_close(replayed[name], value, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(walked[n], state.tensors[n]) for n in walked)


def test_order_of_clients_does_not_show(shop: Workshop) -> None:
    one, two = (federate(shop, start(shop), 2, nodes) for nodes in ((0, 1, 3), (3, 0, 1)))
    assert fingerprint(one.tensors) == fingerprint(two.tensors)


@pytest.mark.parametrize("record", [b"", b"o", b"k123", b"z" + bytes(20)])
def test_damaged_records_are_refused(shop: Workshop, record: bytes) -> None:
    with pytest.raises(WireError):
        shop.method.replay(start(shop).tensors, record)
