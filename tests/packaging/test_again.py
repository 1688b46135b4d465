"""What CI runs once more: a few failures, alone; what fails twice fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.again import again

TESTS = """
import pathlib
import pytest

@pytest.mark.parametrize("number", range(3))
def test_once(number):
    seen = pathlib.Path(f"seen-{{number}}")
    before, _ = seen.exists(), seen.touch()
    assert before and not {broken}

def test_whole():
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize(("broken", "status"), [(False, 0), (True, 1)])
def test_what_passes_alone_is_named_and_what_fails_again_fails(
    broken: bool, status: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_it.py").write_text(TESTS.format(broken=broken))
    subprocess.run([sys.executable, "-m", "pytest", "-q"], cwd=tmp_path, check=False)
    assert again(tmp_path) == status
    out = capfd.readouterr().out
    assert "once more, one at a time: test_it.py::test_once[0]" in out
    assert ("PASSED ALONE" in out) == (status == 0)


@pytest.mark.parametrize("failures", [None, 0, 4])
def test_neither_none_nor_many_are_tried_again(failures: int | None, tmp_path: Path) -> None:
    if failures is not None:
        kept = tmp_path / ".pytest_cache/v/cache/lastfailed"
        kept.parent.mkdir(parents=True)
        kept.write_text(json.dumps({f"test_it.py::test_{number}": True for number in range(failures)}))
    assert again(tmp_path) == 1
