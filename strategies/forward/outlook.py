"""What a forward-only run can hope for, said before it begins."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from strategies.forward.directions import Kind
from strategies.forward.slopes import expected_cosine

__all__ = ["announce", "warn_of_setup"]

logger = logging.getLogger(__name__)

_HOPELESS = 0.02
"""Expected cosine below which a round's step is as good as random."""
_LARGE_SETUP = 200_000
"""Bytes of setup statistics per client from which on a slow link deserves a warning."""


def announce(
    parameters: Mapping[str, torch.Tensor], directions: int, remedy: str, kind: Kind = "rademacher"
) -> None:
    """Say how many parameters are probed and how well a round's step can point; warn where it is hopeless.

    Args:
        parameters: that directions run through.
        directions: that a round probes, all clients together.
        remedy: the option that raises them.
        kind: of the directions.
    """
    count = sum(parameter.numel() for parameter in parameters.values())
    cosine = expected_cosine(directions, count, kind)
    logger.info(
        "%d trained parameters, %d directions a round: expected cosine to the gradient %.3f",
        count,
        directions,
        cosine,
    )
    if cosine < _HOPELESS:
        logger.warning(
            "an expected cosine of %.4f is hopeless: train fewer than %d parameters (tuning.rank, "
            "tuning.targets, tuning.peft) or raise %s",
            cosine,
            count,
            remedy,
        )


def warn_of_setup(start: str, size: int, least: int) -> None:
    """Warn of a closed-form start whose statistics are large, ``size`` bytes where ``least`` would do."""
    if size > _LARGE_SETUP:
        logger.warning(
            'fwdllm.warm_start = "%s" makes each client upload %.2f MB once; "means" needs %.3f MB',
            start,
            size / 1e6,
            least / 1e6,
        )
