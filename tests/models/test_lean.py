"""A language model's loss in parts: torch's own loss and gradients, and no tensor of all tokens' logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from fedllm.config import DataConfig, ModelConfig, RunConfig, TrainingConfig, TuningConfig
from fedllm.errors import ModelError
from fedllm.models.model import load
from fedllm.models.network import Network
from fedllm.models.vocabulary import ending_of, loss_in_parts
from tests.architectures import ARCHITECTURES, Architecture
from tests.parts import quick, task_of

VOCABULARY = 50
SIZES = ARCHITECTURES["Qwen2ForCausalLM"]
OTHERS: dict[str, dict[str, Any]] = {
    "CohereForCausalLM": {**SIZES, "logit_scale": 0.3},
    "GraniteForCausalLM": {**SIZES, "logits_scaling": 3.0},
    "Gemma2ForCausalLM": {**ARCHITECTURES["Gemma2ForCausalLM"], "final_logit_softcapping": 0.5},
}
BASES = {
    "LlamaForCausalLM": "causal",
    "GPT2LMHeadModel": "causal",
    "PhiForCausalLM": "causal",
    **dict.fromkeys(OTHERS, "causal"),
    "T5ForConditionalGeneration": "seq2seq",
    "BartForConditionalGeneration": "seq2seq",
}
"""Output matrices that are tied and not, with a bias, capped, multiplied, divided, of a decoder."""


def network_of(name: str, task: str, *, adapted: bool = False) -> Network:
    kind: Any = getattr(transformers, name)
    settings = OTHERS.get(name) or ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        backbone = kind(kind.config_class(vocab_size=VOCABULARY, **settings))
        if adapted:
            targets = ["q_proj", "lm_head"]
            backbone = get_peft_model(backbone, LoraConfig(target_modules=targets, init_lora_weights=False))
        for parameter in backbone.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    kind_of_task = task_of(task)
    return Network(backbone, kind_of_task.pooling, task=kind_of_task).eval()


def batch(network: Network) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Labels of which some are masked, and the other inputs; a padded text among them."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (4, 7), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    labels = ids.clone()
    if network.pooling == "seq2seq":
        labels = torch.randint(5, VOCABULARY, (4, 5), generator=draw)
        inputs["answer_ids"] = labels.clone()
    labels[torch.rand(labels.shape, generator=draw) < 0.4] = -100
    labels[2] = -100
    return labels, {**inputs, "reference": torch.randn(4, generator=draw)}


def gradients(network: Network, loss: torch.Tensor) -> torch.Tensor:
    trained = [p for p in network.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.double().reshape(-1) for gradient in found])


CASES = [(base, task, False) for base, task in BASES.items()]
CASES += [("LlamaForCausalLM", "instruct", True), ("LlamaForCausalLM", "preference", False)]


@pytest.mark.parametrize("rows", [3, 1000])
@pytest.mark.parametrize(
    ("base", "task", "adapted"), quick(CASES, CASES[0], CASES[5], CASES[7], CASES[8], CASES[9])
)
def test_loss_and_gradients_are_those_of_the_whole(base: str, task: str, adapted: bool, rows: int) -> None:
    network = network_of(base, task, adapted=adapted)
    labels, inputs = batch(network)
    ending = ending_of(network)
    assert ending is not None
    whole = network(labels=labels, **inputs).loss
    want = gradients(network, whole)
    parts = loss_in_parts(network, ending, labels, inputs, rows)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0.0)
    assert (gradients(network, parts) - want).norm() < 1e-6 * want.norm()
    assert want.norm() > 0


def test_gradients_are_those_of_torchs_cross_entropy() -> None:
    """Of the loss times three, of a weight and a bias that are trained too."""
    network = network_of("PhiForCausalLM", "causal")
    labels, inputs = batch(network)
    logits = network(**inputs).logits[:, :-1].double()
    oracle = 3 * functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    want = gradients(network, oracle)
    ending = ending_of(network)
    assert ending is not None
    parts = 3 * loss_in_parts(network, ending, labels, inputs, 5)
    torch.testing.assert_close(parts.double(), oracle, rtol=1e-6, atol=0.0)
    assert (gradients(network, parts) - want).norm() < 1e-6 * want.norm()


def test_a_batch_in_which_nothing_is_predicted_has_no_loss_and_no_gradient() -> None:
    network = network_of("LlamaForCausalLM", "causal")
    labels, inputs = batch(network)
    ending = ending_of(network)
    assert ending is not None
    loss = loss_in_parts(network, ending, torch.full_like(labels, -100), inputs)
    assert loss.item() == 0.0
    assert not gradients(network, loss).any()


class Largest(TorchDispatchMode):
    """Notes how many values the largest tensor has that any operation makes, forward or backward."""

    values = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = operation(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, list | tuple) else [found]:
            if isinstance(tensor, torch.Tensor):
                self.values = max(self.values, tensor.untyped_storage().nbytes() // tensor.element_size())
        return found


@pytest.mark.parametrize("task", ["causal", "preference"])
def test_no_tensor_holds_the_logits_of_more_tokens_than_a_part(task: str) -> None:
    settings = {**ARCHITECTURES["LlamaForCausalLM"], "hidden_size": 16, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(vocab_size=2000, **settings)
    kind = task_of(task)
    network = Network(transformers.LlamaForCausalLM(config), "causal", task=kind)
    for name, parameter in network.named_parameters():
        parameter.requires_grad = "q_proj" in name
    ids = torch.randint(5, 2000, (4, 50), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "reference": torch.zeros(4)}
    ending = ending_of(network)
    assert ending is not None
    for rows, values in ((20, 20 * 2000), (1000, 4 * 50 * 2000)):
        with Largest() as largest:
            loss_in_parts(network, ending, ids, inputs, rows).backward()  # type: ignore[no-untyped-call]
        assert values * 0.9 < largest.values <= values


@pytest.fixture
def biased(architecture: Architecture, tmp_path: Path) -> Path:
    """A BART that adds a vector to its logits."""
    folder = architecture("BartForConditionalGeneration")
    model = transformers.BartForConditionalGeneration.from_pretrained(folder)
    model.final_logits_bias += torch.linspace(0.0, 1.0, model.final_logits_bias.shape[-1])
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    return tmp_path


def test_a_model_that_does_something_else_to_its_logits_is_refused(biased: Path) -> None:
    config = RunConfig(
        model=ModelConfig(name=str(biased), task="seq2seq"),
        data=DataConfig(max_length=12),
        tuning=TuningConfig(rank=2, targets=("q_proj",)),
        training=TrainingConfig(memory="lean"),
    )
    with pytest.raises(ModelError, match=r'^training.memory = "lean" .* is unknown; take "checkpoint"$'):
        load(config, ())
    plain = config.model_copy(update={"training": TrainingConfig(memory="checkpoint")})
    assert load(plain, ()).ending is None
