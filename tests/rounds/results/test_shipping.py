"""``fedllm export --format``: what other runtimes load says what the run's own model says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import onnx
import onnxruntime
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedllm.errors import ConfigError, RunFailed
from simulations.results.options import Format
from simulations.results.predict import export, plain_model, tokenizer
from simulations.results.shipping import gguf_files
from simulations.results.shipping import ship as shipping
from simulations.results.shipping.ship import ship
from tests.parts import quick
from tests.rounds.federation import configuration, run

TEXTS = ["the apple and one old pear", "zinc", "we saw a heron near the otter again today"]


def trained(base: Path, texts: Path, folder: Path, **sections: Any) -> Path:
    run(configuration(base, texts, rounds=1, method="lora", **sections), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def encoder_run(tiny_encoder: Path, tiny_texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tiny_encoder, tiny_texts, tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def causal_run(tiny_causal: Path, tiny_texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tuned = {"rank": 2, "alpha": 4.0, "targets": ("q_proj", "v_proj")}
    model = {"name": str(tiny_causal), "task": "causal"}
    return trained(tiny_causal, tiny_texts, tmp_path_factory.mktemp("causal"), tuning=tuned, model=model)


@pytest.fixture(scope="module")
def bytes_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers x 64, more heads than keys, with a tokenizer of bytes that llama.cpp knows."""
    folder = tmp_path_factory.mktemp("bytes")
    inside = Tokenizer(models.BPE())
    inside.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inside.decoder = decoders.ByteLevel()
    learning = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inside.train_from_iterator([*TEXTS, "since 123456"] * 20, learning)
    PreTrainedTokenizerFast(
        tokenizer_object=inside, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        config = LlamaConfig(vocab_size=328, initializer_range=0.2, **sizes, **heads, **ends)
        LlamaForCausalLM(config).save_pretrained(folder)  # embeddings of eight tokens that nobody has
    return folder


@pytest.fixture(scope="module")
def llama_run(bytes_llama: Path, tiny_texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tuned = {"rank": 2, "alpha": 4.0, "targets": ("q_proj", "k_proj")}
    model = {"name": str(bytes_llama), "task": "causal"}
    return trained(bytes_llama, tiny_texts, tmp_path_factory.mktemp("llama"), tuning=tuned, model=model)


def own_logits(folder: Path) -> tuple[dict[str, Any], torch.Tensor]:
    """Tokens of a few texts, and what the run's model says of those that are no padding."""
    asked = tokenizer(folder)(TEXTS, return_tensors="pt", padding=True)
    with torch.inference_mode():
        logits = plain_model(folder)(**asked).logits
    return asked, logits if logits.dim() == 2 else logits[asked["attention_mask"].bool()]


def in_onnx_runtime(place: Path, asked: dict[str, Any]) -> torch.Tensor:
    session = onnxruntime.InferenceSession(place / "model.onnx", providers=["CPUExecutionProvider"])
    logits = torch.from_numpy(session.run(["logits"], {name: asked[name].numpy() for name in asked})[0])
    return logits if logits.dim() == 2 else logits[asked["attention_mask"].bool()]


def test_a_merged_model_needs_no_peft(causal_run: Path, tmp_path: Path) -> None:
    place, _ = ship(causal_run, tmp_path / "out", "merged")
    asked, ours = own_logits(causal_run)
    with torch.inference_mode():
        loaded = AutoModelForCausalLM.from_pretrained(place)(**asked).logits[asked["attention_mask"].bool()]
    torch.testing.assert_close(loaded, ours, rtol=1e-4, atol=1e-5)
    assert "lora" not in " ".join(AutoModelForCausalLM.from_pretrained(place).state_dict())
    assert "AutoModelForCausalLM.from_pretrained" in (place / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder_run", "causal_run"])
def test_a_graph_says_what_the_run_says_at_any_size(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    place, compared = ship(folder, tmp_path / "out", "onnx", check=True)
    asked, ours = own_logits(folder)
    torch.testing.assert_close(in_onnx_runtime(place, asked), ours, rtol=1e-4, atol=1e-5)
    assert compared is not None
    assert compared.score == pytest.approx(compared.run_score, rel=1e-4)
    assert compared.difference < 1e-4
    assert json.loads((place / "fedllm.json").read_bytes())["runtime"] == "onnxruntime"


@pytest.mark.slow
def test_eight_bits_are_smaller_and_said_to_differ(encoder_run: Path, tmp_path: Path) -> None:
    whole, _ = ship(encoder_run, tmp_path / "whole", "onnx")
    place, compared = ship(encoder_run, tmp_path / "small", "int8", check=True)
    assert (place / "model.onnx").stat().st_size < (whole / "model.onnx").stat().st_size
    assert compared is not None
    assert 1e-4 < compared.difference < 0.5


@pytest.mark.slow
def test_four_bits_are_half_of_eight_and_said_to_differ(encoder_run: Path, tmp_path: Path) -> None:
    place, compared = ship(encoder_run, tmp_path / "four", "int4", check=True)
    kinds = {node.op_type for node in onnx.load(place / "model.onnx").graph.node}
    assert {"MatMulNBits", "GatherBlockQuantized"} <= kinds
    assert "MatMul" not in {
        node.op_type for node in onnx.load(place / "model.onnx").graph.node if "weight" in str(node.input)
    }
    assert compared is not None
    assert 1e-4 < compared.difference < 0.5
    assert compared.metric == "accuracy"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "packed", "off"),
    [("gguf", {"F16"}, 1e-2), ("gguf-q8_0", {"Q8_0"}, 5e-2), ("gguf-q4_k", {"Q5_0", "Q8_0"}, 3e-1)],
)
def test_a_llama_says_in_llama_cpp_what_the_run_says(
    form: Format, packed: set[str], off: float, llama_run: Path, tmp_path: Path
) -> None:
    place, compared = ship(llama_run, tmp_path / "out", form, check=True)
    assert compared is not None
    assert 0 < compared.difference < off
    assert compared.score == pytest.approx(compared.run_score, rel=off)
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(place / "model.gguf").tensors}
    assert {one.tensor_type.name for name, one in held.items() if ".attn_q.weight" in name} <= packed
    assert held["blk.1.attn_norm.weight"].tensor_type.name == "F32"
    asked, ours = own_logits(llama_run)
    theirs = AutoModelForCausalLM.from_pretrained(place, gguf_file="model.gguf", dtype=torch.float32)
    with torch.inference_mode():
        loaded = theirs(**asked).logits[asked["attention_mask"].bool()]
    assert (loaded - ours).norm() / ours.norm() < off
    assert "llama-cli" in (place / "README.md").read_text()


@pytest.mark.parametrize("kind", ["encoder_run", "causal_run"])
def test_what_llama_cpp_does_not_hold_is_refused(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """An encoder, and a Llama whose tokenizer splits texts at spaces."""
    said = {"encoder_run": "answers by mean", "causal_run": "tokenizers of bytes"}[kind]
    with pytest.raises(ConfigError, match=said):
        ship(request.getfixturevalue(kind), tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_tokenizer_that_llama_cpp_reads_otherwise_is_found(
    llama_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_files, "_splitting", lambda tokenizer: "llama-bpe")
    with pytest.raises(RunFailed, match="splits texts otherwise"):
        ship(llama_run, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_student_is_a_plain_model_already(tiny_encoder: Path, tiny_texts: Path, tmp_path: Path) -> None:
    run(configuration(tiny_encoder, tiny_texts, rounds=1, method="fedkd"), tmp_path / "run")
    place, compared = ship(tmp_path / "run", tmp_path / "out", "merged", check=True)
    assert (place / "model.safetensors").exists()
    assert compared is not None
    assert compared.score == compared.run_score


@pytest.mark.slow
def test_what_differs_is_not_left_behind(
    encoder_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping, "_difference", lambda *_: 0.01)
    with pytest.raises(RunFailed, match=r"its scores are 1\.0% off"):
        ship(encoder_run, tmp_path / "out", "merged")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_else_lies_in_the_folder_stays(
    encoder_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs").touch()
    with monkeypatch.context() as patched:
        patched.setattr(shipping, "_difference", lambda *_: 0.01)
        with pytest.raises(RunFailed):
            ship(encoder_run, tmp_path, "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    ship(encoder_run, tmp_path, "merged")
    with pytest.raises(ConfigError, match="exists already"):
        ship(encoder_run, tmp_path, "merged")


@pytest.mark.parametrize("form", quick(["merged", "onnx"], "merged"))
def test_an_adapter_that_no_weights_can_hold_is_refused(
    form: Format, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    folder = trained(tiny_encoder, tiny_texts, tmp_path, tuning={"peft": "bottleneck", "rank": 2})
    with pytest.raises(ConfigError, match=r'tuning\.peft = "bottleneck" is none'):
        ship(folder, tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_told_which_of_two_texts_a_token_is_in_is_no_graph_of_ids_and_mask(
    tiny_encoder: Path, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    texts = tmp_path / "pairs.jsonl"
    texts.write_text("".join(json.dumps({**row, "second": row["text"][::-1]}) + "\n" for row in rows))
    encoder = shutil.copytree(tiny_encoder, tmp_path / "encoder")
    settings = json.loads((encoder / "tokenizer_config.json").read_bytes())
    settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (encoder / "tokenizer_config.json").write_text(json.dumps(settings))
    data = {"path": str(texts), "pair": "second", "max_length": 16}
    run(configuration(encoder, texts, rounds=1, data=data), tmp_path / "run")
    with pytest.raises(ConfigError, match="which of two texts a token is in: take --format merged"):
        ship(tmp_path / "run", tmp_path / "graph", "int8")
    assert tokenizer(tmp_path / "run").model_input_names == ["input_ids", "attention_mask", "token_type_ids"]
    assert (export(tmp_path / "run", tmp_path / "out") / "README.md").is_file()
