"""From settings to batches: which tasks, which descriptions, and what is refused before the first step."""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from sft_helpers import ANSWERS, documents_of, lengths, quiet, shorter
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from t2l.config import EncoderConfig, HypernetConfig, LoraConfig
from t2l.encoder import TokenEncoder
from t2l.errors import ConfigError, DataError
from t2l.tasks import Example, Task
from t2l.train import dataset as train_data
from t2l.train.augment import AnswerCheck, AnswerChoice
from t2l.train.config import DataConfig, SftConfig, TrainConfig
from t2l.train.dataset import RunData, prepare_data
from t2l.train.embeddings import EmbeddingCache
from t2l.train.options import TERSE
from t2l.train.packing import SHARED
from t2l.train.sft import train


@pytest.fixture(scope="module")
def config(sft_config: SftConfig) -> SftConfig:
    return sft_config


def test_nothing_fits_is_an_error_not_an_empty_step(config: SftConfig, tmp_path: Path) -> None:
    """Before the first step, with the numbers on both sides; nothing is written."""
    match = r"No task has an example within train\.max_seq_length \(8\).*: no needs at least 30 tokens, 3 of them"
    with pytest.raises(DataError, match=match):
        train(shorter(config, max_seq_length=8), tmp_path / "run", device="cpu", log=quiet)
    data = prepare_data(
        shorter(config, max_target_length=3), make_tokenizer(), lambda texts: [len(text) for text in texts]
    )
    assert ([pool.name for pool in data.train.pools], data.summary["tasks_too_long"]) == (["no"], ["yes"])
    with pytest.raises(DataError, match=r"No task has a description within encoder\.max_tokens"):
        few = replace(config, encoder=replace(config.encoder, max_tokens=3))
        train(few, tmp_path / "run", device="cpu", log=quiet)
    assert not (tmp_path / "run").exists()


def test_noise_on_embeddings_keeps_documents_apart(config: SftConfig) -> None:
    """It is drawn by a document's own length."""
    for alpha in (0.0, 5.0):
        data = prepare_data(shorter(config, neftune_noise_alpha=alpha), make_tokenizer(), lengths)
        assert bool((data.train[0].rows.documents == SHARED).any()) == (alpha == 0.0)


