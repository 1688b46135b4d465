"""What trains on what: every adapter, on one base of each kind, by each way of training, plain and quantised.

    python -m tests.models.matrix          writes docs/adapters.md

A cell is a run of two rounds with two clients. It says ``yes`` where the server's rehearsal lets the run
begin; then both rounds must come to their end, and what they leave must score the same when loaded again.
"""

from __future__ import annotations

import random
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fedllm.config import RunConfig
from fedllm.errors import ConfigError, ModelError, RunFailed
from fedllm.models.readback import Unchecked, require_true
from fedllm.models.tuning.adapters import method_names
from server.rounds.rehearsal import few_texts, rehearse
from strategies.session import Session
from tests.conformance.federation import federate, start
from tests.conftest import save_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"

BASES = {"BERT": "classification", "Llama": "causal", "GPT-2": "causal", "Mixtral": "causal"}
WAYS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "fwdllm jvp": {"method": "fwdllm", "options": {"directions": 2, "estimator": "jvp"}},
    "fwdllm antithetic": {"method": "fwdllm", "options": {"directions": 2, "estimator": "antithetic"}},
    "mezo": {"method": "mezo"},
    "fedkd": {"method": "fedkd", "options": {"layers": 1}},
    "lora int8": {"method": "lora", "quantize": "int8"},
    "lora nf4": {"method": "lora", "quantize": "nf4"},
    "fwdllm antithetic nf4": {"method": "fwdllm", "quantize": "nf4", "options": {"estimator": "antithetic"}},
}
QUANTISED = ("BERT", "Llama")
"""Bases that the quantised columns are tried on: bitsandbytes packs linear layers of any model alike."""

# What a method needs to be told on layers as small as these; defaults are made for widths of hundreds.
OPTIONS: dict[str, dict[str, Any]] = {
    "c3a": {"block_size": 16},
    "road": {"group_size": 16},
    "vblora": {"vector_length": 16, "num_vectors": 8},
    "waveft": {"n_frequency": 16},
    "fourierft": {"n_frequency": 16},
    "trainable-tokens": {"token_indices": [5, 6, 7]},
}
SAME = {"prompt-tuning", "prefix-tuning"}
"""Names that another one stands for."""


@dataclass(frozen=True)
class Cell:
    """One combination, and why it is refused; empty where it trains."""

    peft: str
    base: str
    way: str
    refused: str = ""


def names() -> list[str]:
    """Return every accepted ``tuning.peft`` but for second names."""
    return sorted({*method_names()} - SAME)


def ways(base: str) -> list[str]:
    """Return the columns of a base."""
    return [way for way in WAYS if base in QUANTISED or "quantize" not in WAYS[way]]


def cells() -> Iterator[Cell]:
    """Try every combination.

    Raises:
        AssertionError: runs that were allowed to begin did not come to their end, or left another model than
            they had; names them all.
    """
    wrong = []
    for base in BASES:
        for peft in names():
            for way in ways(base):
                try:
                    yield tried(Cell(peft, base, way))
                except Exception as error:
                    wrong.append(f"{peft} on {base} by {way}: {error}")
                    yield Cell(peft, base, way, "BROKEN")
    if wrong:
        raise AssertionError("\n".join(wrong))


def tried(cell: Cell) -> Cell:
    """Try one combination; return it with the reason for which it is refused, if it is."""
    session = Session(_configuration(cell))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            rehearse(session)
        except (ModelError, ConfigError) as error:
            return Cell(cell.peft, cell.base, cell.way, str(error))
        state = federate(session, start(session), 2, (0, 1))
        if all(torch.equal(state.tensors[name], session.initial[name]) for name in state.tensors):
            raise AssertionError(f"{cell}: nothing has moved")
        with tempfile.TemporaryDirectory() as folder:
            place = session.method.save(session.model, state.tensors, Path(folder))
            try:
                require_true(session.model, place, few_texts(session).whole())
            except (RunFailed, Unchecked) as error:
                late = str(error).partition("/")[2].partition("; the run's checkpoints")[0]
                return Cell(cell.peft, cell.base, cell.way, f"Only at the end of the run: {late}")
    return cell


