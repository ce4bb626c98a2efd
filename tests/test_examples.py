"""Descriptions that come with examples: how they are written, and rows that read them without telling."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from test_derive import documents

from t2l.config import EncoderConfig, HypernetConfig, LoraConfig
from t2l.errors import ConfigError, DataError
from t2l.examples import INPUT_CHARACTERS, OUTPUT_CHARACTERS, candidates, with_examples
from t2l.tasks import Example
from t2l.train.batches import Batch, Batches, Illustrated, Pool
from t2l.train.data import SHORT_EXAMPLE, RunData, prepare_data
from t2l.train.settings import DataConfig, SftConfig, TrainConfig

PAIRS = st.lists(st.tuples(st.text(max_size=300), st.text(max_size=90)), max_size=3)
SHOWN = re.compile(r"Example input: (.*)\nExample output: (.*)")

# -------------------------------------------------------------------------------------------------------- words


def test_examples_stand_after_the_description_a_line_each() -> None:
    text = with_examples("Add them.", [(" 1\n\n+  2 ", "3\n"), ("2 + 2", "4")])
    assert text == "Add them.\n\nExample input: 1 + 2\nExample output: 3\n\nExample input: 2 + 2\nExample output: 4"


def test_long_examples_lose_the_middle_of_the_input_and_the_end_of_the_output() -> None:
    ((text, answer),) = SHOWN.findall(with_examples("Say.", [("a" * 500 + "z" * 500, "b" * 100)]))
    assert text == f"{'a' * 158} … {'z' * 79}" and len(text) == INPUT_CHARACTERS[0]
    assert answer == f"{'b' * 78} …" and len(answer) == OUTPUT_CHARACTERS


@given(st.text(max_size=40), PAIRS, st.integers(0, 1000))
def test_what_does_not_fit_is_cut_before_it_is_left_out(description: str, pairs: list[Any], room: int) -> None:
    ladder = list(candidates(description, pairs))
    sizes = [(number, len(text)) for text, number in ladder]
    assert sizes == sorted(sizes, reverse=True)
    assert [number for number, _ in sizes] == [n for n in range(len(pairs), 0, -1) for _ in INPUT_CHARACTERS]
    asked: list[str] = []

    def fits(text: str) -> bool:
        asked.append(text)
        return len(text) <= room

    found = with_examples(description, pairs, fits=fits)
    fitting = [text for text, _ in ladder if len(text) <= room]
    assert found == (fitting[0] if fitting else description)
    assert asked == [text for text, _ in ladder][: len(asked)]


@given(st.text(max_size=40))
def test_without_examples_the_description_is_as_it_was(description: str) -> None:
    assert with_examples(description, [], fits=lambda text: False) == description


# ------------------------------------------------------------------------------------------------------ batches

TEXTS = [
    "Say.",
    "Say loud.",
    "Else.",
    "Say, as 0.",
    "Say, as 1 and 2.",
    "Say loud, as 3.",
    "Else, as 4.",
    "Else, as 5.",
]
ASKED = tuple(Example(f"{n}", f"in {n}", (f"out {n}",)) for n in range(6))
LOUD = Pool("a", ASKED, (1,), reword=str.upper, illustrated={5: Illustrated(1, frozenset({3}))}, illustrated_share=1.0)
OWN = replace(
    LOUD,
    descriptions=(0,),
    reword=None,
    illustrated={3: Illustrated(0, frozenset({0})), 4: Illustrated(0, frozenset({1, 2}))},
)
OTHER = replace(
    OWN,
    name="b",
    descriptions=(2,),
    illustrated={6: Illustrated(2, frozenset({4})), 7: Illustrated(2, frozenset({5}))},
)
NUMBERS = {
    text: frozenset(map(str, known.examples)) for pool in (LOUD, OWN, OTHER) for text, known in pool.illustrated.items()
}


def batches(*pools: Pool, **changes: Any) -> Batches:
    settings: dict[str, Any] = {"rows": 8, "tokens": 300, "answer_tokens": 80, "in_prompt": 0.5, "seed": 3}
    return Batches(pools or (OWN, OTHER), TEXTS, make_tokenizer(), **settings | changes)


def equal(one: Batch, other: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("in_prompt", [False, True])
def test_rows_read_a_text_with_examples_and_ask_the_others(in_prompt: bool) -> None:
    read = set()
    for step in range(4):
        batch = batches(examples_in_prompt=in_prompt)[step]
        for row, text in enumerate(batch.descriptions.tolist()):
            read.add(text)
            asked = documents(batch, row)
            shown = TEXTS[text] if in_prompt else TEXTS[text].split(",")[0] + "."
            said = {document.split("<user>")[1].split("\n")[0] for document in asked}
            assert (said == {shown}) if batch.in_prompt[row] else not any("Say" in x or "Else" in x for x in said)
            numbers = [re.search(r"in (\d)", document).group(1) for document in asked]  # type: ignore[union-attr]
            assert len(set(numbers)) == len(numbers) == 6 - len(NUMBERS[text]) and not NUMBERS[text] & set(numbers)
            assert (int(batch.others[row]) in OTHER.illustrated) == (text in OWN.illustrated)
            assert int(batch.others[row]) in NUMBERS
    assert read == {3, 4, 6, 7}


def test_a_share_of_rows_does_and_their_other_text_is_of_their_kind() -> None:
    half = [replace(pool, illustrated_share=0.5) for pool in (OWN, OTHER)]
    found = [batches(*half, rows=32)[step] for step in range(4)]
    both = [(x, y) for b in found for x, y in zip(b.descriptions.tolist(), b.others.tolist(), strict=True)]
    pairs = [(mine in NUMBERS, theirs in NUMBERS) for mine, theirs in both]
    assert all(mine == theirs for mine, theirs in pairs)
    assert 0.35 < sum(mine for mine, _ in pairs) / len(pairs) < 0.65


def test_without_a_share_batches_are_those_without_such_texts() -> None:
    settings: dict[str, Any] = {"made_up": (2,), "made_up_share": 0.2}
    laid = []
    for unused in ({"illustrated_share": 0.0}, {"illustrated": {}}):
        own, other, loud = (replace(pool, **unused) for pool in (OWN, OTHER, LOUD))
        laid.append(batches(replace(own, variants=(loud,), variant_share=0.5), other, **settings))
    with_texts, plain = laid
    assert all(equal(with_texts[step], plain[step]) for step in range(6))
    assert with_texts.readable == list(range(8)) and plain.readable == [0, 1, 2]


def test_a_variants_rows_show_its_own_texts_beside_those_of_what_is_unlike() -> None:
    quiet = replace(LOUD, descriptions=(0,), reword=str.title, illustrated={3: Illustrated(0, frozenset({0}))})
    pool = replace(OWN, variants=(LOUD, quiet), variant_share=1.0)
    pairs = set()
    for step in range(6):
        batch = batches(pool, OTHER)[step]
        for row, text in enumerate(batch.descriptions.tolist()):
            pairs.add((text, int(batch.others[row])))
            said = "".join(documents(batch, row))
            assert ("OUT" in said, "Out" in said) == (text == 5, text == 3)
    assert {pair for pair in pairs if pair[0] == 5} == {(5, 3), (5, 6), (5, 7)}
    assert {pair for pair in pairs if pair[0] == 3} == {(3, 5), (3, 6), (3, 7)}


def test_what_shows_all_examples_asks_them() -> None:
    everything = replace(OWN, illustrated={3: Illustrated(0, frozenset(range(6)))})
    assert (batches(everything, rows=2)[0].weights.sum(1) > 0).all()


# ----------------------------------------------------------------------------------------------------- settings


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., RunData]:
    """Lays out a run on a task of two answers and one of many, with an input that stands twice and one that is long."""
    lines = [{"task": "few", "description": "Do few.", "input": f"q{n}", "output": "ab"[n % 2]} for n in range(9)]
    lines += [{"task": "many", "description": "Do many.", "input": f"q{n % 8}", "output": f"r{n}"} for n in range(9)]
    lines += [{"task": "many", "description": "Do many.", "input": "long" + "x" * SHORT_EXAMPLE, "output": "r"}]
    lines += [{"task": "few", "description": "Do few.", "input": "q99", "output": "a", "split": "val"}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def laid(*, window: int = 250, variant: Any = "L", reads: Any = "description", **changes: Any) -> RunData:
        encoder = EncoderConfig(kind="tokens", model="base", layers=(1,), max_tokens=window)
        config = SftConfig(
            base="tiny",
            reads=reads,
            lora=LoraConfig(),
            encoder=EncoderConfig(kind="onehot") if reads == "task" else encoder,
            hypernet=HypernetConfig(variant=variant),
            data=DataConfig(tasks=str(tmp_path / "own.jsonl"), **changes),
            train=TrainConfig(steps=1, tasks_per_step=4),
        )
        return prepare_data(config, make_tokenizer(), lambda texts: [len(text.encode()) for text in texts])

    return laid


CHANGED: dict[str, Any] = {"relabel": 0.5, "reform": 0.5, "derive": 0.5, "relabel_variants": 3, "derive_variants": 2}


@pytest.mark.parametrize("variant", ["L", "none"])
def test_every_pool_has_texts_with_its_own_examples(prepare: Callable[..., RunData], variant: str) -> None:
    shared = {"examples_in_prompt": True} if variant == "none" else {"made_up": 0.1}
    data = prepare(variant=variant, examples=0.5, **shared, **CHANGED)
    numbers = set()
    for pool in (p for own in data.train.pools for p in (own, *own.variants, *own.derived)):
        assert pool.illustrated_share == 0.5 and 0 < len(pool.illustrated) <= 8
        for place, (description, shown) in pool.illustrated.items():
            text, pairs = data.texts[place], SHOWN.findall(data.texts[place])
            numbers.add(len(pairs))
            assert len(text.encode()) <= 250
            assert description in pool.descriptions
            assert text.split("\n\nExample input: ")[0] == data.texts[description]
            inputs = {pool.examples[n].input for n in shown}
            assert len(inputs) == len(pairs) and not any(text.startswith("long") for text in inputs)
            assert shown == {n for n, example in enumerate(pool.examples) if example.input in inputs}
            for said, answer in pairs if pool.ask is None else ():
                (own, *_), *_ = (example.outputs for example in pool.examples if example.input == said)
                assert answer == (pool.reword(own) if pool.reword else own)
    assert numbers == {1, 2, 3}
    assert data.summary["descriptions_with_examples"] == sum("Example input" in text for text in data.texts) > 8
    assert not any(pool.illustrated for batches in data.judged.values() for pool in batches.pools)
    assert data.train.texts == data.texts and all(data.train[step].weights.sum() > 0 for step in range(4))


def test_what_is_there_without_them_stays_where_it_was(prepare: Callable[..., RunData]) -> None:
    plain, more = (prepare(examples=share, made_up=0.1, **CHANGED) for share in (0.0, 0.5))
    assert more.texts[: len(plain.texts)] == plain.texts
    assert more.train.made_up == plain.train.made_up and plain.summary["descriptions_with_examples"] == 0
    again = prepare(examples=0.5, made_up=0.1, **CHANGED)
    assert again.texts == more.texts and equal(again.train[0], more.train[0])
    assert set(prepare(examples=0.5, made_up=0.1, seed=1, **CHANGED).texts) != set(more.texts)


def test_texts_fit_into_the_window_or_are_left_out(prepare: Callable[..., RunData]) -> None:
    data = prepare(window=55, examples=1.0)  # room for one example, and its two lines take 38 to 45 of it
    few, many = data.train.pools
    assert few.illustrated and many.illustrated
    assert all(len(SHOWN.findall(data.texts[n])) == 1 for pool in (few, many) for n in pool.illustrated)
    with pytest.raises(DataError, match=r"data\.examples: no description with an example.*max_tokens \(30\); raise"):
        prepare(window=30, examples=1.0)


def test_settings_that_cannot_be(prepare: Callable[..., RunData]) -> None:
    for settings, error in (
        ({"examples": 1.5}, r"data\.examples must be in \[0, 1\], got 1\.5"),
        ({"example_texts": 0}, r"data\.example_texts must be at least 1, got 0"),
        ({"examples_in_prompt": True}, "data.examples_in_prompt without data.examples"),
        ({"examples": 0.5, "variant": "none"}, "data.examples without data.examples_in_prompt would do nothing"),
        ({"examples": 0.5, "reads": "task"}, "data.examples come with descriptions; here is read the 'task'"),
    ):
        with pytest.raises(ConfigError, match=error):
            prepare(**settings)
