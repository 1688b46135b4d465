"""The Python API: what the command line does, for programs and notebooks. ``import fedllm`` offers it.

Errors are those of :mod:`fedllm.errors`, in the same sentences. Nothing ends the process or changes what
belongs to all of it: loggers, warnings, threads, environment and signals are afterwards as they were.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from fedllm.config import RunConfig
from fedllm.errors import refused_by_the_system
from fedllm.extras import require
from fedllm.runs.reader import Run as Stored
from fedllm.runs.records import FILE
from fedllm.runs.summary import round_line
from simulations import running
from simulations.experiment import free_folder
from simulations.given import Given
from simulations.results.options import Format, Which
from simulations.running import Host, undisturbed
from simulations.sources import Source, chosen, name_of, resolved
from strategies.starting_point import StartingPoint

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Run", "load_config", "open_run", "simulate"]


def simulate(
    source: Source | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    data: Any = None,
    clients: Any = None,
    model: Any = None,
    out: str | Path | None = None,
    engine: str = "loopback",
    workers: int | None = None,
    threads: int | None = None,
    device: str | None = None,
    overwrite: bool = False,
    report: bool = True,
    track: Sequence[str] = (),
    progress: bool = True,
    **sections: Any,
) -> Run:
    """Run a federation with all its clients on this host, and return it when it is finished.

    Args:
        source: a preset, a TOML file or a configuration; unset is ``quickstart``, and ``own`` over texts of
            one's own. What none of these gives of length, steps and rates is chosen from such texts.
        settings: what differs from it, by key: ``{"training.local_steps": 4}``.
        data: a path, settings of ``[data]``, or the texts themselves: a list of dicts, a pandas frame or a
            ``datasets.Dataset``. With settings the texts are ``rows``, and ``test_rows`` a test set of its
            own: ``{"rows": frame, "text": "body", "label": "queue"}``.
        clients: how many there are, or the texts of each: ``[dataset0, dataset1]``.
        model: a name, settings of ``[model]``, a transformers model, or a function that returns one. With
            settings it is ``object``, and ``tokenizer`` its tokenizer.
        out: the run folder; default ``runs/NAME``, with a number where that is taken. What comes from memory
            is written there too (``given/``), so that the run can be resumed.
        engine: ``loopback`` (in this process) or ``flower`` (Ray).
        workers: processes that answer for the clients; default 1, on Ray one per core.
        threads: torch threads of each client, on which a run's last bits depend; default a worker's share.
        device: where models compute: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        overwrite: replace the run that lies in ``out``.
        report: write ``report.html`` and plots at the end.
        track: also log to ``tensorboard`` or ``mlflow``.
        progress: show what happens on standard error, or in the notebook.
        sections: further settings: ``rounds=4``, ``seed=1``, ``training={"local_steps": 4}``.

    Raises:
        FedllmError: in one sentence what was wrong, where, and what would be right.
        KeyboardInterrupt: somebody pressed Ctrl-C; ``fedllm.open_run(out).resume()`` goes on.
    """
    host = Host(engine, workers, threads)
    running.require_packages(host, report=report)
    given = Given.of(data, clients, model)
    source = chosen(source, settings or {}, sections, given.settings)
    config = resolved(source, settings or {}, sections, given.settings)
    folder = Path(out) if out is not None else free_folder(Path("runs") / config.name)
    console = _console(progress)
    with _explained(), undisturbed(device), given.laid_out(config, folder, overwrite) as config:
        choose = StartingPoint(console.print if console is not None else lambda sentence: None)
        config = choose(config)
        running.free(folder, config, overwrite)
        if console is not None:
            running.announce([(name_of(source), config)], folder, console)
        with _resumable(folder):
            running.run(config, folder, host, console, track=track)
        running.require_finished([folder])
        if report:
            _report(folder, console)
    return Run(folder)


def load_config(source: Source | None = None, settings: Mapping[str, Any] | None = None) -> RunConfig:
    """Return the configuration of a preset or a TOML file, with some settings changed.

    Args:
        source: a preset, a TOML file or a configuration; unset as for :func:`simulate`, which chooses what
            is not given over texts of one's own.
        settings: values by key, or those of a section by its name.

    Raises:
        ConfigError: names the key, what was given and what is allowed.

    >>> load_config("quickstart", {"training.local_steps": 4, "codec": {"up": "quantize(bits=8)"}}).codec.up
    'quantize(bits=8)'
    """
    return resolved(chosen(source, settings or {}), settings or {})


def open_run(folder: str | Path) -> Run:
    """Return the run in a folder, finished or not.

    Raises:
        StoreError: there is no run.
    """
    return Run(folder)


class Run:
    """A run and what came of it. Everything is read from its folder when it is asked for.

    Attributes:
        folder: where it lies.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._stored = Stored(self.folder)

    @property
    def config(self) -> RunConfig:
        """What was run."""
        return self._stored.config

    @property
    def status(self) -> str:
        """``running``, ``finished``, ``failed``, ``stopped``, or ``interrupted`` (killed)."""
        return self._stored.status

    @property
    def summary(self) -> dict[str, Any]:
        """``summary.json``: metrics, bytes, seconds, memory and what else the report tells."""
        return self._stored.summary

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the model's outputs; empty where there are none."""
        return tuple(self._stored.partition.get("label_names", ()))

    @property
    def metrics(self) -> dict[str, float]:
        """What the last round came to on the server's test set, such as ``accuracy`` and ``loss``."""
        return {name: value for name, value in self.summary["metrics"].items() if value is not None}

    @property
    def best(self) -> dict[str, Any]:
        """The best round: its ``round``, the ``metric`` that decides, and its ``value``."""
        found = self._stored.best
        return {"round": found and found.round, "metric": self.config.metric, "value": found and found.value}

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """A record of each round, as in ``rounds.jsonl``; round 0 is the starting point."""
        return [round_line(record) for record in self._stored.rounds()]

    def to_pandas(self) -> Any:
        """Return the rounds as a pandas frame, one row each.

        Raises:
            ConfigError: pandas is not installed.
        """
        require("pandas", "run.to_pandas()")
        import pandas  # type: ignore[import-untyped]  # ships no stubs

        return pandas.DataFrame(self.rounds).set_index("round")

    def predict(
        self, texts: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]], round: Which = None
    ) -> list[dict[str, Any]]:
        """Answer as the run's task does: ``label`` and ``probabilities``, a ``continuation``, ...

        Args:
            texts: one, or several; rows with the run's own columns where its task takes more than a text.
            round: the model after this round, or after the ``"best"``; unset takes the last.

        Raises:
            DataError: no text is left, or one cannot be tokenised.
            StoreError: there is no checkpoint yet, or the base model is another one now.
        """
        from simulations.results.predict import predict

        with _explained(), undisturbed():
            return predict(self.folder, [texts] if isinstance(texts, str | Mapping) else [*texts], round)

    def generate(
        self,
        prompts: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
        *,
        base: bool = False,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        round: Which = None,
    ) -> list[dict[str, Any]]:
        """Let a run's model write: for each prompt a record of ``prompt`` and ``answer``.

        Args:
            prompts: one, or several, answered many at a time; rows with the run's own columns where more
                than a text is asked, such as a system message.
            base: also tell what the untuned base model says, as ``base``.
            max_new_tokens: of an answer, at most; default 200.
            temperature: 0 takes the likeliest token, always; 1 draws as the model believes.
            top_p: draw among the likeliest tokens of this probability together.
            seed: of the draws; each prompt has its own, by its place.
            round: as for :meth:`predict`.

        Raises:
            ConfigError: the run's task writes no text, or an option is out of range.
            DataError: a prompt is blank, or cannot be tokenised.
            StoreError: there is no checkpoint yet, or the base model is another one now.
        """
        from fedllm.models.generation import Sampling
        from simulations.results.talk import NEW_TOKENS, generate

        asked = [prompts] if isinstance(prompts, str | Mapping) else [*prompts]
        new_tokens = NEW_TOKENS if max_new_tokens is None else max_new_tokens
        with _explained(), undisturbed():
            sampling = Sampling(temperature, top_p, seed)
            return generate(self.folder, asked, new_tokens, sampling, round, base=base)

    def evaluate(self, on: str | Path | None = None, round: Which = None) -> dict[str, float]:
        """Score the tuned model; return the task's metrics by name.

        Warns where texts are scored that the run shares out for training.

        Args:
            on: another run's folder, whose test set is taken, or a data file with the run's columns; by
                default the run's own test set.
            round: as for :meth:`predict`.

        Raises:
            ConfigError: the other run has another task, or other classes.
            DataError: the file cannot be read, or holds nothing to score.
            StoreError: there is no checkpoint yet, or the base model is another one now.
        """
        from simulations.results.scoring import evaluate

        with _explained(), undisturbed():
            found = evaluate(self.folder, None if on is None else Path(on), round)
        if found.trained_on:
            warnings.warn(
                f"{found.trained_on} of {found.texts} texts stand among those that the run shares out for "
                "training",
                stacklevel=2,
            )
        return found.metrics

    def model(self, round: Which = None) -> Any:
        """Return the tuned model, ready to use: transformers' own, in a peft adapter where one was trained.

        It takes what :meth:`tokenizer` returns. An encoder under a pooling comes as a torch module with the
        trained head, which takes ``input_ids`` and ``attention_mask`` and returns ``logits``.

        Args:
            round: as for :meth:`predict`.

        Raises:
            StoreError: there is no checkpoint yet, or the base model is another one now.
        """
        from simulations.results.predict import plain_model

        with _explained(), undisturbed():
            return plain_model(self.folder, round)

    def tokenizer(self) -> Any:
        """Return the tokenizer that the model was trained with."""
        from simulations.results.predict import tokenizer

        with _explained(), undisturbed():
            return tokenizer(self.folder)

    def export(
        self,
        out: str | Path,
        round: Which = None,
        *,
        format: Format | None = None,
    ) -> Path:
        """Write the result for other programs into a new folder; return where: ``adapter/``, ``model/``, ...

        Args:
            out: the folder.
            round: as for :meth:`predict`.
            format: ``merged``: a plain transformers model, the adapter in its weights; ``onnx``: a graph for
                ONNX Runtime; ``int8``, ``int4``: that quantised; ``gguf``, ``gguf-q8_0``,
                ``gguf-q4_k``: a file for llama.cpp in float16, in eight bits, in about five. Unset: what the
                run trained, an adapter or a model.
        """
        from simulations.results.predict import export
        from simulations.results.shipping.ship import ship

        with _explained(), undisturbed():
            if format is None:
                return export(self.folder, Path(out), round)
            return ship(self.folder, Path(out), format, round)[0]

    def report(self) -> Path:
        """Write ``report.html`` and the plots anew; return where."""
        from simulations.results.report import write

        with _explained(), undisturbed():
            return write(self.folder)

    def resume(
        self,
        *,
        rounds: int | str | None = None,
        engine: str = "loopback",
        workers: int | None = None,
        threads: int | None = None,
        device: str | None = None,
        report: bool = True,
        progress: bool = True,
    ) -> Self:
        """Continue after a stop, a crash or a kill, or after the end: as if it had never stopped.

        Args:
            rounds: of a finished run that is to go on: ``20`` in all, or ``"+5"`` more.
            engine: this and what follows as for :func:`simulate`.
            workers: processes that answer for the clients.
            threads: torch threads of each client; the same bits need the same number.
            device: where models compute.
            report: write the report again.
            progress: show what happens.

        Raises:
            FedllmError: it cannot go on, or what ended it.
            KeyboardInterrupt: somebody pressed Ctrl-C; it can be resumed again.
        """
        host, console = Host(engine, workers, threads), _console(progress)
        total = None if rounds is None else str(rounds)
        with _explained(), undisturbed(device), _resumable(self.folder):
            went_on = running.go_on(self.folder, host, console, total, report=report)
            running.require_finished([self.folder])
            if went_on and report:
                _report(self.folder, console)
        return self

    def extend(self, rounds: int, **options: Any) -> Self:
        """Go on after the end, by so many rounds more; takes the options of :meth:`resume`.

        Raises:
            FedllmError: the run is not finished, cannot go on, or what ended it.
        """
        return self.resume(rounds=f"+{rounds}", **options)

    def __repr__(self) -> str:
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        return f"<Run {str(self.folder)!r}: {self.status}; {metrics or 'not evaluated'}>"


def _console(progress: bool) -> Console | None:
    from fedllm.terminal.console import console

    return console if progress else None


def _report(folder: Path, console: Console | None) -> None:
    from simulations.results.report import write

    place = write(folder)
    if console is not None:
        console.print(f"report: {place}")


@contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """Say how to go on with a run that Ctrl-C ended, below the traceback."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if (folder / FILE).is_file():
            interrupt.add_note(f"go on with: fedllm.open_run({str(folder)!r}).resume()")
        raise


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if (refusal := refused_by_the_system(error)) is None:
            raise
        raise refusal from error
