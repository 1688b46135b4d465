"""An override that changes nothing beside the other settings is refused: no sweep runs one run twice."""

from __future__ import annotations

import re

import pytest

from fedllm.errors import ConfigError
from strategies.registry import resolve_run

WITHOUT_EFFECT = {
    "server.max_examples=5": ["server.robust=median"],
    "server.weight_ratio=2": ["server.robust=trimmed_mean"],
    "server.norm_ratio=5": ["privacy.secure_aggregation=true"],
    "server.outlier_deviations=3": ["privacy.secure_aggregation=true"],
    "attack.trigger=zz": ["attack.kind=sign_flip"],
    "attack.target=1": ["attack.kind=label_flip"],
    "fedkd.hidden_weight=2": ["method=fedkd", "tuning.peft=full", "fedkd.teacher=false"],
    "fedkd.match=origin": ["method=fedkd", "tuning.peft=full", "fedkd.teacher=false"],
    "data.alpha=0.1": ["data.partition=iid"],
    "server.beta2=0.5": ["server.optimizer=momentum"],
}


@pytest.mark.parametrize("override", WITHOUT_EFFECT)
def test_it_is_refused_by_name_and_taken_where_it_counts(override: str) -> None:
    beside = WITHOUT_EFFECT[override]
    with pytest.raises(ConfigError, match=re.escape(f"{override} would be without effect")):
        resolve_run({}, [*beside, override])
    counts = {
        "data.alpha=0.1": ["data.partition=dirichlet"],
        "server.beta2=0.5": ["server.optimizer=adam"],
        "attack.trigger=zz": ["attack.kind=backdoor"],
        "attack.target=1": ["attack.kind=backdoor"],
    }.get(override, [one for one in beside if one.startswith(("method", "tuning"))])
    resolve_run({}, [*counts, override])
