"""What runs import, for twenty seconds: one process imports this, of which each cell's is a copy."""

from importlib import import_module

from fedllm.models.base.loading import quiet

_MODULES = (
    "simulations.engines.loopback",
    "fedllm.models.tuning.adapters",
    "flwr_datasets.partitioner",
    "transformers.models.bert.modeling_bert",
)

with quiet():  # bitsandbytes, which peft imports, hints at kernels that it could download
    for module in _MODULES:
        import_module(module)
