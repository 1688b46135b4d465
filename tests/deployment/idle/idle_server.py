import json
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    while len(nodes := list(grid.get_node_ids())) < config["nodes"]:
        time.sleep(0.1)
    seconds = []
    for number in range(config["rounds"]):
        began = time.perf_counter()
        content = RecordDict({"c": ConfigRecord({"round": number})})
        messages = [
            Message(content, dst_node_id=node, message_type="train", group_id=str(number)) for node in nodes
        ]
        waiting = set(grid.push_messages(messages))
        while waiting:
            time.sleep(config["poll"])
            for reply in grid.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                assert reply.has_content(), reply.error
        seconds.append(time.perf_counter() - began)
        print("round", number, round(seconds[-1], 2), flush=True)
    if config["out"]:
        Path(config["out"]).write_text(json.dumps({"nodes": sorted(nodes), "seconds": seconds}))
