"""The form is the schema: every setting is asked for, and only what was changed is sent."""

from __future__ import annotations

from typing import Any

import pytest

from fedllm.config import RunConfig
from fedllm.errors import ConfigError
from server.dashboard.actions.form import Field, fields, parse


@pytest.fixture
def form() -> dict[str, Field]:
    options = {"properties": {"rule": {"enum": ["fedit", "svd"], "type": "string", "default": "fedit"}}}
    schemas = {"run": RunConfig.model_json_schema(), "methods": {"lora": options}}
    document = RunConfig(seed=3).to_document()
    return {field.key: field for field in fields(schemas, document)}


def test_every_setting_is_asked_for(form: dict[str, Field]) -> None:
    leaves = {
        f"{name}.{key}"
        for name, section in RunConfig.model_fields.items()
        if hasattr(section.annotation, "model_fields")
        for key in section.annotation.model_fields  # type: ignore[union-attr]
    }
    # What has no plain input: peft's options, a task's other columns, which part a baseline takes, devices.
    assert leaves - set(form) == {"tuning.options", "data.columns", "data.part", "simulation.devices"}
    assert {"seed", "clients", "rounds", "lora.rule"} <= set(form)
    assert form["seed"].value == 3
    assert form["training.learning_rate"].kind == "number"
    assert form["data.partition"].choices[:2] == ("iid", "dirichlet")
    assert form["server.sample"].value is None
    assert form["training.batch_size"].says == "Texts per step."


@pytest.mark.parametrize(
    ("key", "given", "sent"),
    [
        ("seed", "3", None),
        ("seed", "4", 4),
        ("server.sample", "", None),
        ("server.sample", "5", 5),
        ("training.learning_rate", "0.001", None),
        ("training.learning_rate", "3e-3", 3e-3),
        ("tuning.targets", "query, value", ["query", "value"]),
        ("tuning.targets", "", None),
        ("training.gradient_checkpointing", True, True),
        ("lora.rule", "svd", "svd"),
        ("codec.up", "none", None),
    ],
)
def test_only_changes_are_sent(form: dict[str, Field], key: str, given: Any, sent: Any) -> None:
    assert parse(form[key], given) == sent


@pytest.mark.parametrize("given", ["x", "1.5"])
def test_what_is_no_number_is_refused_by_name(form: dict[str, Field], given: str) -> None:
    with pytest.raises(ConfigError, match="clients"):
        parse(form["clients"], given)