def _configuration(cell: Cell) -> RunConfig:
    way = dict(WAYS[cell.way])
    model = {
        "name": str(folder(cell.base)),
        "task": BASES[cell.base],
        "quantize": way.pop("quantize", "none"),
    }
    return RunConfig.model_validate(
        {
            "clients": 2,
            "rounds": 2,
            "model": model,
            "data": {"path": str(_texts()), "max_length": 12},
            "tuning": {"peft": cell.peft, "rank": 4, "options": OPTIONS.get(cell.peft, {})},
            "training": {"local_steps": 2, "batch_size": 4, "learning_rate": 1e-2},
            **way,
        }
    )


@cache
def _place() -> Path:
    return Path(tempfile.mkdtemp(prefix="fedllm-matrix-"))


@cache
def _texts() -> Path:
    pick = random.Random(0)
    words = {"fruit": ["apple", "pear", "plum"], "metal": ["iron", "zinc", "lead"]}
    lines = [
        f'{{"text": "{" ".join(pick.choices(words[w], k=8))}", "label": "{w}"}}\n' for w in [*words] * 12
    ]
    (_place() / "texts.jsonl").write_text("".join(lines), encoding="utf-8")
    return _place() / "texts.jsonl"


@cache
def folder(base: str) -> Path:
    """Return a checkpoint of two layers of width 32."""
    import transformers

    place = _place() / base
    size = save_tokenizer(place)
    ends = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    wide = {
        "vocab_size": size,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    made: Any = {
        "BERT": lambda: transformers.BertModel(transformers.BertConfig(**wide, pad_token_id=0)),
        "Llama": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**wide, **ends, num_key_value_heads=2, tie_word_embeddings=True)
        ),
        "GPT-2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=64, **ends)
        ),
        "Mixtral": lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**wide, **ends, num_key_value_heads=2, num_local_experts=4)
        ),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made[base]().save_pretrained(place)
    return place


def page(tried: Iterable[Cell]) -> str:
    """Return the documentation page: a table for each base, refusals by number, their reasons below."""
    found = {(cell.base, cell.peft, cell.way): cell for cell in tried}
    reasons: dict[str, int] = {}
    lines = [_INTRODUCTION]
    for base in BASES:
        lines += [f"## {base}\n", f"| `tuning.peft` | {' | '.join(ways(base))} |"]
        lines.append("| --- |" + " --- |" * len(ways(base)))
        for peft in names():
            row = []
            for way in ways(base):
                cell = found[base, peft, way]
                number = reasons.setdefault(_reason(cell), len(reasons) + 1) if cell.refused else 0
                row.append(f"[{number}]" if number else "yes")
            lines.append(f"| `{peft}` | {' | '.join(row)} |")
        lines.append("")
    lines.append("## Why not\n")
    lines += [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join(lines) + "\n"


_INTRODUCTION = """# Adapters: what trains on what

This page is written by `python -m tests.models.matrix`. Every cell was run: two rounds, two clients, a model
of two layers of width 32. `yes`: it trains, every trained tensor gets a gradient or a slope, and what the run
leaves scores the same when it is loaded again. A number: the server refuses it before the first round, for
the reason below. `lora` and the others are values of `method`; `jvp` and `antithetic` of `fwdllm.estimator`;
`int8` and `nf4` of `model.quantize`. On layers as small as these some methods need an option of their own
(`c3a`, `road`, `vblora`, `waveft`, `fourierft`: counts of blocks, vectors or frequencies that fit the width);
`trainable-tokens` always needs `token_indices`.
"""


def _reason(cell: Cell) -> str:
    """Return a refusal without what the cell says already."""
    text = " ".join(cell.refused.split())
    for name in (str(folder(base)) for base in BASES):
        text = text.replace(name, "BASE")
    text = text.rpartition(" cannot train BASE: ")[2].partition("; its modules are")[0]
    # Figures whose last digits differ between machines.
    text = re.sub(r"by [0-9.e-]+, whose norm is [0-9.e-]+", "by a share of it", text)
    text = re.sub(r"are [0-9.e-]+% off", "differ", text)
    text = text.replace(f"tuning.peft = {cell.peft!r} ", "")
    return text[:1].upper() + text[1:]


def main() -> None:
    """Write the page."""
    torch.set_num_threads(1)
    PAGE.write_text(page(cells()), encoding="utf-8")


if __name__ == "__main__":
    main()
