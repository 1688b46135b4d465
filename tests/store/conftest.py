"""What is stored here waits for the disk, as it does for users."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _disk() -> None:
    """Write for real."""
