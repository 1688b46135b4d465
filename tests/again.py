"""Run the few tests that failed beside others once more, one at a time: ``python -m tests.again``.

For a machine that many share, and that must say yes or no: a test of real processes can fail there for what
its neighbours do. More failures than a few are no such thing, nor is one that fails again. What passes alone
is named, since it depends on how fast a machine is, or has met a race that somebody should look for.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

__all__ = ["again"]

_FAILED = Path(".pytest_cache/v/cache/lastfailed")
_MOST = 3


def again(folder: Path = Path()) -> int:
    """Return pytest's status of a second try, or 1 where there is nothing to try."""
    path = folder / _FAILED
    failed = sorted(json.loads(path.read_bytes())) if path.exists() else []
    if not 1 <= len(failed) <= _MOST:
        return 1
    print(f"once more, one at a time: {' '.join(failed)}", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "", "--durations", "3", *failed]
    status = subprocess.run(command, cwd=folder, check=False).returncode
    if status == 0:
        print(f"PASSED ALONE, FAILED BESIDE OTHERS: {' '.join(failed)}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(again())
