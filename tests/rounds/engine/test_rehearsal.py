"""What cannot be trained is said before the first round, and looking for it changes no bit of a run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedllm.errors import ConfigError, FedllmError, ModelError
from fedllm.models.network import Output
from fedllm.runs.reader import Run
from fedllm.tensors import fingerprint
from server.rounds.rehearsal import few_texts, rehearse
from strategies.session import Session
from strategies.tryout import require_apart, require_gradients
from tests.architectures import Architecture
from tests.conftest import CLASSES
from tests.parts import quick
from tests.rounds.federation import configuration, run

PROMPT = {"peft": "prompt", "rank": 2}
CHECKPOINTING = {"training": {"local_steps": 1, "batch_size": 4, "gradient_checkpointing": True}}
LEAN = {"training": {"memory": "lean"}}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "model": {"dropout": 0.2}},
    "alternate": {"method": "lora", "options": {"rule": "alternate"}},
    "fedavg": {"method": "fedavg", "tuning": {}},
    "fedkd": {"method": "fedkd", "model": {"dropout": 0.2}},
    "fwdllm": {"method": "fwdllm", "options": {"directions": 3}},
    "mezo": {"method": "mezo"},
}


def session_of(encoder: Path, texts: Path, **sections: Any) -> Session:
    model = {"name": str(encoder), **sections.pop("model", {})}
    return Session(configuration(encoder, texts, model=model, **sections))


@pytest.mark.parametrize("method", quick(METHODS, "fedkd", "fwdllm"))
def test_a_rehearsal_leaves_no_trace(tiny_encoder: Path, tiny_texts: Path, method: str) -> None:
    session = session_of(tiny_encoder, tiny_texts, **METHODS[method])
    before = {name: tensor.clone() for name, tensor in session.initial.items()}
    whole = {name: tensor.clone() for name, tensor in session.model.module.state_dict().items()}
    state = torch.get_rng_state()
    session.model.module.train()
    rehearse(session)
    assert torch.equal(torch.get_rng_state(), state)
    assert session.model.module.training
    assert all(parameter.grad is None for parameter in session.model.module.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in session.model.read().items())
    assert all(torch.equal(whole[name], tensor) for name, tensor in session.model.module.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("method", quick(["lora", "fedkd", "fwdllm"], "lora"))
def test_a_rehearsal_changes_no_bit_of_a_run(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    sections = {"rounds": 2, **METHODS[method]}
    model = {"name": str(tiny_encoder), **sections.pop("model", {})}
    told = []
    for number, skipped in enumerate((False, True)):
        # A name of its own keeps the second run from sharing the first one's model.
        config = configuration(tiny_encoder, tiny_texts, model=model, **sections).model_copy(
            update={"name": f"run{number}"}
        )
        if skipped:
            monkeypatch.setattr("server.rounds.conduct.rehearse", lambda session: [])
        run(config, tmp_path / str(number))
        told.append(json.loads((tmp_path / str(number) / "summary.json").read_text())["state_sha256"])
    assert told[0] == told[1]


def test_factors_that_wait_for_each_other_are_told_from_dead_ones() -> None:
    def factors(*values: float) -> dict[str, nn.Parameter]:
        return {str(i): nn.Parameter(torch.full((2,), value)) for i, value in enumerate(values)}

    def product(parts: dict[str, nn.Parameter]) -> torch.Tensor:
        value = torch.ones(2)
        for part in parts.values():
            value = value * part
        return value.sum()

    waiting = factors(1.0, 0.0)
    require_gradients(waiting, lambda: product(waiting))
    dead = factors(0.0, 0.0)
    with pytest.raises(ModelError, match="0 gets no gradient, 2 of 2 tensors"):
        require_gradients(dead, lambda: product(dead))
    broken = factors(1.0)
    with pytest.raises(ModelError, match="the loss is inf before"):
        require_gradients(broken, lambda: (broken["0"] / 0).sum())
    root = factors(0.0)
    with pytest.raises(ModelError, match="gradient of 0 is not finite"):
        require_gradients(root, lambda: root["0"].sqrt().sum())


@pytest.mark.parametrize("method", ["lora", "fwdllm", "mezo"])
def test_a_head_that_is_gone_around_is_found(tiny_encoder: Path, tiny_texts: Path, method: str) -> None:
    session = session_of(tiny_encoder, tiny_texts, **METHODS[method])
    head = session.model.module.head
    assert head is not None
    idle = nn.Linear(head.in_features, head.out_features)
    head.forward = idle.forward  # type: ignore[method-assign]  # as a wrapper would that trains a copy
    with pytest.raises(
        ModelError,
        match=rf"method = '{method}'.* head.bias (gets no gradient|moves no loss), 2 of 10 tensors",
    ):
        rehearse(session)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"method": "lora", "codec": {"up": 'per_tensor("*nothing*"=none, matrices=quantize(bits=8))'}},
            r"codec.up = .* does not fit .*'\*nothing\*'",
        ),
        (
            {"method": "lora", "codec": {"down": 'per_tensor("*nothing*"=none, matrices=quantize(bits=8))'}},
            r"codec.down = .* does not fit .*'\*nothing\*'",
        ),
        ({"method": "fedkd", "tuning": PROMPT}, "'prompt' puts tokens .* set fedkd.attention = false"),
        ({"method": "fedkd", **CHECKPOINTING}, "gradient_checkpointing .* fedkd.attention compares"),
        ({"method": "fwdllm", **CHECKPOINTING}, "gradient_checkpointing = true is for backward passes"),
        ({"method": "mezo", **LEAN}, 'training.memory = "lean" is for backward passes, and mezo makes none'),
        ({"method": "fedkd", "model": {"task": "causal"}, **LEAN}, 'keeps no logits, which method = "fedkd"'),
        (
            {"method": "lora", "tuning": {"peft": "prefix"}, **CHECKPOINTING},
            "gradient_checkpointing .* without the prefixes",
        ),
        (
            {"method": "fwdllm", "tuning": {"peft": "loha", "rank": 2}},
            'no forward derivative .*; take the estimator "antithetic"',
        ),
    ],
)
def test_what_cannot_work_is_said_before_there_is_a_folder(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, sections: dict[str, Any], words: str
) -> None:
    with pytest.raises((ConfigError, ModelError), match=words) as caught:
        run(configuration(tiny_encoder, tiny_texts, **sections), tmp_path / "run")
    assert isinstance(caught.value, FedllmError)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_refusal_names_the_options_that_were_chosen_and_no_default(
    tiny_encoder: Path, tiny_texts: Path
) -> None:
    sections = {
        "method": "fedkd",
        "tuning": {"peft": "prompt", "options": {"num_virtual_tokens": 2}},
        "options": {"layers": 1, "temperature": 1.0},
    }
    with pytest.raises(ModelError) as caught:
        rehearse(Session(configuration(tiny_encoder, tiny_texts, **sections)))
    chosen = str(caught.value).partition(" cannot train ")[0]
    assert chosen == "method = 'fedkd', tuning.peft = 'prompt', fedkd.layers = 1"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantize", "peft", "method", "words"),
    [
        ("int8", "dora", "lora", "model.quantize = 'int8' cannot train"),
        ("nf4", "loha", "lora", "model.quantize = 'nf4' cannot train"),
        ("nf4", "hra", "lora", "model.quantize = 'nf4' cannot train"),
        # Four-bit products drop the tangent without a word.
        ("nf4", "lora", "fwdllm", "slopes by jvp miss the gradient"),
    ],
)
def test_what_a_quantised_base_cannot_do_is_said(
    tiny_causal: Path, tiny_texts: Path, quantize: str, peft: str, method: str, words: str
) -> None:
    model = {"name": str(tiny_causal), "task": "causal", "quantize": quantize}
    session = Session(
        configuration(tiny_causal, tiny_texts, model=model, tuning={"peft": peft, "rank": 2}, method=method)
    )
    with pytest.raises(ModelError, match=words):
        rehearse(session)


def test_a_gradient_that_is_no_number_shows_nothing() -> None:
    """The second step overflows, and nought times infinity is no number: the idle tensor is still idle."""
    steps, idle = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(1))
    scales = iter([0.0, *[float("nan")] * 9])

    def loss() -> torch.Tensor:
        return steps.sum() + next(scales) * idle.sum()

    with pytest.raises(ModelError, match="idle gets no gradient, 1 of 2 tensors"):
        require_gradients({"steps": steps, "idle": idle}, loss)


# --- without a backward pass --------------------------------------------------------------------------


class NoBackward(torch.autograd.Function):
    """As a kernel that somebody wrote for inference: autograd raises NotImplementedError."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


