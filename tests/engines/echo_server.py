"""A ServerApp that asks every node once and writes down what they said, or fails, or never ends, as told."""

from __future__ import annotations

import json
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    folder = Path(str(context.run_config["folder"]))
    order = str(context.run_config["order"])
    if order == "fail":
        raise ValueError("told to fail, with 'quotes' and \"double\" ones")
    (folder / "started").touch()
    while order == "hang":
        time.sleep(0.1)
    while len(nodes := sorted(grid.get_node_ids())) < int(context.run_config["nodes"]):
        time.sleep(0.05)
    messages = [Message(RecordDict({"ask": ConfigRecord({"order": order})}), node, "train") for node in nodes]
    replies = grid.send_and_receive(messages)
    said = [dict(reply.content.config_records["said"]) for reply in replies]
    (folder / "said.json").write_text(json.dumps({"order": order, "said": said}))
