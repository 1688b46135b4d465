"""The configuration of a run: one frozen, validated tree.

This is the only reader of TOML files, of the command line's ``--set`` and of Flower's ``run_config``.
It imports neither torch nor anything above it: a method's own options arrive as a pydantic model
that the caller looks up (see :func:`resolve`).
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedllm.errors import ConfigError

__all__ = [
    "CodecConfig",
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "PrivacyConfig",
    "RunConfig",
    "Section",
    "ServerConfig",
    "TrainingConfig",
    "TuningConfig",
    "parse_override",
    "read_toml",
    "resolve",
]


class Section(BaseModel):
    """A frozen part of the configuration that refuses unknown keys and silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelConfig(Section):
    """The base model."""

    name: str = "minilm"
    """Bundled short name (``minilm``, ``smollm2``), hub name, local folder or GGUF file."""
    task: Literal["classification", "causal"] = "classification"
    """Sequence classification on an encoder, or next-token prediction on a causal model."""
    pooling: Literal["mean", "cls", "own"] = "mean"
    """How an encoder's tokens become one vector; ``own`` takes the model's own classification head."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the frozen part; trained tensors stay float32."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """Keep the frozen part's matrices in eight or four bits (QLoRA), through bitsandbytes."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout probability everywhere in the base model while training."""


class DataConfig(Section):
    """The text, how it is split and who holds which part."""

    name: str = "bbcnews"
    """Bundled short name or hub name; ``path`` replaces it."""
    path: str | None = None
    """Local jsonl, csv or parquet file, folder of such files, or folder of class folders."""
    text: str = "text"
    """Column that holds the text."""
    label: str | None = "label"
    """Column that holds the class, "" for none; a causal model uses it only for the partition."""
    classes: tuple[str, ...] = ()
    """Class names in the order of the model's outputs; empty takes those that the texts have, sorted."""
    max_length: int = Field(default=64, ge=1)
    """Tokens kept of each text."""
    test_fraction: float = Field(default=0.2, gt=0.0, lt=1.0)
    """Share held out on the server, stratified by class."""
    client_test_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of each client's own part held out for evaluation on that client."""
    partition: Literal["iid", "dirichlet", "pathological", "natural", "file"] = "iid"
    """``natural`` groups by the column ``by``; ``file`` gives each file to one client."""
    alpha: float = Field(default=0.5, gt=0.0)
    """Dirichlet concentration: smaller is more skewed."""
    classes_per_client: int = Field(default=2, ge=1)
    """Classes that each client holds under ``pathological``."""
    part: tuple[int, int] | None = None
    """(k, n): the only client holds what client k of n would hold; the baseline without a federation."""
    by: str | None = None
    """Identity column of the ``natural`` partition."""

    @field_validator("label")
    @classmethod
    def _no_label(cls, label: str | None) -> str | None:
        return label or None


class TuningConfig(Section):
    """Which parameters are trained."""

    peft: str = "lora"
    """A peft method by name (``lora``, ``dora``, ``ia3``, ``vera``, ``prompt``, ...) or ``full``."""
    rank: int = Field(default=8, ge=1)
    """Rank of LoRA-like adapters."""
    alpha: float = Field(default=16.0, gt=0.0)
    """LoRA scale: updates are multiplied by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Module names that carry adapters; empty takes peft's own choice for the architecture."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further options of the peft method, by peft's own names."""


class TrainingConfig(Section):
    """What a client does with its data in one round."""

    local_steps: int = Field(default=8, ge=1)
    """Optimiser steps per round."""
    batch_size: int = Field(default=16, ge=1)
    """Texts per step."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Local optimiser; its moments start anew every round."""
    learning_rate: float = Field(default=1e-3, gt=0.0)
    """Local learning rate at the first round."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the local learning rate falls from the first round to the last."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(default=0.0, ge=0.0)
    """Gradient norm above which a step is scaled down; 0 leaves gradients alone."""
    proximal: float = Field(default=0.0, ge=0.0)
    """FedProx coefficient mu: adds mu/2 ||w - w_round||^2 to the loss."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""


