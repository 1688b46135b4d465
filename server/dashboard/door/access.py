"""Who may enter: users with argon2 hashes, API tokens, sessions, and a limit on guessing.

``access.json`` holds hashes only; a password or a token is shown once, when it is made. Sessions live in
memory: they end when the dashboard does.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import argon2
import filelock

from fedllm.errors import ConfigError, StoreError
from fedllm.runs.durable import replace_file, to_json

__all__ = ["Accounts", "Principal", "Role", "Sessions", "Throttle", "state_folder", "welcome"]

Role = Literal["operator", "viewer"]
ROLES: tuple[Role, ...] = ("operator", "viewer")
TOKEN_PREFIX = "fedllm_"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


@dataclass(frozen=True)
class Principal:
    """Whoever makes a request.

    Attributes:
        name: of the user, or of the token.
        role: ``operator`` may change things, ``viewer`` may look.
        session: of a login; empty for a token.
        csrf: what a login must repeat in ``X-CSRF-Token`` with every change through the API.
        stamp: of the user's password and role when the session was opened; a new one ends the session.
    """

    name: str
    role: Role
    session: str = ""
    csrf: str = ""
    stamp: str = ""


class Accounts:
    """Users and tokens, kept in one file that other processes may change.

    Args:
        folder: made if missing; only its owner may read it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path = folder / "access.json"
        self._hasher = argon2.PasswordHasher()
        # Checked for names that nobody has, so that the time taken does not tell who exists.
        self._nobody = self._hasher.hash(secrets.token_urlsafe())
        self._lock = filelock.FileLock(folder / "access.lock")

    def first(self) -> str | None:
        """Make the user ``operator`` where there are no users yet; return the password, to be shown once."""
        return None if self._read()["users"] else self.add_user("operator", "operator")

    def add_user(self, name: str, role: Role) -> str:
        """Add a user; return the password.

        Raises:
            ConfigError: there is a user of this name: its role cannot be changed by adding it again.
        """
        password = secrets.token_urlsafe(15)
        row = {"role": _role(role), "hash": self._hasher.hash(password)}

        self._add("user", name, row, "give it a new password, or remove it first")
        return password

    def renew_password(self, name: str, role: Role | None = None) -> str:
        """Give a user a new password, and return it.

        Args:
            name: of the user.
            role: a new one; None keeps what the user has. The last operator stays one.

        Raises:
            ConfigError: there is no such user, or nobody would be operator any more.
        """
        password = secrets.token_urlsafe(15)
        hashed = self._hasher.hash(password)

        def renew(held: dict[str, Any]) -> None:
            row = _user(held, name)
            if role == "viewer":
                _require_other_operators(held, name)
            held["users"][name] = {"role": row["role"] if role is None else _role(role), "hash": hashed}

        self._change(renew)
        return password

    def remove_user(self, name: str) -> None:
        """Remove a user; the last operator stays."""

        def remove(held: dict[str, Any]) -> None:
            _user(held, name)
            _require_other_operators(held, name)
            del held["users"][name]

        self._change(remove)

    def add_token(self, name: str, role: Role) -> str:
        """Make an API token and return it.

        Raises:
            ConfigError: there is a token of this name, which somebody may be using.
        """
        token = TOKEN_PREFIX + secrets.token_urlsafe(32)
        row = {"role": _role(role), "sha256": _digest(token), "made_at": time.time()}

        self._add("token", name, row, "choose another name, or revoke it first")
        return token

    def _add(self, kind: str, name: str, row: dict[str, Any], otherwise: str) -> None:
        def add(held: dict[str, Any]) -> None:
            if name in held[f"{kind}s"]:
                raise ConfigError(f"there is a {kind} {name!r} already: {otherwise}")
            held[f"{kind}s"][_name(name)] = row

        self._change(add)

    def remove_token(self, name: str) -> None:
        """Revoke a token."""

        def remove(held: dict[str, Any]) -> None:
            if held["tokens"].pop(name, None) is None:
                raise ConfigError(f"there is no token {name!r}")

        self._change(remove)

    def check_password(self, name: str, password: str) -> Role | None:
        """Return the user's role if the password is right; takes as long for users that do not exist."""
        row = self._read()["users"].get(name)
        try:
            self._hasher.verify(row["hash"] if row else self._nobody, password)
        except argon2.exceptions.VerificationError:
            return None
        return row["role"] if row else None

    def check_token(self, token: str) -> Principal | None:
        """Return whose token this is."""
        # What is secret has 256 random bits, so a plain digest cannot be guessed from the file.
        digest = _digest(token)
        for name, row in self._read()["tokens"].items():
            if secrets.compare_digest(row["sha256"], digest):
                return Principal(f"token {name}", row["role"])
        return None

    def role_of(self, name: str) -> Role | None:
        """Return a user's role as it is now."""
        row = self._read()["users"].get(name)
        return row["role"] if row else None

    def stamp_of(self, name: str) -> str:
        """Return what changes with a user's password and role; empty where there is no such user."""
        row = self._read()["users"].get(name)
        return _digest(f"{row['role']} {row['hash']}") if row else ""

    def users(self) -> list[dict[str, str]]:
        """Return ``name`` and ``role`` of every user."""
        return [{"name": name, "role": row["role"]} for name, row in sorted(self._read()["users"].items())]

    def tokens(self) -> list[dict[str, Any]]:
        """Return ``name``, ``role`` and ``made_at`` (Unix time) of every token."""
        held = self._read()["tokens"]
        return [
            {"name": name, "role": row["role"], "made_at": row["made_at"]}
            for name, row in sorted(held.items())
        ]

    def _read(self) -> dict[str, Any]:
        try:
            held: dict[str, Any] = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return {"users": {}, "tokens": {}}
        except (OSError, ValueError) as error:
            raise StoreError(f"cannot read {self.path}: {error}") from error
        return held

    def _change(self, change: Callable[[dict[str, Any]], None]) -> None:
        with self._lock:
            held = self._read()
            change(held)
            replace_file(self.path, to_json(held, indent=2))
            self.path.chmod(0o600)


