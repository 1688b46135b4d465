"""Labels that nobody can tell apart are one class, and what is no class is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from fedllm.config import DataConfig
from fedllm.data.corpus import load
from fedllm.errors import DataError
from tests.parts import task_of


def labelled(folder: Path, labels: list[object]) -> DataConfig:
    file = folder / "labels.jsonl"
    file.write_text("".join(json.dumps({"text": "t", "label": label}) + "\n" for label in labels))
    return DataConfig(path=str(file))


@pytest.mark.parametrize(
    ("labels", "names", "warned"),
    [
        (["x", "x ", " x", "y"], ("x", "y"), "'x ' is read as 'x'"),
        (["x", "x\u200b", "\ufeffx", "y\x00"], ("x", "y"), "is read as 'x'"),
        (["caf\u00e9", "cafe\u0301"], ("caf\u00e9",), "is read as 'caf\u00e9'"),
        (["a\nb", "a b", "a\tb"], ("a b",), "is read as 'a b'"),
        (["a  b", "a b"], ("a b",), "'a  b' is read as 'a b'"),
        (["\u00e9\n\nb", "\u00e9 b"], ("\u00e9 b",), "is read as '\u00e9 b'"),
        (["0", "0.0", "1"], ("0", "1"), "taken as one class"),
        ([0, "0", 1.0, "1"], ("0", "1"), "taken as one class"),
        ([0.0, 1.0, 10.0, 9.0], ("0", "1", "9", "10"), ""),
        (["10", "9", "-1"], ("-1", "9", "10"), ""),
        (["01", "1", "x"], ("01", "1", "x"), ""),
        (["01", "1"], ("01", "1"), ""),
        (["nan", "inf"], ("inf", "nan"), ""),
        (["v3.9", "v3.10"], ("v3.10", "v3.9"), ""),
        (["\U0001f469\u200d\U0001f467", "\U0001f469"], ("\U0001f469", "\U0001f469\u200d\U0001f467"), ""),
        (["Sports", "sports"], ("Sports", "sports"), ""),
        (["$x_", "y$^$", "<b>", "[red]"], ("$x_", "<b>", "[red]", "y$^$"), ""),
    ],
)
def test_labels_are_told_apart_by_what_is_seen(
    labels: list[object],
    names: tuple[str, ...],
    warned: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        corpus = load(labelled(tmp_path, labels), task_of("classification"))
    assert corpus.label_names == names
    assert corpus.labels is not None
    assert set(corpus.labels.tolist()) == set(range(len(names)))
    assert warned in caplog.text
    assert bool(warned) == bool(caplog.text)


def test_a_clients_own_labels_meet_the_federations_classes(tmp_path: Path) -> None:
    corpus = load(
        labelled(tmp_path, ["y ", "cafe\u0301"]), task_of("classification"), labels=("caf\u00e9", "x", "y")
    )
    assert corpus.labels is not None
    assert corpus.labels.tolist() == [2, 0]
    corpus = load(labelled(tmp_path, [1.0, "0"]), task_of("classification"), labels=("0", "1"))
    assert corpus.labels is not None
    assert corpus.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("classes", "labels", "numbers"),
    [
        (("1", "1.0", "beta"), ["1", "1.0", "beta"], [0, 1, 2]),  # names, since one of them is
        (("01", "1"), ["1", 1, "01"], [1, 1, 0]),
        (("1", "2"), ["2", 2.0, "1.0"], [1, 1, 0]),
        (("1.0", "2"), ["1", 1], [0, 0]),
    ],
)
def test_the_same_labels_are_the_same_classes_everywhere(
    classes: tuple[str, ...], labels: list[object], numbers: list[int], tmp_path: Path
) -> None:
    corpus = load(labelled(tmp_path, labels), task_of("classification"), labels=classes)
    assert corpus.labels is not None
    assert corpus.labels.tolist() == numbers


def test_two_names_of_one_class_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the classes '1' and '1\.0' are the same: name one of them"):
        load(labelled(tmp_path, ["1", "2"]), task_of("classification"), labels=("1", "1.0", "2"))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0.5, 1], "not float 0.5"),
        ([1, "x"], "mixes whole numbers and names"),
        (["3.9", "3.10"], "fractions such as 3.10"),
        (["x", "\u200b"], "line 2.*not empty"),
        (["x", float("nan")], "line 2.*not empty"),
        (["x", float("inf")], "line 2.*not float inf"),
        (
            ["x", ["a"]],
            r"line 2: data.label holds a list of classes, and in other rows one class",
        ),
    ],
)
def test_what_is_no_class_is_refused(labels: list[object], words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        load(labelled(tmp_path, labels), task_of("classification"))


def test_users_are_told_apart_by_what_is_seen(tmp_path: Path) -> None:
    config = labelled(tmp_path, ["u1", "u1 ", "u2"])
    config = config.model_copy(update={"partition": "natural", "by": "label", "label": None})
    assert load(config, task_of("causal")).groups == ["u1", "u1", "u2"]
