"""Flower's SuperNode as a process that ends when the device's supervisor does."""

from __future__ import annotations

from flwr.supernode.cli.flower_supernode import flower_supernode

from fedllm.processes import die_with_parent

__all__ = ["main"]


def main() -> None:
    """Run ``flower-supernode`` with this process's arguments."""
    die_with_parent()
    flower_supernode()


if __name__ == "__main__":
    main()
