"""A codec of one's own: of every value its sign, or nothing, by chance (TernGrad, Wen et al., NeurIPS 2017).

    s = max |x| of a block;  x becomes  s sign(x)  with probability |x| / s,  else 0

On average that is x. A stage chains with all others; here its codes are entropy coded.

    python examples/own_codec.py
    fedllm simulate --plugin examples/own_codec.py --set "codec.up=ternary | entropy"

A plug-in that others install names its stages as entry points of the group ``fedllm.codecs``.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import fedllm
from fedllm.codecs.stages.bits import Codes
from fedllm.codecs.stages.quantize import BlockQuantizer, inverse


@dataclass(frozen=True)
class Ternary(BlockQuantizer):
    """``ternary``: minus one, zero or one times the block's largest magnitude."""

    block: int = 1024

    name = "ternary"
    example = "ternary"
    rate = "2 + 32/block"
    cost = "O(n)"
    bits = 2
    unbiased = True
    contractive = False

    def quantize(
        self, x: Tensor, bits: int, random: np.random.Generator, out: Tensor, scratch: Tensor
    ) -> Tensor:
        """Write codes 0, 1 and 2 for -1, 0 and 1; return the scales."""
        scales = x.abs().amax(dim=1)
        kept = torch.from_numpy(random.random(x.shape, np.float32)) < x.abs() * inverse(scales)[:, None]
        out.copy_(1 + x.sign() * kept)
        return scales

    def dequantize(self, codes: Codes, bits: int, scales: Tensor, out: Tensor) -> None:
        """Write the values that the codes stand for; a fourth code, which nobody sends, is a one."""
        np.take(np.array([-1, 0, 1], np.float32), codes, out=out.numpy(), mode="clip")
        out *= scales


STAGES = (Ternary,)


if __name__ == "__main__":
    run = fedllm.simulate(
        "quickstart",
        {"codec.up": "ternary | entropy"},
        plugins=[__file__],
        clients=4,
        rounds=2,
        name="ternary",
    )
    told = run.summary["bytes"]
    print(f"{told['dense_up'] / told['up']:.0f} times fewer bytes up, accuracy {run.metrics['accuracy']:.3f}")