def state_folder(runs: Path) -> Path:
    """Where the dashboard over a folder of runs keeps what is its own."""
    return runs / ".dashboard"


def welcome(accounts: Accounts, say: Callable[[str], None]) -> None:
    """Make the first user where there is none, and say the password: this once."""
    if password := accounts.first():
        say(f"first start: log in as operator with the password {password}")
        say("it is shown this once; fedllm dashboard --new-password operator makes another")


class Sessions:
    """Logins that have not expired.

    Args:
        idle_s: seconds without a request after which a session ends.
        whole_s: seconds after which it ends in any case.
        now: clock, in seconds.
    """

    def __init__(
        self, idle_s: float = 3600.0, whole_s: float = 12 * 3600.0, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.idle_s, self.whole_s = idle_s, whole_s
        self._now = now
        self._held: dict[str, tuple[Principal, float, float]] = {}
        self._guard = threading.Lock()

    def open(self, name: str, role: Role, stamp: str = "") -> Principal:
        """Start a session with an identifier of its own."""
        principal = Principal(name, role, secrets.token_urlsafe(32), secrets.token_urlsafe(24), stamp)
        with self._guard:
            self._drop_expired()
            self._held[principal.session] = (principal, self._now(), self._now())
        return principal

    def find(self, session: str, *, touch: bool = True) -> Principal | None:
        """Return who a session belongs to, if it goes on; requests prolong it, a page's timer must not."""
        with self._guard:
            self._drop_expired()
            if session not in self._held:
                return None
            principal, opened, seen = self._held[session]
            self._held[session] = (principal, opened, self._now() if touch else seen)
            return principal

    def close(self, session: str) -> None:
        """End a session."""
        with self._guard:
            self._held.pop(session, None)

    def close_all(self, name: str) -> None:
        """End every session of a user."""
        with self._guard:
            for key in [key for key, (principal, _, _) in self._held.items() if principal.name == name]:
                del self._held[key]

    def _drop_expired(self) -> None:
        now = self._now()
        for key, (_, opened, seen) in list(self._held.items()):
            if now - seen > self.idle_s or now - opened > self.whole_s:
                del self._held[key]


class Throttle:
    """Refuses further attempts from where too many have failed lately.

    Args:
        limit: failures allowed within the window.
        window_s: length of the window in seconds.
        now: clock, in seconds.
    """

    def __init__(
        self, limit: int = 5, window_s: float = 60.0, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.limit, self.window_s = limit, window_s
        self._now = now
        self._failures: defaultdict[str, deque[float]] = defaultdict(deque)
        self._guard = threading.Lock()

    def wait_s(self, key: str) -> float:
        """Return the seconds until another attempt is allowed; 0 allows it now."""
        with self._guard:
            failures = self._recent(key)
            if len(failures) < self.limit:
                return 0.0
            return failures[0] + self.window_s - self._now()

    def failed(self, key: str) -> None:
        """Note a failure."""
        with self._guard:
            self._recent(key).append(self._now())

    def clear(self, key: str) -> None:
        """Forget the failures of whoever has succeeded."""
        with self._guard:
            self._failures.pop(key, None)

    def _recent(self, key: str) -> deque[float]:
        # Forgets every key that has gone quiet, so that strangers cannot fill the memory for ever.
        oldest = self._now() - self.window_s
        for other in [other for other, at in self._failures.items() if not at or at[-1] < oldest]:
            del self._failures[other]
        failures = self._failures[key]
        while failures and failures[0] < oldest:
            failures.popleft()
        return failures


def _operators(held: dict[str, Any]) -> list[str]:
    return [user for user, row in held["users"].items() if row["role"] == "operator"]


def _user(held: dict[str, Any], name: str) -> dict[str, Any]:
    if name not in held["users"]:
        raise ConfigError(f"there is no user {name!r}")
    row: dict[str, Any] = held["users"][name]
    return row


def _require_other_operators(held: dict[str, Any], name: str) -> None:
    if _operators(held) == [name]:
        raise ConfigError(f"{name!r} is the last operator; make another first")


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is not a name: letters, digits and . _ @ -, at most 64")
    return name


def _role(role: Role) -> Role:
    if role not in ROLES:
        raise ConfigError(f"role is {' or '.join(ROLES)}, not {role!r}")
    return role
