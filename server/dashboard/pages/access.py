"""Users, tokens, and who did what; for operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nicegui import ui
from starlette.concurrency import run_in_threadpool as beside
from starlette.requests import Request

from server.dashboard.actions.operations import Operations
from server.dashboard.door.access import ROLES, Principal
from server.dashboard.pages.layout import act, empty, frame, heading, lever, on_top, page, sure
from server.dashboard.pages.logs import audit_line

__all__ = ["register"]


def register(ops: Operations) -> None:
    """Serve ``/access``."""

    @page("/access")
    async def access_page(request: Request) -> None:
        with frame(request, "Access") as who:
            heading("Access")
            if who.role != "operator":
                empty("This is for operators", "Ask one of them to change what you may do.")
                return
            with ui.element("div").classes("cards"):
                _Names(
                    who,
                    "Users",
                    "password",
                    ops.accounts.users,
                    ops.add_user,
                    ops.remove_user,
                    renew=ops.renew_password,
                )
                _Names(who, "API tokens", "token", ops.accounts.tokens, ops.add_token, ops.remove_token)
            with ui.element("section").classes("panel"):
                heading("Audit log", 2)
                noted = await beside(ops.audit_log, who)
                ui.label("\n".join(map(audit_line, noted))).classes("log")


class _Names:
    """A list of users or tokens, with a way to add and to remove."""

    def __init__(
        self,
        who: Principal,
        title: str,
        secret: str,
        held: Callable[[], list[dict[str, Any]]],
        add: Callable[..., str],
        remove: Callable[..., None],
        renew: Callable[..., str] | None = None,
    ) -> None:
        self.who, self.secret, self.held = who, secret, held
        self.add, self.remove, self.renew = add, remove, renew
        with ui.element("section").classes("panel"):
            heading(title, 2)
            self.rows = ui.element("div")
            with ui.element("div").classes("row"):
                self.name = ui.input("Name").props("dense outlined").style("flex: 1")
                self.role = ui.select(list(ROLES), value="viewer", label="Role").props("dense outlined")
                lever("Add", self._add, who=who)
        self._show()

    def _show(self) -> None:
        self.rows.clear()
        with self.rows:
            for row in self.held():
                with ui.element("div").classes("row apart"):
                    ui.label(f"{row['name']} ({row['role']})")
                    with ui.element("div").classes("row"):
                        if self.renew is not None:
                            lever("New password", self._renewer(row["name"], self.renew), who=self.who)
                        lever("Remove", self._remover(row["name"]), who=self.who, style="danger")

    def _remover(self, name: str) -> Callable[[], Any]:
        async def remove() -> None:
            if not await sure(f"Remove {name}? It works no more, at once.", "Remove", "Keep"):
                return
            await act(lambda: self.remove(self.who, name), f"{name} is removed")
            self._show()

        return remove

    def _renewer(self, name: str, renew: Callable[..., str]) -> Callable[[], Any]:
        async def ask() -> None:
            if await sure(f"Give {name} a new password? The one it has works no more.", "Renew", "Keep"):
                self._tell(name, await act(lambda: renew(self.who, name), f"{name} has a new password"))

        return ask

    async def _add(self) -> None:
        name = self.name.value
        self._tell(name, await act(lambda: self.add(self.who, name, self.role.value), f"{name} is added"))
        self._show()

    def _tell(self, name: str, made: str | None) -> None:
        """Show what was made, this once; nothing where it was refused."""
        if made is None:
            return
        with on_top() as dialog, ui.card():
            ui.label(f"The {self.secret} of {name}, shown this once:")
            ui.label(made).classes("secret")
            ui.button("I have noted it", on_click=dialog.close).props("no-caps")
        dialog.open()
