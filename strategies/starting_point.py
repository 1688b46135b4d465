"""A run over one's own texts gets the settings that nobody gave it: looks at texts and model, and chooses.

:mod:`fedllm.data.starting_point` holds the rules. Here they meet the texts, the model's tokenizer and the
method, which says whether its clients take gradient steps at all.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from fedllm import tasks
from fedllm.config import DataConfig, Override, RunConfig, read_override
from fedllm.data import corpus as data
from fedllm.data.bundled import CORPORA
from fedllm.data.corpus import Corpus
from fedllm.data.partition import Indices
from fedllm.data.starting_point import (
    LONGEST,
    Base,
    Choice,
    Texts,
    balanced,
    choose,
    limits,
    unset,
    with_choices,
)
from fedllm.errors import ConfigError
from fedllm.host.accelerator import chosen_device, computes_bfloat16
from strategies.registry import method_options

__all__ = ["StartingPoint", "is_own", "usual_source"]

Say = Callable[[str], None]

_WEIGHTS = "training.class_weights"

SAMPLE = 2000
"""Texts that are tokenised to see how long texts are."""
PATIENCE_S = 2.0
"""Seconds after which somebody who waits is told what for."""


def is_own(config: DataConfig) -> bool:
    """Whether texts are somebody's own: the settings of presets were found for the bundled ones.

    >>> is_own(DataConfig(path="tickets.jsonl")), is_own(DataConfig())
    (True, False)
    """
    return config.path is not None or config.name not in CORPORA


def usual_source(overrides: Iterable[Override]) -> str:
    """Return the preset that a run begins from where none is named.

    >>> usual_source(["data.path=tickets.jsonl"]), usual_source(["rounds=4"])
    ('own', 'quickstart')
    """
    for _, (section, *keys), value in map(read_override, overrides):
        told = value if not keys and isinstance(value, dict) else {".".join(keys): value}
        if section == "data" and (told.get("path") or told.get("name", "bbcnews") not in CORPORA):
            return "own"
    return "quickstart"


class StartingPoint:
    """Gives runs over one's own texts what nobody set, and says what and why.

    Args:
        say: takes a sentence for whoever starts the runs; none twice, as runs of a sweep mostly begin alike.
        deployed: the texts are the server's own, and stand for those that each device has.
    """

    def __init__(self, say: Say, *, deployed: bool = False) -> None:
        self._say, self._deployed = say, deployed
        self._said: set[str] = set()
        self._seen: dict[str, _Seen] = {}

    def __call__(self, config: RunConfig) -> RunConfig:
        """Return a run with everything chosen that it was not given.

        One of which everything was given, or whose texts are bundled, is returned as it is; but for balanced
        weights of classes, which become numbers, so that all clients use the same, and for a precision that
        is left to the processor, which is named.

        Raises:
            DataError: the texts cannot be read, or not be shared out as asked.
            ModelError: the model cannot be found or read.
        """
        config = self._precise(config)
        keys, balance = _keys(config), config.training.class_weights == "balanced"
        if not keys and not balance:
            return config
        if config.privacy.hides and not self._deployed:
            raise ConfigError(
                "differential privacy does not cover settings that are chosen by a look at clients' texts: "
                f"give {', '.join(sorted(keys))}"
            )
        with _told_if_long(self._say):
            corpus, lengths, base = self._look(config)
            texts = _texts(config, corpus, lengths, self._deployed)
            choices = choose(config, texts, base, keys=keys, deployed=self._deployed)
            if balance:
                choices.append(Choice(_WEIGHTS, balanced(texts.classes), "balanced, as asked"))
            chosen = _named(with_choices(config, choices), corpus)
            table = None if self._deployed or corpus.labels is None else _table(chosen, corpus)
        self._tell(_sentences(config, corpus, choices, self._deployed))
        if is_own(config.data):
            descends = method_options(config.method).descends
            found = limits(chosen, texts, table, descends=descends)
            self._tell([f"holds it back: {sentence}" for sentence in found])
        return chosen

    def _precise(self, config: RunConfig) -> RunConfig:
        """Name the precision of the frozen part that ``model.dtype = "auto"`` leaves open."""
        if config.model.dtype != "auto":
            return config
        dtype, why = _precision(config, self._deployed)
        self._tell([f'model.dtype = "{dtype}": {why}'])
        return config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})

    def _look(self, config: RunConfig) -> _Seen:
        key = config.data.model_dump_json() + config.model.model_dump_json()
        if key not in self._seen:
            self._seen = {key: _look(config)}  # the texts of one file at a time
        return self._seen[key]

    def _tell(self, sentences: list[str]) -> None:
        for sentence in sentences:
            if sentence not in self._said:
                self._said.add(sentence)
                self._say(sentence)


def _precision(config: RunConfig, deployed: bool) -> tuple[str, str]:
    """Return the precision of the frozen part where it is left open, and why."""
    if config.tuning.peft == "full":
        return "float32", 'tuning.peft = "full" leaves nothing frozen'
    options = method_options(config.method)
    if options.slopes:
        return "float32", f'method = "{config.method}" measures slopes, which bfloat16 would round'
    if not options.descends:
        return "float32", f'method = "{config.method}" does not say that its clients train by gradient'
    if deployed:
        return "float32", "the devices' processors are not known here"
    if computes_bfloat16(chosen_device()):
        return "bfloat16", "computed natively here"
    return "float32", "torch knows of no arithmetic for bfloat16 here"


def _keys(config: RunConfig) -> frozenset[str]:
    """Return what is to be chosen."""
    if not is_own(config.data):
        return frozenset()
    keys = unset(config)
    if not method_options(config.method).descends:
        keys &= {"data.max_length", _WEIGHTS}
    return keys if tasks.of(config).weighs else keys - {_WEIGHTS}


def _named(config: RunConfig, corpus: Corpus) -> RunConfig:
    """Fix the classes' order, which is that of their weights."""
    if config.training.class_weights == "none" or config.data.classes:
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"classes": corpus.label_names})})


