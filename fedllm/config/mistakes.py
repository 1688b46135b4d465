"""What pydantic found, in one sentence."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from fedllm.wording import suggest


def explain(error: ValidationError, schema: type[BaseModel], prefix: tuple[str, ...] = ()) -> str:
    """Say in one sentence what pydantic found first: the key, what was given, what is allowed."""
    # What is missing may be what an unknown key was meant to be.
    first = min(error.errors(), key=lambda one: one["type"] == "missing")
    location = [str(part) for part in first["loc"]]
    key = ".".join((*prefix, *location))
    if first["type"] == "extra_forbidden":
        for part in location[:-1]:
            field = schema.model_fields.get(part)  # none is the name of an entry of a table
            for annotation in () if field is None else (field.annotation, *get_args(field.annotation)):
                if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                    schema = annotation
        return f"unknown key {key}{suggest(location[-1], schema.model_fields)}"
    if first["type"] == "missing":
        return f"{key} is missing"
    if first["type"] == "value_error":
        reason = str(first["ctx"]["error"])
        return f"{key}: {reason}" if location else reason
    return f"{key} = {first['input']!r} is not allowed: {_right(first['type'], first['msg'], first['input'])}"


def _right(kind: str, message: str, given: Any) -> str:
    """Say what is allowed; where pydantic's words are about Python, in others."""
    if kind == "tuple_type":
        return f"it takes a list, such as [{given!r}]"
    if kind in ("dict_type", "model_type", "model_attributes_type"):
        return "it takes a section of keys and values"
    return (message[0].lower() + message[1:]).replace("tuple", "list")
