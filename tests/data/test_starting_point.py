"""What is chosen from texts: closed forms of counts and lengths, and what was given stays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from fedllm.config import RunConfig
from fedllm.data import starting_point
from fedllm.data.starting_point import (
    SETTINGS,
    Base,
    Choice,
    Texts,
    balanced,
    choose,
    limits,
    skew,
    unset,
    with_choices,
)

BASE = Base(positions=512, width=384)
"""As long and as wide as MiniLM."""


def texts(count: int, *lengths: int) -> Texts:
    return Texts(count, lengths or (30,), {"rare": 10, "common": 900})


def chosen(settings: Mapping[str, Any], of: Texts, base: Base = BASE, *, deployed: bool = False) -> RunConfig:
    """Return a configuration with everything chosen that was not given."""
    config = RunConfig.model_validate(settings)
    return with_choices(config, choose(config, of, base, keys=unset(config), deployed=deployed))


@pytest.mark.parametrize(
    ("lengths", "positions", "length"),
    [
        (range(1, 101), 512, 96),  # the 95th of 100 lengths is 95
        ([10] * 95 + [500] * 5, 512, 16),  # a few long ones do not count
        ([10] * 94 + [500] * 6, 512, 256),  # one more does, up to the bound
        ([500] * 10, 40, 40),  # the model's positions, which need not be a multiple of 8
        ([500] * 10, None, 256),
        ([3], 512, 8),
    ],
)
def test_nearly_all_texts_are_read_to_their_end(lengths: Any, positions: int | None, length: int) -> None:
    assert chosen({}, texts(2000, *lengths), Base(positions, 384)).data.max_length == length


@pytest.mark.parametrize(("count", "clients"), [(2040, 10), (2040, 3), (4000, 4), (20_000, 100)])
def test_each_text_is_trained_on_five_times(count: int, clients: int) -> None:
    run = chosen({"clients": clients}, texts(count, 10))
    seen = run.rounds * clients * run.training.local_steps * run.training.batch_size / count
    # A round may be one too many, of which each is at most a pass over a client's texts.
    assert 5 <= seen <= 5 + run.training.local_steps * run.training.batch_size * clients / count
    assert run.training.local_steps * run.training.batch_size < count / clients + 16


def test_few_texts_are_trained_on_until_a_head_has_settled() -> None:
    run = chosen({"clients": 10}, texts(96, 10))
    assert run.training.batch_size == 9
    assert (run.rounds, run.training.local_steps) == (20, 2)  # two steps at least, else one pass at most


def test_clients_that_draw_from_fewer_texts_than_they_are_have_eight_each() -> None:
    run = chosen({"clients": 1000, "server": {"sample": 10}}, texts(192, 10))
    assert run.training.batch_size == 8
    assert (run.rounds, run.training.local_steps) == (20, 2)


def test_many_long_texts_end_in_minutes() -> None:
    run = chosen({"clients": 10}, texts(100_000, 100))
    tokens = run.rounds * 10 * run.training.local_steps * run.training.batch_size * 100
    assert tokens == pytest.approx(1.5e6, rel=0.1)


def test_tokens_that_are_cut_off_cost_nothing() -> None:
    run = chosen({"data": {"max_length": 50}}, texts(100_000, 1000))
    tokens = run.rounds * 10 * run.training.local_steps * run.training.batch_size * 50
    assert tokens == pytest.approx(1.5e6, rel=0.1)


def test_sampled_clients_share_the_passes_among_more_rounds() -> None:
    """Of 100 clients ten work a round: each text must come up as often as when all work."""
    run = chosen({"clients": 100, "server": {"sample": 10}}, texts(4000, 10))
    assert run.rounds * 10 * run.training.local_steps * run.training.batch_size / 4000 >= 5


def test_devices_work_at_the_same_time_so_there_is_more_that_each_can_do() -> None:
    here, there = (chosen({"clients": 100}, texts(100_000, 100), deployed=told) for told in (False, True))
    assert here.rounds * here.training.local_steps == 40  # the least
    assert there.rounds * there.training.local_steps * 16 * 100 == pytest.approx(4e5, rel=0.1)


@pytest.mark.parametrize(
    ("settings", "follows"),
    [
        ({"rounds": 4}, 16),  # 64 steps wanted: 5 * 2040 / (10 * 16)
        ({"rounds": 64}, 1),
    ],
)
def test_steps_follow_rounds_that_were_given(settings: dict[str, Any], follows: int) -> None:
    run = chosen(settings, texts(2040))
    assert (run.rounds, run.training.local_steps) == (settings["rounds"], follows)


def test_rounds_follow_steps_that_were_given() -> None:
    run = chosen({"training": {"local_steps": 4, "batch_size": 8}}, texts(2040))
    assert (run.training.local_steps, run.training.batch_size) == (4, 8)
    assert run.rounds == math.ceil(5 * 2040 / (10 * 8 * 4))


@pytest.mark.parametrize("key", SETTINGS)
def test_what_was_given_is_not_chosen(key: str) -> None:
    section, _, name = key.rpartition(".")
    default = RunConfig()
    value = getattr(getattr(default, section) if section else default, name)
    config = RunConfig.model_validate({section: {name: value}} if section else {name: value})
    assert unset(config) == set(SETTINGS) - {key}
    choices = choose(config, texts(2040), BASE, keys=unset(config))
    assert [choice.key for choice in choices] == [other for other in SETTINGS if other != key]


def test_balanced_classes_count_alike_and_a_text_counts_one_on_average() -> None:
    classes = {"spam": 200, "ham": 800}
    weights = balanced(classes)
    assert weights == (2.5, 0.625)
    spam, ham = (weight * count for weight, count in zip(weights, classes.values(), strict=True))
    assert spam == ham == 500


def test_classes_are_weighed_where_one_is_twenty_times_as_common() -> None:
    uneven = {"spam": 50, "ham": 1000, "eggs": 1000}
    assert chosen({}, Texts(2050, (10,), uneven)).training.class_weights == (10.0, 0.6833, 0.6833)
    assert chosen({}, Texts(1000, (10,), {"spam": 51, "ham": 1000})).training.class_weights == "none"
    assert chosen({}, Texts(1000, (10,), {})).training.class_weights == "none"


def test_no_class_counts_more_than_ten_times() -> None:
    assert balanced({"a": 3, "b": 4997}) == (10.0, 0.5003)
    assert balanced({"absent": 0, "a": 10}) == (5.0, 0.5)


def test_what_was_chosen_counts_as_given_and_stands_in_the_document_as_plain_values() -> None:
    run = chosen({}, texts(2040))
    assert unset(run) == frozenset()
    again = RunConfig.from_document(run.to_document())
    assert again == run
    assert unset(again) == frozenset()


@pytest.mark.parametrize(
    ("tuning", "width", "rate"),
    [
        ("lora", 128, 3e-3),
        ("lora", 384, 3e-3),
        ("lora", 576, 1e-3),
        ("dora", 768, 8e-4),  # 7.5e-4, to one digit
        ("lora", 4096, 1e-4),
        ("full", 384, 2e-4),
        ("full", 768, 5e-5),
        ("full", 4096, 1e-5),
    ],
)
def test_the_rate_falls_with_the_square_of_the_width(tuning: str, width: int, rate: float) -> None:
    run = chosen({"tuning": {"peft": tuning}}, texts(2040), Base(512, width))
    assert run.training.learning_rate == rate


@pytest.mark.parametrize(
    "settings", [{"tuning": {"peft": "prompt"}}, {"training": {"optimizer": "sgd"}}], ids=["prompt", "sgd"]
)
def test_a_rate_that_no_rule_is_known_for_is_left_alone(settings: dict[str, Any]) -> None:
    assert chosen(settings, texts(2040)).training.learning_rate == RunConfig().training.learning_rate


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ([[3, 3], [7, 7]], 0.0),
        ([[10, 0], [0, 10]], 0.5),
        ([[10, 0, 0], [0, 10, 0], [0, 0, 10]], 2 / 3),
        ([[30, 0], [5, 5]], (30 * 0.125 + 10 * 0.375) / 40),  # all: 7/8 and 1/8
    ],
)
def test_skew_is_the_mean_distance_between_shares(table: list[list[int]], expected: float) -> None:
    assert skew(np.array(table)) == pytest.approx(expected)


def test_what_holds_a_run_back_is_said_with_its_figure() -> None:
    lengths = [10] * 80 + [100] * 20
    config = RunConfig.model_validate({"rounds": 1, "data": {"max_length": 64}})
    said = limits(config, texts(10_000, *lengths), np.array([[10, 0], [0, 10]]))
    cut, few, apart = said
    assert cut.startswith("20% of the texts are cut at 64 tokens")
    assert few.startswith("each text is trained on 0.13 times")  # 10 clients * 8 steps * 16 / 10,000
    assert apart.startswith("clients' classes differ from the whole's by 0.50")
    assert limits(config, texts(10_000, 10), descends=False) == []  # few passes are no fault


def test_a_run_that_was_chosen_is_held_back_by_nothing_it_could_choose() -> None:
    of = texts(2040, *range(1, 101))
    assert limits(chosen({}, of), of, np.array([[9, 11], [11, 9]])) == []


def test_a_choice_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting_point, "PASSES", 2.0)
    choices = {c.key: c for c in choose(RunConfig(), texts(2000, 10, 300), BASE, keys=SETTINGS)}
    length = choices["data.max_length"]
    assert length == Choice("data.max_length", 256, "50% of the texts have no more tokens; more takes long")
    assert choices["rounds"].reason.startswith("each text is trained on ")
