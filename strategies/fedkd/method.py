"""Private teachers, a shared student: FedKD (Wu et al., Nature Communications 13:2032, 2022).

    client k   reads its teacher and Wh from its own disk, and for each local step
                   teacher, Wh   descend   Lt + KL(ys || yt) / D + Lh
                   student w     descends  Ls + KL(yt || ys) / D + Lh         (strategies.fedkd.losses)
               keeps teacher, Wh and their optimiser's moments; sends w_k - w and its number of texts n_k
    server     w  <-  w + sum_k n_k (w_k - w) / sum_k n_k

Both directions are compressed by the run's codecs (low_rank with an energy that rises with progress is the
paper's dynamic gradient approximation). The server evaluates the student; clients evaluate their teachers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from fedllm import tasks
from fedllm.config import RunConfig
from fedllm.data.tokens import Batch
from fedllm.errors import ConfigError, ModelError, RunFailed
from fedllm.models import model as models
from fedllm.models.evaluation import evaluate
from fedllm.models.model import Model, Output
from fedllm.models.readback import Unchecked, require_true
from fedllm.models.saving import save
from fedllm.models.training import descend, learning_rate, minibatches, optimizer_of
from fedllm.randomness import stream
from fedllm.tensors import Tensors
from strategies.averaging import Averaging
from strategies.base import Answer, Passes, Work
from strategies.fedkd.losses import Distillation, Projections, View, matched_layers
from strategies.fedkd.options import Options
from strategies.fedkd.student import (
    check_pair,
    depth,
    freeze_embeddings,
    keep_layers,
    narrow,
    principal_directions,
    width,
)
from strategies.tryout import require_apart, require_gradients, undone

__all__ = ["FedKD", "Options"]


@dataclass
class Tutor:
    """The teacher's side on a client: one module per process, whose values are swapped from client to client.

    Attributes:
        model: the teacher.
        projections: Wh.
        first: what a client that has no state yet starts from.
    """

    model: Model
    projections: Projections
    first: Tensors

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what is trained beside the student, by the name it has in the client's state."""
        named = {f"teacher/{name}": p for name, p in self.model.trainable().items()}
        return named | {f"projection/{name}": p for name, p in self.projections.named_parameters()}