class _Seen(NamedTuple):
    """All texts, how many tokens each of a sample has, and the model's outline."""

    corpus: Corpus
    lengths: tuple[int, ...]
    base: Base


def _look(config: RunConfig) -> _Seen:
    from fedllm.models.base.outline import outline

    with _silent():
        task = tasks.of(config)
        corpus = data.load(config.data, task, config.data.classes or None)
        tokenizer, base = outline(config)
        some = np.unique(np.linspace(0, len(corpus) - 1, min(SAMPLE, len(corpus))).astype(np.int64))
        tokens = task.encode(corpus.subset(some), tokenizer, 2 * LONGEST)
    # A run that leaves long texts out may have no others.
    return _Seen(corpus, tuple(tokens.lengths.tolist()) or (2 * LONGEST,), base)


def _texts(config: RunConfig, corpus: Corpus, lengths: tuple[int, ...], deployed: bool) -> Texts:
    """Count what the clients train on, before anything is drawn: the seed changes nothing."""
    where = config.data
    count = len(corpus) * config.clients if deployed else len(corpus)
    if where.test_path is None and not deployed:
        count -= round(where.test_fraction * count)
    count -= round(where.client_test_fraction * count)
    return Texts(max(1, count), lengths, _classes(corpus))


def _classes(corpus: Corpus) -> dict[str, int]:
    if corpus.labels is None:
        return {}
    counts = np.bincount(corpus.labels, minlength=len(corpus.label_names))
    return dict(zip(corpus.label_names, counts.tolist(), strict=True))


def _table(config: RunConfig, corpus: Corpus) -> Indices:
    """Return the texts of each simulated client by class, as the run is going to share them out."""
    with _silent():  # the run says it
        train = corpus
        if config.data.test_path is None:
            train, _ = data.split(corpus, config.data.test_fraction, config.seed)
        return data.partition_table(train, data.partition(train, config.data, config.clients, config.seed))


def _sentences(config: RunConfig, corpus: Corpus, choices: list[Choice], deployed: bool) -> list[str]:
    where = config.data.path or config.data.name
    source = f"{len(corpus)} texts of {where}"
    if deployed:
        source = f"server's {source}, taking each of {config.clients} devices to hold as many"
    lines = [f"  {choice.key} = {_written(choice.value)}: {choice.reason}" for choice in choices]
    return [f"chosen from the {source} (--set changes it):", *lines] if lines else []


def _written(value: object) -> str:
    """Write a value as ``--set`` takes it."""
    return json.dumps(value) if isinstance(value, str | tuple) else f"{value:g}"


@contextmanager
def _silent() -> Iterator[None]:
    """Leave unsaid what is remarkable of the texts: it is said once, when the run reads them."""
    logger = logging.getLogger("fedllm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _told_if_long(say: Say) -> Iterator[None]:
    """Tell somebody who waits what for."""
    timer = threading.Timer(PATIENCE_S, say, ["looking at the texts, to choose what was not set ..."])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
