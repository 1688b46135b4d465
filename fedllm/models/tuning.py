"""What each kind of ``tuning.peft`` reads of ``[tuning]``, known without torch and peft.

A configuration is judged in every command, and importing peft takes seconds. A test asks peft for every row.
"""

from __future__ import annotations

from fedllm import plugins

__all__ = ["KEYS", "READ", "plain", "unread"]

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


def unread(name: str) -> frozenset[str]:
    """Return the keys of ``[tuning]`` that a kind does not read, such as the rank of what has none.

    Args:
        name: as ``tuning.peft`` takes it.

    Raises:
        ConfigError: a plug-in's kind is none, or takes a name that is taken.
        ModelError: there is no such kind.

    >>> sorted(unread("ia3")), sorted(unread("full"))
    (['tuning.alpha', 'tuning.rank'], ['tuning.alpha', 'tuning.options', 'tuning.rank', 'tuning.targets'])
    """
    if plain(name) in READ and not plugins.adapters():
        read = READ[plain(name)]
    else:
        # A plug-in's kind, one of a newer peft, or a mistake: whoever attaches it knows.
        from fedllm.models.base.loading import quiet

        with quiet():  # peft brings libraries that give hints when they are imported
            from fedllm.models.adapters import reads
        read = reads(name)
    return frozenset(f"tuning.{key}" for key in KEYS - read)
