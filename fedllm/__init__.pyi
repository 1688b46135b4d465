from fedllm.codecs.base import Codec as Codec
from fedllm.config import RunConfig as RunConfig
from fedllm.errors import FedllmError as FedllmError
from fedllm.tasks.base import Task as Task
from simulations.api import Run as Run
from simulations.api import load_config as load_config
from simulations.api import open_run as open_run
from simulations.api import simulate as simulate
from strategies.base import Method as Method

__all__ = [
    "Codec",
    "FedllmError",
    "Method",
    "Run",
    "RunConfig",
    "Task",
    "load_config",
    "open_run",
    "simulate",
]
