"""What federated LoRA cannot be combined with: each rule asks something of adapter, server and codecs."""

from __future__ import annotations

from fedllm.codecs import Codecs
from fedllm.config import RunConfig
from fedllm.errors import ConfigError
from strategies.lora.options import WITH_BASE, Options

__all__ = ["check"]

_MIXED = ("svd", "stack", "hetero")
"""Rules under which ranks may differ from client to client."""


def check(config: RunConfig, options: Options) -> None:
    """Refuse combinations that cannot mean what they say.

    Raises:
        ConfigError: names both sides, and what would be right.
    """
    rule, tuning, server = f'lora.rule = "{options.rule}"', config.tuning, config.server

    def refuse(condition: bool, reason: str) -> None:
        if condition:
            raise ConfigError(reason)

    refuse(tuning.peft == "full", 'method = "lora" needs an adapter: tuning.peft = "full" goes with "fedavg"')
    refuse(
        options.rule != "fedit" and tuning.start != "usual",
        f'{rule} begins from factors of its own, tuning.start = "{tuning.start}" from others: use rule fedit',
    )
    refuse(
        options.rule not in ("fedit", "ffa") and tuning.blocks > 1,
        f"{rule} moves all layers in each round, tuning.blocks = {tuning.blocks} a part of them: use "
        "rule fedit or ffa",
    )
    plain = tuning.peft in ("lora", "rslora") and not tuning.options.get("use_dora")
    refuse(
        options.rule != "fedit" and not plain,
        f'{rule} aggregates products B A, tuning.peft = "{tuning.peft}" has more than that: use rule fedit',
    )
    refuse(
        options.rule not in ("fedit", "ffa", "fed-sb", "fedsa") and not server.plain,
        f"{rule} sets the next factors itself, which the server would move off: {server.PLAINLY}",
    )
    refuse(
        options.rule == "fed-sb" and config.codec.down != "none",
        f"{rule} sends its outer factors once and then what is trained alone, as it is: codec.down = "
        f'{config.codec.down!r} must be "none"',
    )
    refuse(
        options.rule == "fed-sb" and not server.plain,
        f"{rule} lets clients take up the mean itself: {server.PLAINLY}",
    )
    codecs = Codecs.of(config.codec)
    moving = {"up": ("svd", "stack", "hetero", "alternate"), "down": ("svd", "stack", "hetero")}
    for way, rules in moving.items():
        refuse(
            getattr(codecs, way).stateful
            and (options.rule in rules or (way == "down" and options.base_rank is not None)),
            f"{rule} changes the factors' basis between rounds, so codec.{way} = "
            f"{getattr(config.codec, way)!r} would add residuals of other factors; leave error "
            "feedback out, or use rule fedit, ffa or residual",
        )
    start = tuning.options.get("init_lora_weights")
    refuse(
        options.rule in WITH_BASE
        and (start == "loftq" or (start == "olora" and config.model.quantize != "none")),
        f'{rule} saves an adapter for the plain base, which init_lora_weights = "{start}" replaces by a '
        "quantised one of its own: use rule fedit, or leave it out",
    )
    refuse(
        options.rule == "ffa" and str(start).startswith("pissa_niter_"),
        f'{rule} never sends A, and init_lora_weights = "{start}" is drawn at random whenever the adapter is '
        'loaded: take "pissa"',
    )
    refuse(
        options.rule == "fed-sb" and start not in (None, True),
        f"{rule} measures the directions of its adapter itself: leave out init_lora_weights = {start!r}",
    )
    evaluation = config.evaluation
    refuse(
        options.rule == "fedsa" and (evaluation.every > 0 or not evaluation.clients),
        f"{rule} leaves each client a model of its own and the server half of one, which no score would mean "
        "anything of: set evaluation.every = 0, and evaluation.clients = true with data.client_test_fraction "
        "above 0",
    )
    refuse(
        options.rule == "fedsa" and config.training.local_steps < 2,
        f"{rule} begins with B = 0 on every client, and A has no gradient before B has moved: "
        "training.local_steps must be at least 2",
    )
    refuse(
        options.rule == "fedsa" and start not in (None, True, "gaussian"),
        f"{rule} begins with B = 0 on every client: leave out init_lora_weights = {start!r}",
    )
    mixed = bool(options.ranks or options.memory_mb)
    refuse(
        mixed and options.rule not in _MIXED,
        f"{rule} needs one rank for all; mixed ranks: {', '.join(_MIXED)}",
    )
    refuse(
        mixed and config.codec.down != "none",
        f'clients of mixed ranks hold different tensors: codec.down = {config.codec.down!r} must be "none"',
    )
    for key, given in {
        "ranks": options.ranks if not options.shares else (),
        "memory_mb": options.memory_mb,
    }.items():
        refuse(
            bool(given) and len(given) != config.clients,
            f"lora.{key} lists {len(given)} clients, clients = {config.clients}",
        )
    refuse(
        max(options.ranks, default=0) > tuning.rank,
        f"lora.ranks reach {max(options.ranks, default=0)}, the global rank is tuning.rank = {tuning.rank}",
    )
