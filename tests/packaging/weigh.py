"""What is installed beside torch in the environment that runs this file: packages and megabytes.

    python3 -m venv lean
    lean/bin/pip install --constraint constraints.txt .
    lean/bin/python tests/packaging/weigh.py

prints the figures of docs/install.md. It imports nothing that has to be installed.
"""

from __future__ import annotations

from importlib.metadata import distributions

TORCH = {
    *("filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "setuptools", "sympy", "torch"),
    *("pip", "typing-extensions"),
}
"""Torch, what it needs itself (on the CPU), and pip."""


def main() -> None:
    """Print the sum and the twenty largest packages."""
    sizes: dict[str, int] = {}
    for distribution in distributions():
        name = distribution.name.lower().replace("_", "-")
        if name not in TORCH:
            files = [file.locate() for file in distribution.files or []]
            sizes[name] = sum(path.stat().st_size for path in files if path.is_file())  # type: ignore[attr-defined]
    print(f"{len(sizes)} packages, {sum(sizes.values()) / 1e6:.0f} MB beside torch")
    for name, size in sorted(sizes.items(), key=lambda item: -item[1])[:20]:
        print(f"{size / 1e6:8.1f} {name}")


if __name__ == "__main__":
    main()
