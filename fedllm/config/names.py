"""Names of runs, which are names of folders too."""

from __future__ import annotations

import re

from fedllm.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]{0,99}")


def require_name(name: str) -> str:
    """Return a run's name, which is that of its folder too.

    >>> require_name("lora-alpha=0.1")
    'lora-alpha=0.1'

    Raises:
        ConfigError: it could lead out of the folder of runs, or be taken for something else.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name[:120]!r} is not a run name: letters, digits and . _ = -, at most 100, "
            "a letter or a digit first"
        )
    return name


def as_name(text: str) -> str:
    """Turn any text into a run name: what a name may not hold becomes ``_``.

    >>> as_name("codec.up=quantize(bits=8)"), as_name("../../my run")
    ('codec.up=quantize_bits=8', 'my_run')
    """
    return re.sub(r"[^A-Za-z0-9.=-]+", "_", text).strip("._=-")[:100] or "run"
