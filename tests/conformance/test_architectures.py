"""Every family of models loads, trains a round of LoRA and is saved so that plain peft loads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedllm.runs.reader import Run
from strategies.registry import resolve_run
from tests.architectures import Architecture
from tests.conformance.test_tasks import TASKS
from tests.parts import quick
from tests.rounds.federation import run

FAMILIES = {
    "pairs": (
        "AlbertModel", "BertModel", "DebertaV2Model", "DistilBertModel", "ElectraModel", "ModernBertModel",
        "RobertaModel",
    ),
    "instruct": (
        "GemmaForCausalLM", "Gemma2ForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "LlamaForCausalLM",
        "MistralForCausalLM", "OPTForCausalLM", "PhiForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
    ),
    "seq2seq": ("BartForConditionalGeneration", "T5ForConditionalGeneration"),
}  # fmt: skip
CELLS = [(task, name) for task, names in FAMILIES.items() for name in names]


@pytest.mark.parametrize(("task", "name"), quick(CELLS, ("seq2seq", "BartForConditionalGeneration")))
def test_a_family_goes_the_whole_way(
    task: str, name: str, architecture: Architecture, tmp_path: Path
) -> None:
    go_the_whole_way(task, architecture(name), "lora", tmp_path)


@pytest.mark.parametrize("peft", quick(["prompt", "prefix"], "prefix"))
def test_virtual_tokens_stand_before_what_an_encoder_reads(
    peft: str, architecture: Architecture, tmp_path: Path
) -> None:
    go_the_whole_way("seq2seq", architecture("T5ForConditionalGeneration"), peft, tmp_path)


def go_the_whole_way(task: str, base: Path, peft: str, folder: Path) -> None:
    rows, settings = TASKS[task][1:]
    texts = folder / "rows.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = resolve_run(
        {
            "clients": 2,
            "rounds": 1,
            **settings,
            "model": {"name": str(base), **settings["model"]},
            "data": {"path": str(texts), "max_length": 32, **settings.get("data", {})},
            "tuning": {"peft": peft},
            "training": {"local_steps": 2, "batch_size": 8, "learning_rate": 1e-2},
        }
    )
    summary = run(config, folder / "run")
    assert summary["status"] == "finished"
    assert (folder / "run" / "adapter" / "adapter_config.json").is_file()
    # What was saved was loaded again by peft alone and compared; had it not been, an event would say so.
    said = [event.message for event in Run(folder / "run").newest_events()]
    assert [message for message in said if "was not compared" in message] == []
