"""Flower's SuperExec, which starts ServerApps, as a process that ends with its SuperLink."""

from __future__ import annotations

from flwr.supercore.cli import flower_superexec

from fedllm.host.processes import die_with_parent

__all__ = ["main"]


def main() -> None:
    """Run ``flower-superexec`` with this process's arguments."""
    die_with_parent()
    flower_superexec()


if __name__ == "__main__":
    main()
