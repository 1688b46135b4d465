"""What work costs: counted from weights and tokens, against torch's own count of operations; and memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from fedllm.devices import Device, Named
from fedllm.errors import ConfigError
from fedllm.protocol.wire import Reply
from server.rounds.conduct import Transport, conduct
from server.rounds.timing.work import Work, clock_of, least_memory, require_memory
from strategies.session import Session
from tests.rounds.federation import configuration, run


@pytest.fixture
def session(tiny_encoder: Path, tiny_texts: Path) -> Session:
    return session_of(tiny_encoder, tiny_texts)


def session_of(encoder: Path, texts: Path, **sections: Any) -> Session:
    return Session(configuration(encoder, texts, **sections))


@pytest.mark.parametrize("peft", ["lora", "full"])
def test_operations_are_those_that_torch_counts(peft: str, tiny_encoder: Path, tiny_texts: Path) -> None:
    """Torch counts products with weights as they run: nearly all but the head's are made for every token."""
    tuning = {"peft": peft, "rank": 2, "targets": ("query", "value") if peft == "lora" else ()}
    method = "lora" if peft == "lora" else "fedavg"
    session = session_of(tiny_encoder, tiny_texts, method=method, tuning=tuning)
    work, batch = Work(session), session.train_tokens.batch(range(4))
    tokens = batch.input_ids.numel()
    with FlopCounterMode(display=False) as forward:
        loss = session.model.loss(batch)
    with FlopCounterMode(display=False) as backward:
        loss.backward()  # type: ignore[no-untyped-call]
    assert tokens * work.forward == pytest.approx(products(forward), rel=0.02)
    # Under LoRA the products with the lowest layer's query, key and value need no gradient of their input.
    spared = 2 * tokens * 3 * 32**2 if peft == "lora" else 0
    assert tokens * work.backward == pytest.approx(products(backward) + spared, rel=0.05)


def products(counter: FlopCounterMode) -> int:
    """Operations in products of two matrices; attention's have three dimensions."""
    return sum(
        count
        for op, count in counter.get_flop_counts()["Global"].items()
        if "mm" in str(op).split(".")[1] and "bmm" not in str(op)
    )


def test_a_reply_costs_its_passes_times_the_tokens_of_its_batches(session: Session) -> None:
    work, (train, _) = Work(session), session.client_tokens(2)
    mean = train.lengths.sum() / len(train)
    said = Reply(1, 0, 5, {"forward": 3.0, "backward": 2.0})
    assert len(train) > 8
    assert work.flops(2, "fit", said) == pytest.approx(8 * mean * (3 * work.forward + 2 * work.backward))
    assert work.flops(2, "fit", Reply(1, 0, error="out of memory")) == 0.0
    assert work.backward == pytest.approx(work.forward, rel=0.2)  # nearly all is frozen


def test_a_batch_is_no_larger_than_what_a_client_has(tiny_encoder: Path, tiny_texts: Path) -> None:
    session = session_of(tiny_encoder, tiny_texts, training={"batch_size": 500})
    work, (train, _) = Work(session), session.client_tokens(0)
    said = Reply(1, 0, 5, {"forward": 1.0})
    assert work.flops(0, "fit", said) == pytest.approx(train.lengths.sum() * work.forward)
    part = replace(said, metrics={"forward": len(train) / 500})
    assert work.flops(0, "setup", part) == pytest.approx(train.lengths.sum() * work.forward)


def test_an_evaluation_costs_one_pass_over_what_is_held_out(tiny_encoder: Path, tiny_texts: Path) -> None:
    session = session_of(
        tiny_encoder,
        tiny_texts,
        data={"path": str(tiny_texts), "max_length": 16, "client_test_fraction": 0.5},
    )
    work, (_, test) = Work(session), session.client_tokens(0)
    assert work.flops(0, "evaluate", Reply(1, 0, len(test))) == test.lengths.sum() * work.forward > 0


def test_checkpointing_pays_for_another_forward_pass(tiny_encoder: Path, tiny_texts: Path) -> None:
    plain = Work(session_of(tiny_encoder, tiny_texts))
    training = {"gradient_checkpointing": True, "batch_size": 8}
    again = Work(session_of(tiny_encoder, tiny_texts, training=training))
    assert again.backward == pytest.approx(plain.backward + plain.forward)


@pytest.mark.parametrize(("optimizer", "numbers"), [("adamw", 3), ("sgd", 1)])
def test_memory_is_weights_and_what_descending_keeps(
    optimizer: str, numbers: int, tiny_encoder: Path, tiny_texts: Path
) -> None:
    session = session_of(tiny_encoder, tiny_texts, training={"optimizer": optimizer, "batch_size": 8})
    weights = sum(p.numel() for p in session.model.module.parameters())
    trained = sum(tensor.numel() for tensor in session.initial.values())
    assert least_memory(session) == 4 * weights + 4 * numbers * trained


def test_forward_only_methods_keep_nothing_beside_the_weights(tiny_encoder: Path, tiny_texts: Path) -> None:
    session = session_of(tiny_encoder, tiny_texts, method="mezo", options={})
    assert least_memory(session) == 4 * sum(p.numel() for p in session.model.module.parameters())


def test_a_device_without_memory_for_the_run_is_named_before_the_first_round(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    watch = {"gflops": 1.0, "efficiency": 0.5, "memory_gb": 1e-5, "down_mbps": 1.0, "up_mbps": 1.0}
    config = configuration(
        tiny_encoder,
        tiny_texts,
        simulation={"profile": {"watch": 1, "phones-4g": 5}, "devices": {"watch": watch}},
    )
    wanted = (
        r"^a watch has 10 kB of memory for training, and model and optimiser alone need [0-9.]+ kB: take a "
        r"smaller model, model\.quantize, or other devices in simulation\.profile$"
    )
    with pytest.raises(ConfigError, match=wanted):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_just_fits_is_let_in() -> None:
    small = Device(gflops=1, efficiency=1, memory_gb=1, down_mbps=1, up_mbps=1)
    require_memory([Named("small", small)], 10**9)
    with pytest.raises(ConfigError):
        require_memory([Named("small", small)], 10**9 + 1)


def test_a_deployment_simulates_nothing(tiny_encoder: Path, tiny_texts: Path, tmp_path: Path) -> None:
    config = configuration(tiny_encoder, tiny_texts, simulation={"profile": "phones-4g"})
    transport = Transport(traffic=lambda: (0, 0), proven=None, bound=lambda size: None)
    with pytest.raises(
        ConfigError, match=r"^simulation\.profile = 'phones-4g' is for fedllm simulate: in a dep"
    ):
        conduct(None, config, tmp_path / "run", transport=transport)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_without_a_profile_there_is_no_clock(session: Session) -> None:
    assert clock_of(session) is None
