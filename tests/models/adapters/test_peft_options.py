"""An option of peft does what it says, or is refused: none is taken and then set aside."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from fedllm.config import DataConfig, ModelConfig, RunConfig, TuningConfig
from fedllm.errors import ModelError
from fedllm.models import extra_adapters
from fedllm.models.model import Model, load
from fedllm.models.tuning import kinds
from fedllm.models.tuning.adapters import _config_class, method_names, reads

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")


def loaded(base: Path, task: Any, method: str, options: dict[str, Any], **keys: Any) -> Model:
    config = RunConfig(
        model=ModelConfig(name=str(base), task=task),
        data=DataConfig(max_length=16),
        tuning=TuningConfig(peft=method, rank=4, options=options, **keys),
    )
    return load(config, ("a", "b"))


def test_the_table_of_what_is_read_says_of_each_kind_what_peft_says() -> None:
    names = ["full", *method_names()]
    assert {name: kinds.READ.get(name) for name in names} == {name: reads(name) for name in names}


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("lora", {"init_lora_weights": "eva"}, 'init_lora_weights = "eva" is computed from data before'),
        ("lora", {"init_lora_weights": "lora_ga"}, "init_lora_weights = .lora_ga. is computed"),
        ("lora", {"init_lora_weights": "corda"}, "init_lora_weights = .corda. is computed"),
        ("lora", {"eva_config": {}}, "eva_config is computed from data"),
        ("lora", {"use_qalora": True}, "use_qalora works on GPTQ bases alone"),
        ("lora", {"loftq_config": {"loftq_bits": 4}}, "loftq_config is set aside by peft: .*will be ignored"),
        ("lora", {"fan_in_fan_out": True}, "fan_in_fan_out is set aside by peft: .*Setting"),
        ("lora", {"inference_mode": True}, "inference_mode is known to the run itself"),
        ("lora", {"r": 2}, "r is what tuning.rank sets; give that"),
        (
            "lora",
            {"rank_pattern": {"qeury": 2}},
            "rank_pattern has 'qeury', which no module of BertModel fits",
        ),
        ("adalora", {"velora_config": {}}, "velora_config is idle here: a federated round prunes no ranks"),
        ("adalora", {"tinit": 5}, "tinit is idle"),
        ("p-tuning", {"encoder_num_layers": 3}, "encoder_num_layers is set aside by peft"),
        ("p-tuning", {"encoder_dropout": 0.2}, "encoder_dropout works in an LSTM"),
        ("trainable-tokens", {}, "token_indices must list the numbers"),
    ],
)
def test_an_option_without_effect_is_refused(
    tiny_encoder: Path, method: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ModelError, match=rf"tuning.options.{words}"):
        loaded(tiny_encoder, "classification", method, options)


def test_options_with_effect_are_taken(tiny_encoder: Path, tiny_causal: Path) -> None:
    model = loaded(
        tiny_encoder, "classification", "lora", {"rank_pattern": {"query": 2}, "lora_dropout": 0.1}
    )
    ranks = {n.split(".lora_A")[0][-5:]: len(p) for n, p in model.trainable().items() if "lora_A" in n}
    assert ranks == {"query": 2, "value": 4}
    tokens = loaded(tiny_causal, "causal", "trainable-tokens", {"token_indices": [5, 6]})
    assert [tuple(p.shape) for p in tokens.trainable().values()] == [(2, 32)]


def test_modules_to_save_are_added_to_the_head_not_put_in_its_place(tiny_encoder: Path) -> None:
    config = RunConfig(
        model=ModelConfig(name=str(tiny_encoder), pooling="own"),
        data=DataConfig(max_length=16),
        tuning=TuningConfig(rank=2, options={"modules_to_save": ["LayerNorm"]}),
    )
    trained = load(config, ("a", "b")).trainable()
    assert any("classifier" in name for name in trained)
    assert any("LayerNorm" in name for name in trained)


# Options that matter only beside others, or only to larger layers or convolutions than these.
CONDITIONAL = {
    "deft": ("init_scale",),
    "frod": ("progressbar", "runtime_offload_base_weight"),
    "loha": ("use_effective_conv2d",),
    "lokr": ("use_effective_conv2d", "decompose_both", "rank_dropout_scale"),
    "lora": ("ensure_weight_tying",),
    "miss": ("mini_r",),
    "oft": ("oft_block_size", "module_dropout", "eps", "block_share"),
    "psoft": ("psoft_alpha", "random_seed"),
    "pvera": ("sample_at_inference",),
    "tinylora": ("init_v_bound",),
}
DEFAULTS = [
    m for m in method_names() if m not in (*extra_adapters.NAMES, "prefix", "prompt", "dora", "rslora")
]


def other(value: Any) -> Any:
    """Return another value of the same kind, or ``None`` where that takes knowledge."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1 if value < 3 else value * 2
    return value * 0.5 + 0.3 if isinstance(value, float) else None


def outcome(model: Model) -> tuple[str, float, str]:
    """Return what tells two adapters apart: their tensors, and the loss and gradients off their start."""
    state = hashlib.sha256()
    for name, tensor in model.module.state_dict().items():
        state.update(name.encode() + tensor.detach().float().numpy().tobytes())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    ids = torch.arange(5, 25).reshape(2, 10)
    labels = ids if model.task.name == "causal" else torch.tensor([0, 1])
    torch.manual_seed(3)
    loss = model.module(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
    loss.backward()
    gradients = hashlib.sha256()
    for parameter in model.trainable().values():
        if parameter.grad is not None:
            gradients.update(parameter.grad.numpy().tobytes())
    return state.hexdigest(), float(loss), gradients.hexdigest()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", DEFAULTS)
def test_every_option_changes_something_or_is_refused(
    tiny_encoder: Path, tiny_causal: Path, method: str
) -> None:
    bases: list[tuple[Path, Any]] = [(tiny_causal, "causal"), (tiny_encoder, "classification")]
    for base, task in bases:
        try:
            plain = outcome(loaded(base, task, method, {}))
        except ModelError:
            continue
        break
    else:
        return  # takes no model without options; the matrix of adapters says which
    own = {field.name for field in dataclasses.fields(peft.PeftConfig)}
    idle = set()
    for field in dataclasses.fields(_config_class(method)):
        value = other(field.default)
        if field.name in own or not field.init or value is None or field.name in CONDITIONAL.get(method, ()):
            continue
        try:
            if outcome(loaded(base, task, method, {field.name: value})) == plain:
                idle.add(field.name)
        except (ModelError, RuntimeError):  # refused, or without a gradient at this value
            continue
    assert not idle
