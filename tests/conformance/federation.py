"""A federation without an engine: the calls of one round, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from fedllm.config import RunConfig
from fedllm.tensors import Tensors
from strategies.base import Answer, Commit, Exchange, Reply, State, Work
from strategies.session import Session


def session_for(encoder: Path, texts: Path, method: str, **sections: Any) -> Session:
    """Four clients of unequal size, one tiny model, a few local steps."""
    sections.setdefault("tuning", {"rank": 4, "alpha": 8.0, "targets": ("query", "value")})
    sections.setdefault("training", {"local_steps": 3, "batch_size": 8, "learning_rate": 1e-2})
    data = {"path": str(texts), "partition": "dirichlet", "alpha": 1.0, "max_length": 16}
    config = RunConfig.model_validate(
        {
            "clients": 4,
            "method": method,
            "model": {"name": str(encoder)},
            **sections,
            "data": data | sections.get("data", {}),
        }
    )
    return Session(config)


def start(session: Session) -> State:
    return State(0, session.initial)


def ask(
    session: Session,
    state: State,
    exchange: Exchange,
    node: int,
    round: int = 1,
    index: int = 0,
    **known: Any,
) -> Answer:
    """Let one client answer, as the worker does."""
    train, test = session.client_tokens(node)
    view = session.method.view(state.tensors, node)
    session.method.load(session.model, view)
    work = Work(
        kind=exchange.kind,
        arguments=exchange.arguments,
        round=round,
        index=index,
        node=node,
        progress=0.0,
        model=session.model,
        tensors=view,
        local=known.get("local", {}),
        train=train,
        test=test,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(node)
        return session.method.run(work)


def reply_of(answer: Answer, node: int, examples: int | None = None) -> Reply:
    return Reply(node, answer.tensors, examples or answer.examples, answer.metrics)


def commit(session: Session, state: State, round: int, kind: str, replies: Iterable[Reply]) -> State:
    acc = session.method.begin(state, round)
    for reply in replies:
        acc = session.method.fold(acc, kind, reply)
    return step(session, state, acc)


def step(session: Session, state: State, acc: Any) -> State:
    found = session.method.step(state, acc)
    proposal, memory = found.proposal, found.memory
    if not isinstance(proposal, dict):
        proposal = session.method.replay(state.tensors, proposal.record)
    return State(state.version + 1, proposal, memory)


def federate(session: Session, state: State, rounds: int, nodes: Sequence[int], first: int = 1) -> State:
    """Run whole rounds, each exchange that ``plan`` asks for, nodes in the order given."""
    for round in range(first, first + rounds):
        acc = session.method.begin(state, round)
        local: dict[int, Tensors] = {}
        index = 0
        while not isinstance(exchange := session.method.plan(state, acc), Commit):
            for node in nodes:
                answer = ask(session, state, exchange, node, round, index, local=local.get(node, {}))
                local[node] = answer.local
                acc = session.method.fold(acc, exchange.kind, reply_of(answer, node))
            index += 1
        state = step(session, state, acc)
    return state


def logits(session: Session, tensors: Tensors | None = None) -> torch.Tensor:
    """What the model says about the test set, with ``tensors`` loaded or as it stands."""
    if tensors is not None:
        session.method.load(session.model, tensors)
    session.model.module.eval()
    try:
        with torch.no_grad():
            return session.model.forward(session.test_tokens.batch(range(len(session.test_tokens)))).logits
    finally:
        session.model.module.train()
