"""What a client's answers have spent of its own texts' privacy, where it adds the noise to its steps itself.

Kept in the node's folder for its user alone, and written before anything is learnt from a text. An answer
that is asked for again, of the same tensors and texts, has the same noise and spends nothing.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from client.node import NodeContext
from client.secret import Secret
from fedllm.config import RunConfig
from fedllm.data.tokens import Tokens
from fedllm.errors import ConfigError, FedllmError, StoreError
from fedllm.privacy.accounting import epsilon_of, least_noise, usual_delta
from fedllm.protocol.wire import Instruction
from fedllm.runs.durable import replace_file
from fedllm.wording import number
from strategies.base import StepNoise
from strategies.steps import batch_rate

__all__ = ["Spending"]


@dataclass
class Spending:
    """A client's spending in one run.

    Attributes:
        texts: that it had when it began, on which the noise and its accounting hang.
        noise: multiplier of every step.
        released: digests of what was learnt from which tensors and texts, by round and exchange.
    """

    texts: int
    noise: float
    released: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, config: RunConfig, place: NodeContext, run: str, texts: int) -> Self:
        """Read a client's spending; the first time a budget becomes noise.

        Raises:
            ConfigError: ``dp-accounting`` is not installed, or there is no delta for so few texts.
            StoreError: the file is damaged, or the client has other texts than it began with.
        """
        path = _path(place, run)
        if not path.exists():
            found = cls(texts, _noise(config, texts))
            found._write(path)
            return found
        try:
            found = cls(**json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise StoreError(
                f"{path} is damaged: without it this client does not know what it has spent of its texts' "
                "privacy; it takes no further part in the run"
            ) from error
        if found.texts != texts:
            raise StoreError(
                f"this client began the run with {found.texts} texts and has {texts}, and its noise was made "
                "for the former: bring them back, or begin another run"
            )
        return found

    def spend(self, config: RunConfig, place: NodeContext, asked: Instruction, train: Tokens) -> StepNoise:
        """Write down that steps are taken, and return their noise.

        Raises:
            FedllmError: the budget does not allow them; nothing was written down.
        """
        learnt = hashlib.sha256(train.flat.tobytes() + train.starts.tobytes())
        learnt.update(b"" if train.labels is None else train.labels.tobytes())
        mark = f"{asked.digest:016x}/{learnt.hexdigest()[:32]}"
        before = self.released.setdefault(f"{asked.round}/{asked.index}", [])
        if mark not in before:
            before.append(mark)
            target, after = config.privacy.target_epsilon, self.epsilon(config)
            if target is not None and after > target:
                raise FedllmError(
                    f"another answer of this client would bring epsilon to {number(after)} for its texts, "
                    f"above privacy.target_epsilon = {target:g}"
                )
            self._write(_path(place, asked.run))
        key = Secret.of(place, asked.run).key("steps", asked.round, asked.index, mark)
        return StepNoise(self.noise, key)

    def epsilon(self, config: RunConfig) -> float:
        """Return what all steps so far have spent of each text's privacy."""
        steps = config.training.local_steps * sum(map(len, self.released.values()))
        return epsilon_of({1: steps}, batch_rate(config, self.texts), self.noise, _delta(config, self.texts))

    def told(self, config: RunConfig) -> dict[str, float]:
        """Return epsilon and delta as metrics of an answer."""
        return {"epsilon": self.epsilon(config), "delta": _delta(config, self.texts)}

    def _write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_file(path, json.dumps(asdict(self)), mode=0o600)


def _path(place: NodeContext, run: str) -> Path:
    return Path(place.folder) / run / "spending.json"


def _noise(config: RunConfig, texts: int) -> float:
    if config.privacy.noise_multiplier is not None:
        return config.privacy.noise_multiplier
    target = config.privacy.target_epsilon
    assert target is not None
    steps = config.rounds * config.training.local_steps
    return least_noise(target, steps, batch_rate(config, texts), _delta(config, texts))


def _delta(config: RunConfig, texts: int) -> float:
    if config.privacy.delta is None and texts < 2:
        raise ConfigError("this client has one text, which privacy.delta = texts^-1.1 does not hide: give it")
    return config.privacy.delta or usual_delta(texts)