HALF_BLIND = {
    "raises": lambda hidden: NoBackward.apply(hidden),  # type: ignore[no-untyped-call]
    "cuts": lambda hidden: hidden.detach(),
}
"""What a base without a backward pass makes of a gradient: an error, or nothing."""
PROBES = {
    "fwdllm": {"method": "fwdllm", "options": {"directions": 2, "estimator": "antithetic"}},
    "mezo": {"method": "mezo"},
}


def blinded(session: Session, how: str) -> None:
    """Let no gradient through the last layer of the base; the head behind it has one in any case."""
    layer = session.model.module.get_submodule("backbone.base_model.model.encoder.layer.1.output")
    layer.register_forward_hook(lambda module, inputs, output: HALF_BLIND[how](output))


@pytest.mark.parametrize("how", HALF_BLIND)
@pytest.mark.parametrize("method", PROBES)
def test_probes_ask_for_no_backward_pass(tiny_encoder: Path, tiny_texts: Path, method: str, how: str) -> None:
    session = session_of(tiny_encoder, tiny_texts, **PROBES[method])
    blinded(session, how)
    assert rehearse(session) == []


@pytest.mark.parametrize("how", HALF_BLIND)
def test_training_asks_for_a_backward_pass(tiny_encoder: Path, tiny_texts: Path, how: str) -> None:
    session = session_of(tiny_encoder, tiny_texts, **METHODS["lora"])
    blinded(session, how)
    with pytest.raises(ModelError, match=r"change one of them|gets no gradient"):
        rehearse(session)


