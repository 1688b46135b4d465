"""What a model writes is what it would write if it read everything anew for every token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedllm.config import RunConfig
from fedllm.errors import ConfigError, ModelError
from fedllm.models.generation import Generator, Sampling, end_tokens, generate, pieces
from fedllm.models.model import Model, load
from tests.architectures import ARCHITECTURES, Architecture
from tests.models import matrix
from tests.parts import quick
from tests.talking import tokenizer

PROMPTS = [[5, 9, 7], [6, 5, 12, 9, 8, 20], [11], [6, 5, 12, 9, 8, 21], [14, 13]]

LLAMA = {*matrix.names(), "full"} - {"head", "adaption-prompt", "adamss"}
"""What attaches to a Llama without a further package."""

READ_ANEW = {"lily", "shadow"}
"""One looks at all tokens at once, the other keeps a state of its own."""

CAUSAL = [name for name in ARCHITECTURES if name.endswith("ForCausalLM") or name == "GPT2LMHeadModel"]


def opened(base: Path | str, peft: str = "lora", **sections: Any) -> Model:
    """Return a causal model whose trained tensors are anything but what they were."""
    model = load(
        RunConfig.model_validate(
            {
                "model": {"name": str(base), "task": "causal"},
                "data": {"max_length": 12},
                "tuning": {"peft": peft, "rank": 4, "options": matrix.OPTIONS.get(peft, {})},
                **sections,
            }
        ),
        (),
    )
    noise = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.3)
    return model


def naive(model: Model, prompt: Sequence[int], new_tokens: int, window: int = 64) -> list[int]:
    """Greedily, one text at a time, everything anew."""
    ids = list(prompt)
    model.module.eval()
    with torch.no_grad():
        for _ in range(new_tokens):
            seen = torch.tensor([ids[-window:]])
            best = int(model.module(seen, torch.ones_like(seen)).logits[0, -1].argmax())
            if best == 3:
                break
            ids.append(best)
    return ids[len(prompt) :]


def widths(model: Model) -> list[list[int]]:
    """Return a list that fills with the shapes of what the transformers model reads."""
    found: list[list[int]] = []
    backbone: Any = model.module.backbone
    plain = backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone

    def note(module: nn.Module, args: Any, given: dict[str, Any]) -> None:
        read = given.get("input_ids")
        found.append(list((given["inputs_embeds"] if read is None else read).shape[:2]))

    plain.register_forward_pre_hook(note, with_kwargs=True)
    return found


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch, about how peft's frod works
@pytest.mark.parametrize("peft", quick(sorted(LLAMA), "lora", "prompt", "prefix"))
def test_every_adapter_writes_the_same_with_what_it_keeps(peft: str) -> None:
    model = opened(matrix.folder("Llama"), peft)
    found = generate(model, PROMPTS, 8)
    assert found == [naive(model, prompt, 8) for prompt in PROMPTS]
    assert bool(Generator(model).uncached) == (peft in READ_ANEW)


@pytest.mark.parametrize("name", quick(CAUSAL, "GPT2LMHeadModel", "MambaForCausalLM"))
def test_every_architecture_writes_the_same(architecture: Architecture, name: str) -> None:
    model = opened(architecture(name))
    assert generate(model, PROMPTS, 8) == [naive(model, prompt, 8) for prompt in PROMPTS]


@pytest.mark.parametrize("peft", quick(["lora", "full"], "lora"))
@pytest.mark.parametrize("kind", quick(["T5", "Bart"], "T5"))
def test_an_encoder_with_a_decoder_writes_the_same(architecture: Architecture, kind: str, peft: str) -> None:
    name = f"{kind}ForConditionalGeneration"
    model = opened(architecture(name), peft, model={"name": str(architecture(name)), "task": "seq2seq"})
    backbone: Any = model.module.eval().backbone
    expected = []
    for source in PROMPTS:
        written = [2]  # decoder_start_token_id
        with torch.no_grad():
            for _ in range(7):
                ids, decoded = torch.tensor([source]), torch.tensor([written])
                mask = torch.ones_like(ids)
                raw = backbone(input_ids=ids, attention_mask=mask, decoder_input_ids=decoded)
                if (best := int(raw.logits[0, -1].argmax())) == 3:
                    break
                written.append(best)
        expected.append(written[1:])
    assert generate(model, PROMPTS, 7) == expected
    assert len(set(map(tuple, expected))) > 1
    writer = Generator(model)
    assert not writer.uncached
    if name.startswith("Bart"):
        assert len(next(iter(writer.complete(PROMPTS[:1], 80)))) <= 64  # it has no more positions


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_of_real_size_keeps_what_it_read(dtype: str) -> None:
    """Rounding in thirty layers is a hundred times that in two."""
    writer = Generator(opened("", model={"name": "smollm2", "task": "causal", "dtype": dtype}))
    assert writer.uncached == ""


def test_an_adapter_that_looks_at_all_tokens_keeps_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Lily's router takes a mean over the tokens it is given."""
    model = opened(matrix.folder("Llama"), "lily")
    assert Generator(model).uncached == (
        "LlamaForCausalLM with tuning.peft = 'lily' scores a token otherwise then"
    )
    assert generate(model, PROMPTS, 3) == [naive(model, prompt, 3) for prompt in PROMPTS]
    assert "every new token reads all before it again" in caplog.text
    writer, read = Generator(model), widths(model)
    assert list(writer.write(PROMPTS[1], 3)) == naive(model, PROMPTS[1], 3)
    assert read[:3] == [[1, 6], [1, 7], [1, 8]]