def test_held_out_descriptions_never_train(config: SftConfig, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    data = prepare_data(config, tiny_tokenizer, lambda texts: [len(text) for text in texts])
    held_out = {texts[-1] for texts in ANSWERS.values()}
    everything = shorter(config, description_in_prompt_prob=1.0)
    shown = prepare_data(everything, tiny_tokenizer, lambda texts: [len(text) for text in texts])
    seen: set[str] = set()
    for step in range(25):
        seen |= {data.texts[n] for n in data.train[step].read.tolist()}
        tokens = shown.train[step].rows.tokens
        assert not any(text in tiny_tokenizer.decode(row) for row in tokens for text in held_out)
    assert seen == {text for texts in ANSWERS.values() for text in texts} - held_out
    judged = data.evaluation["seen/adapter"][0]
    assert {data.texts[n] for n in judged.read.tolist()} == held_out
    # Judged on inputs that were not trained on.
    inputs = " ".join(document for row in range(4) for document in documents_of(judged, tiny_tokenizer, row))
    assert "Is it 2" in inputs and "Is it 3" not in inputs


def test_comparing_needs_two_tasks_that_can_be_told_apart(config: SftConfig, sft_jsonl: Path, tmp_path: Path) -> None:
    one = replace(shorter(config, margin_loss_weight=1.0), data=replace(config.data, max_tasks=1))
    with pytest.raises(DataError, match=r"train\.margin_loss_weight needs two tasks or more.*there are 1"):
        train(one, tmp_path / "run", device="cpu", log=quiet)
    rows = [json.loads(line) | {"description": "Say something."} for line in sft_jsonl.read_text().splitlines()]
    (tmp_path / "twins.jsonl").write_text("\n".join(map(json.dumps, rows)))
    twins = replace(shorter(config, margin_loss_weight=1.0), data=DataConfig(tasks=str(tmp_path / "twins.jsonl")))
    with pytest.raises(DataError, match="each with descriptions of its own"):
        train(twins, tmp_path / "run", device="cpu", log=quiet)
    assert not (tmp_path / "run").exists()


def test_own_tasks_come_from_a_folder_too(config: SftConfig, sft_jsonl: Path, tmp_path: Path) -> None:
    for number, line in enumerate(sft_jsonl.read_text().splitlines()[::20]):
        with (tmp_path / f"{number % 2}.jsonl").open("a") as file:
            file.write(line + "\n")
    data = prepare_data(replace(config, data=DataConfig(tasks=str(tmp_path))), make_tokenizer(), lengths)
    assert [pool.name for pool in data.train.pools] == ["no", "yes"]


def test_short_answers_change_their_words_and_open_ones_their_form(config: SftConfig, tmp_path: Path) -> None:
    lines = [{"task": "few", "input": f"{n}?", "output": ("yes", "no")[n % 2]} for n in range(9)]
    lines += [{"task": "open", "input": f"{n}?", "output": f"{n} it is"} for n in range(9)]
    described = [line | {"description": f"Do {line['task']}."} for line in lines]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in described))

    told: list[str] = []

    def shares(**changes: Any) -> dict[str, tuple[float, int]]:
        settings = DataConfig(tasks=str(tmp_path / "own.jsonl"), **changes)
        data = prepare_data(replace(config, data=settings), make_tokenizer(), lambda texts: [1] * len(texts))
        told.extend(data.told())
        return {pool.name: (pool.variant_prob, len(pool.variants)) for pool in data.train.pools}

    assert shares(label_remap_prob=0.4, format_variation_prob=0.1) == {"few": (0.4, 12), "open": (0.1, 12)}
    assert shares(label_remap_prob=0.4) == {"few": (0.4, 12), "open": (0.0, 0)}
    assert shares(format_variation_prob=0.1) == {"few": (0.0, 0), "open": (0.1, 12)}
    for name, said, share in (
        ("few", "data.format_variation_prob: every task", (0.4, 12)),
        ("open", "data.label_remap_prob: no task has a few short", (0.1, 12)),
    ):
        alone = [json.dumps(line) + "\n" for line in described if line["task"] == name]
        (tmp_path / "own.jsonl").write_text("".join(alone))
        assert shares(label_remap_prob=0.4, format_variation_prob=0.1) == {name: share}
        assert f"Without effect, {said}" in told[-1]


def test_a_description_file_adds(config: SftConfig, tmp_path: Path) -> None:
    path = tmp_path / "more.jsonl"
    path.write_text(json.dumps({"task": "yes", "description": ["Agree with me.", "Say yes."]}) + "\n")

    def texts(**changes: Any) -> dict[str, set[str]]:
        settings = replace(config.data, held_out_descriptions=0, descriptions=str(path), **changes)
        data = prepare_data(replace(config, data=settings), make_tokenizer(), lengths)
        return {pool.name: {data.texts[n] for n in pool.descriptions} for pool in data.train.pools}

    assert texts() == {"no": set(ANSWERS["no"]), "yes": {*ANSWERS["yes"], "Agree with me."}}
    # What is held out for judging stays held out, whatever a file adds.
    settings = replace(config.data, held_out_descriptions=1, descriptions=str(path))
    data = prepare_data(replace(config, data=settings), make_tokenizer(), lengths)
    judged = next(iter(data.evaluation.values()))
    assert {pool.name: {data.texts[n] for n in pool.descriptions} for pool in judged.pools} == {
        name: {texts_[-1]} for name, texts_ in ANSWERS.items()
    }
    # A task's two texts of the file are drawn as often as its six others.
    settings = replace(config.data, held_out_descriptions=0, descriptions=str(path))
    data = prepare_data(replace(config, data=settings), make_tokenizer(), lengths)
    (yes,) = (pool for pool in data.train.pools if pool.name == "yes")
    drawn = Counter(data.texts[n] for n in yes.descriptions)
    assert sum(drawn[text] for text in ("Agree with me.", "Say yes.")) == pytest.approx(sum(drawn.values()) / 2, abs=1)
    path.write_text(json.dumps({"task": "ja", "description": ["Agree with me."]}) + "\n")
    with pytest.raises(DataError, match="describes none of the tasks, such as no"):
        texts()