@pytest.mark.parametrize("how", HALF_BLIND)
def test_probes_find_what_moves_no_loss(tiny_encoder: Path, tiny_texts: Path, how: str) -> None:
    session = session_of(tiny_encoder, tiny_texts, **PROBES["mezo"])
    blinded(session, how)
    head = session.model.module.head
    assert head is not None
    head.forward = nn.Linear(head.in_features, head.out_features).forward  # type: ignore[method-assign]
    before = {name: tensor.clone() for name, tensor in session.initial.items()}
    with pytest.raises(
        ModelError, match=r"head\.bias moves no loss, 2 of 10 tensors would be trained in name"
    ):
        rehearse(session)
    assert all(torch.equal(before[name], tensor) for name, tensor in session.model.read().items())


# --- experts ------------------------------------------------------------------------------------------


def experts(
    *reached: int, layer: str = "layer.0", also: str = ""
) -> tuple[dict[str, nn.Parameter], list[str]]:
    """Three experts of one layer of which some are asked, and another tensor that is not."""
    names = [f"{layer}.experts.{number}.w" for number in range(3)] + ([also] if also else [])
    return {name: nn.Parameter(torch.ones(1)) for name in names}, [names[number] for number in reached]


@pytest.mark.parametrize("reached", [(0, 1), (2,)])
def test_an_expert_that_no_text_was_sent_to_is_told_of_and_not_refused(reached: tuple[int, ...]) -> None:
    parameters, asked = experts(*reached)
    (note,) = require_gradients(
        parameters, lambda: sum((parameters[name].sum() for name in asked), torch.zeros(()))
    )
    first = min(set(parameters) - set(asked))
    assert note.startswith(
        f"no text of the rehearsal was sent to the experts of {3 - len(reached)} of 3 trained tensors, such "
        f"as {first}"
    )


def test_experts_none_of_which_is_ever_asked_are_idle() -> None:
    parameters, _ = experts()
    others, asked = experts(0, 1, 2, layer="layer.1")
    with pytest.raises(ModelError, match=r"layer\.0\.experts\.0\.w gets no gradient, 3 of 6 tensors"):
        require_gradients(
            parameters | others, lambda: sum((others[name].sum() for name in asked), torch.zeros(()))
        )


