"""The section of whom the server asks and how it combines what they answer."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fedllm.section import Section


class ServerConfig(Section):
    """How the server picks clients and combines their updates.

    Attributes:
        PLAINLY: how to set it so that it is :attr:`plain`, as the end of a sentence.
    """

    PLAINLY: ClassVar[str] = (
        'leave server.optimizer at "sgd", server.learning_rate at 1.0 and server.anchor at 0'
    )

    mode: Literal["sync", "async"] = "sync"
    """``sync`` waits for a round's clients; ``async`` (FedBuff; Nguyen et al., AISTATS 2022) keeps
    ``concurrency`` of them at work and ends a round when ``buffer`` answers have come, whenever begun."""
    sample: int | None = Field(default=None, ge=1)
    """Clients per round; unset takes all."""
    concurrency: int | None = Field(default=None, ge=1)
    """Clients at work at once in mode ``async``; unset takes ``sample``."""
    buffer: int | None = Field(default=None, ge=1)
    """Answers that make a round in mode ``async``, of a client each; unset means half of ``concurrency``,
    rounded up."""
    staleness: Literal["constant", "polynomial"] = "polynomial"
    """Weight of an update that began s rounds ago in mode ``async``: 1, or (1 + s)^-staleness_exponent."""
    staleness_exponent: float = Field(default=0.5, ge=0.0)
    """How fast ``polynomial`` weights fall; 0.5 in the paper."""
    max_staleness: int | None = Field(default=None, ge=0)
    """Rounds ago that an answer may have begun and still count in mode ``async``; unset sets no bound."""
    over_select: int = Field(default=0, ge=0)
    """Further clients asked; the round closes once ``sample`` of them have answered. A simulation, unless
    ``simulation.profile`` makes some slow, asks them in the place of those that fail."""
    quorum: int | None = Field(default=None, ge=1)
    """Accepted replies without which a round does not count; unset means half of ``sample``, rounded up."""
    deadline_s: float = Field(default=600.0, gt=0.0)
    """Seconds after which an exchange closes with what has arrived; in a simulation, seconds since the newest
    reply, so that no client is lost to a slow machine, or with ``simulation.profile`` simulated seconds."""
    retries: int = Field(default=3, ge=0)
    """Further attempts at a round that missed its quorum before the run fails."""
    optimizer: Literal["sgd", "momentum", "adam", "yogi"] = "sgd"
    """Server optimiser on the averaged update (Reddi et al., ICLR 2021)."""
    learning_rate: float = Field(default=1.0, gt=0.0)
    """Server learning rate."""
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Momentum, or beta1 of adam and yogi."""
    beta2: float = Field(default=0.99, ge=0.0, lt=1.0)
    """Second-moment decay of adam and yogi."""
    epsilon: float = Field(default=1e-3, gt=0.0)
    """Added to the root of the second moment of adam and yogi."""
    anchor: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the way back to where the run began, such as ``init_from``, that each round's result is drawn
    (L2-SP; Li et al., ICML 2018); a later text then overwrites less of what was learned before."""
    max_update_norm: float | None = Field(default=None, gt=0.0)
    """L2 norm above which a client's update is rejected, as the server measures it."""
    norm_ratio: float = Field(default=10.0, ge=0.0)
    """Multiple of the usual update norm above which a client's update is rejected; 0 sets no such bound."""
    max_examples: int = Field(default=1_000_000, ge=1)
    """Texts that one client counts for at most, whatever it claims."""
    weight_ratio: float | None = Field(default=None, ge=0.0)
    """Multiple of all clients' median number of texts that one counts for at most; 0 sets no such bound.
    Unset is 0 in a simulation, whose clients do not lie, and 3 in a deployment."""
    robust: Literal["none", "trimmed_mean", "median", "multi_krum", "norm_bound"] = "none"
    """How updates are averaged where some clients may be bad: per value without the extremes, or by the
    median; over the updates closest to each other; or each scaled down to a length first. In the first three
    all clients count alike."""
    byzantine: float = Field(default=0.2, ge=0.0, lt=0.5)
    """Share of a round's updates that may be bad: so many ``trimmed_mean`` leaves out at each end, and
    ``multi_krum`` in all."""
    robust_norm: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """L2 norm that ``norm_bound`` scales longer updates down to; unset takes the median of the round's."""
    outliers: Literal["name", "reject"] = "name"
    """Of an update far longer than the cohort's: name it in the run's log, or reject it as well."""
    outlier_deviations: float = Field(default=6.0, gt=0.0, allow_inf_nan=False)
    """Robust standard deviations (1.4826 MAD) above the median norm of five rounds, from which an update is
    far longer, if it is also more than twice the median."""

    @property
    def plain(self) -> bool:
        """Whether a round's mean update is taken as it is, as clients can do for themselves."""
        return self.optimizer == "sgd" and self.learning_rate == 1.0 and self.anchor == 0.0
