"""What a method's own section is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fedllm.section import Section


class MethodOptions(Section):
    """A method's own options, in the section of its name; the module that holds them imports no torch.

    Attributes:
        method: the method's name, as ``method = "..."`` spells it.
        implementation: where the method itself is, as ``"module:class"``; imported once it is chosen.
        descends: whether its clients take ``training.local_steps`` steps down the gradient, so that their
            number and rate can be chosen from the texts.
        slopes: whether its clients measure slopes of the loss, which a base of low precision rounds.
        unread: keys of the run's other sections that the method does not read, such as ``tuning.rank``.
        needs: options that only count beside another: its name, and the values that let them count.
        no_baseline: kinds of baseline (``local``, ``central``) that would be none of it, and why.
    """

    method: ClassVar[str]
    implementation: ClassVar[str]
    descends: ClassVar[bool] = False
    slopes: ClassVar[bool] = False
    unread: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[Mapping[str, tuple[str, tuple[Any, ...]]]] = {}
    no_baseline: ClassVar[Mapping[str, str]] = {}
