"""What a method's own section is."""

from __future__ import annotations

from typing import ClassVar

from fedllm.section import Section


class MethodOptions(Section):
    """A method's own options, in the section of its name; the module that holds them imports no torch.

    Attributes:
        method: the method's name, as ``method = "..."`` spells it.
        implementation: where the method itself is, as ``"module:class"``; imported once it is chosen.
        descends: whether its clients take ``training.local_steps`` steps down the gradient, so that their
            number and rate can be chosen from the texts.
    """

    method: ClassVar[str]
    implementation: ClassVar[str]
    descends: ClassVar[bool] = False
