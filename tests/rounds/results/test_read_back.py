"""What a run leaves behind is the run's model: loaded as a user would, it scores the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from fedllm.data.tokens import Batch
from fedllm.errors import RunFailed
from fedllm.models import readback
from fedllm.models.model import Model
from fedllm.models.readback import Unchecked, require_true
from fedllm.runs.amending import settle
from fedllm.runs.reader import Run
from server.rounds.rehearsal import few_texts
from simulations.results.predict import export, restore
from strategies.session import Session, open_session
from tests.parts import quick
from tests.rounds.federation import configuration, run

STARTS = ["pissa", "pissa_niter_4", "olora"]
RULES = ["fedit", "alternate", "svd", "stack", "residual", "hetero"]
QUICK = {("residual", "pissa")}


def conducted(encoder: Path, texts: Path, folder: Path, **sections: Any) -> Path:
    run(configuration(encoder, texts, rounds=2, **sections), folder)
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "start"),
    [
        pytest.param(rule, start, marks=() if (rule, start) in QUICK else pytest.mark.slow)
        for rule in RULES
        for start in STARTS
    ],
)
def test_an_adapter_that_started_from_the_weights_is_true_on_the_plain_base(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, start: str, rule: str
) -> None:
    tuning = {"rank": 4, "alpha": 8.0, "targets": ("query", "value"), "options": {"init_lora_weights": start}}
    folder = conducted(
        tiny_encoder, tiny_texts, tmp_path / "run", method="lora", options={"rule": rule}, tuning=tuning
    )
    told = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert told["init_lora_weights"] is True
    model = restore(folder).model
    torch.manual_seed(99)  # nothing may depend on what a user's process has drawn before
    stock = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_encoder), str(folder / "adapter"))
    head = load_file(folder / "adapter" / "head.safetensors")
    batch = few_texts(Session(configuration(tiny_encoder, tiny_texts))).whole()
    with torch.no_grad():
        hidden = stock.eval()(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        mean = (hidden * batch.attention_mask[..., None]).sum(1)
        logits = mean / mean.norm(dim=-1, keepdim=True) * 32**0.5 @ head["weight"].T + head["bias"]
        torch.testing.assert_close(model.forward(batch).logits, logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("file", quick(["adapter_model.safetensors", "head.safetensors"], "head.safetensors"))
def test_a_result_that_is_not_the_run_fails_it(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    from strategies import base

    saved = base.save

    def spoilt(model: Any, folder: Path) -> Path:
        place = saved(model, folder)
        tensors = load_file(place / file)
        save_file(
            {name: torch.flip(value, (0,)).contiguous() for name, value in tensors.items()}, place / file
        )
        return place

    monkeypatch.setattr(base, "save", spoilt)
    with pytest.raises(
        RunFailed, match="run/adapter is not the run's model: loaded again, its scores of 8 texts"
    ):
        run(configuration(tiny_encoder, tiny_texts, rounds=2, method="lora"), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"
    assert not (tmp_path / "run" / "adapter").exists()
    with pytest.raises(RunFailed, match="out/adapter is not the run's model"):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out" / "adapter").exists()


OUT_OF_MEMORY = {
    "python": MemoryError(),
    "allocator": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    "cuda": torch.OutOfMemoryError("CUDA out of memory"),
    "system": OSError(12, "Cannot allocate memory"),
}
OTHER = {"library": KeyError("lora_A"), "network": OSError("huggingface.co cannot be reached")}


@pytest.mark.parametrize("step", ["scores", "read_back"])
@pytest.mark.parametrize("what", [*OUT_OF_MEMORY, *OTHER])
def test_a_result_that_cannot_be_checked_is_a_warning(
    tiny_encoder: Path,
    tiny_texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    step: str,
) -> None:
    def fail(*_: object) -> None:
        raise (OUT_OF_MEMORY | OTHER)[what]

    session = open_session(configuration(tiny_encoder, tiny_texts, rounds=1).to_json())
    monkeypatch.setattr(readback, step, fail)
    with pytest.raises(Unchecked, match="adapter was not compared with the run's model") as told:
        require_true(session.model, tmp_path / "run" / "adapter", few_texts(session).whole())
    assert told.value.starved == (what in OUT_OF_MEMORY)
    assert ("no memory for a second base" in str(told.value)) == told.value.starved


def test_a_run_that_cannot_be_checked_is_finished_and_says_so(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: Mock(available=1000, total=1 << 30))
    folder = conducted(tiny_encoder, tiny_texts, tmp_path / "run", method="lora")
    (warning,) = [event for event in Run(folder).events() if event.kind == "warning"]
    assert "a second base takes" in warning.message
    assert warning.message.endswith("of memory, and 1 kB are free")
    assert "Scores after 2 of 2 rounds" in (folder / "adapter" / "README.md").read_text()


def test_a_check_that_killed_the_process_is_not_tried_again(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """Nothing catches it, as nothing catches the kernel."""

    def kill(*_: object) -> None:
        assert not (tmp_path / "run" / "adapter" / "README.md").read_text().startswith('---\nbase_model: "')
        raise Killed

    config, folder = configuration(tiny_encoder, tiny_texts, rounds=1, method="lora"), tmp_path / "run"
    monkeypatch.setattr("server.rounds.conduct.require_true", kill)
    with pytest.raises(Killed):
        run(config, folder)
    assert Run(folder).status == "interrupted"
    assert settle(folder)  # as a server does that starts anew
    assert run(config, folder)["status"] == "finished"
    (warning,) = [event for event in Run(folder).events() if event.kind == "warning"]
    assert "the process was killed over that the last time" in warning.message
    assert (folder / "adapter" / "README.md").read_text().startswith('---\nbase_model: "')


@pytest.mark.slow
def test_a_result_that_cannot_be_loaded_says_so(tiny_encoder: Path, tiny_texts: Path, tmp_path: Path) -> None:
    folder = conducted(tiny_encoder, tiny_texts, tmp_path / "run", method="lora")
    session = Session(configuration(tiny_encoder, tiny_texts, rounds=2, method="lora"))
    model = restore(folder).model
    batch = few_texts(session).whole()
    before = torch.get_rng_state()
    model.module.train()
    require_true(model, folder / "adapter", batch)
    assert model.module.training
    assert torch.equal(torch.get_rng_state(), before)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(Unchecked, match=r"cannot be loaded again: .*; the run's checkpoints hold the model"):
        require_true(model, folder / "adapter", batch)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"options": {"rule": "stack"}, "tuning": {"options": {"init_lora_weights": "loftq"}}}, "plain base"),
        (
            {"options": {"rule": "ffa"}, "tuning": {"options": {"init_lora_weights": "pissa_niter_4"}}},
            "at random",
        ),
    ],
)
def test_what_could_not_be_saved_is_refused(
    tiny_encoder: Path, tiny_texts: Path, sections: dict[str, Any], words: str
) -> None:
    from fedllm.errors import ConfigError

    with pytest.raises(ConfigError, match=words):
        _ = Session(configuration(tiny_encoder, tiny_texts, method="lora", **sections)).method


KINDS: dict[str, dict[str, Any]] = {
    "everything": {"method": "fedavg", "tuning": {}},
    "student": {"method": "fedkd", "options": {"layers": 1}},
    "prompt": {"method": "lora", "tuning": {"peft": "prompt", "rank": 2}},
    "bottleneck": {"method": "lora", "tuning": {"peft": "bottleneck", "rank": 2}},
    "bfloat16": {"method": "lora", "model": {"dtype": "bfloat16"}},
    "own head": {"method": "lora", "model": {"pooling": "own"}},
    "first token": {"method": "lora", "model": {"pooling": "cls"}, "tuning": {"peft": "ia3"}},
    "slopes": {"method": "fwdllm", "options": {"directions": 2}},
}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders that were read back and found to be the run's model."""
    found: list[str] = []

    def check(model: Model, place: Path, batch: Batch) -> None:
        require_true(model, place, batch)
        found.append(place.name)

    monkeypatch.setattr("server.rounds.conduct.require_true", check)
    return found


@pytest.mark.parametrize("kind", quick(KINDS, "prompt"))
def test_whatever_a_run_saves_is_read_back(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, read: list[str], kind: str
) -> None:
    model = {"name": str(tiny_encoder), **KINDS[kind].get("model", {})}
    conducted(tiny_encoder, tiny_texts, tmp_path / "run", **{**KINDS[kind], "model": model})
    written = "model" if kind in ("everything", "student") else "adapter"
    assert read[0] == written
    assert {name.removesuffix("-best") for name in read} == {written}


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_an_adapter_of_a_quantised_base_is_read_back(
    tiny_encoder: Path,
    tiny_texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read: list[str],
    quantize: str,
) -> None:
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = {"name": str(tiny_encoder), "quantize": quantize}
    conducted(tiny_encoder, tiny_texts, tmp_path / "run", method="lora", model=model)
    assert read == ["adapter"]
