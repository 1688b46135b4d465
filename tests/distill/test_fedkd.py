"""FedKD's two halves in a plain loop: what travels, what stays, what is learnt, what is scored."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedllm.data.tokens import Batch
from fedllm.errors import ConfigError
from fedllm.models import model as models
from fedllm.models.evaluation import evaluate
from fedllm.models.model import Model
from fedllm.models.training import descend, minibatches
from fedllm.randomness import stream
from fedllm.tensors import Tensors, fingerprint
from strategies.base import Exchange, Reply, State
from strategies.fedkd.losses import Distillation, Losses
from tests.conformance.federation import session_for
from tests.distill.conftest import Client, Start
from tests.parts import quick

OFF: dict[str, Any] = {"mutual": False, "hidden": False, "attention": False}


def _part(local: Tensors, prefix: str) -> Tensors:
    return {n.removeprefix(prefix): t for n, t in local.items() if n.startswith(prefix)}


def _plain(client: Client, model: Model, rate: float = 1e-3) -> Tensors:
    """Ordinary fine-tuning of ``model`` on the batches that client 0 sees in round 1."""
    training = client.config.training.model_copy(update={"learning_rate": rate})

    def loss(batch: Batch) -> torch.Tensor:
        value = model.forward(batch).loss
        assert value is not None
        return value

    train = client.texts[0].subset(range(24))
    batches = minibatches(train, training.batch_size, training.local_steps, stream(0, "batches", 1, 0))
    descend(list(model.trainable().values()), loss, batches, training)
    return model.read()


def _assert_equal(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-6, msg=name)


def test_only_the_students_update_travels(start: Start) -> None:
    client = start()
    answer = client.fit()
    assert answer.tensors.keys() == client.initial.keys()
    assert answer.tensors.keys() == client.method.spec(Exchange("fit"), client.initial).keys()
    after = client.student.read()
    for name, update in answer.tensors.items():  # the update, not the weights
        torch.testing.assert_close(update, after[name] - client.initial[name], rtol=0, atol=0)
    assert {n.partition("/")[0] for n in answer.local} == {"teacher", "projection", "moment"}
    assert answer.examples == 24


TUNED = [(causal, tuning) for causal in (False, True) for tuning in ("full", "lora")]


@pytest.mark.parametrize(("causal", "tuning"), quick(TUNED, (False, "lora"), (True, "full")))
def test_every_trainable_part_learns(start: Start, causal: bool, tuning: str) -> None:
    client = start(causal=causal, tuning=tuning)
    answer = client.fit()
    assert client.method._tutor is not None
    first = client.method._tutor.first
    # The key's bias shifts all scores of a query alike, which the softmax does not see.
    unmoved = {n for n, update in answer.tensors.items() if not update.any()} | {
        n for n, start in first.items() if torch.equal(answer.local[n], start)
    }
    assert {n for n in unmoved if not n.endswith("key.bias")} == set()


@pytest.mark.slow
def test_the_projections_learn_and_only_where_hidden_states_are_compared(start: Start) -> None:
    identity = torch.eye(32)
    moved = _part(start().fit().local, "projection/")
    assert len(moved) == 2
    assert all(not torch.equal(w, identity) for w in moved.values())
    assert _part(start(hidden=False).fit().local, "projection/") == {}


def test_a_lora_teacher_costs_its_client_adapters_only(start: Start) -> None:
    kept = _part(start(tuning="lora").fit().local, "teacher/")
    assert kept
    assert all("lora_" in name or name.startswith("head.") for name in kept)


def test_without_any_term_teacher_and_student_are_plainly_fine_tuned(start: Start) -> None:
    """The references: ``student-alone`` has no teacher, ``teacher-local`` a teacher that nobody hears."""
    apart, alone = start(**OFF, teacher_learning_rate=2e-3), start(teacher=False)
    both = apart.fit()
    _assert_equal(both.tensors, alone.fit().tensors)
    alone.student.write(alone.initial)
    expected = _plain(alone, alone.student)
    _assert_equal(both.tensors, {n: t - alone.initial[n] for n, t in expected.items()})

    teacher = models.load(apart.config, apart.student.labels)
    for module in teacher.module.modules():
        if isinstance(module, torch.nn.Embedding):
            module.weight.requires_grad_(False)
    _assert_equal(_part(both.local, "teacher/"), _plain(apart, teacher, 2e-3))


@pytest.mark.parametrize(
    "options",
    quick(
        [
            {"mutual": False},
            {"hidden": False},
            {"attention": False},
            {"temperature": 2.0},
            {"divergence": "reverse"},
            {"literal": True},
            {"mutual_weight": 0.5},
            {"hidden_weight": 0.5},
            {"ramp": 1.0},
            {"match": "origin", "layers": (0, 1)},
        ],
        {"divergence": "reverse"},
    ),
)
def test_every_option_of_the_loss_reaches_both_models(start: Start, options: dict[str, Any]) -> None:
    usual, other = start().fit(), start(**options).fit()
    assert fingerprint(usual.tensors) != fingerprint(other.tensors)
    assert fingerprint(_part(usual.local, "teacher/")) != fingerprint(_part(other.local, "teacher/"))


def test_a_ramp_rises_from_nothing_over_its_share_of_the_run(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four rounds of three steps, a ramp of half the run: full weight from the seventh step on."""
    shares: list[float] = []
    objective = Distillation.__call__

    def noted(self: Distillation, *views: Any) -> Losses:
        shares.append(views[-1])
        return objective(self, *views)

    monkeypatch.setattr(Distillation, "__call__", noted)
    client = start(ramp=0.5)
    for round in (1, 2, 3):
        client.fit(round=round)
    assert shares == pytest.approx([step / 6 for step in range(6)] + [1.0] * 3)


