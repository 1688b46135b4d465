"""FedNova beside what its paper says, written out with torch alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedllm.errors import ConfigError
from fedllm.models.training import minibatches
from fedllm.randomness import stream
from strategies.base import Exchange
from tests.conformance.federation import ask, commit, reply_of, session_for, start

RATE, BATCH, MOST = 0.1, 8, 4
SGD = {"optimizer": "sgd", "local_steps": MOST, "batch_size": BATCH, "learning_rate": RATE}


def test_a_round_is_that_of_the_paper(tiny_encoder: Path, tiny_texts: Path) -> None:
    """Equations 6 and 8: each client's update by its own steps, their mean by the mean number of steps."""
    session = session_for(tiny_encoder, tiny_texts, "fednova", training=SGD, options={"epochs": 0.3})
    w, model = session.initial, session.model
    texts = [session.client_tokens(node)[0] for node in range(4)]
    taken = [min(-(-3 * len(own) // (10 * BATCH)), MOST) for own in texts]
    assert len(set(taken)) > 1
    shares = [len(own) / sum(map(len, texts)) for own in texts]
    mean_steps = sum(share * steps for share, steps in zip(shares, taken, strict=True))
    want = {name: value.clone() for name, value in w.items()}
    for node, own in enumerate(texts):
        model.write(w)
        for batch in minibatches(own, BATCH, taken[node], stream(session.config.seed, "batches", 1, node)):
            slopes = torch.autograd.grad(model.loss(batch), list(model.trainable().values()))
            with torch.no_grad():
                for value, slope in zip(model.trainable().values(), slopes, strict=True):
                    value -= RATE * slope
        for name, after in model.read().items():
            want[name] += mean_steps * shares[node] * (after - w[name]) / taken[node]

    state = start(session)
    replies = [reply_of(ask(session, state, Exchange("fit"), node), node) for node in range(4)]
    found = commit(session, state, 1, "fit", replies)
    for name, value in want.items():
        torch.testing.assert_close(found.tensors[name], value, rtol=1e-4, atol=1e-6)


def test_what_counts_steps_unlike_is_refused(tiny_encoder: Path, tiny_texts: Path) -> None:
    with pytest.raises(ConfigError, match=r"counts every local step alike.*set training\.optimizer"):
        _ = session_for(tiny_encoder, tiny_texts, "fednova").method