def test_what_was_read_is_not_read_again(tiny_causal: Path) -> None:
    model = opened(tiny_causal)
    writer, read = Generator(model), widths(model)
    assert len(list(writer.write(PROMPTS[1], 4))) == 4
    assert read == [[1, 6], [1, 1], [1, 1], [1, 1]]
    read.clear()
    writer.complete(PROMPTS, 3)
    assert read == [[5, 6], [5, 1], [5, 1]]


def test_virtual_tokens_are_read_once_and_never_behind_padding(tiny_causal: Path) -> None:
    model = opened(tiny_causal, "prompt")
    writer, read = Generator(model), widths(model)
    writer.complete(PROMPTS, 2)
    assert sorted(read) == sorted([[1, 21], [1, 22], [1, 23], [2, 26], [1, 1], [1, 1], [1, 1], [2, 1]])


def test_batches_are_as_large_as_those_of_an_evaluation(tiny_causal: Path) -> None:
    model = opened(tiny_causal, evaluation={"batch_size": 2})
    writer, read = Generator(model), widths(model)
    found = writer.complete(PROMPTS, 1)
    assert read == [[2, 2], [2, 6], [1, 6]]
    assert found == [naive(model, prompt, 1) for prompt in PROMPTS]


def test_a_text_longer_than_the_model_s_positions_goes_on_with_its_end(architecture: Architecture) -> None:
    model = opened(architecture("GPT2LMHeadModel"))
    long = [5 + index % 17 for index in range(60)]
    assert model.positions == 64
    writer, read = Generator(model), widths(model)
    found = writer.complete([long, long * 2], 9)
    assert {batch for batch, _ in read} == {2}  # also where positions are numbers
    assert found == [naive(model, long, 9), naive(model, long * 2, 9)]


def test_a_text_ends_where_model_tokenizer_or_caller_say(tiny_causal: Path) -> None:
    model = opened(tiny_causal, "full")
    assert end_tokens(model) == {3}
    told = {tuple(prompt): naive(model, prompt, 6) for prompt in PROMPTS}
    # None of the first three comes earlier than it should.
    prompt, found = next((p, f) for p, f in told.items() if len(set(f[:3])) == 3)
    assert generate(model, [prompt], 6, ends={found[2]}) == [found[:2]]
    base: Any = model.module.backbone
    base.generation_config.eos_token_id = None
    assert end_tokens(model) == {3}
    base.generation_config.eos_token_id = [3, found[1]]
    assert end_tokens(model) == {3, found[1]}
    assert list(Generator(model).write(prompt, 6)) == found[:1]