def test_a_student_is_compared_with_the_layers_it_was_made_of(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first two of four layers compute the same in both models, so nothing is apart at first."""
    apart: list[float] = []
    objective = Distillation.__call__

    def noted(self: Distillation, *views: Any) -> Losses:
        losses = objective(self, *views)
        apart.append(losses.hidden.item())
        return losses

    monkeypatch.setattr(Distillation, "__call__", noted)
    start(match="origin", layers=(0, 1)).fit()
    assert apart[0] == pytest.approx(0.0, abs=1e-9)
    assert apart[1] > 1e-6
    apart.clear()
    start(layers=(0, 1)).fit()
    assert apart[0] > 1e-3


def test_a_student_of_another_make_has_no_origin(start: Start, tiny_encoder: Path) -> None:
    with pytest.raises(ConfigError, match="made from the teacher"):
        start(match="origin", student=str(tiny_encoder))


def test_one_forward_pass_of_each_model_serves_all_losses(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = start()
    client.fit()
    seen: list[int] = []
    forward = Model.forward

    def counted(self: Model, batch: Batch, **wanted: bool) -> models.Output:
        seen.append(id(self))
        return forward(self, batch, **wanted)

    monkeypatch.setattr(Model, "forward", counted)
    answer = client.fit()
    assert sorted(seen.count(model) for model in set(seen)) == [3, 3]
    # Three batches through the teacher, and through two of its four layers once more.
    assert (answer.passes.forward, answer.passes.backward) == (4.5, 4.5)


@pytest.mark.slow
def test_teachers_of_one_process_do_not_mix(start: Start) -> None:
    """Two clients in turn give the bits that each gives in a process of its own; nobody averages teachers."""
    shared = start()
    first = [shared.fit(node) for node in (0, 1)]
    second = [shared.fit(node, first[node].local, round=2) for node in (0, 1)]
    for node in (0, 1):
        own = start()
        alone = own.fit(node, own.fit(node).local, round=2)
        assert fingerprint(alone.local) == fingerprint(second[node].local)
        assert fingerprint(alone.tensors) == fingerprint(second[node].tensors)
    teachers = {fingerprint(_part(answer.local, "teacher/")) for answer in (*first, *second)}
    assert len(teachers) == 4


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_killed_client_goes_on_with_its_own_teacher(start: Start, tmp_path: Path, optimizer: str) -> None:
    client = start(teacher_optimizer=optimizer)
    kept = client.fit().local
    uninterrupted = client.fit(local=kept, round=2)
    save_file(kept, tmp_path / "local.safetensors")
    restarted = start(teacher_optimizer=optimizer)
    resumed = restarted.fit(local=load_file(tmp_path / "local.safetensors"), round=2)
    assert fingerprint(resumed.local) == fingerprint(uninterrupted.local)
    assert fingerprint(resumed.tensors) == fingerprint(uninterrupted.tensors)
    anew = restarted.fit(round=2)
    assert fingerprint(_part(resumed.local, "teacher/")) != fingerprint(_part(anew.local, "teacher/"))


@pytest.mark.slow
def test_moments_carry_over_between_rounds(start: Start) -> None:
    client = start()
    kept = client.fit().local
    forgotten = {n: t for n, t in kept.items() if not n.startswith("moment/")}
    assert kept["moment/step/teacher/head.weight"].item() == 3
    after = client.fit(local=kept, round=2).local
    assert after["moment/step/teacher/head.weight"].item() == 6
    again = client.fit(local=forgotten, round=2).local
    assert fingerprint(_part(after, "teacher/")) != fingerprint(_part(again, "teacher/"))
    assert _part(start(teacher_optimizer="sgd").fit().local, "moment/") == {}


def test_texts_of_one_token_move_nothing_and_break_nothing(start: Start) -> None:
    """A causal batch without a token to predict has no task loss and no divergence, and both stay finite."""
    client = start(causal=True, hidden=False, attention=False)
    short = client.texts[0]
    client.texts[0] = dataclasses.replace(short, lengths=np.ones_like(short.lengths))
    answer = client.fit()
    assert (answer.metrics["loss"], answer.metrics["teacher_loss"]) == (0.0, 0.0)
    assert all((update == 0).all() for update in answer.tensors.values())


def test_the_learning_rate_schedule_and_the_norm_bound_reach_the_teacher(start: Start) -> None:
    sgd: dict[str, Any] = {"teacher_optimizer": "sgd", **OFF}
    one = {"local_steps": 1, "optimizer": "sgd", "learning_rate": 0.5}

    def moved(training: dict[str, Any], round: int = 1) -> float:
        client = start(training=one | training, teacher_learning_rate=0.1, **sgd)
        local = client.fit(round=round).local
        assert client.method._tutor is not None
        start_at = client.method._tutor.first
        return float(sum((local[n] - start_at[n]).square().sum() for n in local) ** 0.5)

    assert moved({"max_grad_norm": 0.05}) == pytest.approx(0.1 * 0.05, rel=1e-3)
    bounded = {"max_grad_norm": 0.05, "schedule": "linear"}
    assert moved(bounded, round=3) == pytest.approx(0.1 * 0.05 / 2, rel=1e-3)


def test_the_server_scores_the_student_and_the_client_both(start: Start) -> None:
    """Heads that always answer class 0 (student) and class 1 (teacher) tell who was scored."""
    client = start()
    local = client.fit().local
    for tensors, prefix, answer in ((client.initial, "", 0), (local, "teacher/", 1)):
        tensors[f"{prefix}head.weight"].zero_()
        tensors[f"{prefix}head.bias"].copy_(torch.eye(3)[answer] * 9)
    test = client.texts[0].subset(range(24, 60))
    assert test.labels is not None
    share = [float((test.labels == number).mean()) for number in range(3)]
    assert share[0] != share[1]
    answer = client.evaluate(local=local)
    assert answer.metrics["accuracy"] == pytest.approx(share[0])
    assert answer.metrics["teacher_accuracy"] == pytest.approx(share[1])
    assert (answer.tensors, answer.examples) == ({}, 36)
    client.method.load(client.student, client.initial)  # as the server does
    assert evaluate(client.student, test, 8)["accuracy"] == pytest.approx(share[0])


def test_the_server_averages_updates_by_numbers_of_texts(start: Start) -> None:
    method, tensors = start().method, {"w": torch.tensor([1.0, 2.0])}
    state = State(3, tensors)
    acc = method.begin(state, 4)
    assert method.plan(state, acc) == Exchange("fit")
    for node, (values, examples) in enumerate((([4.0, 0.0], 1), ([0.0, 8.0], 3))):
        acc = method.fold(acc, "fit", Reply(node, {"w": torch.tensor(values)}, examples, {}))
    step = method.step(state, acc)
    proposal, memory = step.proposal, step.memory
    assert isinstance(proposal, dict)
    assert proposal["w"].tolist() == [2.0, 8.0]
    assert memory == {}
    assert type(method.plan(state, acc)).__name__ == "Commit"


def test_the_result_is_the_student_as_a_plain_model(start: Start, tmp_path: Path) -> None:
    from transformers import AutoModel

    client = start()
    moved = {n: t + 0.01 for n, t in client.initial.items()}
    client.method.save(client.student, moved, tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path / "model")
    assert loaded.config.num_hidden_layers == 2
    for name, tensor in loaded.state_dict().items():
        if f"backbone.{name}" in moved:
            assert torch.equal(tensor, moved[f"backbone.{name}"]), name


def test_a_pretrained_student_of_another_depth_learns_from_the_teacher(
    start: Start, tiny_encoder: Path
) -> None:
    client = start(student=str(tiny_encoder))
    assert all(update.isfinite().all() for update in client.fit().tensors.values())


def test_a_narrow_student_is_compared_in_its_own_coordinates(start: Start) -> None:
    client = start(width=16)
    client.fit()
    assert client.method._tutor is not None
    first = client.method._tutor.first["projection/weights.0"]
    torch.testing.assert_close(first.T @ first, torch.eye(16))
    assert not torch.equal(first, torch.eye(32, 16))


def test_a_rehearsal_looks_at_student_and_teacher(
    tiny_encoder: Path, tiny_texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_for(tiny_encoder, tiny_texts, "fedkd")
    looked: list[str] = []
    monkeypatch.setattr("strategies.fedkd.method.require_gradients", lambda named, loss: looked.extend(named))
    student = set(session.initial)
    session.method.try_out(session.model, session.test_tokens.batch(range(4)))
    assert {name.partition("/")[2] for name in looked if name.startswith("student/")} == student
    assert sum("lora_A" in name for name in looked if name.startswith("teacher/")) == 4
