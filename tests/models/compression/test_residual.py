"""``tuning.start = "residual"``: LoRA makes up for what quantising a base took away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from fedllm.errors import ConfigError, ModelError
from fedllm.models import model as models
from fedllm.models.compression.residual import factors
from fedllm.models.readback import difference
from tests.rounds.federation import configuration, run

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 4, 5, 6]])
TUNED = {"rank": 8, "alpha": 4.0, "targets": ["all-linear"]}


def quantised(base: Path, texts: Path, **tuning: Any) -> Any:
    model = {"name": str(base), "task": "causal", "quantize": "nf4"}
    return configuration(base, texts, model=model, rounds=1, method="lora", tuning=TUNED | tuning)


def test_what_is_lost_is_made_up_for_where_inputs_are() -> None:
    """No matrix of the rank does better on the inputs, by the theorem of Eckart and Young."""
    torch.manual_seed(0)
    lost, seen = torch.randn(6, 8), torch.randn(500, 8) * torch.tensor([9.0, 5, 1, 1, 0.1, 0.1, 0.1, 0.1])
    a, b = factors(lost, (seen.T @ seen).double(), 2)
    left = float((seen @ (lost - b @ a).T).norm())
    best = torch.linalg.svdvals(seen @ lost.T)[2:].norm()
    assert left == pytest.approx(float(best), rel=1e-2)
    plain_a, plain_b = factors(lost, torch.eye(8).double(), 2)
    assert left < 0.8 * float((seen @ (lost - plain_b @ plain_a).T).norm())


@pytest.mark.slow
def test_a_quantised_base_begins_nearer_to_what_it_was(
    tiny_causal: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(tiny_causal)(input_ids=IDS).logits
        off = {}
        for start in ("usual", "residual"):
            module = models.load(quantised(tiny_causal, tiny_texts, start=start), ()).module.eval()
            off[start] = difference(whole, module(IDS, torch.ones_like(IDS)).logits)
    assert off["residual"] < 0.6 * off["usual"]
    again = models.load(quantised(tiny_causal, tiny_texts, start="residual"), ()).read()
    first = models.load(quantised(tiny_causal, tiny_texts, start="residual"), ()).read()
    assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.slow
def test_the_adapter_loads_in_plain_peft(tiny_causal: Path, tiny_texts: Path, tmp_path: Path) -> None:
    config = quantised(tiny_causal, tiny_texts, start="residual")
    run(config, tmp_path / "run")  # which compares what peft loads with the run's own model
    assert "What was saved" not in (tmp_path / "run" / "adapter" / "README.md").read_text()
    base = AutoModelForCausalLM.from_pretrained(tiny_causal)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    factors = [p for name, p in loaded.named_parameters() if "lora_B" in name]
    assert len(factors) == 14
    assert all(factor.abs().sum() > 0 for factor in factors)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"quantize": "none"}}, 'model.quantize = "none"'),
        ({"tuning": {"peft": "ia3", "start": "residual", "targets": ()}}, 'tuning.peft = "ia3"'),
        ({"options": {"rule": "ffa"}}, "use rule fedit"),
    ],
)
def test_what_it_cannot_make_up_for_is_refused(
    change: dict[str, Any], said: str, tiny_causal: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    config = quantised(tiny_causal, tiny_texts, start="residual")
    document = config.model_dump(mode="json")
    for section, values in change.items():
        document[section] = document[section] | values
    with pytest.raises((ModelError, ConfigError), match=said):
        run(type(config).model_validate(document), tmp_path / "run")
