"""A base model is loaded whole, with its own tokenizer, for a task that it can do, or it is refused."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedllm.config import DataConfig, ModelConfig, RunConfig, TuningConfig
from fedllm.errors import ModelError
from fedllm.models.base import converted, loading
from fedllm.models.model import Model, load
from fedllm.models.saving import save
from fedllm.runs.reader import Run
from tests.architectures import Architecture
from tests.parts import quick
from tests.rounds.federation import configuration, run

LABELS = ("animal", "fruit", "metal")

Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
Changed = Callable[..., Path]


def build(name: Path | str, pooling: str = "mean", peft: str = "lora", **sections: Any) -> Model:
    """Load a model for a kind of head, ``causal`` among them."""
    task: Any = "causal" if pooling == "causal" else "classification"
    chosen: Any = "mean" if task == "causal" else pooling
    return load(
        RunConfig(
            model=ModelConfig(name=str(name), task=task, pooling=chosen, **sections.pop("model", {})),
            tuning=TuningConfig(peft=peft, rank=4, **sections.pop("tuning", {})),
            data=DataConfig(**{"max_length": 12, **sections}),
        ),
        LABELS,
    )


def refusal(name: Path | str, pooling: str = "mean", **sections: Any) -> str:
    with pytest.raises(ModelError) as caught:
        build(name, pooling, **sections)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def changed(architecture: Architecture, tmp_path: Path) -> Changed:
    """Copy a checkpoint and change its weights or its configuration."""

    def change(name: str, weights: Change = dict, **settings: Any) -> Path:
        folder = shutil.copytree(architecture(name), tmp_path / "changed")
        file = folder / "model.safetensors"
        save_file(weights(load_file(file)), file, metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))
        return folder

    return change


@pytest.mark.parametrize(
    ("name", "pooling", "targets"),
    [
        ("AlbertModel", "mean", {"query", "value"}),
        ("BloomForCausalLM", "causal", {"query_key_value"}),
        ("CodeGenForCausalLM", "causal", {"qkv_proj"}),
        ("DebertaV2Model", "mean", {"query_proj", "value_proj"}),
        ("DistilBertModel", "mean", {"q_lin", "v_lin"}),
        ("GPT2LMHeadModel", "causal", {"c_attn"}),
        ("Gemma2ForCausalLM", "causal", {"q_proj", "v_proj"}),
        ("MPNetModel", "mean", {"q", "v"}),
        ("MambaForCausalLM", "causal", {"in_proj", "x_proj"}),
        ("MixtralForCausalLM", "causal", {"q_proj", "v_proj"}),
        ("ModernBertModel", "mean", {"Wqkv"}),
        ("Phi3ForCausalLM", "causal", {"qkv_proj"}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_every_architecture_trains_with_lora_where_it_belongs(
    architecture: Architecture, name: str, pooling: str, targets: set[str]
) -> None:
    model = build(architecture(name), pooling)
    places = {name.split(".lora_")[0].rpartition(".")[2] for name in model.trainable() if ".lora_" in name}
    assert places == targets
    loss = model.loss(sentences(model).batch([0, 1]))
    loss.backward()
    bs = [p for name, p in model.trainable().items() if "lora_B" in name]
    assert bs
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in bs)


@pytest.mark.parametrize(
    ("name", "pooling"),
    [
        ("AlbertModel", "mean"),
        ("BertForMaskedLM", "mean"),
        ("BertForSequenceClassification", "own"),
        ("GPT2LMHeadModel", "causal"),
        ("MixtralForCausalLM", "causal"),
        ("Phi3ForCausalLM", "causal"),
    ],
)
def test_weights_that_are_converted_piece_by_piece_are_those_that_transformers_reads(
    architecture: Architecture, monkeypatch: pytest.MonkeyPatch, name: str, pooling: str
) -> None:
    monkeypatch.setattr(converted, "_PIECE", 7)
    half: dict[str, Any] = {"model": {"dtype": "bfloat16"}}
    ours = build(architecture(name), pooling, **half)
    monkeypatch.setattr(loading, "converted", lambda source, dtype: None)
    theirs = build(architecture(name), pooling, **half)
    assert ours.module.backbone.dtype == torch.bfloat16
    want = theirs.module.state_dict()
    assert ours.module.state_dict().keys() == want.keys()
    for key, value in ours.module.state_dict().items():
        assert torch.equal(value, want[key]), key
        assert value.dtype == want[key].dtype
    assert ours.notes == theirs.notes
    if pooling == "causal":
        settings = [model.module.backbone.generation_config.to_dict() for model in (ours, theirs)]
        assert settings[0] == settings[1]


def test_weights_that_are_there_already_or_cut_short_are_left_to_transformers(
    architecture: Architecture, tmp_path: Path
) -> None:
    folder = architecture("GPT2LMHeadModel")
    assert converted.converted(str(folder), torch.float32) is None
    assert converted.converted(str(tmp_path), torch.bfloat16) is None
    whole = (folder / "model.safetensors").read_bytes()
    longer = whole.replace(b'"shape":[32]', b'"shape":[99]', 1)
    assert longer != whole
    for cut in (whole[:-2], whole[:40], whole[:4], longer):
        (tmp_path / "model.safetensors").write_bytes(cut)
        assert converted.converted(str(tmp_path), torch.bfloat16) is None


def sentences(model: Model) -> Any:
    from fedllm.data.corpus import Corpus

    texts = ["the old apple and a pear", "iron near copper", "a horse saw one otter today and again a lynx"]
    return model.task.encode(Corpus(texts, np.array([1, 2, 0]), LABELS, None), model.tokenizer, 12)


@pytest.mark.parametrize(
    ("dtype", "known", "told"),
    [
        ("bfloat16", {"avx2": True, "avx512_bf16": False, "amx_bf16": False}, True),
        ("bfloat16", {"avx512_bf16": True, "amx_bf16": False}, False),
        ("bfloat16", {"neon": True, "bf16": True}, False),
        ("bfloat16", {}, False),
        ("float32", {"avx2": True}, False),
    ],
)
def test_a_processor_that_only_converts_bfloat16_is_told_of(
    tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, known: dict[str, bool], told: bool
) -> None:
    monkeypatch.setenv("FEDLLM_DEVICE", "cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    notes = build(tiny_encoder, model={"dtype": dtype}).notes
    assert any("converting every number" in note for note in notes) is told


@pytest.mark.parametrize(("name", "fused"), [("BertModel", True), ("MPNetModel", False)])
def test_attention_falls_back_to_eager_and_says_so(
    architecture: Architecture, name: str, fused: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fedllm"):
        model = build(architecture(name))
    said = f"no fused attention (sdpa) for {name}, so attention is computed by 'eager'"
    assert any(said in line for line in caplog.messages) is not fused
    assert any(said in note for note in model.notes) is not fused
    backbone: Any = model.module.backbone
    assert backbone.config._attn_implementation == ("sdpa" if fused else "eager")
    maps = model.forward(sentences(model).batch([0]), attentions=True).attentions
    assert maps is not None
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(maps[0].shape[:-1]))


def test_the_runs_log_says_what_fell_back(
    architecture: Architecture, tiny_texts: Path, tmp_path: Path
) -> None:
    config = configuration(architecture("MPNetModel"), tiny_texts, rounds=1, tuning={"rank": 2})
    run(config, tmp_path / "run")
    told = [event.message for event in Run(tmp_path / "run").events() if event.kind == "model"]
    assert len(told) == 1
    assert "attention is computed by 'eager'" in told[0]


def without(part: str) -> Change:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def prefixed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


def doubled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    rows = tensors["encoder.layer.1.output.dense.weight"]
    return tensors | {"encoder.layer.1.output.dense.weight": torch.cat([rows, rows])}


@pytest.mark.parametrize("pooling", ["mean", "cls", "own"])
@pytest.mark.parametrize(
    ("weights", "settings", "words"),
    [
        (
            prefixed,
            {},
            ["lacks", "embeddings.LayerNorm.bias", "(there is a module.embeddings.LayerNorm.bias)"],
        ),
        (without("layer.1.output.dense.weight"), {}, ["lacks", "encoder.layer.1.output.dense.weight;"]),
        (dict, {"num_hidden_layers": 3}, ["lacks", "encoder.layer.2.", "and 15 more"]),
        (dict, {"num_hidden_layers": 1}, ["holds", "encoder.layer.1.", "no place"]),
        (doubled, {}, ["encoder.layer.1.output.dense.weight in another shape ((64, 48), not (32, 48))"]),
    ],
    ids=["prefixed", "a weight", "layers too few", "layers too many", "shape"],
)
def test_a_checkpoint_that_does_not_fill_the_model_is_refused(
    changed: Changed, pooling: str, weights: Change, settings: dict[str, Any], words: list[str]
) -> None:
    said = refusal(changed("BertModel", weights, **settings), pooling)
    assert all(word in said for word in words), said


def test_what_is_lacking_or_over_for_good_reason_is_accepted(
    architecture: Architecture, changed: Changed
) -> None:
    """No pooler, buffers of older releases, tied matrices, heads that are not wanted."""
    folder = changed(
        "BertModel",
        lambda tensors: without("pooler")(tensors) | {"embeddings.position_ids": torch.arange(64)[None]},
    )
    build(folder)
    own = build(folder, "own")
    assert {name.split(".modules_to_save")[0].rpartition("model.")[2] for name in own.trainable()} >= {
        "bert.pooler",
        "classifier",
    }
    build(architecture("BertForMaskedLM"))
    build(architecture("LlamaForCausalLM"), "own")
    tied = build(architecture("GPT2LMHeadModel"), "causal")
    assert "lm_head.weight" not in load_file(architecture("GPT2LMHeadModel") / "model.safetensors")
    assert tied.task.name == "causal"


@pytest.mark.parametrize(
    ("name", "pooling", "words"),
    [
        ("BertModel", "causal", "'bert', an encoder, which sees the tokens"),
        ("BertForMaskedLM", "causal", "'bert', an encoder, which sees the tokens"),
        ("XLNetLMHeadModel", "causal", "sees the tokens that it is to predict: XLNetLMHeadModel"),
        ("BartModel", "causal", "its checkpoint lacks lm_head.weight"),
        ("DebertaV2Model", "causal", "'deberta-v2', of which transformers has no model for model.task"),
        ("T5Model", "mean", 'an encoder with a decoder, and model.pooling = "mean" pools an encoder'),
        ("CodeGenForCausalLM", "own", "'codegen', of which transformers has no model for model.pooling"),
        ("XLNetModel", "own", "other answers when it is padded on the right"),
    ],
)
def test_a_task_that_a_model_cannot_do_is_refused(
    architecture: Architecture, name: str, pooling: str, words: str
) -> None:
    assert words in refusal(architecture(name), pooling)


def test_an_untied_output_matrix_must_be_there(changed: Changed) -> None:
    assert "lacks lm_head.weight;" in refusal(changed("LlamaForCausalLM", without("lm_head")), "causal")


def test_a_model_of_text_and_images_is_refused(architecture: Architecture, tmp_path: Path) -> None:
    from transformers import Gemma3Config

    folder = shutil.copytree(architecture("Gemma2ForCausalLM"), tmp_path / "mm")
    Gemma3Config().save_pretrained(folder)
    assert "a model of text among other things (text_config, vision_config)" in refusal(folder, "causal")


@pytest.mark.parametrize("name", ["BertModel", "T5Model", "GPT2LMHeadModel", "LlamaForCausalLM"])
def test_a_tokenizer_is_never_made_up(architecture: Architecture, tmp_path: Path, name: str) -> None:
    bare = shutil.ignore_patterns("tokenizer*", "special_tokens*")
    folder = shutil.copytree(architecture(name), tmp_path / "bare", ignore=bare)
    said = refusal(folder, "own")
    assert "comes without a tokenizer" in said or "cannot be loaded" in said


def test_words_without_an_embedding_are_refused_and_padding_is_replaced(
    architecture: Architecture, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    for place, name, pooling, addition in (
        ("words", "BertModel", "mean", {"tokens": ["tungsten"]}),
        ("padding", "LlamaForCausalLM", "causal", {"pad_token": "<PAD>"}),
    ):
        folder = shutil.copytree(architecture(name), tmp_path / place)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        rows = len(tokenizer)
        if "tokens" in addition:
            tokenizer.add_tokens(addition["tokens"])
        else:
            tokenizer.add_special_tokens(addition)
        tokenizer.save_pretrained(folder)
        if place == "words":
            said = refusal(folder, pooling)
            assert f"token {rows} ('tungsten'), its embedding table only {rows} rows" in said
            continue
        model = build(folder, pooling)
        assert model.tokenizer.pad_token == model.tokenizer.eos_token
        assert any("'<PAD>'" in note and "padding is masked" in note for note in model.notes)
        plain = build(architecture(name), pooling)
        batch = sentences(model).batch([0, 2])
        torch.testing.assert_close(model.loss(batch), plain.loss(sentences(plain).batch([0, 2])))


def test_a_damaged_or_absent_file_of_weights_is_named(architecture: Architecture, tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 90868376\n"
    for file in ("model.safetensors", "tokenizer.json"):
        folder = shutil.copytree(architecture("BertModel"), tmp_path / file)
        (folder / file).write_text(pointer)
        assert f"{file} is a Git LFS pointer" in refusal(folder)
    folder = shutil.copytree(architecture("BertModel"), tmp_path / "short")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "a file of weights is damaged or cut short" in refusal(folder)
    gguf = tmp_path / "m.gguf"
    gguf.write_text(pointer)
    assert "m.gguf is a Git LFS pointer" in refusal(gguf, "causal")


@pytest.mark.parametrize("content", [b"GGUF\x03\x00\x00\x00", b"GGUF" + b"\xff" * 60, b""])
def test_a_short_gguf_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "m.gguf").write_bytes(content)
    assert "cannot be read as a GGUF language model" in refusal(tmp_path / "m.gguf", "causal")


@pytest.mark.parametrize(("name", "longest"), [("RobertaModel", 62), ("MPNetModel", 62), ("BertModel", 64)])
def test_positions_are_counted_from_the_padding_index(
    architecture: Architecture, name: str, longest: int
) -> None:
    build(architecture(name), max_length=longest)
    said = refusal(architecture(name), max_length=longest + 1)
    assert f"data.max_length = {longest + 1} exceeds the {longest} tokens" in said


def test_a_model_without_bound_takes_any_length(architecture: Architecture) -> None:
    model = build(architecture("XLNetModel"), peft="full", max_length=500)
    ids = torch.full((1, 500), 5)
    assert torch.isfinite(model.module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits).all()


OWN = ["AlbertModel", "BartModel", "BertModel", "DebertaV2Model", "DistilBertModel", "ElectraModel"]
OWN += ["GPT2LMHeadModel", "LlamaForCausalLM", "ModernBertModel", "RobertaModel", "T5Model"]


@pytest.mark.parametrize("peft", ["lora", "head"])
@pytest.mark.parametrize("name", quick(OWN, "BertModel", "GPT2LMHeadModel", "T5Model"))
def test_every_tensor_of_an_own_head_is_trained(architecture: Architecture, name: str, peft: str) -> None:
    model = build(architecture(name), "own", peft)
    backbone: Any = model.module.backbone
    plain = backbone.get_base_model() if peft == "lora" else backbone
    inside = plain.base_model
    around = sum(p.numel() for p in plain.parameters()) - sum(p.numel() for p in inside.parameters())
    head = {name: p for name, p in model.trainable().items() if ".lora_" not in name}
    # peft keeps the head as it was beside the copy that is trained.
    assert sum(p.numel() for p in head.values()) == (around // 2 if peft == "lora" else around)
    model.loss(sentences(model).batch([0, 1, 2])).backward()
    assert all(p.grad is not None and p.grad.any() for p in head.values())


@pytest.mark.parametrize("name", ["RobertaModel", "ElectraModel", "DistilBertModel"])
def test_an_own_head_is_saved_for_plain_peft(architecture: Architecture, name: str, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForSequenceClassification

    model = build(architecture(name), "own")
    model.write({name: tensor + 0.1 for name, tensor in model.read().items()})
    place = save(model, tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(architecture(name), num_labels=3)
    stock = peft.PeftModel.from_pretrained(plain, str(place)).eval()
    ids, mask, *_ = sentences(model).batch([0, 1, 2])
    model.module.eval()
    torch.testing.assert_close(
        model.module(ids, mask).logits, stock(input_ids=ids, attention_mask=mask).logits
    )


def test_a_checkpoints_own_head_is_put_into_the_order_of_the_datas_classes(
    changed: Changed, architecture: Architecture
) -> None:
    from transformers import AutoModelForSequenceClassification

    theirs = {"0": "metal", "1": "animal", "2": "fruit"}
    folder = changed("BertForSequenceClassification", id2label=theirs)
    stock: Any = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    for peft in ("full", "head", "bitfit", "bottleneck", "lora"):
        model = build(folder, "own", peft)
        ids, mask, *_ = sentences(model).batch([0, 1])
        logits = stock(input_ids=ids, attention_mask=mask).logits
        expected = torch.stack([logits[:, 1], logits[:, 2], logits[:, 0]], dim=1)
        model.module.eval()
        torch.testing.assert_close(model.module(ids, mask).logits, expected)
        assert any("classifier" in name for name in model.trainable())
        assert any("order of the data's classes: animal, fruit, metal" in note for note in model.notes)


def test_a_head_of_other_classes_is_refused_or_replaced_aloud(changed: Changed, tmp_path: Path) -> None:
    folder = changed("BertForSequenceClassification", id2label={"0": "x", "1": "y", "2": "z"})
    said = refusal(folder, "own")
    assert "its own head tells x, y, z apart, the data's classes are animal, fruit, metal" in said
    build(folder, "mean")


def test_a_head_of_another_size_starts_afresh(changed: Changed) -> None:
    folder = changed(
        "BertForSequenceClassification",
        lambda tensors: (
            tensors | {"classifier.weight": torch.zeros(2, 32), "classifier.bias": torch.zeros(2)}
        ),
        id2label={"0": "x", "1": "y"},
    )
    model = build(folder, "own")
    assert any("knows 2 classes (x, y), not these: it starts afresh" in note for note in model.notes)


def test_a_moved_base_is_found_or_its_setting_named(
    architecture: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = architecture("BertModel")
    gone = tmp_path / "gone" / "BertModel"
    said = refusal(gone)
    assert "there is no such folder" in said
    assert "set FEDLLM_MODELS to the folder that holds 'BertModel' now" in said
    monkeypatch.setenv("FEDLLM_MODELS", str(folder.parent))
    model = build(gone)
    assert model.config.model.name == str(gone)
    assert all(
        torch.equal(a, b) for a, b in zip(model.read().values(), build(folder).read().values(), strict=True)
    )
