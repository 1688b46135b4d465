"""What the page about Python and the examples say works, word for word."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fedllm import plugins
from fedllm.codecs import parse
from fedllm.codecs.base import CodecContext
from fedllm.config import RunConfig
from fedllm.tensors import TensorSpec
from strategies.base import Reply, State

Plugged = Callable[[str], Any]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in; the code of this checkout is what is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    return tmp_path


@pytest.fixture
def plugged(monkeypatch: pytest.MonkeyPatch) -> Iterator[Plugged]:
    """Load an example as the plug-in that it is, until the test ends."""
    monkeypatch.setattr(plugins, "_named", {})
    before = set(sys.modules)

    def load(name: str) -> ModuleType:
        plugins.load([str(ROOT / "examples" / f"{name}.py")])
        return sys.modules[name]

    yield load
    for name in set(sys.modules) - before:
        if name.startswith("own_"):
            del sys.modules[name]


@pytest.mark.slow
def test_the_page_runs(outside: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), flags=re.DOTALL)
    assert len(blocks) > 5
    (outside / "page.py").write_text("\n".join(blocks))
    subprocess.run([sys.executable, "page.py"], check=True)
    made = {path.name for path in (outside / "runs").iterdir()}
    assert made == {"quickstart", "tickets", "shops", "small", "writer"}
    assert (outside / "for-others" / "adapter").is_dir()


@pytest.mark.slow
def test_a_run_from_python(outside: Path) -> None:
    told = example("run_from_python.py")
    assert [line.partition(":")[0] for line in told[:4]] == [f"round {number}" for number in range(4)]
    assert told[4:] == ["'my parcel never came' goes to delivery", "'I cannot log in' goes to account"]


@pytest.mark.slow
def test_a_method_of_ones_own(outside: Path) -> None:
    (told,) = example("own_method.py")
    method, accuracy = told.split(": accuracy ")
    assert method == "trimmed_mean"
    assert float(accuracy) > 0.5


@pytest.mark.slow
def test_a_codec_of_ones_own(outside: Path) -> None:
    (told,) = example("own_codec.py")
    times, accuracy = told.split(" times fewer bytes up, accuracy ")
    assert int(times) > 16  # two bits a value, without their entropy
    assert float(accuracy) > 0.3


def test_a_trimmed_mean_leaves_out_what_is_far_off(plugged: Plugged) -> None:
    method = plugged("own_method").TrimmedMean(RunConfig(method="trimmed_mean", options={"trim": 0.25}))
    state = State(0, {"w": torch.tensor([1.0, 1.0])})
    acc = method.begin(state, 1)
    for node, update in enumerate([[1e9, 0.0], [1.0, 2.0], [3.0, -1e9], [-1e9, 4.0]]):
        acc = method.fold(acc, "fit", Reply(node, {"w": torch.tensor(update)}, 1, {}))
    assert method.step(state, acc).proposal["w"].tolist() == [3.0, 2.0]  # 1 + (1 + 3) / 2, 1 + (0 + 2) / 2


@pytest.mark.slow
def test_ternary_codes_are_right_on_average(plugged: Plugged) -> None:
    """The mean of n draws is off by s / 2 sqrt(n) at most, in one standard deviation."""
    plugged("own_codec")
    codec, x = parse("ternary | entropy"), torch.linspace(-1.0, 0.5, 1024)  # a block
    draws = []
    for seed in range(16):
        payload, _ = codec.encode({"w": x.repeat(100, 1)}, {}, CodecContext(seed))
        decoded, _ = codec.decode(payload, {"w": TensorSpec((100, 1024))}, {}, CodecContext(seed))
        assert decoded["w"].unique().tolist() == [-1.0, 0.0, 1.0]
        draws.append(decoded["w"])
    assert (torch.cat(draws).mean(dim=0) - x).abs().max() < 5 * 0.5 / 40


def example(name: str, *words: str) -> list[str]:
    command = [sys.executable, str(ROOT / "examples" / name), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.mark.slow
def test_two_classes_are_written_that_are_as_common_and_hardly_overlap(outside: Path) -> None:
    example("two_classes.py")
    train, test = (
        [json.loads(line) for line in (outside / file).read_text().splitlines()]
        for file in ("train.jsonl", "test.jsonl")
    )
    assert Counter(row["label"] for row in train) == {"tech": 1020, "entertainment": 1020}
    assert Counter(row["label"] for row in test) == {"tech": 1000, "entertainment": 1000}
    assert all(len(row["text"].split()) == 6 for row in train + test)
    assert len({row["text"] for row in train} & {row["text"] for row in test}) < 10


@pytest.mark.slow
def test_of_two_classes_one_may_be_rare(outside: Path) -> None:
    example("two_classes.py", "20")
    for file, rare in (("train.jsonl", 51), ("test.jsonl", 125)):
        labels = [json.loads(line)["label"] for line in (outside / file).read_text().splitlines()]
        assert Counter(labels) == {"tech": 20 * rare, "entertainment": rare}
