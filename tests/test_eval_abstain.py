"""The condition `t2l-abstain`: it follows a description the less, the less it is like any of training."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from t2l.errors import ConfigError, EvaluationError
from t2l.eval import adapters, answers, retrieval, suites
from t2l.eval.adapters import AdapterCache, UsedAdapter
from t2l.eval.conditions import CONDITIONS, choose_conditions
from t2l.eval.run import Settings, run
from t2l.eval.sources import Sources
from t2l.tasks import Splits, Task
from t2l.text_to_lora import TextToLora

TASKS = {
    "reverse": ["Write the word backwards.", "Turn the letters round.", "Last letter first, please."],
    "upper": ["Write the word in capitals.", "SHOUT the word.", "Use upper case for all letters."],
    "double": ["Say the word twice."],
}
WORDS = [f"word{n} and {'x' * n}" for n in range(3)]


@pytest.fixture(scope="module")
def tasks_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks") / "words.jsonl"
    lines = [
        {"task": task, "description": descriptions, "split": "test", "input": word, "output": word[::-1]}
        for task, descriptions in TASKS.items()
        for word in WORDS
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def generator(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> TextToLora:
    return TextToLora.from_pretrained(str(make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "t2l")))


@pytest.fixture
def cache(generator: TextToLora, tiny_base: Any, tiny_tokenizer: Any) -> AdapterCache:
    return AdapterCache((tiny_base, tiny_tokenizer), Sources(checkpoint=generator), log=lambda text: None)


def an_instance(path: Path) -> suites.EvalInstance:
    tasks = suites.load_suite(str(path), per_task=None)
    found = suites.instances(tasks, [0], fits=lambda text: len(text.encode()) < 96)
    return next(instance for instance in found if instance.task.name == "upper")


def only(cache: AdapterCache, condition: str, instance: suites.EvalInstance) -> UsedAdapter:
    cache.prepare([(CONDITIONS[condition], instance)])
    (used,) = cache.of(CONDITIONS[condition], [instance])
    assert used is not None
    return used


@pytest.fixture
def packed(tmp_path: Path, sentence_folder: Path, monkeypatch: Any) -> dict[str, list[str]]:
    """Training and choosing tasks for the bounds; the descriptions of the latter are those of the former."""
    texts = {"trained": [f"known {n}: " + "abcdefgh "[n % 7 :] * 3 for n in range(7)]}
    texts["chosen"] = texts["trained"][:3]
    splits = Splits(frozenset({"trained"}), frozenset(), frozenset(), frozenset(), {}, frozenset())
    monkeypatch.setattr(retrieval, "load_splits", lambda: splits)
    monkeypatch.setattr(
        retrieval, "load_sni", lambda names, splits: [Task(name, tuple(texts[name]), {}) for name in sorted(names)]
    )
    monkeypatch.setattr(retrieval, "written_descriptions", lambda what: {what: tuple(texts["chosen"])})
    monkeypatch.setattr(retrieval, "WINDOW", 100)
    monkeypatch.setattr(retrieval, "RETRIEVER", str(sentence_folder))
    (tmp_path / "sni_tasks.parquet").touch()
    monkeypatch.setenv("T2L_DATA", str(tmp_path))
    return texts


def test_abstention_goes_from_the_offset_to_the_adapter(
    packed: dict[str, list[str]], tasks_file: Path, cache: AdapterCache
) -> None:
    instance = an_instance(tasks_file)
    familiar = dataclasses.replace(instance, description=packed["trained"][0])
    followed = only(cache, "t2l-abstain", familiar)
    plain = only(cache, "t2l", familiar)
    assert cache.sources.checkpoint is not None
    a, b = cache.sources.checkpoint.hypernet.shared_lora()
    seen = set()
    for text in ("q!", "The opposite of known 3, in German?", *packed["trained"], instance.random_text):
        asked_with = dataclasses.replace(instance, description=text)
        one, full = only(cache, "t2l-abstain", asked_with), only(cache, "t2l", asked_with)
        weight = float(cache.familiarity([text]))
        seen.add(weight)
        for m in range(len(a)):
            torch.testing.assert_close(one.lora.a[m], a[m] + weight * (full.lora.a[m] - a[m]))
            torch.testing.assert_close(one.lora.b[m], b[m] + weight * (full.lora.b[m] - b[m]))
        assert one.id != full.id
    assert 0.0 in seen
    assert 1.0 in seen
    torch.testing.assert_close(followed.lora.b[0], plain.lora.b[0])


def test_embeddings_stay_in_order(packed: dict[str, list[str]]) -> None:
    encode = retrieval.Sentences()
    texts = ["A text in the middle.", "Short.", "The longest of all three texts, by far.", "Of four."]
    torch.testing.assert_close(encode(texts), torch.cat([encode([text]) for text in texts]))


def test_bounds_are_read_off_random_texts_and_descriptions(packed: dict[str, list[str]]) -> None:
    found = retrieval.Familiarity(held_out=0)
    assert found.high == 1.0  # the choosing tasks' descriptions are known word for word
    made_up = [suites.random_text(retrieval.random.Random(f"bounds/{n}")) for n in range(retrieval.MADE_UP)]
    assert 0.9 <= float((found(made_up) == 0).float().mean()) <= 0.96
    assert found(packed["chosen"]).tolist() == pytest.approx([1.0] * 3, abs=1e-4)
    fewer = retrieval.Familiarity(held_out=2)
    assert fewer.known_KE.shape[0] == 5  # what training has not read does not make a text familiar
    packed["chosen"] = made_up[:50]
    with pytest.raises(EvaluationError, match="does not tell random texts from descriptions"):
        retrieval.Familiarity(held_out=0)


def test_bounds_are_recorded_and_stay(
    packed: dict[str, list[str]],
    tasks_file: Path,
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    out, checkpoint = tmp_path / "answers.jsonl", str(make_checkpoint(tmp_path / "checkpoint"))
    values: dict[str, Any] = {
        "suites": (str(tasks_file),),
        "checkpoint": checkpoint,
        "max_new_tokens": 2,
        "per_task": 1,
        "held_out": 2,
    }
    told: list[int] = []

    def familiarity(*, held_out: int, device: str) -> retrieval.Familiarity:
        told.append(held_out)
        return retrieval.Familiarity(held_out=held_out, device=device)

    monkeypatch.setattr(adapters, "Familiarity", familiarity)
    run(Settings(conditions="t2l", **values), out, log=lambda text: None)
    assert answers.read(out).header["abstain_bounds"] is None
    assert not told
    run(Settings(conditions="t2l-abstain,t2l-abstain-random", **values), out, log=lambda text: None)
    low, high = answers.read(out).header["abstain_bounds"]
    assert told == [2]
    assert low < high == 1.0
    assert {line["condition"] for line in answers.read(out).lines} == {"t2l", "t2l-abstain", "t2l-abstain-random"}
    run(Settings(conditions="base", **values), out, log=lambda text: None)
    assert answers.read(out).header["abstain_bounds"] == [low, high]
    monkeypatch.setattr(retrieval, "MADE_UP", 5)
    with pytest.raises(ConfigError, match=rf"abstain_bounds \[{low}, {high}\]"):
        run(Settings(conditions="t2l-abstain+description", **values), out, log=lambda text: None)


def test_abstention_is_left_out_where_it_has_nothing_to_go_by(
    packed: dict[str, list[str]], generator: TextToLora, cache: AdapterCache, monkeypatch: Any
) -> None:
    names = choose_conditions("t2l,t2l-abstain,t2l-abstain-random+description")
    assert cache.sources.left_out(names) == {}
    monkeypatch.setitem(generator.config.training, "settings", {"data": {"tasks": "mine.jsonl"}})
    left_out = cache.sources.left_out(names)
    assert left_out.keys() == {"t2l-abstain", "t2l-abstain-random+description"}
    assert "trained on mine.jsonl" in left_out["t2l-abstain"]
    monkeypatch.delitem(generator.config.training, "settings")
    monkeypatch.delenv("T2L_DATA")
    assert "T2L_DATA is not set" in cache.sources.left_out(names)["t2l-abstain"]
    empty = copy.copy(generator)
    empty.hypernet = copy.deepcopy(generator.hypernet)
    for b in empty.hypernet.shared_lora.b:
        b.zero_()
    assert "share is empty" in Sources(checkpoint=empty).left_out(names)["t2l-abstain"]


@pytest.mark.parametrize("window", [0, 4, 5, 6, 20, 400])
def test_cutting_to_a_window_ends_for_every_text_and_window(window: int, tiny_tokenizer: Any) -> None:
    encoder = SimpleNamespace(tokenizer=tiny_tokenizer, max_tokens=window)  # one token a byte
    for text in ("a", "😀😀😀", "ab" * 99, "é" * 50, ""):
        kept = retrieval.cut_to_window(encoder, text)
        assert text.startswith(kept) and bool(kept) == bool(text)
        assert len(kept.encode()) <= max(1, window - 4) or len(kept) == 1
