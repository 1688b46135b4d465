"""A configuration does what it says, or is refused in one sentence; every key is documented."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fedllm import tasks
from fedllm.config import RunConfig, read_toml
from fedllm.errors import ConfigError
from fedllm.measures import in_order, judged
from fedllm.presets import document, origin
from simulations.keys import keys
from strategies.registry import method_names, resolve_keys, resolve_run
from tests.commands.conftest import Fedllm

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("fwdllm.directionz=50", "unknown key fwdllm.directionz; did you mean directions?"),
        (
            "fwdllm.directions=50",
            "--set fwdllm.directions=50 is for method = 'fwdllm', and this run's is 'lora'",
        ),
        ("data.classes=['a', 'b', 'a']", "data.classes: 'a' stands twice; name each class once"),
        ("data.classes_per_client=3", 'is for data.partition = "pathological"; leave it out'),
        ("data={by='who'}", 'data.by is for data.partition = "natural" or model.task = "ranking"'),
        (
            "model={task='tokens', pooling='cls'}",
            "model.pooling is for tasks that predict something of a whole text",
        ),
        ("server.momentum=0.5", 'is for server.optimizer = "momentum", "adam" or "yogi"; leave it out'),
        ("evaluation.new_tokens=8", "is for evaluation.generate above 0; leave it out"),
        ("data=5", "data = 5 is not allowed: it takes a section of keys and values"),
        ("lora=5", "lora = 5 is not allowed: it takes a section of keys and values"),
        ("data.classes=sport", "data.classes = 'sport' is not allowed: it takes a list, such as ['sport']"),
        ("lora.ranks=4", "lora.ranks = 4 is not allowed: it takes a list, such as [4]"),
        ("data.part=[0, 1, 2]", "data.part = [0, 1, 2] is not allowed: list should have at most 2 items"),
        ("privacy.clip=inf", "privacy.clip = inf is not allowed: input should be a finite number"),
        ("rounds=true", "rounds: it takes a number, not True"),
        ("server.deadline_s=false", "server.deadline_s: it takes a number, not False"),
        ("lora.ranks=[4, true]", "lora.ranks: it takes a number, not True"),
        ("lora.base_rank=true", "lora.base_rank: it takes a number, not True"),
        ("evaluation.clients=1", "evaluation.clients: it takes true or false, not 1"),
        ("model.nam=x", "unknown key model.nam; did you mean name?"),
        ("model.base=x", "unknown key model.base; valid are dropout, dtype, name, "),
    ],
)
def test_what_would_have_no_effect_is_refused(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        resolve_run(document("quickstart"), [override])


@pytest.mark.parametrize(
    ("method", "overrides", "sentence"),
    [
        ("fedavg", ["data.alpha=1"], 'is for data.partition = "dirichlet"; leave it out'),
        (
            "fedavg",
            ["tuning.rank=2"],
            "tuning.rank is for other methods, and this run",
        ),
        ("fedavg", ["model.dtype=bfloat16"], "model.dtype is for what is frozen, and here all is trained"),
        ("fedavg", ["tuning.peft=lora"], 'method = "fedavg" tunes the whole model; use method = "lora"'),
        (
            "lora",
            ["tuning.rank=2", "tuning.peft=ia3"],
            'tuning.rank is for other kinds of tuning.peft than "ia3"',
        ),
        ("lora", ["tuning={alpha=2.0, peft='bitfit'}"], 'is for other kinds of tuning.peft than "bitfit"'),
        ("mezo", ["training.optimizer=sgd"], "training.optimizer is for other methods"),
        ("mezo", ["model.dropout=0.1"], "model.dropout is for other methods"),
        ("fwdllm", ["training.local_steps=2"], "training.local_steps is for other methods"),
        ("fwdllm", ["training.proximal=0.1"], "is for steps down a gradient, and fwdllm takes none"),
        ("mezo", ["training.max_grad_norm=1"], "is for steps down a gradient, and mezo takes none"),
        (
            "fwdllm",
            ["fwdllm.radius=0.1"],
            'fwdllm.radius is for fwdllm.estimator = "antithetic"',
        ),
        ("fedkd", ["fedkd.layers=3", "fedkd.student=x", "fedkd.match=spread"], "is for fedkd.student unset"),
        (
            "fedkd",
            ["fedkd.temperature=2", "fedkd.teacher=false"],
            "is for fedkd.teacher = true",
        ),
    ],
)
def test_what_means_nothing_beside_the_rest_is_refused_where_it_is_asked_for(
    method: str, overrides: list[str], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        resolve_run({"method": method}, overrides)


def test_a_column_that_a_task_does_not_read_is_not_named() -> None:
    with pytest.raises(
        ConfigError, match=r"columns are named by data\.columns\.source, data\.columns\.target"
    ):
        resolve_run({"model": {"task": "seq2seq"}}, ["data.text=body"])


def test_a_file_may_hold_what_means_nothing_beside_an_override() -> None:
    """Who changes a preset's partition need not take out its alpha."""
    changed = {"data": {"partition": "dirichlet", "alpha": 0.1}, "training": {"local_steps": 4}}
    config = resolve_run(changed, ["data.partition=iid", "method=fwdllm", "fwdllm.estimator=antithetic"])
    assert (config.data.alpha, config.training.local_steps) == (0.1, 4)
    assert resolve_run({}, ["data.partition=dirichlet", "data.alpha=0.1", "tuning.rank=2"]).tuning.rank == 2