class CodecConfig(Section):
    """How updates are compressed: ``"none"`` or a chain such as ``"quantize(bits=8) | entropy"``."""

    up: str = "none"
    """Client to server."""
    down: str = "none"
    """Server to client."""


class ServerConfig(Section):
    """How the server picks clients and combines their updates."""

    sample: int | None = Field(default=None, ge=1)
    """Clients per round; unset takes all."""
    over_select: int = Field(default=0, ge=0)
    """Further clients asked; the round closes once ``sample`` of them have answered."""
    quorum: int | None = Field(default=None, ge=1)
    """Accepted replies without which a round does not count; unset means half of ``sample``, rounded up."""
    deadline_s: float = Field(default=600.0, gt=0.0)
    """Seconds after which an exchange closes with what has arrived."""
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
    max_update_norm: float | None = Field(default=None, gt=0.0)
    """L2 norm above which a client's update is rejected."""


class EvaluationConfig(Section):
    """When quality is measured, and on what."""

    every: int = Field(default=1, ge=0)
    """Rounds between evaluations on the server's test set; 0 never evaluates."""
    clients: bool = False
    """Also evaluate on each sampled client's held-out part."""
    batch_size: int = Field(default=64, ge=1)
    """Texts per evaluation batch."""


class PrivacyConfig(Section):
    """What bounds a single client's influence."""

    clip: float | None = Field(default=None, gt=0.0)
    """L2 norm to which each client scales its update down before encoding."""


class RunConfig(Section):
    """Everything that decides a run's numbers."""

    name: str = "run"
    seed: int = Field(default=0, ge=0)
    clients: int = Field(default=10, ge=1)
    rounds: int = Field(default=10, ge=1)
    method: str = "lora"
    """A file of ``strategies/``: ``fedavg``, ``lora``, ``fwdllm``, ``fedkd``."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    tuning: TuningConfig = TuningConfig()
    training: TrainingConfig = TrainingConfig()
    codec: CodecConfig = CodecConfig()
    server: ServerConfig = ServerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    options: dict[str, Any] = Field(default_factory=dict)
    """The method's own options; in TOML they stand in a section named after the method."""

    @property
    def cohort(self) -> int:
        """Clients whose replies a round waits for."""
        return self.server.sample or self.clients

    @property
    def quorum(self) -> int:
        """Accepted replies without which a round does not count."""
        return self.server.quorum or (self.cohort + 1) // 2

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        def require(condition: bool, message: str) -> None:
            if not condition:
                raise ValueError(message)

        server, data = self.server, self.data
        require(
            self.cohort <= self.clients,
            f"server.sample = {server.sample} asks for more clients than clients = {self.clients}",
        )
        require(
            self.cohort + server.over_select <= self.clients,
            f"server.over_select = {server.over_select} and server.sample = {self.cohort} "
            f"together exceed clients = {self.clients}",
        )
        require(
            self.quorum <= self.cohort,
            f"server.quorum = {server.quorum} can never be reached with {self.cohort} clients per round",
        )
        require(
            data.part is None or (self.clients == 1 and 0 <= data.part[0] < data.part[1]),
            f"data.part = {data.part} needs clients = 1 and a client k from 0 to n - 1",
        )
        require(
            data.partition != "natural" or data.by is not None,
            'data.partition = "natural" needs data.by, the column that names who a text belongs to',
        )
        require(
            data.partition != "file" or data.path is not None,
            'data.partition = "file" needs data.path, a folder with one file per client',
        )
        require(
            self.model.task == "causal" or data.label is not None,
            'model.task = "classification" needs data.label, the column that holds the class',
        )
        require(
            not self.evaluation.clients or data.client_test_fraction > 0,
            "evaluation.clients = true needs data.client_test_fraction above 0",
        )
        return self

    def to_document(self) -> dict[str, Any]:
        """Return the tree as TOML lays it out, unset values left out."""
        document = self.model_dump(mode="json", exclude_none=True)
        document["data"].setdefault("label", "")  # TOML has no null
        document[self.method] = document.pop("options")
        return document

    def to_toml(self) -> str:
        """Return the resolved configuration; reading it back gives an equal one."""
        return tomli_w.dumps(self.to_document())

    def to_json(self) -> str:
        """Return the configuration as the one string that Flower's ``run_config`` carries."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what :meth:`to_json` wrote; the options were already validated by the sender."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ConfigError(_explain(error, cls)) from error


def read_toml(path: Path) -> dict[str, Any]:
    """Read one TOML file; a syntax error names the file and the place."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def parse_override(text: str) -> tuple[list[str], Any]:
    """Split ``a.b=value``; the value is read as TOML, and as plain text where that fails.

    >>> parse_override("training.learning_rate=1e-3")
    (['training', 'learning_rate'], 0.001)
    >>> parse_override("codec.up=quantize(bits=8)")
    (['codec', 'up'], 'quantize(bits=8)')
    """
    key, separator, value = text.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not separator or not all(path):
        raise ConfigError(f"--set takes key=value, as in training.local_steps=4; got {text!r}")
    try:
        return path, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return path, value.strip()