@pytest.mark.slow
def test_draws_follow_the_probabilities_and_the_seed(tiny_causal: Path) -> None:
    model = opened(tiny_causal, evaluation={"batch_size": 512})
    seen = torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        logits = model.module.eval()(seen, torch.ones_like(seen)).logits[0, -1].double()
    expected = (logits / 0.7).softmax(0)
    count = 2000
    warm = Sampling(temperature=0.7, seed=5)
    drawn = [tokens or [3] for tokens in generate(model, [PROMPTS[1]] * count, 1, warm)]
    seen_often = Counter(token for (token,) in drawn)
    for token, probability in enumerate(expected.tolist()):
        # Five standard deviations of a binomial count.
        spread = (count * probability * (1 - probability)) ** 0.5
        assert abs(seen_often[token] - count * probability) <= 5 * spread + 1
    assert generate(model, [PROMPTS[1]] * 20, 1, warm) == generate(model, [PROMPTS[1]] * 20, 1, warm)
    assert generate(model, [PROMPTS[1]] * 20, 1, warm) != generate(
        model, [PROMPTS[1]] * 20, 1, replace(warm, seed=6)
    )
    likely = expected.sort(descending=True)
    kept = int((likely.values.cumsum(0) < 0.3).sum()) + 1
    narrow = generate(model, [PROMPTS[1]] * 500, 1, replace(warm, top_p=0.3))
    often = Counter((tokens or [3])[0] for tokens in narrow)
    assert set(often) == set(likely.indices[:kept].tolist())
    for token, probability in zip(likely.indices[:kept].tolist(), likely.values[:kept].tolist(), strict=True):
        share = probability / float(likely.values[:kept].sum())
        assert abs(often[token] - 500 * share) <= 5 * (500 * share * (1 - share)) ** 0.5 + 1
    tiny = replace(warm, top_p=1e-9)  # the likeliest always stays
    assert generate(model, PROMPTS, 4, tiny) == generate(model, PROMPTS, 4)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"temperature": -1.0}, "temperature = -1 must be 0"),
        ({"temperature": float("nan")}, "temperature = nan must be"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p = 0 must be above 0 and at most 1"),
        ({"top_p": 0.9}, "top_p = 0.9 has no effect .* set a temperature"),
        ({"seed": 4}, "seed = 4 has no effect .* set a temperature"),
    ],
)
def test_a_setting_out_of_range_is_named(settings: dict[str, float], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Sampling(**settings)  # type: ignore[arg-type]


def test_modes_and_random_numbers_are_left_as_they_were(tiny_causal: Path) -> None:
    model = opened(tiny_causal)
    model.module.train()
    state = torch.random.get_rng_state()
    assert generate(model, PROMPTS, 3, Sampling(temperature=1.0))
    assert all(part.training for part in model.module.modules())
    written = Generator(model).write(PROMPTS[0], 3)
    assert next(written) not in (3, None)
    del written  # nobody reads on
    assert all(part.training for part in model.module.modules())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_prompt_without_a_token_and_a_model_without_numbers(tiny_causal: Path) -> None:
    model = opened(tiny_causal)
    with pytest.raises(ModelError, match="nothing to continue"):
        generate(model, [[5], []], 1)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.fill_(float("nan"))
    with pytest.raises(ModelError, match="has diverged"):
        generate(model, PROMPTS, 1)


@pytest.mark.parametrize(
    "text",
    ["hello 👩‍👩‍👧 ü €", "日本語\r\n", "مرحبا", "a\ufffd\ufffdb", "", "🏳️‍🌈", "\x1b[2J\x00"],
    ids=["family", "japanese", "arabic", "replaced", "empty", "flag", "control"],
)
def test_text_comes_in_whole_characters(text: str) -> None:
    words = tokenizer()
    ids = words(text, add_special_tokens=False)["input_ids"]
    found = list(pieces(words, ids))
    assert "".join(found) == text
    assert all(piece and (piece in text) for piece in found)
    if text.startswith("hello"):
        assert "👩" in found  # four tokens, one piece


def test_half_a_character_at_the_end_is_said_to_be_one() -> None:
    words = tokenizer()
    ids = words("a👩", add_special_tokens=False)["input_ids"]
    assert "".join(pieces(words, ids[:-1])) == "a\N{REPLACEMENT CHARACTER}"


def test_a_continuation_begins_as_the_text_goes_on(tiny_causal: Path) -> None:
    from transformers import AutoTokenizer

    words: Any = AutoTokenizer.from_pretrained(tiny_causal)
    assert "".join(pieces(words, [5, 6])) == "the a"
    assert "".join(pieces(words, [5, 6], before=[2, 7])) == " the a"