def sni_tasks(number: int) -> list[Task]:
    """Tasks of three categories, two thirds of them in the first; every second one has a definition."""
    examples = {s: tuple(Example(f"{s}{n}", f"{s} {n}", ("yes",)) for n in range(4)) for s in ("train", "val")}
    return [
        Task(
            f"task{n}",
            (*([f"Full text {n}."] if n % 2 else []), f"Short {n}.", f"Other {n}."),
            examples,
            category="abcaaa"[n % 6],
            definition=f"Full text {n}." if n % 2 else None,
        )
        for n in range(number)
    ]


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch, config: SftConfig) -> Callable[..., RunData]:
    """Stands in for the packed data: 24 training tasks, two validation tasks."""

    def load(names: Any, *, splits: tuple[str, ...]) -> list[Task]:
        tasks = sni_tasks(26)
        return tasks[:24] if "train" in splits else tasks[24:]

    monkeypatch.setattr(train_data, "load_sni", load)

    def prepare(*, conditioning: Any = "description", share: float = 0.0, **changes: Any) -> RunData:
        encoder = EncoderConfig(kind="onehot") if conditioning == "task" else config.encoder
        settings = replace(
            config, conditioning=conditioning, encoder=encoder, data=DataConfig(held_out_descriptions=0, **changes)
        )
        return prepare_data(
            shorter(settings, description_in_prompt_prob=share),
            make_tokenizer(),
            lambda texts: [len(t.split()) for t in texts],
        )

    return prepare


def described(data: RunData) -> dict[str, set[str]]:
    return {pool.name: {data.texts[n] for n in pool.descriptions} for pool in data.train.pools}


def test_kinds_of_descriptions(packed: Callable[..., RunData], monkeypatch: pytest.MonkeyPatch) -> None:
    """Definitions, what is not one on the same tasks, and the same made-up text for a task in every run."""
    long, uneven = "word " * 40, sni_tasks(6)
    uneven[2] = replace(uneven[3], name="task2", descriptions=(long, "Short."), definition=long)
    uneven[3] = replace(uneven[3], descriptions=(uneven[3].definition,))
    definitions = described(packed(descriptions="definitions"))
    assert definitions == {f"task{n}": {f"Full text {n}."} for n in range(1, 24, 2)}
    paraphrases = described(packed(descriptions="paraphrases"))
    assert paraphrases == {f"task{n}": {f"Short {n}.", f"Other {n}."} for n in range(1, 24, 2)}
    random = described(packed(descriptions="random"))
    assert random == described(packed(descriptions="random"))
    assert len(set.union(*random.values())) == len(random) == 24
    assert not any("Short" in text for texts in random.values() for text in texts)
    # Those of one kind alone, and with a definition over the window, are left out of both.
    for kind in ("definitions", "paraphrases"):
        monkeypatch.setattr(train_data, "load_sni", lambda _, splits: uneven[: 4 if "train" in splits else 0])
        assert described(packed(descriptions=kind)).keys() == {"task1"}


