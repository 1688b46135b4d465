"""What ``fedllm bench`` measures; the package's other modules are what benchmarks are made of."""

from __future__ import annotations

__all__ = ["BENCHMARKS"]

BENCHMARKS = {
    "aggregation": "LoRA's rules against dense sums, the factored SVD's speed, server memory",
    "attacks": "accuracy and backdoor success of each attack under each robust average",
    "codecs": "speed, size and error of the update codecs",
    "coders": "bits and speed of the entropy coder beside zstandard",
    "device": "memory of a whole device, idle and at its peak under each method",
    "deployment": "what a deployed round costs beyond the clients' computing",
    "distill": "a local step of FedKD beside plain fine-tuning of its teacher",
    "memory": "what a step needs above the loaded model",
    "pacing": "whether asking for more directions while a round is noisy saves any",
    "privacy": "membership inference under budgets of differential privacy",
    "reply_fuzz": "that no mutated or hostile reply ends a round",
    "secagg": "bytes and seconds of a round under secure aggregation beside the plain one",
    "sampling": "whether choosing directions by the previous gradient pays",
    "simulation": "wall time beside a stock Flower app, memory per virtual client",
}
"""Modules that have ``run()``, by name, with what each measures."""
