"""What each kind of ``tuning.peft`` reads of ``[tuning]``, known without torch and peft.

A configuration is judged in every command, and importing peft takes seconds. A test asks peft for every row.
"""

from __future__ import annotations

from fedllm import plugins

__all__ = ["KEYS", "READ", "known", "plain"]

KEYS = frozenset({"alpha", "options", "rank", "targets"})
"""The keys of ``[tuning]`` that some kinds read and others do not."""

_SCALED = (
    "adalora", "deft", "dora", "gralora", "loha", "lokr", "lora", "rslora", "supertuning",
)  # fmt: skip
_RANKED = (
    "adamss", "bottleneck", "delora", "glora", "hira", "hra", "lily", "miss", "peanut", "psoft", "pvera",
    "randlora", "shadow", "shira", "tinylora", "unilora", "vblora", "vera",
)  # fmt: skip
_PLACED = (
    "adaption-prompt", "beft", "bitfit", "boft", "c3a", "cartridge", "cpt", "fourierft", "frod", "head",
    "ia3", "ln-tuning", "oft", "osf", "p-tuning", "prefix", "prefix-tuning", "prompt", "prompt-tuning",
    "road", "trainable-tokens", "waveft",
)  # fmt: skip
READ: dict[str, frozenset[str]] = {
    "full": frozenset(),
    **dict.fromkeys(_SCALED, KEYS),
    **dict.fromkeys(_RANKED, KEYS - {"alpha"}),
    **dict.fromkeys(_PLACED, frozenset({"options", "targets"})),
}
"""What is read, by kind. Those without options, and a head that is given targets, say so themselves."""


def plain(name: str) -> str:
    """Return a kind's name as the table has it.

    >>> plain("P_Tuning ")
    'p-tuning'
    """
    return name.strip().lower().replace("_", "-")


def known(name: str) -> frozenset[str] | None:
    """Return the keys of ``[tuning]`` that a kind reads; None of a plug-in's, of a newer peft's, or of none.

    Args:
        name: as ``tuning.peft`` takes it.

    >>> sorted(known("ia3")), sorted(known("full"))
    (['options', 'targets'], [])
    """
    # A plug-in may have taken a name: whoever attaches adapters says so.
    return None if plugins.adapters() else READ.get(plain(name))
