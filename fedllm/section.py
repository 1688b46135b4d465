"""What every part of the configuration is: frozen, closed to unknown keys, and wary of silent conversions."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

__all__ = ["Section"]


def _leaves(annotation: Any) -> set[Any]:
    """Return the types that values of an annotation, and their elements, may have.

    >>> _leaves(tuple[int, ...] | None) == {int, type(None)}
    True
    """
    if get_origin(annotation) is Literal:
        return {type(value) for value in get_args(annotation)}
    inner = [part for part in get_args(annotation) if part is not ...]
    return set().union(*map(_leaves, inner)) if inner else {annotation}


class Section(BaseModel):
    """A frozen part of the configuration that refuses unknown keys and silent conversions."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,  # JSON, in which configurations travel, has neither
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what pydantic takes without a word: true for 1, and 1 for true."""
        allowed = _leaves(cls.model_fields[str(info.field_name)].annotation)
        numbers, truth = bool({int, float} & allowed), bool in allowed
        given = value if isinstance(value, list | tuple) else [value]
        if Any not in allowed and numbers != truth:
            for item in given:
                if isinstance(item, bool) and numbers:
                    raise ValueError(f"it takes a number, not {item!r}")
                if isinstance(item, int | float) and not isinstance(item, bool) and truth:
                    raise ValueError(f"it takes true or false, not {item!r}")
        return value
