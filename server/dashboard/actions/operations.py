"""What people do through pages and API: checked against their role, carried out, written to the audit log."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.config import require_name
from fedllm.errors import ConfigError, FedllmError, StoreError
from fedllm.runs.amending import forget
from fedllm.runs.durable import append_line, to_json
from fedllm.runs.folder import GIVEN
from fedllm.runs.records import FILE
from fedllm.terminal.console import console
from server.dashboard.actions import federation
from server.dashboard.actions.federation import FederationNode
from server.dashboard.actions.launch import Launcher
from server.dashboard.door.access import Accounts, Principal, Role, Sessions, state_folder
from server.dashboard.errors import Conflict, Denied, Missing
from server.dashboard.reading.prepared import Prepared
from server.dashboard.reading.runs import Overview, RunIndex

__all__ = ["COMMANDS", "Operations"]

COMMANDS = ("pause", "resume", "stop", "quarantine", "release")
_SETTING = re.compile(r"[A-Za-z0-9_]\w*(\.\w+)*", re.ASCII)
_CHECKPOINT = re.compile(r"round-(\d{6,})")


class Operations:
    """All that the dashboard knows and may do.

    Args:
        root: folder of runs; made if missing.
        federation: folder of the federation that is served beside it, if any.
    """

    def __init__(self, root: Path, federation: Path | None = None) -> None:
        self.root, self.federation = root.resolve(), federation and federation.resolve()
        self.root.mkdir(parents=True, exist_ok=True)
        self.state = state_folder(self.root)
        self.accounts, self.sessions = Accounts(self.state), Sessions()
        self.index = RunIndex(self.root)
        self.prepared = Prepared(self.state / "prepared")
        self.launcher = Launcher(self.root, self.state, self.federation)

    # --- looking ----------------------------------------------------------------------------------------

    def overviews(self) -> list[Overview]:
        """Return all runs, those first that are only about to begin."""
        begun = self.index.overviews()
        starting = [self._starting(name, reason) for name, reason in self.launcher.starting().items()]
        return starting + begun

    def overview(self, name: str) -> Overview:
        """Return one run, begun or about to."""
        if name in (starting := self.launcher.starting()):
            return self._starting(name, starting[name])
        return self.index.overview(name)

    def _starting(self, name: str, reason: str) -> Overview:
        state = "failed" if reason else "starting"
        return Overview(name=name, state=state, reason=reason, changed_at=time.time())

    def checkpoints(self, name: str) -> list[int]:
        """Return the rounds that a run can go back to."""
        folder = self.index.folder(name) / "checkpoints"
        return sorted(_checkpoints(folder))

    def audit_log(self, who: Principal, limit: int = 200) -> list[dict[str, Any]]:
        """Return ``at``, ``who``, ``action``, ``detail`` and ``run`` of what was done here, newest first.

        It tells who logs in, from where, and under which names others tried: for operators.
        """
        self.require_operator(who)
        try:
            lines = (self.state / "audit.jsonl").read_bytes().splitlines()
        except FileNotFoundError:
            return []
        return [_noted(line) for line in reversed(lines[-limit:])]

    # --- levers -----------------------------------------------------------------------------------------

    def command(self, who: Principal, name: str, kind: str, node: int | None = None) -> None:
        """Ask a run for one of :data:`COMMANDS`; it obeys before its next round."""
        self.require_operator(who)
        view = self.index.overview(name)
        if kind not in COMMANDS:
            raise ConfigError(f"there is no command {kind!r}; valid are {', '.join(COMMANDS)}")
        about_node = kind in ("quarantine", "release")
        if about_node != (node is not None):
            raise ConfigError(f"{kind} {'needs' if about_node else 'takes no'} node")
        if node is not None and not 0 <= node < view.clients:
            raise Missing(f"{name} has no node {node}: its nodes are 0 to {view.clients - 1}")
        if not view.live:
            raise Conflict(f"{name} is {view.state}: {kind} needs a run that is under way")
        arguments = {} if node is None else {"node": node}
        self.index.run(name).post_command(kind, who.name, **arguments)
        self._note(who, kind, name, to_json(arguments) if arguments else "")

    def start(
        self, who: Principal, name: str, preset: str, settings: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Start a run from a preset; returns its configuration."""
        self.require_operator(who)
        return self._begin(who, "start", name, self.launcher.document(preset), settings or {}, preset)

    def clone(
        self, who: Principal, source: str, name: str, settings: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Start a run like another; returns its configuration."""
        self.require_operator(who)
        document = self.index.run(source).config.to_document()
        return self._begin(who, "clone", name, document, settings or {}, source)

    def dismiss(self, who: Principal, name: str) -> None:
        """Take a run that never began out of the list."""
        self.require_operator(who)
        reason = self.launcher.starting().get(name)
        if reason is None:
            raise Missing(f"there is no run {name!r} that did not start")
        if not reason:
            raise Conflict(f"{name} is starting: wait for what becomes of it")
        self.launcher.dismiss(name)
        self._note(who, "dismiss", name, reason)

    def go_on(self, who: Principal, name: str, round: int | None = None) -> None:
        """Go on with a run that is not under way, at its last checkpoint or an earlier one."""
        self.require_operator(who)
        view = self.index.overview(name)
        if view.live or self.launcher.busy(name):
            raise Conflict(f"{name} is {view.state}: stop it first")
        if round is None and view.state == "finished":
            raise Conflict(f"{name} is finished: go back to a checkpoint, or clone it")
        self._require_checkpoint(name, round)
        detail = "" if round is None else f"from round {round}"
        # Only said here: what came after is forgotten by the run itself, once it goes on.
        self.index.run(name).go_on_from(round)
        try:
            self.launcher.go_on(name)
        except FedllmError as error:
            self.index.run(name).go_on_from(None)
            self._note(who, "go on refused", name, f"{detail}: {error}".removeprefix(": "))
            raise
        self._note(who, "go on", name, detail)

    def _require_checkpoint(self, name: str, round: int | None) -> None:
        held = self.checkpoints(name)
        if round is not None and round not in held:
            known = ", ".join(map(str, held)) or "none"
            raise Missing(f"{name} has no checkpoint of round {round}; its checkpoints are {known}")

    def _begin(
        self,
        who: Principal,
        action: str,
        name: str,
        document: Mapping[str, Any],
        settings: Mapping[str, Any],
        source: str,
    ) -> dict[str, Any]:
        require_name(name)
        for key in settings:
            if not _SETTING.fullmatch(key):
                raise ConfigError(f"{key[:100]!r} is not a setting")
        if "name" in settings:
            raise ConfigError("the name is given beside the settings, not among them")
        self._require_free(name)
        resolved = self.launcher.resolve({**document, "name": name}, settings)
        self._require_free(name)
        self.launcher.start(name, resolved)
        self._note(who, action, name, f"from {source}" + (f" with {to_json(settings)}" if settings else ""))
        return resolved

    def _require_free(self, name: str) -> None:
        if (self.root / name / FILE).exists() or self.launcher.busy(name):
            raise Conflict(f"there is a run {name} already; choose another name")

    # --- nodes ------------------------------------------------------------------------------------------

    def federation_nodes(self) -> list[FederationNode]:
        """Return the nodes of the federation that is served beside; none where runs are simulated."""
        return [] if self.federation is None else federation.nodes(self.federation)

    def revoke(self, who: Principal, node: int) -> None:
        """Forbid a node to join ever again."""
        self.require_operator(who)
        if node not in [row.node for row in self.federation_nodes() if row.status != "revoked"]:
            raise Missing(f"there is no node {node} that may join")
        assert self.federation is not None
        federation.revoke_node(self.federation, node)
        self._note(who, "revoke", "", f"node {node}")

    def forget(self, who: Principal, name: str, node: int) -> None:
        """Delete what a run that is over keeps about a node; its bytes stay in the run's totals."""
        self.require_operator(who)
        folder = self.index.folder(name)
        if self.index.overview(name).live:
            raise Conflict(f"{name} is under way: stop it first")
        if node not in [row.node for row in self.index.nodes(name) if row.known]:
            raise Missing(f"{name} knows nothing of a node {node}")
        if any((folder / GIVEN).rglob("*.jsonl")):
            raise Conflict(
                f"{folder / GIVEN} holds the texts of all clients: delete that folder first, without which "
                "the run cannot go on"
            )
        forget(folder, node)
        self.index.drop(name)
        self._note(who, "forget", name, f"node {node}")

    # --- access -----------------------------------------------------------------------------------------

    def add_user(self, who: Principal, name: str, role: Role) -> str:
        """Add a user and return the password."""
        self.require_operator(who)
        password = self.accounts.add_user(name, role)
        self._note(who, "user", "", f"{name} as {role}")
        return password

    def renew_password(self, who: Principal, name: str) -> str:
        """Give a user a new password and return it; ends that user's sessions."""
        self.require_operator(who)
        password = self.accounts.renew_password(name)
        self.sessions.close_all(name)
        self._note(who, "new password", "", name)
        return password

    def remove_user(self, who: Principal, name: str) -> None:
        """Remove a user and end all sessions of that name."""
        self.require_operator(who)
        self.accounts.remove_user(name)
        self.sessions.close_all(name)
        self._note(who, "remove user", "", name)

    def add_token(self, who: Principal, name: str, role: Role) -> str:
        """Make an API token and return it."""
        self.require_operator(who)
        token = self.accounts.add_token(name, role)
        self._note(who, "token", "", f"{name} as {role}")
        return token

    def remove_token(self, who: Principal, name: str) -> None:
        """Revoke an API token."""
        self.require_operator(who)
        self.accounts.remove_token(name)
        self._note(who, "revoke token", "", name)

    def require_operator(self, who: Principal) -> None:
        """Refuse whoever may not change things, or may not any more."""
        # A page that stays open acts through a websocket that was let in long ago: look again.
        if who.session and not self.goes_on(who):
            raise Denied("the session has ended: log in again")
        if who.role != "operator":
            raise Denied(f"{who.name} may look, not change: this needs the role operator")

    def goes_on(self, who: Principal, *, touch: bool = True) -> bool:
        """Whether a login is still one; a page's timer must not prolong it."""
        found = self.sessions.find(who.session, touch=touch)
        return found is not None and self.accounts.stamp_of(who.name) == who.stamp

    def login_noted(self, name: str, address: str, *, succeeded: bool) -> None:
        """Write a login, or an attempt at one, to the audit log."""
        action = "login" if succeeded else "login refused"
        try:
            self._note(Principal(name, "viewer"), action, "", f"from {address}")
        except StoreError as error:
            # Whoever is to free the disk has to get in.
            console.print(f"{name!r}: {error}", style="yellow")

    def _note(self, who: Principal, action: str, run: str, detail: str) -> None:
        line = {"at": time.time(), "who": who.name, "action": action, "run": run, "detail": detail}
        try:
            append_line(self.state / "audit.jsonl", to_json(line))
        except StoreError as error:
            raise StoreError(f"{action} is done, but is not in the audit log: {error}") from error
        # Commands note themselves in the run they are for; a run that is about to begin has no log yet.
        if run and action not in COMMANDS and (self.root / run / FILE).is_file():
            self.index.run(run).audit(who.name, action, detail)


def _noted(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
        return {key: row[key] for key in ("at", "who", "action", "run", "detail")}
    except (ValueError, KeyError, TypeError):
        # Cut off when the disk was full; what is left of it is shown.
        return {"at": 0.0, "who": "?", "action": "damaged line", "run": "", "detail": repr(line[:500])}


def _checkpoints(folder: Path) -> dict[int, Path]:
    matches = ((_CHECKPOINT.fullmatch(path.name), path) for path in folder.glob("round-*"))
    return {int(match[1]): path for match, path in matches if match}
