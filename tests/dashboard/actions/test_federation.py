"""The dashboard beside a federation: its nodes, its certificate, its folder of runs."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from fedllm.errors import ConfigError
from server.dashboard.door.access import Accounts, Principal
from server.dashboard.errors import Denied, Missing
from server.dashboard.start import open_operations, secret, start
from server.federation.control import read_public_key
from server.federation.provision import provision

OLIVE = Principal("olive", "operator")


def test_the_federation_is_found_from_its_folder_or_its_runs(tmp_path: Path) -> None:
    provision(tmp_path / "fed", "localhost", 1)
    for folder in (tmp_path / "fed", tmp_path / "fed" / "runs"):
        ops = open_operations(folder)
        assert (ops.root, ops.federation) == (tmp_path / "fed" / "runs", tmp_path / "fed")
    alone = open_operations(tmp_path / "runs")
    assert (alone.root, alone.federation, alone.federation_nodes()) == (tmp_path / "runs", None, [])


def test_nodes_carry_fingerprints_and_can_be_revoked_for_ever(tmp_path: Path) -> None:
    folder = tmp_path / "fed"
    provision(folder, "localhost", 2, port=1)
    ops = open_operations(folder)
    key = read_public_key(folder / "nodes" / "node-0.pub")
    found = ops.federation_nodes()
    assert [(row.node, row.status) for row in found] == [(0, "unknown"), (1, "unknown")]
    assert found[0].fingerprint == hashlib.sha256(key).hexdigest()[:32]
    with pytest.raises(Denied):
        ops.revoke(Principal("vera", "viewer"), 1)
    ops.revoke(OLIVE, 1)
    assert [row.status for row in ops.federation_nodes()] == ["unknown", "revoked"]
    assert not (folder / "bundles" / "node-1").exists()
    assert ops.audit_log(OLIVE)[0]["detail"] == "node 1"
    for node in (1, 7):
        with pytest.raises(Missing, match="no node"):
            ops.revoke(OLIVE, node)


def test_secrets_are_made_on_the_command_line(tmp_path: Path) -> None:
    token = secret(tmp_path, user=None, token="ci", role="viewer")
    accounts = Accounts(tmp_path / ".dashboard")
    assert accounts.check_token(token) == Principal("token ci", "viewer")
    first = secret(tmp_path, user="olive", token=None, role="operator")
    second = secret(tmp_path, user="olive", token=None, role=None)
    assert accounts.check_password("olive", first) is None
    # A new password is no new role.
    assert accounts.check_password("olive", second) == "operator"
    with pytest.raises(ConfigError, match="operator or viewer"):
        secret(tmp_path, user=None, token="x", role="king")


def test_tls_needs_a_certificate(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fedllm provision makes one"):
        start(tmp_path, host="127.0.0.1", port=1, tls=True, report=print)