class FedKD(Averaging):
    """Every client distils between its own teacher and the common student; only the student travels."""

    Options = Options
    averages = True
    sums = True
    private = True

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.options = Options.model_validate(config.options)
        if self.options.student is not None and self.options.width is not None:
            raise ConfigError(
                "fedkd.width applies to a student made from the teacher; fedkd.student is given"
            )
        if self.options.student is not None and self.options.match == "origin":
            raise ConfigError(
                'fedkd.match = "origin" needs a student made from the teacher; fedkd.student is given'
            )
        if tasks.of(config).prepares:
            raise ConfigError(
                f'method = "fedkd" cannot learn model.task = "{config.model.task}": the loss compares with '
                "one model as it was before, and here there are two"
            )
        if config.training.memory == "lean" and tasks.of(config).pooling in ("causal", "seq2seq"):
            raise ConfigError(
                'training.memory = "lean" keeps no logits, which method = "fedkd" compares; take "checkpoint"'
            )
        if config.training.recomputes and self.options.attention:
            raise ConfigError(
                f"{config.training.recomputing} computes layers again without the attention maps that "
                'fedkd.attention compares; take training.memory = "plain", or set fedkd.attention = false'
            )
        self._tutor: Tutor | None = None

    def build(self, labels: tuple[str, ...]) -> Model:
        """Make the student, fully trainable but for frozen embeddings."""
        student = models.load(_tuned(self.config, "full", self.options.student, prune="none"), labels)
        if self.options.student is None:
            keep_layers(student, _chosen(self.options.layers, depth(student)))
            if self.options.width is not None:
                narrow(student, self.options.width)
        if self.options.embeddings != "trained":
            freeze_embeddings(student)
        if self.config.model.prune != "none":  # what becomes of the student's matrices comes first
            models.mask_whole(student.module, _tuned(self.config, "full", None))
        return student

    def try_out(self, model: Model, batch: Batch) -> list[str]:
        """Server: let teacher and student learn from each other, with all terms at their full weight."""
        if not self.options.teacher:
            notes = super().try_out(model, batch)
            self._require_own_places(model, batch)
            return notes
        self._tutor = tutor = self._tutor or self._prepare(model)
        if self.config.tuning.peft != "full":
            require_apart(tutor.model, batch)
        objective = _Objective(self.config, self.options, model, tutor, progress=1.0)
        named = {f"student/{name}": p for name, p in model.trainable().items()}
        named |= {f"teacher/{name}": p for name, p in tutor.model.trainable().items()}
        with undone(model, tutor.model):
            notes = require_gradients(named, lambda: objective(batch))
        for parameter in tutor.projections.parameters():
            parameter.grad = None
        self._require_own_places(model, batch)
        return notes

    def _require_own_places(self, student: Model, batch: Batch) -> None:
        """Save the student and read it back: what a layer is may hang on its place, which has changed."""
        if self.options.student is not None:
            return
        with tempfile.TemporaryDirectory() as folder:
            try:
                require_true(student, save(student, Path(folder)), batch)
            except (RunFailed, Unchecked) as error:
                if isinstance(error, Unchecked) and error.starved:
                    return  # the end of the run says so, if there is no more memory then
                raise ModelError(
                    f"fedkd.layers = {self.options.layers}: layers of {student.config.model.name} are what "
                    "they are by their places, so the student could not be saved; name others, first layer 0"
                ) from error

    def objective(self, model: Model) -> tuple[Callable[[Batch], torch.Tensor], tuple[nn.Module, ...]]:
        """Client: both models' losses, with all terms; beside the student there are teacher and Wh."""
        if not self.options.teacher:
            return super().objective(model)
        tutor = self._pair(model)
        objective = _Objective(self.config, self.options, model, tutor, progress=1.0)
        return objective, (tutor.model.module, tutor.projections)

    def run(self, work: Work) -> Answer:
        """Client: train the student, and the teacher beside it."""
        return self._fit(work, self._summon(work) if self.options.teacher else None)

    def evaluate(self, work: Work) -> Answer:
        """Client: score student and teacher on its held-out texts."""
        answer = super().evaluate(work)
        if not self.options.teacher:
            return answer
        scores = evaluate(self._summon(work).model, work.test, self.config.evaluation.batch_size)
        averaged = work.model.task.averaged(scores)
        metrics = answer.metrics | {f"teacher_{name}": value for name, value in averaged.items()}
        return replace(answer, metrics=metrics)

    def reference_parameters(self, model: Model) -> int:
        """Count the whole teacher: it is what FedAvg would move."""
        self._tutor = self._tutor or self._prepare(model)
        return super().reference_parameters(self._tutor.model)

    def _fit(self, work: Work, tutor: Tutor | None) -> Answer:
        training, student = self.config.training, work.model
        generator = stream(self.config.seed, "batches", work.round, work.node)
        batches: Iterable[Batch] = minibatches(
            work.train, training.batch_size, training.local_steps, generator
        )
        objective = _Objective(self.config, self.options, student, tutor, work.progress)
        optimizer: torch.optim.Optimizer | None = None
        if tutor is not None:
            optimizer = self._optimizer(tutor, work)
            batches = _alternating(batches, optimizer, training.max_grad_norm)
        descend(list(student.trainable().values()), objective, batches, training, work.progress)
        update = {name: after - work.tensors[name] for name, after in student.read().items()}
        local = _remember(tutor, optimizer) if tutor is not None and optimizer is not None else {}
        steps = training.local_steps
        passes = steps * (objective.share + (tutor is not None))
        return Answer(update, len(work.train), objective.means(), local, Passes(passes, passes))

    def _summon(self, work: Work) -> Tutor:
        """Put this client's teacher and Wh into the process's one teacher module."""
        if self._tutor is None:
            self._tutor = self._prepare(work.model)
        values = work.local or self._tutor.first
        with torch.no_grad():
            for name, parameter in self._tutor.parameters().items():
                parameter.copy_(values[name])
        return self._tutor

    def _prepare(self, student: Model) -> Tutor:
        tutor = self._pair(student)
        tutor.first = _values(tutor)
        return tutor

    def _pair(self, student: Model) -> Tutor:
        """Make a teacher and Wh for a student; what a client starts from is left out."""
        teacher = models.load(
            _tuned(self.config, self.config.tuning.peft, None, prune="none"), student.labels
        )
        if self.options.embeddings == "frozen":
            freeze_embeddings(teacher)
        check_pair(teacher, student, attention=self.options.attention)
        layers = depth(student) if self.options.hidden else 0
        projections = Projections(layers, width(teacher), width(student)).to(teacher.device)
        if self.options.width is not None:
            # A narrowed student lives in these coordinates; the identity would compare unlike with unlike.
            for weight in projections.weights:
                weight.data.copy_(principal_directions(teacher, width(student)))
        return Tutor(teacher, projections, {})

    def _optimizer(self, tutor: Tutor, work: Work) -> torch.optim.Optimizer:
        training = self.config.training
        rate = self.options.teacher_learning_rate or training.learning_rate
        rate *= learning_rate(training, work.progress) / training.learning_rate
        parameters = tutor.parameters()
        optimizer = optimizer_of(
            self.options.teacher_optimizer, parameters.values(), rate, training.weight_decay
        )
        for key, value in work.local.items():
            tag, _, rest = key.partition("/")
            if tag == "moment":
                moment, _, name = rest.partition("/")
                parameter = parameters[name]
                optimizer.state[parameter][moment] = value.to(parameter.device, copy=True)
        return optimizer


