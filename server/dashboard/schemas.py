"""Prints the schemas that the form for a new run is made from; a program, since methods import torch."""

from __future__ import annotations

import json

from fedllm.config import RunConfig
from strategies.registry import method_names, method_options

if __name__ == "__main__":
    methods = {name: method_options(name).model_json_schema() for name in method_names()}
    print(json.dumps({"run": RunConfig.model_json_schema(), "methods": methods}))
