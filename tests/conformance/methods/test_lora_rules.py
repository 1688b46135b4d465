"""Each LoRA rule against the dense sum, on replies made by hand and on real layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedllm.config import RunConfig
from fedllm.errors import ConfigError, ModelError
from fedllm.tensors import Tensors, fingerprint
from simulations.bench import aggregation
from strategies.base import Exchange, Reply, State
from strategies.lora.factors import Factors, leading, pairs, stack, truncate
from strategies.lora.method import Lora, Options
from strategies.session import Session
from tests.conformance.federation import ask, commit, federate, logits, reply_of, session_for, start
from tests.parts import quick

RANK = 4
SHAPES = {"tall": (28, 12), "wide": (10, 30), "square": (20, 20)}
EXACT = ("ffa", "alternate", "stack", "residual", "fed-sb")
COHORTS = {
    "two of many": {3: 5, 8: 1},
    "five, unequal": {0: 11, 1: 3, 4: 40, 6: 7, 9: 1},
    "more ranks than rows": {node: 1 + 13 * node for node in range(10)},
}


def lora(rule: str, **more: Any) -> Lora:
    options = {"rule": rule, **more.pop("options", {})}
    return Lora(RunConfig(method="lora", options=options, **{"tuning": {"rank": RANK}, **more}))


def normal(shape: tuple[int, ...], *path: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(path).normal(size=shape)).float()


def global_tensors(method: Lora, *, b: float = 1.0) -> Tensors:
    """Factors, and what else the rule keeps, of three layers and a head; the square one is not symmetric."""
    tensors: Tensors = {"head.weight": normal((3, 5), 99)}
    for i, (layer, (m, n)) in enumerate(SHAPES.items()):
        tensors[f"{layer}.lora_B.default.weight"] = normal((m, RANK), i, 0) * b
        if method.rule != "ffa":
            tensors[f"{layer}.lora_A.default.weight"] = normal((RANK, n), i, 1)
        if method.rule == "fed-sb":
            tensors[f"{layer}.middle.default"] = normal((RANK, RANK), i, 2)
        if method.rule in ("stack", "residual"):
            zero = method._bounded(Factors(torch.zeros(m, 1), torch.zeros(1, n)))
            tensors |= {f"{layer}.base_B": zero.b.float(), f"{layer}.base_A": zero.a.float()}
    return tensors


def frozen_a(i: int, n: int) -> torch.Tensor:
    return normal((RANK, n), i, 1)


def products(tensors: Tensors) -> dict[str, torch.Tensor]:
    """What the adapter adds to each weight, in units of the common scale: plain dense float64."""
    found = {}
    for i, (layer, (_, n)) in enumerate(SHAPES.items()):
        a = tensors.get(f"{layer}.lora_A.default.weight", frozen_a(i, n))
        a, b = a.double(), tensors[f"{layer}.lora_B.default.weight"].double()
        found[layer] = (
            b @ tensors.get(f"{layer}.middle.default", torch.eye(b.shape[1])).double() @ a[: b.shape[1]]
        )
        if f"{layer}.base_B" in tensors:
            found[layer] += tensors[f"{layer}.base_B"].double() @ tensors[f"{layer}.base_A"].double()
    return found


def one_round(method: Lora, state: State, cohort: dict[int, int]) -> tuple[State, dict[str, torch.Tensor]]:
    """Fold made-up changes; return the next state and the dense weighted sum of what the clients hold."""
    acc = method.begin(state, state.version + 1)
    exchange = method.plan(state, acc)
    assert isinstance(exchange, Exchange)
    dense = {layer: torch.zeros(shape, dtype=torch.float64) for layer, shape in SHAPES.items()}
    for node, examples in cohort.items():
        view = method.view(state.tensors, node)
        spec = method.spec(exchange, view)
        change = {
            n: normal(s.shape, state.version, node, i) * 0.3 for i, (n, s) in enumerate(sorted(spec.items()))
        }
        acc = method.fold(acc, "fit", Reply(node, change, examples, {}))
        held = view | {name: view[name] + c for name, c in change.items()}
        for layer, product in products(held).items():
            dense[layer] += product * (examples / sum(cohort.values()))
    step = method.step(state, acc)
    after = step.proposal
    if not isinstance(after, dict):
        after = method.replay(state.tensors, after.record)
    return State(state.version + 1, after, step.memory), dense


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("cohort", COHORTS.values(), ids=COHORTS)
@pytest.mark.parametrize("rule", EXACT)
def test_exact_rules_give_the_dense_sum_round_after_round(rule: str, cohort: dict[int, int]) -> None:
    method = lora(rule)
    state = State(0, global_tensors(method))
    for _ in range(4):
        state, dense = one_round(method, state, cohort)
        found = products(state.tensors)
        assert {layer: error(found[layer], dense[layer]) for layer in SHAPES} == pytest.approx(
            dict.fromkeys(SHAPES, 0.0), abs=1e-6
        )


@pytest.mark.parametrize("cohort", COHORTS.values(), ids=COHORTS)
def test_stack_is_exact_under_mixed_ranks(cohort: dict[int, int]) -> None:
    method = lora("stack", options={"ranks": [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]})
    state = State(0, global_tensors(method))
    for _ in range(3):
        # A client of rank 1 starts from its own cut of (A, B), not from all of it: B must be zero.
        state.tensors.update({n: torch.zeros_like(t) for n, t in state.tensors.items() if "lora_B" in n})
        state, dense = one_round(method, state, cohort)
        assert max(error(products(state.tensors)[layer], dense[layer]) for layer in SHAPES) <= 1e-6


@pytest.mark.parametrize("cohort", COHORTS.values(), ids=COHORTS)
def test_svd_is_the_best_approximation_of_the_dense_sum(cohort: dict[int, int]) -> None:
    method = lora("svd")
    state = State(0, global_tensors(method))
    for _ in range(2):
        state, dense = one_round(method, state, cohort)
        for layer, found in products(state.tensors).items():
            singular = np.linalg.svd(dense[layer].numpy(), compute_uv=False)
            assert (found - dense[layer]).norm() <= np.sqrt((singular[RANK:] ** 2).sum()) * (1 + 1e-4)


def test_fedit_is_not_exact_and_residual_adds_what_it_misses() -> None:
    cohort = COHORTS["five, unequal"]
    fedit, residual = lora("fedit"), lora("residual")
    approximate, dense = one_round(fedit, State(0, global_tensors(fedit)), cohort)
    exact, _ = one_round(residual, State(0, global_tensors(residual)), cohort)
    for layer in SHAPES:
        b, a = pairs(exact.tensors)[layer]
        assert torch.equal(exact.tensors[b], approximate.tensors[b])
        assert torch.equal(exact.tensors[a], approximate.tensors[a])
        assert error(products(approximate.tensors)[layer], dense[layer]) > 1e-3
        base = exact.tensors[f"{layer}.base_B"].double() @ exact.tensors[f"{layer}.base_A"].double()
        assert np.linalg.matrix_rank(base.numpy(), tol=1e-5) <= (len(cohort) - 1) * RANK


def test_bounded_base_is_the_best_of_its_rank() -> None:
    method = lora("residual", options={"base_rank": 6})
    state, dense = one_round(method, State(0, global_tensors(method)), COHORTS["five, unequal"])
    for layer, (b, a) in pairs(state.tensors).items():
        base = dense[layer] - state.tensors[b].double() @ state.tensors[a].double()
        singular = np.linalg.svd(base.numpy(), compute_uv=False)
        assert state.tensors[f"{layer}.base_A"].shape[0] == 6
        missing = (products(state.tensors)[layer] - dense[layer]).norm()
        assert missing <= np.sqrt((singular[6:] ** 2).sum()) * (1 + 1e-4)
        assert missing > 1e-3


def test_hetero_weighs_padded_factors_by_the_norm_of_their_product() -> None:
    method = lora("hetero", options={"ranks": [4, 2, 1, 3]}, clients=4)
    state = State(0, global_tensors(method))
    acc = method.begin(state, 1)
    sums: dict[str, Any] = {}
    for node, examples in {0: 3, 1: 5, 2: 1}.items():
        view = method.view(state.tensors, node)
        change = {n: normal(tuple(t.shape), node, i) for i, (n, t) in enumerate(sorted(view.items()))}
        acc = method.fold(acc, "fit", Reply(node, change, examples, {}))
        for layer, (b, a) in pairs(view).items():
            held = (view[b] + change[b]).double().numpy(), (view[a] + change[a]).double().numpy()
            weight = examples * np.linalg.norm(held[0] @ held[1])
            missing = RANK - held[1].shape[0]
            padded = np.pad(held[0], ((0, 0), (0, missing))), np.pad(held[1], ((0, missing), (0, 0)))
            entry = sums.setdefault(layer, [0.0, 0.0, 0.0])
            sums[layer] = [entry[0] + weight * padded[0], entry[1] + weight * padded[1], entry[2] + weight]
    after = method.step(state, acc).proposal
    assert isinstance(after, dict)
    for layer, (b, a) in pairs(after).items():
        np.testing.assert_allclose(after[b].numpy(), sums[layer][0] / sums[layer][2], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(after[a].numpy(), sums[layer][1] / sums[layer][2], rtol=1e-5, atol=1e-6)


def test_hetero_of_adapters_that_do_nothing_keeps_them() -> None:
    method = lora("hetero")
    state = State(0, global_tensors(method, b=0.0))
    still = {name: torch.zeros_like(t) for name, t in state.tensors.items()}
    acc = method.fold(method.begin(state, 1), "fit", Reply(0, still, 4, {}))
    after = method.step(state, acc).proposal
    assert isinstance(after, dict)
    assert all(torch.equal(after[name], t) for name, t in state.tensors.items())


def test_alternate_sends_one_factor_at_a_time_b_first() -> None:
    method = lora("alternate")
    state = State(0, global_tensors(method))
    for trained, frozen in ("BA", "AB", "BA"):
        exchange = method.plan(state, method.begin(state, state.version + 1))
        assert isinstance(exchange, Exchange)
        sent = method.spec(exchange, state.tensors)
        assert {n.split(".")[1] for n in sent if "lora" in n} == {f"lora_{trained}"}
        after, _ = one_round(method, state, {0: 1, 1: 2})
        same = {n for n, t in after.tensors.items() if torch.equal(t, state.tensors[n])}
        assert same == {n for n in state.tensors if f"lora_{frozen}" in n}
        state = after


def test_svd_does_not_collapse_to_the_smallest_rank() -> None:
    """Clients that change nothing change nothing; averaging their truncations forgets what few can hold."""
    rounds, ranks = 12, [1, 1, 1, 4]
    method = lora("svd", options={"ranks": ranks}, clients=4)
    state = State(0, global_tensors(method))
    first = products(state.tensors)
    state, _ = one_round(method, state, {3: 1})  # in SVD order from here on, as views need
    kept = products(state.tensors)
    naive = {
        layer: Factors(state.tensors[b], state.tensors[a]) for layer, (b, a) in pairs(state.tensors).items()
    }
    for _ in range(rounds):
        acc = method.begin(state, state.version + 1)
        for node in range(4):
            view = method.view(state.tensors, node)
            acc = method.fold(
                acc, "fit", Reply(node, {n: torch.zeros_like(t) for n, t in view.items()}, 1, {})
            )
        after = method.step(state, acc).proposal
        assert isinstance(after, dict)
        state = State(state.version + 1, after)
        naive = {
            layer: truncate(stack([leading(f, rank) for rank in ranks], [0.25] * 4), RANK)
            for layer, f in naive.items()
        }
    for layer in SHAPES:
        assert error(kept[layer], first[layer]) > 0.1
        assert error(products(state.tensors)[layer], kept[layer]) < 1e-5
        singular = torch.linalg.svdvals(naive[layer].product())
        assert singular[1] < 1e-6 * singular[0]  # what the guard is there for


def test_svd_lets_those_who_hold_a_component_change_it() -> None:
    method = lora("svd", options={"ranks": [1, 4]}, clients=2)
    state = State(0, global_tensors(method))
    state, _ = one_round(method, state, {1: 1})
    before = products(state.tensors)
    state_after, _ = one_round(method, state, {0: 30, 1: 10})
    for layer in SHAPES:
        assert error(products(state_after.tensors)[layer], before[layer]) > 0.05


def test_ranks_by_list_share_and_memory() -> None:
    tensors = global_tensors(lora("svd"))
    values = sum(m + n for m, n in SHAPES.values())

    def ranks(**options: Any) -> list[int]:
        method = lora("svd", options=options)
        shapes = [method.view(tensors, node)["wide.lora_A.default.weight"].shape for node in range(10)]
        assert all(width == 30 for _, width in shapes)
        return [rank for rank, _ in shapes]

    listed = [1, 2, 3, 4, 4, 3, 2, 1, 1, 1]
    assert ranks(ranks=listed) == listed
    shared = ranks(ranks=[1, 2, 4], shares=[0.5, 0.3, 0.2])
    assert sorted(shared) == [1] * 5 + [2] * 3 + [4] * 2
    assert shared != sorted(shared)
    # Factor, gradient and two moments in float32 for each of (m + n) values per rank.
    mib = [rank * values * 16 / 2**20 for rank in (1, 2, 2.99, 3, 4, 400, 1, 1, 1, 1)]
    assert ranks(memory_mb=[m * (1 + 1e-9) for m in mib]) == [1, 2, 2, 3, 4, 4, 1, 1, 1, 1]
    with pytest.raises(ConfigError, match="client 0"):
        ranks(memory_mb=[mib[0] / 2] * 10)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "full": ({"tuning": {"peft": "full"}}, "fedavg"),
    "other adapters": ({"options": {"rule": "svd"}, "tuning": {"peft": "ia3"}}, "fedit"),
    "dora": ({"options": {"rule": "ffa"}, "tuning": {"options": {"use_dora": True}}}, "fedit"),
    "adam": (
        {"options": {"rule": "svd"}, "server": {"optimizer": "adam"}},
        'svd.*leave server.optimizer at "sgd"',
    ),
    "server rate": (
        {"options": {"rule": "residual"}, "server": {"learning_rate": 0.5}},
        "residual.*server.learning_rate at 1.0",
    ),
    "feedback": ({"options": {"rule": "stack"}, "codec": {"up": "error_feedback(sign)"}}, "stack.*codec.up"),
    "ef21": (
        {"options": {"rule": "svd"}, "codec": {"up": "ef21(top_k(fraction=0.1))"}},
        "svd.*codec.up.*ef21",
    ),
    "feedback down": (
        {"options": {"rule": "hetero"}, "codec": {"down": "error_feedback(sign)"}},
        "codec.down",
    ),
    "feedback on a folded base": (
        {"options": {"rule": "residual", "base_rank": 4}, "codec": {"down": "error_feedback(sign)"}},
        "codec.down",
    ),
    "alternating feedback": (
        {"options": {"rule": "alternate"}, "codec": {"up": "error_feedback(sign)"}},
        "altern",
    ),
    "mixed fedit": ({"options": {"rule": "fedit", "ranks": [4] * 10}}, "one rank for all"),
    "mixed downlink": (
        {"options": {"rule": "svd", "ranks": [4] * 10}, "codec": {"down": "sign"}},
        "codec.down",
    ),
    "mixed fed-sb": ({"options": {"rule": "fed-sb", "ranks": [4] * 10}}, "one rank for all"),
    "fed-sb and a server's optimiser": (
        {"options": {"rule": "fed-sb"}, "server": {"optimizer": "adam"}},
        "fed-sb.*server.optimizer",
    ),
    "fed-sb and a compressed downlink": (
        {"options": {"rule": "fed-sb"}, "codec": {"down": "sign"}},
        "codec.down",
    ),
    "fed-sb and a start of one's own": (
        {"options": {"rule": "fed-sb"}, "tuning": {"options": {"init_lora_weights": "pissa"}}},
        "fed-sb.*init_lora_weights = 'pissa'",
    ),
    "too few ranks": ({"options": {"rule": "svd", "ranks": [4, 2]}}, "lists 2 clients, clients = 10"),
    "too few memories": ({"options": {"rule": "svd", "memory_mb": [4.0]}}, "memory_mb lists 1"),
    "too large": (
        {"options": {"rule": "svd", "ranks": [16] * 10}, "tuning": {"rank": 8}},
        "16.*tuning.rank = 8",
    ),
}


@pytest.mark.parametrize(("given", "said"), REFUSED.values(), ids=REFUSED)
def test_impossible_combinations_name_both_sides(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Lora(RunConfig.model_validate({"method": "lora", **given}))


@pytest.mark.parametrize(
    "options",
    [
        {"ranks": [1], "memory_mb": [1.0]},
        {"ranks": [1, 2], "shares": [0.5, 0.6]},
        {"ranks": [1, 2], "shares": [1.0]},
        {"shares": [1.0]},
        {"ranks": [0]},
        {"base_rank": 4},
        {"rule": "stack", "base_rank": 0},
        {"rule": "mean"},
    ],
)
def test_contradictory_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        Options.model_validate(options)


@pytest.mark.parametrize("rule", ["fedit", "ffa", "residual"])
def test_feedback_is_allowed_where_the_basis_stays(rule: str) -> None:
    method = lora(rule, codec={"up": "error_feedback(sign)", "down": "error_feedback(sign)"})
    assert (method.options.rule, method.config.codec.up) == (rule, "error_feedback(sign)")


# ---- real layers ----


@pytest.fixture(scope="module")
def tiny_gpt2(tiny_causal: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of two layers x 32, whose attention is Conv1D: weights stored [in, out]."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(tiny_causal)
    tokenizer.save_pretrained(folder)
    size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": len(tokenizer)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        GPT2LMHeadModel(GPT2Config(**size, bos_token_id=2, eos_token_id=3)).save_pretrained(folder)
    return folder


LAYERS = {
    "Linear": {"targets": ("query", "dense")},
    "Conv1D": {"targets": ("c_attn", "c_proj")},
    "rslora": {"targets": ("value",), "peft": "rslora"},
}


@pytest.fixture(scope="module")
def opened(tiny_encoder: Path, tiny_gpt2: Path, tiny_texts: Path) -> Any:
    def build(rule: str, layers: str, **options: Any) -> Session:
        conv = layers == "Conv1D"
        tuning = {"rank": RANK, "alpha": 12.0, **LAYERS[layers]}
        model = {"name": str(tiny_gpt2), "task": "causal"} if conv else {"name": str(tiny_encoder)}
        session = session_for(
            tiny_encoder, tiny_texts, "lora", tuning=tuning, model=model, options={"rule": rule, **options}
        )
        start(session)
        return session

    return build


def merged_by_hand(session: Session, changes: dict[str, torch.Tensor], silent: Tensors) -> torch.Tensor:
    """Logits of the plain model whose weights are W + change, adapters and base at zero."""
    session.method.load(session.model, silent)
    before = {}
    for layer, change in changes.items():
        module: Any = session.model.module.get_submodule(layer)
        weight = module.base_layer.weight
        before[weight] = weight.detach().clone()
        transposed = type(module.base_layer).__name__ == "Conv1D"
        weight.data += (change.T if transposed else change).float()
    try:
        return logits(session)
    finally:
        for weight, value in before.items():
            weight.data.copy_(value)


SUMS = [(rule, layers) for rule in ("stack", "residual", "alternate") for layers in LAYERS]
SAVED = [(rule, layers) for rule in ("fedit", "ffa", "stack", "residual", "fed-sb") for layers in LAYERS]


@pytest.mark.parametrize(("rule", "layers"), quick(SUMS, SUMS[0], SUMS[-1]))
def test_layers_compute_with_the_dense_sum(rule: str, layers: str, opened: Any) -> None:
    session = opened(rule, layers)
    state = federate(session, start(session), 2, (0, 1))
    exchange = session.method.plan(state, session.method.begin(state, 3))
    answers = {node: ask(session, state, exchange, node, 3) for node in (0, 3)}
    scale = 12.0 / RANK**0.5 if layers == "rslora" else 12.0 / RANK
    total = sum(answer.examples for answer in answers.values())
    changes: dict[str, Any] = {}
    for layer, (b, a) in pairs(state.tensors).items():
        changes[layer] = 0.0
        for answer in answers.values():
            held_b, held_a = (state.tensors[n] + answer.tensors.get(n, 0.0) for n in (b, a))
            product = held_b.double() @ held_a.double()
            if f"{layer}.base_B" in state.tensors:
                base = state.tensors[f"{layer}.base_B"], state.tensors[f"{layer}.base_A"]
                product = product + base[0].double() @ base[1].double()
            changes[layer] += scale * product * answer.examples / total
    after = commit(session, state, 3, "fit", [reply_of(answer, node) for node, answer in answers.items()])
    found = logits(session, after.tensors)
    silent = {n: t if n.startswith("head") else torch.zeros_like(t) for n, t in after.tensors.items()}
    torch.testing.assert_close(found, merged_by_hand(session, changes, silent), rtol=1e-4, atol=1e-5)
    assert (found - logits(session, silent)).abs().max() > 1e-2


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing.:FutureWarning"
)  # between peft and transformers
@pytest.mark.parametrize(("rule", "layers"), quick(SAVED, SAVED[0], ("fed-sb", "Conv1D")))
def test_saved_adapter_is_true_on_the_plain_base_model(
    rule: str, layers: str, opened: Any, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModel, AutoModelForCausalLM

    session = opened(rule, layers)
    state = federate(session, start(session), 2, (0, 1, 2))
    batch = session.test_tokens.batch(range(8))
    session.method.load(session.model, state.tensors)
    session.model.module.eval()
    with torch.no_grad():
        wanted = session.model.forward(batch, hidden_states=True).hidden_states
    session.method.save(session.model, state.tensors, tmp_path)
    session.model.module.train()
    assert fingerprint(session.method.initial(session.model)) == fingerprint(state.tensors)
    kind = AutoModelForCausalLM if layers == "Conv1D" else AutoModel
    plain = PeftModel.from_pretrained(
        kind.from_pretrained(session.config.model.name), tmp_path / "adapter"
    ).eval()
    with torch.no_grad():
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        found = plain(**inputs, output_hidden_states=True).hidden_states
    assert wanted is not None
    torch.testing.assert_close(found[-1], wanted[-1], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_small_device_holds_a_small_adapter_and_the_next_one_a_large(opened: Any) -> None:
    session = opened("svd", "Linear", ranks=[1, 4, 2, 3])
    state = federate(session, start(session), 2, (0, 1, 2, 3))
    exchange = session.method.plan(state, session.method.begin(state, 3))
    for node, rank in ((0, 1), (1, 4), (2, 2)):
        answer = ask(session, state, exchange, node, 3)
        held = [p.shape[0] for n, p in session.model.trainable().items() if "lora_A" in n]
        assert set(held) == {rank}
        assert {t.shape[0] for n, t in answer.tensors.items() if "lora_A" in n} == {rank}
    assert logits(session, state.tensors).isfinite().all()


def test_ffa_freezes_a_after_it_is_attached(opened: Any) -> None:
    session, free = opened("ffa", "Linear"), opened("fedit", "Linear")
    assert not any("lora_A" in name for name in session.initial)
    frozen = {n: p for n, p in session.model.module.named_parameters() if "lora_A" in n}
    before = {n: p.detach().clone() for n, p in frozen.items()}
    assert all(torch.equal(value, free.initial[name]) for name, value in before.items())
    assert all(value.abs().max() > 0 for value in before.values())
    federate(session, start(session), 1, (0, 1))
    assert all(torch.equal(p, before[n]) for n, p in frozen.items())


def test_stack_starts_each_round_afresh_and_alike_everywhere(opened: Any) -> None:
    session = opened("stack", "Linear")
    one = federate(session, start(session), 1, (0, 1))
    two = federate(session, one, 1, (2, 3), first=2)
    for b, a in pairs(one.tensors).values():
        assert not one.tensors[b].any()
        assert not torch.equal(one.tensors[a], two.tensors[a])
        assert one.tensors[a].abs().max() <= one.tensors[a].shape[1] ** -0.5
    again = federate(session, start(session), 1, (1, 0))
    assert all(torch.equal(again.tensors[n], t) for n, t in one.tensors.items())


def test_embeddings_cannot_carry_a_base(tiny_encoder: Path, tiny_texts: Path) -> None:
    tuning = {"rank": 2, "targets": ("word_embeddings",)}
    for rule in ("stack", "residual"):
        session = session_for(tiny_encoder, tiny_texts, "lora", tuning=tuning, options={"rule": rule})
        with pytest.raises(ModelError, match="word_embeddings"):
            start(session)
    session = session_for(tiny_encoder, tiny_texts, "lora", tuning=tuning, options={"rule": "svd"})
    assert logits(session, federate(session, start(session), 1, (0, 1)).tensors).isfinite().all()


@pytest.mark.slow
def test_server_memory_stays_flat_or_bounded_by_one_dense_matrix() -> None:
    held = aggregation.memory(size=128, layers=1, rank=4)
    assert held["fedit"]["growth_payloads"] <= 0.05
    assert held["svd"]["growth_payloads"] > 0
    assert (
        held["svd"]["after_1000_bytes"] <= 1.1 * held["svd"]["bound_payloads"] * held["svd"]["payload_bytes"]
    )


@pytest.mark.slow
def test_benchmark_reports_what_these_tests_assert() -> None:
    errors = {rule: row["relative_error"] for rule, row in aggregation.exactness(clients=3, rounds=1).items()}
    assert errors.pop("fedit") > 1e-3
    assert max(errors.values()) <= 1e-6
    speed = aggregation.svd_speed(size=256, clients=4, rank=4, keep=4)
    assert speed["error_over_optimum"] <= 1e-4
    assert speed["speedup"] > 1
