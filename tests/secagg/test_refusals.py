"""What cannot be summed unseen is refused before the run, with what to take instead."""

from __future__ import annotations

from typing import Any

import pytest

from fedllm.errors import ConfigError
from strategies.registry import open_method, resolve_run

SECURE = {"privacy": {"secure_aggregation": True}}


@pytest.mark.parametrize(
    ("sections", "instead"),
    [
        ({"codec": {"up": "top_k(fraction=0.1)"}}, r"fixed\(bits=8"),
        ({"codec": {"up": "quantize(bits=4)"}}, r"fixed\(bits=8"),
        ({"codec": {"up": "cast(bf16) | entropy"}}, r"fixed\(bits=8"),
        ({"codec": {"up": "error_feedback(sign)"}}, r"fixed\(bits=8"),
        ({"method": "fwdllm"}, "mezo.candidates above 0"),
        ({"method": "fwdllm", "fwdllm": {"pacing": "ratio"}}, "fwdllm.shared = true"),
        ({"method": "mezo"}, "mezo.candidates above 0"),
        ({"method": "fednova", "training": {"optimizer": "sgd"}}, "rule fedit"),
        ({"method": "lora", "lora": {"rule": "svd"}}, "rule fedit"),
        ({"method": "lora", "lora": {"rule": "fed-sb"}}, "rule fedit"),
        ({"server": {"robust": "median"}}, "privacy.clip"),
        ({"server": {"outliers": "reject"}}, "privacy.clip"),
        ({"server": {"max_update_norm": 1.0}}, "privacy.clip"),
        ({"server": {"mode": "async"}}, 'mode "sync"'),
        ({"server": {"sample": 2}}, "three or more"),
        ({"evaluation": {"clients": True}, "data": {"client_test_fraction": 0.1}}, "evaluation.every"),
    ],
)
def test_it_is_a_sentence(sections: dict[str, Any], instead: str) -> None:
    with pytest.raises(ConfigError, match=rf"privacy.secure_aggregation.*{instead}"):
        resolve_run({**SECURE, **sections})


@pytest.mark.parametrize("setting", [{"threshold": 0.8}, {"neighbours": 10}])
def test_settings_of_it_need_it(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"is for privacy\.secure_aggregation = true"):
        resolve_run({"privacy": setting})


@pytest.mark.parametrize(
    "sections",
    [{"method": method} for method in ("fedavg", "fedkd")]
    + [{"method": "lora", "lora": {"rule": rule}} for rule in ("fedit", "ffa", "alternate")]
    + [{"method": "mezo", "mezo": {"candidates": 8}}]
    + [{"method": "fwdllm", "fwdllm": {"shared": True}}, {"method": "fwdllm", "fwdllm": {"upload": "dense"}}]
    + [{"method": "scaffold", "training": {"optimizer": "sgd"}}],
)
def test_what_is_a_sum_is_taken(sections: dict[str, Any]) -> None:
    assert open_method(resolve_run({**SECURE, **sections})).sums


def test_a_setup_is_not_masked() -> None:
    options = {"shared": True, "warm_start": "means"}
    with pytest.raises(ConfigError, match=r'does not mask: set fwdllm\.warm_start = "none"'):
        resolve_run({**SECURE, "method": "fwdllm", "fwdllm": options})
