"""A whole federation on this machine: a SuperLink, and devices in processes of their own, on a tiny model."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from flwr.app import Message

from client.device.bundle import Bundle
from fedllm.config import RunConfig
from fedllm.host.processes import Child, open_log
from fedllm.protocol import wire
from fedllm.runs.reader import Run as StoredRun
from fedllm.runs.records import FILE, NodeRound
from server.federation.link import Link, open_link
from server.federation.provision import provision
from server.federation.submit import Submitted, follow, numbers, submit
from tests.deployment.answers import BEHAVIOUR, WORKING
from tests.deployment.unlucky import LOST, start_device
from tests.processes import free_port, until
from tests.rounds.federation import run as simulate

EVERYONE: dict[str, Any] = {"sample": 3, "quorum": 3, "deadline_s": 300.0, "retries": 9}
ANY_TWO = {**EVERYONE, "quorum": 2}
"""Of ``server``: every client counts in every round, or whichever two come."""


class Federation:
    """Devices by number, on one SuperLink."""

    def __init__(self, folder: Path, bundles: list[Bundle], links: contextlib.ExitStack) -> None:
        self.folder = folder
        self.bundles = bundles
        self._links = links
        self.link: Link = links.enter_context(open_link(folder))
        self.devices: dict[int, Child] = {}
        self.deadline_s = 60.0
        """Long enough for whoever answers at all."""

    def state(self, node: int) -> Path:
        return self.folder / f"state-{node}"

    def join(
        self,
        *nodes: int,
        data: Path | None = None,
        ahead: float = 0.0,
        namespace: str = "",
        idle: float = 0.0,
        peers: Path | None = None,
        wait: bool = True,
    ) -> None:
        """Start devices and wait until the SuperLink sees them.

        Args:
            nodes: their numbers.
            data: their own texts.
            ahead: seconds by which their clocks are ahead.
            namespace: network namespace in which they live.
            idle: seconds without work after which their workers end; 0 is never.
            peers: certificates of those with whom alone they sit in a sum.
            wait: whether they are expected to get in.
        """
        for node in nodes:
            log = open_log(self.folder / f"device-{node}.log")
            self.devices[node] = start_device(
                self.bundles[node],
                self.state(node),
                log,
                data=data,
                ahead=ahead,
                namespace=namespace,
                idle=idle,
                peers=peers,
            )
        if wait:
            until(lambda: {f"node-{node}" for node in nodes} <= self.online())

    def warm_up(self, encoder: Path, texts: Path) -> None:
        """Let every worker load what it needs, and see how fast this machine is just now."""
        config = configuration(encoder, texts, name="warm", rounds=2, server={"deadline_s": 600.0})
        run = self.submit(config)
        self.finish(run)
        self.deadline_s = 10.0 + 8 * StoredRun(run.folder).rounds()[-1].seconds

    def ask(self, behaviour: str, *nodes: int) -> None:
        """Have devices answer so from now on; see ``tests.deployment.answers``."""
        for node in nodes:
            (self.state(node) / BEHAVIOUR).write_text(behaviour)

    def lose(self, share: float, *nodes: int) -> None:
        """Let a share of these devices' replies get lost from now on."""
        for node in nodes:
            (self.state(node) / LOST).write_text(str(share))

    def online(self) -> set[str]:
        return {node.name for node in self.link.control.nodes() if node.status == "online"}

    def leave(self, node: int) -> None:
        """Stop a device politely."""
        self.devices.pop(node).stop(grace=15.0)

    def kill(self, node: int) -> None:
        """Pull a device's plug: its supervisor and all its processes at once."""
        child = self.devices.pop(node)
        tree = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        child.stop()

    def process(self, node: int, words: str) -> psutil.Process:
        """Find one process of a device by what stands on its command line."""
        found: list[psutil.Process] = []

        def look() -> bool:
            for process in psutil.Process(self.devices[node].pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if words in " ".join(process.cmdline()):
                        found.append(process)
            return bool(found)

        until(look)
        return found[0]

    def await_work(self, node: int) -> None:
        """Wait until an ``unhurried`` device trains."""
        until((self.state(node) / WORKING).exists)

    def said(self, node: int) -> str:
        return (self.folder / f"device-{node}.log").read_text(encoding="utf-8")

    def submit(self, config: RunConfig) -> Submitted:
        return submit(self.folder, self.link.control, config)

    def stop_runs(self) -> None:
        """End what a test that failed has left under way."""
        for number in (number for sessions in numbers(self.folder).values() for number in sessions):
            self.link.control.stop(number)

    def finish(self, run: Submitted) -> dict[str, Any]:
        """Wait for a run's end; return its summary."""
        follow(self.link.control, run)
        summary: dict[str, Any] = json.loads((run.folder / "summary.json").read_text())
        return summary

    def await_round(self, run: Submitted, number: int) -> None:
        """Wait until a round is committed; fails at once where the run has."""

        def committed() -> bool:
            if not (run.folder / FILE).exists():
                return False
            stored = StoredRun(run.folder)
            assert stored.status != "failed", stored.events()[-1].message
            return bool(stored.rounds(after=number - 1))

        until(committed, 600)

    def hold(self, run: Submitted, meanwhile: Callable[[], None]) -> int:
        """Do something while a run pauses after the round under way; returns that round."""
        stored = StoredRun(run.folder)
        stored.post_command("pause", "test")
        meanwhile()
        until(lambda: stored.phase.get("name") == "paused")
        last = stored.rounds()[-1].round
        stored.post_command("resume", "test")
        return last

    def restart_link(self) -> None:
        """Start another SuperLink on the same folder, as ``fedllm server`` does when one has died."""
        self.link = self._links.enter_context(open_link(self.folder))

    def close(self) -> None:
        for child in self.devices.values():
            os.kill(child.pid, signal.SIGTERM)
        for child in self.devices.values():
            child.stop(grace=15.0)


@contextlib.contextmanager
def federation(folder: Path, nodes: int, host: str = "localhost") -> Iterator[Federation]:
    bundles = [Bundle.read(path) for path in provision(folder, host, nodes, port=free_port())]
    with contextlib.ExitStack() as links:
        made = Federation(folder, bundles, links)
        try:
            yield made
        finally:
            made.close()


def configuration(encoder: Path, texts: Path, **sections: Any) -> RunConfig:
    """Three clients, two a round, three rounds of two short steps."""
    method = sections.get("method", "lora")
    sections.setdefault("name", re.sub(r"\W+", "-", method))
    if method != "fedavg":
        sections.setdefault("tuning", {"rank": 2, "alpha": 4.0, "targets": ("query", "value")})
    return RunConfig.model_validate(
        {
            "clients": 3,
            "rounds": 3,
            "model": {"name": str(encoder)},
            "data": {"path": str(texts), "max_length": 16},
            "training": {"local_steps": 2, "batch_size": 8, "learning_rate": 5e-2},
            "server": {"sample": 2, "deadline_s": 600.0},
            **sections,
        }
    )


def quantised(encoder: Path, texts: Path, name: str, server: dict[str, Any], **more: Any) -> RunConfig:
    """LoRA with residuals on both sides: a reply that is lost or counted twice changes every later bit."""
    codec = {"up": "error_feedback(quantize(bits=4))", "down": "quantize(bits=8)"}
    return configuration(encoder, texts, name=name, codec=codec, server=server, **more)


def counted(run: Submitted) -> dict[int, list[int]]:
    """Who counted in which round."""
    rounds = StoredRun(run.folder).rounds(after=0)
    return {record.round: record.details["accepted"] for record in rounds}


def outcomes(run: Submitted, node: int) -> dict[int, NodeRound]:
    return {row.round: row for row in StoredRun(run.folder).nodes(node=node) if row.exchange == "fit"}


def ends_right(run: Submitted, summary: dict[str, Any], config: RunConfig, folder: Path) -> None:
    """Simulate a run in which exactly those replies count that did, and compare the last bit."""
    accepted = counted(run)

    def fault(message: Message) -> Message:
        reply = wire.unpack_reply(message.content)
        node = message.metadata.src_node_id - 1
        if reply.round > 0 and node not in accepted[reply.round]:
            message.content = wire.pack_reply(wire.Reply(reply.round, reply.index, error="it did not count"))
        return message

    simulated = simulate(config, folder / run.folder.name, fault)
    assert summary["status"] == simulated["status"] == "finished"
    assert counted(Submitted(0, folder / run.folder.name)) == accepted
    assert summary["state_sha256"] == simulated["state_sha256"]
