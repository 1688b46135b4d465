"""Whatever is sent to the API, it answers as its own description says, and never with a fault of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from server.dashboard.actions.launch import Launcher
from server.dashboard.actions.operations import Operations
from server.dashboard.app import create
from tests.reports.made_up import make_run

# Of jsonschema and others that schemathesis brings along. It takes seconds to import: so where it is used.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture
def described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The API's own description, with a token that may do everything and nothing that starts processes."""
    import schemathesis

    preset = {"name": "quickstart", "shows": "", "costs": ""}
    monkeypatch.setattr(Launcher, "presets", lambda self: [preset])
    monkeypatch.setattr(Launcher, "document", lambda self, preset: {})
    monkeypatch.setattr(Launcher, "schemas", lambda self: {})
    monkeypatch.setattr(Launcher, "resolve", lambda self, document, settings: dict(document))
    monkeypatch.setattr(Launcher, "start", lambda self, name, document: None)
    monkeypatch.setattr(Launcher, "go_on", lambda self, name: None)
    ops = Operations(tmp_path / "runs")
    make_run(ops.root / "a")
    monkeypatch.setattr(Launcher, "report", lambda self, name: ops.root / "a" / "summary.json")
    headers = {"Authorization": f"Bearer {ops.accounts.add_token('script', 'operator')}"}
    return schemathesis.openapi.from_asgi("/api/openapi.json", create(ops), headers=headers), headers


@pytest.mark.slow
def test_the_api_keeps_its_word(described: Any) -> None:
    from schemathesis.specs.openapi.checks import (
        negative_data_rejection,
        positive_data_acceptance,
        unsupported_method,
    )

    schema, headers = described
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 25
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        def check(case: Any) -> None:
            # What no schema can say (quarantine needs a node) is refused too; "0" for a number is not.
            excluded = [negative_data_rejection, positive_data_acceptance, unsupported_method]
            case.call_and_validate(headers=headers, excluded_checks=excluded)

        check()
