"""A federation without an engine: the calls of one round, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from fedllm.config import RunConfig
from fedllm.tensors import Tensors
from strategies.base import Answer, Commit, Exchange, Reply, State, Work
from strategies.workshop import Workshop


def workshop(encoder: Path, texts: Path, method: str, **sections: Any) -> Workshop:
    """Four clients of unequal size, one tiny model, a few local steps."""
    sections.setdefault("tuning", {"rank": 4, "alpha": 8.0, "targets": ("query", "value")})
    sections.setdefault("training", {"local_steps": 3, "batch_size": 8, "learning_rate": 1e-2})
    config = RunConfig.model_validate(
        {
            "clients": 4,
            "method": method,
            "model": {"name": str(encoder)},
            "data": {"path": str(texts), "partition": "dirichlet", "alpha": 1.0, "max_length": 16},
            **sections,
        }
    )
    return Workshop(config)


def start(shop: Workshop) -> State:
    return State(0, shop.initial)


def ask(
    shop: Workshop, state: State, exchange: Exchange, node: int, round: int = 1, index: int = 0, **known: Any
) -> Answer:
    """Let one client answer, as the worker does."""
    train, test = shop.client_tokens(node)
    view = shop.method.view(state.tensors, node)
    shop.method.load(shop.model, view)
    work = Work(
        kind=exchange.kind,
        arguments=exchange.arguments,
        round=round,
        index=index,
        node=node,
        progress=0.0,
        model=shop.model,
        tensors=view,
        local=known.get("local", {}),
        train=train,
        test=test,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(node)
        return shop.method.run(work)


def reply_of(answer: Answer, node: int, examples: int | None = None) -> Reply:
    return Reply(node, answer.tensors, examples or answer.examples, answer.metrics)


def commit(shop: Workshop, state: State, round: int, kind: str, replies: Iterable[Reply]) -> State:
    acc = shop.method.begin(state, round)
    for reply in replies:
        acc = shop.method.fold(acc, kind, reply)
    return step(shop, state, acc)


def step(shop: Workshop, state: State, acc: Any) -> State:
    proposal, memory = shop.method.step(state, acc)
    if not isinstance(proposal, dict):
        proposal = shop.method.replay(state.tensors, proposal.record)
    return State(state.version + 1, proposal, memory)


def federate(shop: Workshop, state: State, rounds: int, nodes: Sequence[int], first: int = 1) -> State:
    """Run whole rounds, each exchange that ``plan`` asks for, nodes in the order given."""
    for round in range(first, first + rounds):
        acc = shop.method.begin(state, round)
        local: dict[int, Tensors] = {}
        index = 0
        while not isinstance(exchange := shop.method.plan(state, acc), Commit):
            for node in nodes:
                answer = ask(shop, state, exchange, node, round, index, local=local.get(node, {}))
                local[node] = answer.local
                acc = shop.method.fold(acc, exchange.kind, reply_of(answer, node))
            index += 1
        state = step(shop, state, acc)
    return state


def logits(shop: Workshop, tensors: Tensors | None = None) -> torch.Tensor:
    """What the model says about the test set, with ``tensors`` loaded or as it stands."""
    if tensors is not None:
        shop.method.load(shop.model, tensors)
    shop.model.module.eval()
    try:
        with torch.no_grad():
            return shop.model.forward(shop.test_tokens.batch(range(len(shop.test_tokens)))).logits
    finally:
        shop.model.module.train()
