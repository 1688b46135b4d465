"""The real bundled models, whole."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedllm.config import DataConfig, ModelConfig, RunConfig, TuningConfig
from fedllm.data.bundled import MODELS, model_source
from fedllm.data.corpus import Corpus, split
from fedllm.data.corpus import load as load_texts
from fedllm.models.evaluation import evaluate
from fedllm.models.model import Model, load
from fedllm.tensors import fingerprint
from tests.parts import task_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One conversion for all tests, away from the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def news() -> tuple[Corpus, Corpus]:
    return split(load_texts(DataConfig(), task_of("classification")), 0.2, 0)


def test_minilm_knows_which_sentences_mean_the_same(minilm: Model) -> None:
    texts = ["A man is eating food.", "A man eats something.", "The stock market fell sharply."]
    encoded = minilm.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        vectors = minilm.module.features(encoded["input_ids"], encoded["attention_mask"])
    unit = vectors / vectors.norm(dim=-1, keepdim=True)
    near, far = float(unit[0] @ unit[1]), float(unit[0] @ unit[2])
    assert near > 0.7 > 0.2 > far


def test_quickstart_adapter_has_75653_parameters(minilm: Model) -> None:
    assert sum(p.numel() for p in minilm.trainable().values()) == 75_653


@pytest.mark.parametrize("name", list(MODELS))
def test_beginnings_give_the_tokens_of_whole_articles(name: str, news: tuple[Corpus, Corpus]) -> None:
    """Both tokenizer families: word pieces and byte pairs."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_source(name))
    _, test = news
    tokens = task_of("causal").encode(test, tokenizer, 64)
    expected = tokenizer(test.texts, truncation=True, max_length=64)["input_ids"]
    for index, ids in enumerate(expected):
        assert tokens.batch([index]).input_ids[0].tolist() == ids


def test_smollm2_from_the_cache_is_the_gguf_model(news: tuple[Corpus, Corpus]) -> None:
    from transformers import AutoModelForCausalLM

    config = RunConfig(
        model=ModelConfig(name="smollm2", task="causal"),
        data=DataConfig(max_length=32),
        tuning=TuningConfig(targets=("q_proj", "v_proj")),
    )
    model = load(config, ())
    again = load(config, ())
    assert fingerprint(again.read()) == fingerprint(model.read())
    package, file = MODELS["smollm2"]
    found = importlib.util.find_spec(package)
    assert found is not None
    assert found.origin is not None
    stock = AutoModelForCausalLM.from_pretrained(
        Path(found.origin).parent, gguf_file=file, dtype=torch.float32
    )
    batch = task_of("causal").encode(news[1].subset(range(4)), model.tokenizer, 32).batch(range(4))
    with torch.no_grad():
        ours = model.forward(batch)
        theirs = stock(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    torch.testing.assert_close(ours.loss, theirs.loss)
    tokens = task_of("causal").encode(news[1].subset(range(16)), model.tokenizer, 32)
    assert 5 < evaluate(model, tokens, 16)["perplexity"] < 150
