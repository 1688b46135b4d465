"""The whole tree, and what its sections must agree on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import tomli_w
from pydantic import Field, ValidationError, field_validator, model_validator

from fedllm.config.attack import AttackConfig
from fedllm.config.data import DataConfig
from fedllm.config.evaluation import CheckpointConfig, EvaluationConfig
from fedllm.config.exchange import CodecConfig, PrivacyConfig
from fedllm.config.mistakes import explain
from fedllm.config.model import ModelConfig, TuningConfig
from fedllm.config.names import require_name
from fedllm.config.server import ServerConfig
from fedllm.config.training import TrainingConfig
from fedllm.devices import SimulationConfig
from fedllm.errors import ConfigError
from fedllm.measures import deciding
from fedllm.section import Section


class RunConfig(Section):
    """Everything that decides a run's numbers."""

    name: str = "run"
    """Of the run and of its folder: letters, digits and . _ = -."""
    seed: int = Field(default=0, ge=0)
    """Decides the split, the initial values and every draw: the same seed gives the same numbers."""
    clients: int = Field(default=10, ge=1)
    """Clients that hold a part of the texts each."""
    rounds: int = Field(default=10, ge=1)
    """Rounds that are committed before the run is finished, unless ``evaluation.patience`` ends it before."""
    method: str = "lora"
    """``lora``, ``fedavg``, ``fwdllm``, ``fedkd``, another folder of strategies/, or what a plug-in adds."""
    plugins: tuple[str, ...] = ()
    """Modules or .py files that add methods or codec stages; installed plug-ins need not be named."""
    init_from: str | None = None
    """Folder of an earlier run, of the same method and model, whose result this one begins from."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    tuning: TuningConfig = TuningConfig()
    training: TrainingConfig = TrainingConfig()
    codec: CodecConfig = CodecConfig()
    server: ServerConfig = ServerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    simulation: SimulationConfig = SimulationConfig()
    attack: AttackConfig = AttackConfig()
    options: dict[str, Any] = Field(default_factory=dict)
    """The method's own options; in TOML they stand in a section named after the method."""

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        try:
            return require_name(name)
        except ConfigError as error:
            raise ValueError(str(error)) from error

    @property
    def cohort(self) -> int:
        """Clients that are asked at once; in mode ``async``, that are at work at once."""
        return self.server.concurrency or self.server.sample or self.clients

    @property
    def quorum(self) -> int:
        """Accepted replies without which a round does not count; in mode ``async`` they are all there are."""
        return self.server.buffer or self.server.quorum or (self.cohort + 1) // 2

    @property
    def buffered(self) -> bool:
        """Whether rounds are asynchronous."""
        return self.server.mode == "async"

    @property
    def answers(self) -> int:
        """Clients whose updates make a round."""
        return self.quorum if self.buffered else self.cohort

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        def require(condition: bool, message: str) -> None:
            if not condition:
                raise ValueError(message)

        server, data = self.server, self.data
        require(
            self.cohort <= self.clients,
            f"server.{'concurrency' if server.concurrency else 'sample'} = {self.cohort} asks for more "
            f"clients than clients = {self.clients}",
        )
        require(
            self.cohort + server.over_select <= self.clients,
            f"server.over_select = {server.over_select} and server.sample = {self.cohort} "
            f"together exceed clients = {self.clients}",
        )
        self._require_mode()
        self._require_robust()
        self._require_attack()
        self._require_secure()
        self._require_private()
        require(
            self.quorum <= self.cohort or self.buffered,
            f"server.quorum = {server.quorum} can never be reached with {self.cohort} clients per round",
        )
        require(
            not server.weight_ratio or server.weight_ratio >= 1,
            f"server.weight_ratio = {server.weight_ratio} would count most clients for less than they "
            "have; use 0 for no bound, or at least 1",
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
        self._require_measured()
        require(
            self.evaluation.patience == 0 or self.evaluation.every > 0,
            f"evaluation.patience = {self.evaluation.patience} counts evaluations, and evaluation.every = 0 "
            "makes none: evaluate every so many rounds, or leave the patience out",
        )
        require(
            not self.evaluation.clients or data.client_test_fraction > 0,
            "evaluation.clients = true needs data.client_test_fraction above 0",
        )
        return self

    @property
    def metric(self) -> str:
        """The metric that decides which round is the best, and is shown first."""
        return self.evaluation.metric or deciding(self.model.task)

    def _require_mode(self) -> None:
        """Refuse what means nothing in the mode that rounds are in."""
        server = self.server
        if not self.buffered:
            for key in ("concurrency", "buffer", "staleness", "staleness_exponent", "max_staleness"):
                if getattr(server, key) != type(server).model_fields[key].default:
                    raise ValueError(f'server.{key} is for server.mode = "async": set that, or leave it out')
            return
        if server.over_select or server.quorum is not None:
            key = "over_select" if server.over_select else "quorum"
            raise ValueError(
                f'server.{key} is for server.mode = "sync": in mode "async" server.concurrency says how many '
                "clients are at work and server.buffer how many answers make a round; leave it out"
            )
        if server.sample and server.concurrency and server.sample != server.concurrency:
            raise ValueError(
                f"server.sample = {server.sample} and server.concurrency = {server.concurrency} both say how "
                "many clients are at work at once: leave one of them out, or give both the same value"
            )
        if self.quorum > self.clients:
            raise ValueError(
                f"server.buffer = {server.buffer} waits for as many different clients in each round, and "
                f"there are clients = {self.clients}: lower it"
            )

    def _require_robust(self) -> None:
        """Refuse a robust average that would not do what it is for."""
        server = self.server
        rule, share = server.robust, server.byzantine
        if rule != "norm_bound" and server.robust_norm is not None:
            raise ValueError(
                'server.robust_norm is for server.robust = "norm_bound": set that, or leave it out'
            )
        if rule not in ("trimmed_mean", "multi_krum"):
            if share != type(server).model_fields["byzantine"].default:
                raise ValueError(
                    'server.byzantine is for server.robust = "trimmed_mean" and "multi_krum": set one of '
                    "them, or leave it out"
                )
        elif int(share * self.quorum) == 0:
            raise ValueError(
                f"server.byzantine = {share:g} of the {self.quorum} replies that make a round at least is "
                f'none, and server.robust = "{rule}" would leave nobody out: raise it, or server.quorum'
            )
        elif rule == "multi_krum":
            for replies in range(self.quorum, self.cohort + 1):
                if replies < 2 * int(share * replies) + 3:
                    raise ValueError(
                        'server.robust = "multi_krum" needs 2 f + 3 replies where f are bad, and a round may '
                        f"have {replies}, {int(share * replies)} of them bad by server.byzantine = "
                        f"{share:g}: lower it, or raise server.quorum"
                    )
        if rule != "none" and self.buffered:
            raise ValueError(
                f'server.robust = "{rule}" compares updates that began from the same tensors, and in '
                'server.mode = "async" they do not: take mode "sync"'
            )

    def _require_secure(self) -> None:
        """Refuse what needs a single client's update or scores, where the server is to see none."""
        privacy, server = self.privacy, self.server
        if not privacy.secure_aggregation:
            for key in ("threshold", "neighbours"):
                if getattr(privacy, key) != type(privacy).model_fields[key].default:
                    raise ValueError(
                        f"privacy.{key} is for privacy.secure_aggregation = true: set that, or leave it out"
                    )
            return
        if self.cohort < 3:
            raise ValueError(
                "privacy.secure_aggregation = true hides a client among two others at least, and a round has "
                f"{self.cohort}: take three or more (server.sample, clients)"
            )
        for wrong, key, instead in (
            (self.buffered, 'server.mode = "async"', 'mode "sync", in which clients meet in a round'),
            (server.robust != "none", f'server.robust = "{server.robust}"', "privacy.clip, by each client"),
            (server.outliers == "reject", 'server.outliers = "reject"', "privacy.clip, by each client"),
            (server.max_update_norm is not None, "server.max_update_norm", "privacy.clip, by each client"),
            (self.evaluation.clients, "evaluation.clients = true", "evaluation.every, on the server's texts"),
        ):
            if wrong:
                raise ValueError(
                    f"privacy.secure_aggregation = true shows the server no single client, which {key} "
                    f"needs: take {instead}, or leave one of the two out"
                )

    def _require_private(self) -> None:
        """Refuse what noise would not hide, or what its accounting does not cover."""
        privacy, server = self.privacy, self.server
        usual = type(privacy).model_fields["clip_rate"].default
        if privacy.clip_quantile is None and privacy.clip_rate != usual:
            raise ValueError("privacy.clip_rate is for privacy.clip_quantile: set that, or leave it out")
        if privacy.unit == "example":
            self._require_private_steps()
            return
        if not privacy.noised:
            for key in ("delta", "clip_quantile"):
                if getattr(privacy, key) is not None:
                    raise ValueError(
                        f"privacy.{key} is for privacy.noise_multiplier or privacy.target_epsilon"
                    )
            return
        if privacy.clip_quantile is not None and privacy.secure_aggregation:
            raise ValueError(
                "privacy.clip_quantile counts whose updates are longer than the clip, and under "
                "privacy.secure_aggregation the server sees none: leave one of the two out"
            )
        own = "what a client changes by its own update"
        for wrong, why in (
            (
                privacy.clip is None,
                "hide nothing without privacy.clip: set it, to about a usual update's norm",
            ),
            (self.clients < 2, "hide a client among others, and clients = 1: take more"),
            (self.buffered, 'hide who takes part in a round, and server.mode is "async": take mode "sync"'),
            (
                server.over_select > 0,
                f"cover {own}; take server.over_select = 0, or answers decide of others",
            ),
            (server.robust != "none", f'go with sums, not server.robust = "{server.robust}": take "none"'),
            (server.outliers == "reject", f'cover {own}: take server.outliers = "name"'),
            (self.evaluation.clients, "do not cover what clients score: take evaluation.clients = false"),
            (
                self.training.class_weights == "balanced",
                "do not cover numbers of texts by class: give training.class_weights as numbers",
            ),
        ):
            if wrong:
                raise ValueError(f"privacy.noise_multiplier and privacy.target_epsilon {why}")

    def _require_private_steps(self) -> None:
        """Refuse what noise on a client's steps would not hide."""
        privacy = self.privacy
        for wrong, why in (
            (
                privacy.hides == "",
                "needs privacy.noise_multiplier or privacy.target_epsilon: set one of them",
            ),
            (
                privacy.clip is None,
                "needs privacy.clip, about the usual norm of the gradient of one text: set it",
            ),
            (
                privacy.clip_quantile is not None,
                "clips gradients, and privacy.clip_quantile follows updates: leave it out",
            ),
            (self.buffered, 'goes by rounds, and server.mode is "async": take mode "sync"'),
            (
                self.model.prune != "none",
                f'adds noise to all weights, those that model.prune = "{self.model.prune}" masks as well: '
                "leave one of the two out",
            ),
            (self.evaluation.clients, "does not cover what clients score: take evaluation.clients = false"),
            (
                self.training.class_weights == "balanced",
                "does not cover numbers of texts by class: give training.class_weights as numbers",
            ),
        ):
            if wrong:
                raise ValueError(f'privacy.unit = "example" {why}')

    def _require_attack(self) -> None:
        """Refuse an attack that would not take place."""
        attack = self.attack
        if attack.kind == "none":
            for key, field in type(attack).model_fields.items():
                if getattr(attack, key) != field.default:
                    raise ValueError(f"attack.{key} says how to attack, and attack.kind is none: set it")
            return
        if int(attack.share * self.clients) == 0:
            raise ValueError(f"attack.share = {attack.share:g} of {self.clients} clients is none: raise it")
        if attack.kind == "scale" and attack.factor == 1.0:
            raise ValueError('attack.kind = "scale" with attack.factor = 1 sends honest updates: raise it')

    def _require_measured(self) -> None:
        """Refuse a metric that decides and is never measured."""
        metric = self.evaluation.metric
        if metric is not None and self.evaluation.every == 0:
            raise ValueError(
                f"evaluation.metric = {metric!r} is never measured with evaluation.every = 0: "
                "evaluate every so many rounds, or leave the metric out"
            )

    def placed(self, *, deployed: bool) -> Self:
        """Fill in what depends on where the run takes place, unless it was given.

        Args:
            deployed: over a network, with clients that are strangers to the server; else a simulation.

        Raises:
            ConfigError: it is a deployment, whose devices are what they are, and devices or attacks are to be
                simulated; or it is a simulation, in which nobody is slow but by simulated devices, and rounds
                are asynchronous.

        >>> RunConfig().placed(deployed=True).server.weight_ratio
        3.0
        """
        if deployed and self.simulation.profile is not None:
            raise ConfigError(
                f"simulation.profile = {self.simulation.profile!r} is for fedllm simulate: in a deployment "
                "devices take the time that they take; leave it out"
            )
        if deployed and self.attack.kind != "none":
            raise ConfigError(
                f'attack.kind = "{self.attack.kind}" is for fedllm simulate: no device attacks because a '
                "server asks it to; leave it out"
            )
        if self.buffered and not deployed and self.simulation.profile is None:
            raise ConfigError(
                'server.mode = "async" goes by how long each client takes, which a simulation knows of '
                'simulated devices alone: set simulation.profile, such as "phones-4g"'
            )
        if self.server.weight_ratio is not None:
            return self
        server = self.server.model_copy(update={"weight_ratio": 3.0 if deployed else 0.0})
        return self.model_copy(update={"server": server})

    def to_document(self, *, given: bool = False) -> dict[str, Any]:
        """Return the tree as TOML lays it out, unset values left out.

        Args:
            given: leave out defaults as well, so that what nobody gave may still be chosen.
        """
        document = self.model_dump(mode="json", exclude_none=True, exclude_unset=given)
        if self.data.label is None:
            document["data"]["label"] = ""  # TOML has no null
        document[self.method] = document.pop("options", {})
        return document

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_document` returned; the options were validated by whoever wrote it."""
        method = document.get("method", cls.model_fields["method"].default)
        tree = {key: value for key, value in document.items() if key != method}
        return cls.validated({**tree, "options": document.get(method, {})})

    @classmethod
    def validated(cls, tree: Any) -> Self:
        """Return a tree of plain values as a configuration, or say what is wrong with it first."""
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ConfigError(explain(error, cls)) from error

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
            raise ConfigError(explain(error, cls)) from error