def test_held_out_tasks_and_subsets(packed: Callable[..., RunData]) -> None:
    """The held-out tasks are spread over categories and the same at every size; small subsets lie in large ones."""
    runs = {n: packed(held_out_tasks=6, max_tasks=n) for n in (4, 12, None)}
    names = {n: {pool.name for pool in run.train.pools} for n, run in runs.items()}
    assert [len(x) for x in names.values()] == [4, 12, 18]
    assert names[4] < names[12] < names[None]
    held_out = runs[4].summary["held_out_tasks"]
    assert all(run.summary["held_out_tasks"] == held_out for run in runs.values())
    assert not set(held_out) & names[None]
    category = {task.name: task.category for task in sni_tasks(26)}
    assert Counter(category[name] for name in held_out if name not in ("task24", "task25")) == {"a": 2, "b": 2, "c": 2}
    assert {pool.name for pool in runs[4].evaluation["validation/adapter"].pools} == set(held_out)
    with pytest.raises(DataError, match=r"data\.held_out_tasks is 24, of 24 training tasks"):
        packed(held_out_tasks=24)


def test_choosing_tasks_are_watched_by_their_written_descriptions(
    packed: Callable[..., RunData], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever descriptions are trained on."""
    written = {"task24": ("By hand.", "Written by hand.")}
    monkeypatch.setattr(train_data, "written_descriptions", lambda what: {"choosing": written}[what])
    for kind in ("own", "definitions", "random"):
        data = packed(descriptions=kind)
        pools = {pool.name: pool for pool in data.evaluation["validation/adapter"].pools}
        assert {data.texts[n] for n in pools["task24"].descriptions} == set(written["task24"])


def test_task_without_examples_is_named(packed: Callable[..., RunData], monkeypatch: pytest.MonkeyPatch) -> None:
    def load(names: Any, *, splits: tuple[str, ...]) -> list[Task]:
        return [replace(task, examples={"train": ()}) if task.name == "task1" else task for task in sni_tasks(4)]

    monkeypatch.setattr(train_data, "load_sni", load)
    with pytest.raises(DataError, match="No training examples for task1; take them out"):
        packed()


def test_names_are_read_only_of_tasks_that_are_trained_on(packed: Callable[..., RunData]) -> None:
    data = packed(conditioning="task")
    assert data.texts == sorted(f"task{n}" for n in range(24))
    assert data.evaluation.keys() == {"seen/adapter"}
    batch = data.train[0]
    for row in range(4):
        own = data.train.task_of_row(0, row)
        assert data.texts[batch.read[row]] == data.train.pools[own].name


def test_the_cache_gives_back_what_the_encoder_said(
    tiny_base: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    """In any order and from any chunk, up to bfloat16; the window pads to one static shape."""
    encoder = TokenEncoder(tiny_base, tiny_tokenizer, layers=(2,), max_tokens=40)
    texts = ["Add the numbers.", "No.", "Translate into French, please.", "Sort."]
    said: list[str] = []
    cache = EmbeddingCache(encoder, texts, chunk=2, log=said.append, every=0)
    assert [line.split(",")[0] for line in said] == ["2 of 4 texts read", "4 of 4 texts read"]
    assert re.search(r", in \d+(\.\d+)? m?s$", said[-1])
    index = torch.tensor([2, 0, 3, 2, 1])
    found = cache[index]
    assert found.mask is not None and found.states.shape == (5, 40, 32)
    for n, i in enumerate(index.tolist()):
        alone = encoder.encode([texts[i]]).states[0]
        assert int(found.mask[n].sum()) == len(alone)
        assert found.mask[n, : len(alone)].all()
        assert (found.states[n, : len(alone)] - alone).abs().max() <= 0.02 * alone.abs().max()
        assert not found.states[n, len(alone) :].any()


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., Any]:
    """Lays out a run on a task of two answers and one of a single answer."""
    lines = [{"task": "few", "description": "Do few.", "input": f"{n}?", "output": ("a", "b")[n % 2]} for n in range(9)]
    lines += [{"task": "one", "description": "Do one.", "input": f"{n}?", "output": "always"} for n in range(9)]

    def laid(*names: str, count: int = 1, **changes: Any) -> Any:
        (tmp_path / "own.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines if x["task"] in names))
        config = SftConfig(
            base="tiny",
            lora=LoraConfig(),
            encoder=EncoderConfig(kind="tokens", model="base", layers=(1,), max_tokens=64),
            hypernet=HypernetConfig(),
            data=DataConfig(tasks=str(tmp_path / "own.jsonl"), **changes),
            train=TrainConfig(max_steps=1, max_seq_length=384, max_target_length=96),
        )
        return prepare_data(config, make_tokenizer(), lambda texts: [count + 63 * ("right" in t) for t in texts])

    return laid


def test_auxiliary_tasks_are_made_if_asked_for_and_counted(prepare: Callable[..., Any]) -> None:
    data = prepare("few", "one", auxiliary_task_prob=0.3)
    few, one = data.train.pools
    assert (few.auxiliary_prob, [type(x.augmentation) for x in few.auxiliary]) == (0.3, [AnswerCheck, AnswerChoice] * 2)
    assert one.auxiliary == () and data.summary["tasks_with_auxiliary_tasks"] == 1
    for pool in few.auxiliary:
        assert pool.examples == pool.augmentation.examples
        assert all("Do few." in data.texts[text] for text in pool.descriptions)
    plain = prepare("few", "one")
    assert [pool.auxiliary for pool in plain.train.pools] == [(), ()] and plain.summary[
        "tasks_with_auxiliary_tasks"
    ] == 0
    assert set(plain.texts) < set(data.texts)


def test_texts_over_the_window_are_left_out_and_no_auxiliary_task_at_all_is_said(
    prepare: Callable[..., Any],
) -> None:
    (few,) = (data := prepare("few", count=2, auxiliary_task_prob=0.3)).train.pools
    assert few.auxiliary and not any("right" in data.texts[text] for x in few.auxiliary for text in x.descriptions)
    said = prepare("one", auxiliary_task_prob=0.3).told()[-1]
    assert re.search(r"data\.auxiliary_task_prob: no task has different short answers.*max_tokens \(64\)", said)


def test_extra_tasks_come_as_often_as_their_weights_say(config: SftConfig, sft_jsonl: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in sft_jsonl.read_text().splitlines()]
    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps(row | {"task": f"more-{row['task']}"}) + "\n" for row in rows))
    mixed = replace(config, data=replace(config.data, extra_tasks=(str(more),), extra_weights=(0.25,)))
    data = prepare_data(mixed, make_tokenizer(), lengths)
    pools = data.train.pools
    assert {pool.source for pool in pools if pool.name.startswith("more-")} == {1}
    tasks = [pools[data.train.task_of_row(step, 0)] for step in range(0, 100 * mixed.train.tasks_per_batch, 1)]
    assert 0.2 < sum(pool.source for pool in tasks) / len(tasks) < 0.3


def test_a_task_of_two_sources_is_named(config: SftConfig, sft_jsonl: Path, tmp_path: Path) -> None:
    same = tmp_path / "same.jsonl"
    same.write_text(sft_jsonl.read_text())
    twice = replace(config, data=replace(config.data, extra_tasks=(str(same),)))
    with pytest.raises(DataError, match="come from two sources"):
        prepare_data(twice, make_tokenizer(), lengths)


def test_options_and_terse_texts_reach_the_pools(config: SftConfig) -> None:
    data = replace(config.data, option_placement_prob=0.5, terse_description_prob=0.25)
    made = prepare_data(
        replace(config, encoder=replace(config.encoder, max_tokens=64), data=data), make_tokenizer(), lengths
    )
    for pool in made.train.pools:
        assert pool.terse
        assert {made.texts[n] for n in pool.terse} <= set(TERSE)
    assert not any(pool.terse for batches in made.evaluation.values() for pool in batches.pools)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra_tasks": ("t0",), "extra_weights": (0.5, 0.2)}, "2 shares for 1 sources"),
        ({"extra_tasks": ("t0", "computed"), "extra_weights": (0.5, 0.5)}, "add up to less than 1"),
        ({"extra_tasks": ("t0", "t0")}, "must be different sources"),
        ({"extra_tasks": ("",)}, "must be different sources"),
    ],
)
def test_sources_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(**changes)
