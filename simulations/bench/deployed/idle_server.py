"""Sends every node a few bytes and waits for all of them, with the same loop as the engine's."""

from __future__ import annotations

import json
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from server.rounds.exchange.conversation import converse

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run ``rounds`` rounds with ``clients`` nodes; write their seconds to ``out``."""
    config = context.run_config
    nodes: list[int] = []
    while len(nodes) < int(config["clients"]):
        time.sleep(0.1)
        nodes = list(grid.get_node_ids())
    seconds = []
    for number in range(int(config["rounds"])):
        began = time.perf_counter()
        content = RecordDict({"c": ConfigRecord({"round": number})})
        messages = [Message(content, node, "train", group_id=str(number)) for node in nodes]
        silent = converse(grid, messages, receive=lambda *_: None, missing=lambda: 1, deadline_s=300.0)
        if silent:
            raise RuntimeError(f"{len(silent)} nodes did not answer")
        seconds.append(time.perf_counter() - began)
        print("round", number, f"{seconds[-1]:.2f} s", flush=True)
    if config["out"]:
        rounds = [{"seconds": value, "compute": 0.0} for value in seconds]
        Path(str(config["out"])).write_text(json.dumps(rounds), encoding="utf-8")
