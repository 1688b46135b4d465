"""A result tells what it was made from, how good it is, and how to load it; what it tells is true."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedllm.data import bundled
from fedllm.runs.provenance.verify import verify
from fedllm.runs.reader import Run
from fedllm.runs.writer import RunStore
from fedllm.wording import human_bytes
from simulations.results.predict import export
from tests.parts import quick
from tests.rounds.federation import configuration, run

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "bitfit": {"method": "lora", "tuning": {"peft": "bitfit"}},
    "fedavg": {"method": "fedavg"},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", quick(KINDS, "lora"))
def test_the_card_says_what_the_run_was_and_its_code_loads_it(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, kind: str
) -> None:
    config = configuration(tiny_encoder, tiny_texts, rounds=2, **KINDS[kind])
    summary = run(config, tmp_path / "run")
    place = tmp_path / "run" / ("model" if kind == "fedavg" else "adapter")
    card = (place / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == str(tiny_encoder)
    assert front["library_name"] == ("peft" if kind == "lora" else "transformers")
    assert front["pipeline_tag"] == "text-classification"
    assert "- classes: animal, fruit, metal\n" in card
    assert "Scores after 2 of 2 rounds" in card
    assert f"- accuracy: {summary['metrics']['accuracy']:.4g}\n" in card
    partition = json.loads((tmp_path / "run" / "partition.json").read_text())
    sizes = [len(client["indices"]) for client in partition["clients"]]
    assert f"- training texts: {sum(sizes)}; {min(sizes)} to {max(sizes)} a client (iid)\n" in card
    assert "[More Information Needed]" not in card
    code = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(code) == 1
    found: dict[str, Any] = {}
    exec(code[0].replace("PATH/OF/THIS/FOLDER", str(place)), found)
    assert type(found["model"]).__name__.startswith("PeftModel" if kind == "lora" else "BertModel")
    export(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out" / place.name / "README.md").read_text(encoding="utf-8") == card


@pytest.mark.slow
def test_the_card_says_what_it_took_and_for_whom_it_works(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    told = {"evaluation": {"clients": True}, "codec": {"up": "quantize(bits=8)"}, "privacy": {"clip": 2.5}}
    data = {"path": str(tiny_texts), "max_length": 16, "client_test_fraction": 0.3}
    summary = run(configuration(tiny_encoder, tiny_texts, rounds=2, data=data, **told), tmp_path / "run")
    card = (tmp_path / "run" / "adapter" / "README.md").read_text(encoding="utf-8")
    moved = {side: human_bytes(summary["bytes"][side]) for side in ("up", "down")}
    assert f"- moved: {moved['up']} up, {moved['down']} down (FedAvg of the whole model in float32: " in card
    assert "- codec: quantize(bits=8) up, none down\n" in card
    assert "no noise was added, so no epsilon is spent or bounded; answers clipped to a norm of 2.5\n" in card
    opened = Run(tmp_path / "run")
    assert f"- signed: link 3 of the run's chain, {verify(opened.folder).head}\n" in card
    asked = [row for row in opened.nodes(round=2) if row.exchange == "evaluate"]
    for row in asked:
        assert f"| {row.node} | {row.metrics['accuracy']:.4g} |\n" in card
    assert len(asked) == card.count("\n| ") - 2 > 0


def test_a_bundled_base_goes_by_its_name_on_the_hub(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the bundled package's folder replaced by a tiny model's."""
    monkeypatch.setattr(bundled, "_inside", lambda package, path: tiny_encoder)
    run(configuration(Path("minilm"), tiny_texts, rounds=1), tmp_path / "run")
    adapter = tmp_path / "run" / "adapter"
    hub = "sentence-transformers/all-MiniLM-L6-v2"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == hub
    assert json.loads((adapter / "fedllm.json").read_text())["base"] == hub
    assert f'base_model: "{hub}"' in (adapter / "README.md").read_text()
    assert str(tiny_encoder) not in "".join(
        file.read_text() for file in adapter.iterdir() if file.suffix in (".json", ".md")
    )


def test_the_card_claims_nothing_of_texts_and_scores_that_nobody_knows(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    """Of devices' own texts, whose shares no file of the run tells, and of a round that was not scored."""
    config = configuration(tiny_encoder, tiny_texts, rounds=3, evaluation={"every": 3})
    run(config, tmp_path / "run")
    opened = Run(tmp_path / "run")
    assert not opened.own_texts
    assert opened.partition["clients"]
    export(tmp_path / "run", tmp_path / "first", 2)
    card = (tmp_path / "first" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "Scores after 0 of 3 rounds\n\nThe model here is that of round 2, which was not scored.\n" in card
    assert "On texts that no client trained on." in card
    with RunStore.open(tmp_path / "run") as store:
        store.event("joined", "client 0", node=0, device={"texts": "own", "platform": "Linux"})
    assert opened.own_texts
    assert opened.partition["clients"] == []
    export(tmp_path / "run", tmp_path / "own")
    card = (tmp_path / "own" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "Scores after 3 of 3 rounds\n\n- accuracy" in card
    assert "- texts: the clients' own\n" in card
    assert "On texts of the server's." in card
    assert "training texts" not in card
