"""What ``fedllm export`` writes is what the run left, whatever the method keeps beside the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from safetensors.torch import load_file

from fedllm.tensors import fingerprint
from simulations.results.predict import export
from strategies.fedkd.method import FedKD
from strategies.lora.method import Options
from tests.parts import quick
from tests.rounds.federation import configuration, run

RULES = get_args(Options.model_fields["rule"].annotation)
PERSONAL = ("fedsa",)
"""Leave each client a model of its own, which the clients score."""


def exported(config: Any, folder: Path, place: str, weights: str) -> tuple[str, str]:
    """Fingerprints of what a run left and of what was exported from it."""
    run(config, folder / "run")
    export(folder / "run", folder / "out")
    left, written = (fingerprint(load_file(folder / side / place / weights)) for side in ("run", "out"))
    return left, written


@pytest.mark.parametrize("rule", quick(RULES, "stack"))
def test_every_rule_exports_the_adapter_that_its_run_left(
    rule: str, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {"rounds": 2, "method": "lora", "options": {"rule": rule}}
    if rule in PERSONAL:
        data = {"path": str(tiny_texts), "max_length": 16, "client_test_fraction": 0.2}
        sections |= {"data": data, "evaluation": {"every": 0, "clients": True}}
    config = configuration(tiny_encoder, tiny_texts, **sections)
    left, written = exported(config, tmp_path, "adapter", "adapter_model.safetensors")
    assert written == left


@pytest.mark.slow
def test_a_student_is_exported_whole(tiny_encoder: Path, tiny_texts: Path, tmp_path: Path) -> None:
    options = FedKD.Options(layers=1).model_dump(mode="json", exclude_none=True)
    config = configuration(tiny_encoder, tiny_texts, rounds=1, method="fedkd", options=options)
    left, written = exported(config, tmp_path, "model", "model.safetensors")
    assert written == left