def resolve(
    document: Mapping[str, Any],
    overrides: Iterable[str],
    *,
    methods: Iterable[str],
    options: Callable[[str], type[BaseModel]],
) -> RunConfig:
    """Merge a document with ``--set`` overrides and validate the whole.

    Args:
        document: parsed TOML.
        overrides: ``a.b=value`` strings; later ones win.
        methods: names of the known methods; sections of those not chosen are dropped.
        options: returns the options model of a method.

    Raises:
        ConfigError: names the key, what was given and what is allowed.
    """
    tree: dict[str, Any] = json.loads(json.dumps(document, default=str))
    for override in overrides:
        path, value = parse_override(override)
        branch = tree
        for part in path[:-1]:
            branch = branch.setdefault(part, {})
            if not isinstance(branch, dict):
                raise ConfigError(f"--set {override}: {part} is a value, not a section")
        branch[path[-1]] = value
    if tree.get("data", {}).get("path") is not None and isinstance(tree["data"], dict):
        tree["data"].pop("name", None)
    known = sorted(methods)
    method = tree.get("method", RunConfig.model_fields["method"].default)
    if method not in known:
        raise ConfigError(f"method = {method!r} is unknown{_suggest(str(method), known)}")
    chosen = tree.pop(method, {})
    for other in known:
        tree.pop(other, None)
    if "options" in tree:
        raise ConfigError(f"unknown key options: options of {method} belong in section [{method}]")
    schema = options(method)
    try:
        tree["options"] = schema.model_validate(chosen).model_dump(mode="json", exclude_none=True)
    except ValidationError as error:
        raise ConfigError(_explain(error, schema, prefix=(method,))) from error
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, RunConfig)) from error


def _suggest(given: str, valid: Iterable[str]) -> str:
    names = sorted(valid)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; valid are {', '.join(names)}"


def _explain(error: ValidationError, schema: type[BaseModel], prefix: tuple[str, ...] = ()) -> str:
    """Say in one sentence what pydantic found first: the key, what was given, what is allowed."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join((*prefix, *location))
    if first["type"] == "extra_forbidden":
        for part in location[:-1]:
            annotation = schema.model_fields[part].annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                schema = annotation
        return f"unknown key {key}{_suggest(location[-1], schema.model_fields)}"
    if first["type"] == "value_error":
        reason = str(first["ctx"]["error"])
        return f"{key}: {reason}" if location else reason
    return f"{key} = {first['input']!r} is not allowed: {first['msg'][0].lower()}{first['msg'][1:]}"
