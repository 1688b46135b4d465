"""Which Flower app a device runs: one that is installed on it, named by a bundle that holds no code.

A bundle comes from the server with every run. Flower would unpack it, install what it depends on, and run it.
"""

from __future__ import annotations

import io
import tomllib
import zipfile

__all__ = ["APP", "refusal"]

APP = "client.app:app"
"""The installed fedllm's own."""

_FILES = {"pyproject.toml", ".info/CONTENT"}
_MOST = 64 << 10


def refusal(bundle: bytes, accepted: tuple[str, ...] = (APP,)) -> str | None:
    """Say why a bundle is not run; None where it names an accepted app and nothing else is in it.

    Args:
        bundle: a Flower app bundle, from whoever commands the server.
        accepted: installed apps as ``module:attribute``.
    """
    ours = f"this device runs {' or '.join(accepted)} as it is installed, and nothing else"
    try:
        with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
            if foreign := sorted(set(archive.namelist()) - _FILES):
                return f"the run's bundle brings {foreign[0][:80]!r}; {ours}"
            if archive.getinfo("pyproject.toml").file_size > _MOST:
                return f"the run's bundle is larger than {_MOST} bytes; {ours}"
            document = tomllib.loads(archive.read("pyproject.toml").decode())
        named = document["tool"]["flwr"]["app"]["components"]["clientapp"]
        depends = document.get("project", {}).get("dependencies", [])
    except (zipfile.BadZipFile, KeyError, TypeError, AttributeError, ValueError) as error:
        return f"the run's bundle cannot be read ({type(error).__name__}); {ours}"
    if named not in accepted:
        return f"the run asks for {str(named)[:80]!r}; {ours}"
    return f"the run's bundle asks to install {str(depends)[:80]}; {ours}" if depends else None
