"""A client's probes: slopes of the loss on one batch of its own texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedllm.config import RunConfig
from fedllm.randomness import stream
from strategies.base import Passes, Work
from strategies.forward.activations import ActivationCache
from strategies.forward.directions import Direction, Kind
from strategies.forward.slopes import Estimator, Slopes, batch_loss, passes, settled, slopes

__all__ = ["Prober"]


@dataclass(frozen=True)
class Prober:
    """How a run's clients measure slopes.

    Attributes:
        config: the run.
        estimator, kind, radius, parallel: see :func:`strategies.forward.slopes.slopes`.
        cache: of hidden states below what is trained.
        use_cache: whether it is used.
    """

    config: RunConfig
    estimator: Estimator
    kind: Kind
    radius: float
    parallel: int
    cache: ActivationCache
    use_cache: bool = True

    def __call__(
        self, work: Work, directions: Sequence[Direction], names: Iterable[str] | None = None
    ) -> tuple[Slopes, Passes]:
        """Measure slopes on the batch of a round: the same, however often it is asked for in it.

        Args:
            work: whose model is probed on whose texts.
            directions: P of them.
            names: trained tensors that directions run through, in name order; all by default.

        Returns:
            Slopes, shape (P,), and their cost in passes through the whole model.
        """
        training, model = self.config.training, work.model
        order = stream(self.config.seed, "batches", work.round, work.node).permutation(len(work.train))
        indices = order[: training.batch_size]
        loss = batch_loss(model, work.train.batch(indices))
        trained = {name: parameter.detach() for name, parameter in model.trainable().items()}
        moved = trained if names is None else {name: trained[name] for name in names}
        shortcut = self.cache.open(model, work.train, use=self.use_cache)
        with settled(model.module), shortcut.resumed(indices):
            found = slopes(
                self.estimator,
                loss,
                moved,
                directions,
                kind=self.kind,
                radius=self.radius,
                parallel=self.parallel,
            )
        count = passes(len(directions), self.estimator, self.parallel)
        return found, shortcut.cost(count, self.config)