class _Objective:
    """The loss of one batch from one forward pass of each model; adds up the task losses on the way."""

    def __init__(
        self, config: RunConfig, options: Options, student: Model, tutor: Tutor | None, progress: float
    ) -> None:
        self.student, self.tutor = student, tutor
        self.progress, self.ramp = progress, options.ramp
        self.all_batches = config.rounds * config.training.local_steps
        self.distil = Distillation(
            options.mutual,
            options.hidden,
            options.attention,
            options.temperature,
            options.divergence == "reverse",
            options.literal,
            options.mutual_weight,
            options.hidden_weight,
            options.adaptive,
        )
        self.layers = range(1, depth(student) + 1)
        whole = depth(tutor.model) if tutor is not None else depth(student)
        self.matched = matched_layers(whole, depth(student))
        if options.match == "origin":
            self.matched = tuple(layer + 1 for layer in _chosen(options.layers, whole))
        self.share = depth(student) / whole
        self.totals: dict[str, float] = {}
        self.batches = 0

    def __call__(self, batch: Batch) -> torch.Tensor:
        self.batches += 1
        if self.tutor is None:
            loss = self._look(self.student, batch, (), wanted=False).loss
            self._note(loss=loss)
            return loss
        teacher = self._look(self.tutor.model, batch, self.matched)
        student = self._look(self.student, batch, tuple(self.layers))
        mask = batch.attention_mask.to(self.student.device)
        losses = self.distil(teacher, student, mask, self.tutor.projections, self._share())
        self._note(loss=losses.student, teacher_loss=losses.teacher)
        return losses.total

    def _share(self) -> float:
        if not self.ramp:
            return 1.0
        done = self.progress + (self.batches - 1) / self.all_batches
        return min(1.0, done / self.ramp)

    def means(self) -> dict[str, float]:
        return {name: total / self.batches for name, total in self.totals.items()}

    def _look(self, model: Model, batch: Batch, layers: tuple[int, ...], *, wanted: bool = True) -> View:
        hidden, attention = self.distil.hidden and wanted, self.distil.attention and wanted
        here = batch.to(model.device)
        output: Output = model.forward(here, hidden_states=hidden, attentions=attention)
        assert output.loss is not None
        states, maps = output.hidden_states or (), output.attentions or ()
        return View(
            output.loss,
            model.task.predictions(output.logits, here.labels, here.extra),
            tuple(states[layer] for layer in layers) if hidden else (),
            tuple(maps[layer - 1] for layer in layers) if attention else (),
            model.task.parametrises(batch.labels),
        )

    def _note(self, **losses: torch.Tensor) -> None:
        for name, value in losses.items():
            self.totals[name] = self.totals.get(name, 0.0) + float(value.detach())


def _alternating(
    batches: Iterable[Batch], optimizer: torch.optim.Optimizer, max_grad_norm: float
) -> Iterator[Batch]:
    """Yield batches; once the next is asked for, the last one's backward pass has reached the teacher too."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        yield batch
        if max_grad_norm:
            nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()


def _values(tutor: Tutor) -> Tensors:
    return {n: p.detach().to("cpu", torch.float32, copy=True) for n, p in tutor.parameters().items()}


def _remember(tutor: Tutor, optimizer: torch.optim.Optimizer) -> Tensors:
    """Everything a client keeps: teacher, Wh, and the moments of each under ``moment/KIND/NAME``.

    Moments are not copied: the optimiser has taken its last step.
    """
    local = _values(tutor)
    for name, parameter in tutor.parameters().items():
        for moment, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                local[f"moment/{moment}/{name}"] = value.detach().cpu()
    return local


def _tuned(config: RunConfig, peft: str, name: str | None, **settings: str) -> RunConfig:
    tuning = config.tuning.model_copy(update={"peft": peft})
    model = config.model.model_copy(update=settings | ({} if name is None else {"name": name}))
    return config.model_copy(update={"tuning": tuning, "model": model})


def _chosen(layers: int | tuple[int, ...], available: int) -> tuple[int, ...]:
    if isinstance(layers, tuple):
        return layers
    return tuple(layer - 1 for layer in matched_layers(available, layers))
