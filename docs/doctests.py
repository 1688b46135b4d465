"""Docstrings as Markdown: examples become code, and roles become names."""

from __future__ import annotations

from typing import Any

import griffe

from docs.hooks import markdown


class Markdown(griffe.Extension):
    """Rewrites every docstring before mkdocstrings reads it."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
