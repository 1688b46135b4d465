"""How many of 300 changed lines do the quick tests notice? ``make mutants`` says so, with mutmut.

mutmut writes every mutant of the files named in ``pyproject.toml`` into ``mutants/``, runs the quick tests
once to learn which of them reach which function, and forks a process with everything imported for each
mutant. What is added here: a sample that a seed chooses, the fastest tests first with a bound on their
seconds per mutant, and the score. A mutant that only slower tests would notice counts as a survivor, and so
does one that changes nothing: the score is a lower bound. Stopped, the run goes on where it was; after a
change of the code, ``rm -r mutants`` begins anew.

    python tests/mutation/score.py [--sample 300] [--seed 0] [--seconds 10]
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import math
import random
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path("mutants")
STATS = ROOT / "mutmut-stats.json"
TRIED = ROOT / "tried.json"
FIRST = "fedllm.models.training.x_learning_rate__mutmut_1"
"""Tried so that mutmut writes the mutants and learns what the tests reach."""
NOTICED = {1, 3}
"""Exit codes of pytest where a test failed or could not even begin."""
ENDLESS = {24, -24, 152}
"""Exit codes of a run that was stopped for want of an end."""


def main() -> None:
    """Draw, run, report."""
    parser = argparse.ArgumentParser(prog="python tests/mutation/score.py")
    parser.add_argument("--sample", type=int, default=300, help="mutants to try")
    parser.add_argument("--seed", type=int, default=0, help="chooses them")
    parser.add_argument("--seconds", type=float, default=10.0, help="of tests per mutant, the fastest first")
    given = parser.parse_args()
    if not STATS.is_file():
        subprocess.run([sys.executable, "-m", "mutmut", "run", "--max-children", "1", FIRST], check=True)
    chosen = sample(every_mutant(), given.sample, given.seed)
    known = tried()
    attempt([name for name in chosen if name not in known], given.seconds)
    report(chosen)


def every_mutant() -> list[str]:
    """Names of all mutants, sorted."""
    files = ROOT.glob("**/*.py.meta")
    return sorted(name for file in files for name in json.loads(file.read_text("utf-8"))["exit_code_by_key"])


def sample(names: list[str], size: int, seed: int) -> list[str]:
    """Choose uniformly among all mutants; a larger sample begins with the smaller."""
    order = list(names)
    random.Random(seed).shuffle(order)
    return order[:size]


def tried() -> dict[str, int]:
    """Exit code of the tests by mutant, of those that were tried."""
    return dict(json.loads(TRIED.read_text("utf-8"))) if TRIED.is_file() else {}


def dies(code: int) -> bool:
    """Whether the tests noticed."""
    return code in NOTICED | ENDLESS


def attempt(names: list[str], seconds: float) -> None:
    """Let the tests meet each mutant, and write down after each what came of it."""
    if not names:
        return
    # Only installed for this: whoever collects tests may come by here without it.
    from mutmut.utils.file_utils import setup_source_paths
    from mutmut.workers.isolation import get_mutant_runner

    setup_source_paths()
    stats = json.loads(STATS.read_text("utf-8"))
    known, runner = tried(), get_mutant_runner(1)
    runner.startup()
    for count, name in enumerate(names, start=1):
        chosen, expected = tests_of(name, stats, seconds)
        runner.submit(name, chosen, math.ceil(2 * (3 * expected + 30)), expected)
        known[name] = runner.wait_for_result().exit_code
        TRIED.write_text(json.dumps(known, indent=0), encoding="utf-8")
        print(f"{count}/{len(names)} {'dies' if dies(known[name]) else 'survives'} {name}", flush=True)
    runner.signal_work_complete()
    runner.shutdown()


def tests_of(name: str, stats: dict[str, Any], seconds: float) -> tuple[list[str], float]:
    """The fastest of the tests that reach a mutant's function, as many as fit; and how long they take."""
    duration = stats["duration_by_test"]
    reaching = stats["tests_by_mangled_function_name"].get(name.rpartition("__mutmut_")[0], [])
    chosen: list[str] = []
    spent = 0.0
    for test in sorted(reaching, key=lambda test: (duration[test], test)):
        if spent + duration[test] > seconds and len(chosen) >= 5:
            break
        chosen.append(test)
        spent += duration[test]
    return chosen, spent


def report(chosen: list[str]) -> None:
    """Print what survived, and the score."""
    known = tried()
    survived = [name for name in chosen if not dies(known[name])]
    for name in survived:
        print(f"\n{name}")
        print("\n".join(line for line in change(name) if line[:1] in "+-" and line[:3] not in ("+++", "---")))
    killed = len(chosen) - len(survived)
    print(f"\n{killed} of {len(chosen)} mutants die: {100 * killed / len(chosen):.1f} %")


def change(name: str) -> Iterable[str]:
    """The lines of a function that its mutant changes."""
    module, _, function = name.rpartition(".")
    original = function.rpartition("__mutmut_")[0] + "__mutmut_orig"
    before, after = (functions(module)[key].splitlines()[1:] for key in (original, function))
    return difflib.unified_diff(before, after, lineterm="", n=0)


@cache
def functions(module: str) -> dict[str, str]:
    """Source of every function, original or mutant, that mutmut wrote for a module."""
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text("utf-8"))
    return {node.name: ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


if __name__ == "__main__":
    main()
