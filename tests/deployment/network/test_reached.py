"""A server that goes away while a command talks to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedllm.errors import FedllmError
from server.federation.link import reached
from server.federation.provision import provision
from tests.processes import free_port


def test_a_server_that_does_not_answer_is_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "federation"
    provision(folder, "localhost", 1, port=(port := free_port()))
    with pytest.raises(FedllmError) as caught, reached(folder) as control:
        control.nodes()
    said = str(caught.value)
    assert said.startswith(f"the server of {folder} does not answer on 127.0.0.1:{port} (")
    assert said.endswith(f"; start it with: fedllm server {folder}")
