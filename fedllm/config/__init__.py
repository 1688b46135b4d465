"""The configuration of a run: one frozen, validated tree.

This is the only reader of TOML files, of the command line's ``--set`` and of Flower's ``run_config``.
It imports neither torch nor anything above it: a method's own options arrive as a pydantic model
that the caller looks up (see :func:`resolve`).
"""

from fedllm.config.attack import AttackConfig
from fedllm.config.data import DataConfig
from fedllm.config.effect import require_effect
from fedllm.config.evaluation import CheckpointConfig, EvaluationConfig
from fedllm.config.exchange import CodecConfig, PrivacyConfig
from fedllm.config.method import MethodOptions
from fedllm.config.model import ModelConfig, TuningConfig
from fedllm.config.names import as_name, require_name
from fedllm.config.reading import Override, parse_override, read_override, read_toml, resolve, total_rounds
from fedllm.config.run import RunConfig
from fedllm.config.server import ServerConfig
from fedllm.config.training import TrainingConfig
from fedllm.devices import SimulationConfig
from fedllm.section import Section

__all__ = [
    "AttackConfig",
    "CheckpointConfig",
    "CodecConfig",
    "DataConfig",
    "EvaluationConfig",
    "MethodOptions",
    "ModelConfig",
    "Override",
    "PrivacyConfig",
    "RunConfig",
    "Section",
    "ServerConfig",
    "SimulationConfig",
    "TrainingConfig",
    "TuningConfig",
    "as_name",
    "parse_override",
    "read_override",
    "read_toml",
    "require_effect",
    "require_name",
    "resolve",
    "total_rounds",
]
