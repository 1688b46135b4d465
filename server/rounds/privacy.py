"""The server's part of client-level differential privacy: who takes part, the noise, and what is spent.

Everything secret comes of one key that the run folder keeps (``privacy.json``, mode 0600). The run's seed,
which every client knows, tells neither who takes part in a round nor the noise.

    cohort    each client by a coin of its own, with probability server.sample / clients
    noise     keyed by the round and the sum that it hides: the same sum has the same noise, so that a run
              that goes on ends with the same bits; another sum of that round has noise of its own
    spending  the file lists the digests of all sums that were ever released, and never forgets one: going
              back to an earlier round gives no budget back

Under secure aggregation nobody needs the key: who takes part is no secret, and each client adds its share of
the noise, so that what is released is the sum as it comes.
"""

from __future__ import annotations

import hmac
import json
import secrets
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from fedllm.config import RunConfig
from fedllm.errors import FedllmError, StoreError
from fedllm.privacy.noise import gaussian, uniform
from fedllm.runs.durable import replace_file, to_json
from fedllm.runs.folder import PRIVACY
from fedllm.wording import number
from strategies.private import FixedSum, PrivateSum, delta_of, deviation, next_clip, spent

__all__ = ["Privacy", "Spent"]


class Spent(FedllmError):
    """A further release would spend more than ``privacy.target_epsilon``."""


class Privacy:
    """Noise, cohorts and spending of one run.

    Args:
        config: of a run with ``privacy.noise_multiplier``.
        folder: the run folder.
        begun: whether the run has a checkpoint, and must know what it has spent.

    Raises:
        StoreError: the run has begun, and its file is gone or damaged.
    """

    def __init__(self, config: RunConfig, folder: Path, *, begun: bool) -> None:
        self._config, self._path = config, folder / PRIVACY
        self.delta = delta_of(config)
        if begun or self._path.exists():
            self._secret, self._released = _read(self._path)
        else:
            self._secret, self._released = secrets.token_bytes(32), dict[int, list[str]]()
            self._write()

    def cohort(self, round: int, available: Collection[int]) -> list[int]:
        """Return who takes part in a round, of those that are there; the coins do not depend on who is."""
        rate = self._config.cohort / self._config.clients
        coins = uniform(self._key("cohort", round), self._config.clients)
        return [node for node in sorted(available) if coins[node] < rate]

    def release(self, round: int, total: FixedSum, clip: float, unclipped: int) -> float:
        """Write down that a sum is released, then add its noise, unless clients have.

        Args:
            round: its number.
            total: of the updates that came.
            clip: of the round.
            unclipped: updates that were not longer; heeded where the clip follows them.

        Returns:
            The next round's clip.

        Raises:
            Spent: it would spend too much; nothing was added.
        """
        follows, answered = self._config.privacy.clip_quantile is not None, total.count
        digest = total.digest() + (f"/{clip!r}/{unclipped}/{answered}" if follows else "")
        released = self._released.get(round, [])
        if digest not in released:
            self.require(round)
            self._released[round] = [*released, digest]
            self._write()
        if isinstance(total, PrivateSum):
            key = self._key("noise", round, digest)
            total.blur(key, deviation(self._config, total.spec, clip))
        if not follows:
            return clip
        drawn = float(gaussian(self._key("count", round, digest), 1))
        return next_clip(self._config, clip, unclipped, answered, drawn)

    def require(self, round: int, last: int | None = None) -> None:
        """See that the budget allows a new release in a round, and in all up to ``last``.

        Raises:
            Spent: it does not.
        """
        target, last = self._config.privacy.target_epsilon, last or round
        new = {at: [*self._released.get(at, []), ""] for at in range(round, last + 1)}
        after = self._epsilon(self._released | new)
        if target is not None and after > target:
            raise Spent(
                f"round {last} would bring epsilon to {number(after)} at delta = {self.delta:.3g}, above "
                f"privacy.target_epsilon = {target:g}"
            )

    def begin(self, round: int) -> None:
        """Raise :class:`Spent` if a round cannot end with a release; one that was released already can."""
        if round not in self._released:
            self.require(round)

    @property
    def epsilon(self) -> float:
        """What all releases so far have spent."""
        return self._epsilon(self._released)

    def _epsilon(self, released: dict[int, list[str]]) -> float:
        return spent(self._config, Counter(len(digests) for digests in released.values()))

    def _key(self, *purpose: str | int) -> bytes:
        return hmac.digest(self._secret, "/".join(map(str, purpose)).encode(), "sha256")

    def _write(self) -> None:
        told = {"secret": self._secret.hex(), "released": self._released}
        replace_file(self._path, to_json(told), mode=0o600)


def _read(path: Path) -> tuple[bytes, dict[int, list[str]]]:
    try:
        told = json.loads(path.read_bytes())
        released = {int(round): [str(one) for one in digests] for round, digests in told["released"].items()}
        return bytes.fromhex(told["secret"]), released
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{path} is gone or damaged: without it nobody knows what the run has spent of its privacy; "
            "bring it back, or begin another run"
        ) from error