def test_what_is_no_expert_is_idle_beside_one() -> None:
    parameters, asked = experts(0, also="layer.0.gate.w")
    with pytest.raises(ModelError, match=r"layer\.0\.gate\.w gets no gradient, 1 of 4 tensors"):
        require_gradients(parameters, lambda: parameters[asked[0]].sum())


def test_more_texts_are_read_where_tokens_choose_among_experts(
    architecture: Architecture, tiny_encoder: Path, tiny_texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    monkeypatch.setattr(
        "strategies.base.require_gradients", lambda parameters, loss: read.append(len(parameters)) or []
    )
    monkeypatch.setattr(
        "server.rounds.rehearsal.few_texts", lambda session, count=8: read.append(count) or few_texts(session)
    )
    mixture = architecture("MixtralForCausalLM")
    for folder, task in ((tiny_encoder, "classification"), (mixture, "causal")):
        model = {"name": str(folder), "task": task}
        rehearse(
            Session(configuration(folder, tiny_texts, model=model, tuning={"peft": "full"}, method="fedavg"))
        )
    assert read[::2] == [8, 64]


# --- texts --------------------------------------------------------------------------------------------


def test_the_first_texts_may_have_one_token_each(tiny_causal: Path, tmp_path: Path) -> None:
    """Of a causal run: they are left out of training, and of the rehearsal."""
    words = [word for group in CLASSES.values() for word in group]
    texts = [words[number % 18] for number in range(300)] + [f"{a} and {b}" for a in words for b in words]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    # No special tokens: a word is a token.
    folder = tmp_path / "model"
    shutil.copytree(tiny_causal, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = configuration(
        folder,
        file,
        model={"name": str(folder), "task": "causal"},
        method="lora",
        tuning={"rank": 2, "targets": ("q_proj",)},
    )
    session = Session(config)
    assert session.train_tokens.lengths[:64].max() == 1
    assert rehearse(session) == []
    assert few_texts(session).whole().attention_mask.sum(1).min() > 1


# --- clipping and codecs ------------------------------------------------------------------------------


def clipped(encoder: Path, texts: Path, up: str) -> list[str]:
    config = configuration(encoder, texts, method="lora", codec={"up": up}, privacy={"clip": 0.5})
    return rehearse(Session(config))


def test_a_codec_that_multiplies_lengths_and_a_clip_on_them_exclude_each_other(
    tiny_encoder: Path, tiny_texts: Path
) -> None:
    """One of a hundred values, a hundred times as large: ten times as long."""
    with pytest.raises(ConfigError) as caught:
        clipped(tiny_encoder, tiny_texts, "random_k(fraction=0.01)")
    longer = re.search(r"about (\S+) times as long", str(caught.value))
    assert longer is not None
    assert float(longer[1]) == pytest.approx(10.0, rel=0.15)
    assert str(caught.value) == (
        f"codec.up = 'random_k(fraction=0.01)' makes updates about {longer[1]} times as long, and the server "
        "cuts what is longer than privacy.clip = 0.5 after decoding: an update of that length would count "
        f"for 1/{longer[1]} of itself; take a codec that sends all values, such as quantize, or no "
        "privacy.clip"
    )


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_codec_that_would_do_nothing_is_refused(way: str, tiny_encoder: Path, tiny_texts: Path) -> None:
    text = "low_rank(rank=1) | random_k(fraction=0.1)"
    config = configuration(tiny_encoder, tiny_texts, method="lora", codec={way: text})
    sentence = f"codec.{way} = {text!r} does not fit what is sent: updates would go uncompressed, since"
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        rehearse(Session(config))


def test_a_codec_that_lengthens_a_little_is_told_of(tiny_encoder: Path, tiny_texts: Path) -> None:
    """By the square root of pi / 2, 1.25: a rotated value is a normal one, and only its sign is sent."""
    (note,) = clipped(tiny_encoder, tiny_texts, "rotate | quantize(bits=1)")
    assert re.search(r"makes updates about 1\.[23] times as long", note)
    assert clipped(tiny_encoder, tiny_texts, "quantize(bits=8)") == []


def test_what_is_left_to_say_becomes_warnings_of_the_run(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    config = configuration(
        tiny_encoder,
        tiny_texts,
        method="lora",
        rounds=1,
        codec={"up": "rotate | quantize(bits=1)"},
        privacy={"clip": 0.5},
    )
    run(config, tmp_path / "run")
    warnings = [event.message for event in Run(tmp_path / "run").events() if event.kind == "warning"]
    assert [message for message in warnings if message.startswith("codec.up = ")]


# --- sentences ----------------------------------------------------------------------------------------


def test_a_librarys_words_stand_inside_a_sentence_of_ours(tiny_encoder: Path, tiny_texts: Path) -> None:
    session = session_of(tiny_encoder, tiny_texts, method="lora", tuning={"peft": "dora", "rank": 2})

    def broken(*_: Any) -> Any:
        raise RuntimeError("expected m1 and m2 to have\nthe same dtype")

    session.method.try_out = broken  # type: ignore[method-assign]
    with pytest.raises(ModelError) as caught:
        rehearse(session)
    assert str(caught.value).partition("cannot train ")[0] == "method = 'lora', tuning.peft = 'dora' "
    assert str(caught.value).endswith(
        ': these do not go together, change one of them, such as tuning.peft = "lora" (the library that met '
        "it says: expected m1 and m2 to have the same dtype)"
    )


def test_a_loss_that_is_no_number_says_what_to_change() -> None:
    w = nn.Parameter(torch.ones(1))
    with pytest.raises(
        ModelError, match=r'the loss is nan before any training; take model\.dtype = "float32"'
    ):
        require_gradients({"w": w}, lambda: w.sum() * float("nan"))


def test_a_codec_that_does_not_fit_says_what_to_change(tiny_encoder: Path, tiny_texts: Path) -> None:
    session = session_of(
        tiny_encoder, tiny_texts, method="lora", codec={"up": 'per_tensor("*nothing*"=none)'}
    )
    with pytest.raises(
        ConfigError, match=r'; change it, or take "none" \(fedllm codecs lists what there is\)'
    ):
        rehearse(session)


# --- who looks at whom --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "model"),
    [
        ("lora", {}),
        ("lora", {"dtype": "bfloat16"}),
        ("lora", {"quantize": "int8"}),
        ("lora", {"quantize": "nf4"}),
        ("fedkd", {}),  # the teacher has it
    ],
)
def test_an_adapter_that_looks_at_the_texts_beside_is_refused(
    tiny_encoder: Path, tiny_texts: Path, method: str, model: dict[str, str]
) -> None:
    """Lily mixes its experts by what all tokens of a batch have in common."""
    session = Session(
        configuration(
            tiny_encoder,
            tiny_texts,
            method=method,
            tuning={"peft": "lily"},
            model={"name": str(tiny_encoder), **model},
        )
    )
    before = fingerprint(session.model.read())
    with pytest.raises(ModelError, match="depend on the texts beside it in a batch"):
        rehearse(session)
    assert fingerprint(session.model.read()) == before


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_a_quantised_base_looks_at_no_text_beside(
    tiny_encoder: Path, tiny_texts: Path, quantize: str
) -> None:
    model = {"name": str(tiny_encoder), "quantize": quantize, "dtype": "bfloat16"}
    session = Session(configuration(tiny_encoder, tiny_texts, model=model, tuning={"peft": "lora"}))
    require_apart(session.model, few_texts(session).whole())


def test_an_adapter_that_looks_ahead_is_refused(tiny_causal: Path, tiny_texts: Path) -> None:
    session = Session(
        configuration(
            tiny_causal,
            tiny_texts,
            model={"name": str(tiny_causal), "task": "causal"},
            tuning={"peft": "lora", "rank": 2},
        )
    )
    batch, network = few_texts(session).whole(), session.model.module
    require_apart(session.model, batch)
    plain = network.forward

    def peeking(*given: Any, **named: Any) -> Output:
        found = plain(*given, **named)
        return Output(found.loss, found.logits + found.logits.mean(dim=1, keepdim=True))

    network.forward = peeking  # type: ignore[method-assign,assignment]
    with pytest.raises(ModelError, match="see the tokens that it is to predict"):
        require_apart(session.model, batch)
