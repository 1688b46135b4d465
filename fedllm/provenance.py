"""Where a run's numbers come from: versions, commit, machine."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["provenance"]

_PACKAGES = ("fedllm", "flwr", "numpy", "peft", "torch", "transformers")


def provenance(**facts: Any) -> dict[str, Any]:
    """Return versions of what computes, the git commit of this checkout (None elsewhere) and further facts.

    >>> provenance(engine="loopback")["engine"]
    'loopback'
    """
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    machine = {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()}
    return {"versions": versions, "git": _git(Path(__file__).parent), "machine": machine, **facts}


def _git(folder: Path) -> dict[str, Any] | None:
    """Return the commit that holds this very file, and whether the checkout differs from it."""
    tracked = _run(folder, "ls-files", "--error-unmatch", Path(__file__).name)
    commit = _run(folder, "rev-parse", "HEAD")
    if tracked is None or commit is None:
        return None
    return {"commit": commit, "modified": bool(_run(folder, "status", "--porcelain", "--untracked-files=no"))}


def _run(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