def test_true_is_no_number_wherever_it_comes_from(tmp_path: Path) -> None:
    """From a file, from Python, and as a run folder, a message and the dashboard give it."""
    (tmp_path / "run.toml").write_text("rounds = true")
    for read in (
        lambda: resolve_run(read_toml(tmp_path / "run.toml")),
        lambda: resolve_run({}, [(("rounds",), True)]),
        lambda: RunConfig.from_json('{"rounds": true}'),
        lambda: RunConfig.from_document({"rounds": True}),
    ):
        with pytest.raises(ConfigError, match=r"^rounds: it takes a number, not True$"):
            read()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["evaluation.metric=acuracy"],
         "evaluation.metric = 'acuracy' is nothing that model.task = \"classification\" measures; "
         "did you mean accuracy?"),
        (["evaluation.metric=perplexity"], "measures; valid are accuracy, loss, macro_f1"),
        (["evaluation.metric=macro_f1", "model.task=causal"], "measures; valid are loss, perplexity"),
        (["evaluation.patience=3", "evaluation.every=0"],
         "evaluation.patience = 3 counts evaluations, and evaluation.every = 0 makes none"),
        (["evaluation.metric=loss", "evaluation.every=0"], "is never measured with evaluation.every = 0"),
    ],
)  # fmt: skip
def test_a_metric_that_decides_something_is_measured(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        resolve_run({}, overrides)


@pytest.mark.parametrize(
    ("overrides", "metric"),
    [
        ([], "accuracy"),
        (["evaluation.metric=macro_f1"], "macro_f1"),
        (["model.task=causal"], "perplexity"),
        (["model.task=causal", "evaluation.metric=loss"], "loss"),
    ],
)
def test_the_metric_that_decides_is_the_one_named_or_the_tasks_first(
    overrides: list[str], metric: str
) -> None:
    assert resolve_keys({}, overrides).metric == metric


@pytest.mark.parametrize("task", tasks.names())
def test_every_metric_of_a_task_has_its_direction_and_its_title(task: str) -> None:
    metrics = tasks.kind(task).metrics
    assert judged(metrics, "") == in_order(metrics)


@pytest.mark.parametrize(
    ("given", "overrides"),
    [
        ({"name": "agnews", "path": "own.jsonl"}, []),
        ({"path": "own.jsonl"}, ["data.name=agnews"]),
        ({}, ["data.path=own.jsonl", "data.name=agnews"]),
        ({}, ["data.name=agnews", "data.path=own.jsonl"]),
    ],
)
def test_texts_in_two_places_are_refused(given: dict[str, str], overrides: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_run({"data": given}, overrides)
    assert str(caught.value) == (
        "data.name = 'agnews' and data.path = 'own.jsonl' both say where the texts are; leave one of them out"
    )


@pytest.mark.parametrize(
    ("given", "overrides"),
    [
        ({"name": "agnews"}, ["data.path=own.jsonl"]),  # a preset's name, and a user's path
        ({"name": "bbcnews", "path": "own.jsonl"}, []),  # what a resolved configuration writes down
        ({"path": "other.jsonl"}, ["data.path=own.jsonl"]),
    ],
)
def test_a_path_replaces_a_name_that_nobody_gave_beside_it(
    given: dict[str, str], overrides: list[str]
) -> None:
    config = resolve_run({"data": given}, overrides)
    assert config.data.path == "own.jsonl"
    assert resolve_run(config.to_document()) == config


def test_an_option_of_the_method_chosen_beside_it_counts() -> None:
    config = resolve_run(document("quickstart"), ["fwdllm.directions=50", "method=fwdllm"])
    assert config.options["directions"] == 50


def test_a_file_may_hold_sections_of_several_methods_but_no_mistake() -> None:
    assert resolve_run({"method": "lora", "fwdllm": {"directions": 50}}).method == "lora"
    with pytest.raises(ConfigError, match=r"unknown key fwdllm\.directionz"):
        resolve_run({"method": "lora", "fwdllm": {"directionz": 50}})


def test_a_file_in_another_encoding_is_one_sentence_and_a_mark_in_front_is_none(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes('name = "latin\u00e9"'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"run\.toml is not UTF-8, .*byte 13 is 0xe9; save it"):
        read_toml(file)
    file.write_bytes('name = "r\u00e9sum\u00e9"'.encode("utf-8-sig"))
    assert read_toml(file) == {"name": "r\u00e9sum\u00e9"}
    file.write_bytes("seed = 1".encode("utf-16"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_toml(file)


def test_every_key_has_a_meaning_and_a_value_that_it_takes() -> None:
    for key in keys():
        assert key.meaning.endswith("."), key.name
        assert key.takes, key.name


def test_every_default_of_the_table_is_the_one_of_a_run() -> None:
    """``--set KEY=DEFAULT`` changes nothing, for every key."""
    for key in keys():
        if key.default and key.name not in ("name", "method"):
            section = key.name.partition(".")[0]
            base = {"method": section} if section in method_names() else {}
            plain = resolve_keys(base)
            assert resolve_keys(base, [f"{key.name}={key.default}"]) == plain, key.name


def test_a_file_extends_another_told_from_its_own_folder_and_never_itself(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('extends = "lora-30x"\nrounds = 3\nseed = 5', encoding="utf-8")
    mine = tmp_path / "mine.toml"
    mine.write_text('extends = "{here}/base.toml"\nrounds = 2', encoding="utf-8")
    found = document(str(mine))
    assert (found["name"], found["rounds"], found["seed"], found["clients"]) == ("mine", 2, 5, 10)
    assert found["codec"]["up"] == document("lora-30x")["codec"]["up"]
    assert (origin(str(mine)), origin("lora-30x")) == ("lora-30x", "lora-30x")
    for wrong, sentence in (
        ('"{here}/mine.toml"', "leads back to itself"),
        ("5", "extends = 5 is no preset"),
    ):
        (tmp_path / "base.toml").write_text(f"extends = {wrong}", encoding="utf-8")
        with pytest.raises(ConfigError, match=sentence):
            document(str(mine))


def test_the_pages_example_resolves(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    file = tmp_path / "example.toml"
    file.write_text(example, encoding="utf-8")
    config = resolve_run(document(str(file)))
    assert (config.name, config.data.alpha, config.options["rule"]) == ("tickets", 0.3, "residual")


def test_keys_are_listed_for_people_and_programs(fedllm: Fedllm) -> None:
    assert "training.local_steps" in fedllm("keys").out
    told = json.loads(fedllm("keys", "data.alpha", "--json").out)
    assert told[0]["default"] == "0.5"
    assert fedllm("keys", "nothing").code == 2
