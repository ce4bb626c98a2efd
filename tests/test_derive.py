"""Derived tasks: the same examples asked about otherwise, said by the description and meant in input and answer."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from test_written_descriptions import WHATS, grams

from t2l.config import EncoderConfig, HypernetConfig, LoraConfig
from t2l.errors import ConfigError, DataError
from t2l.prompt import PromptConfig, render
from t2l.tasks import Example, Task, written_descriptions
from t2l.train.batches import Batch, Batches, Pool
from t2l.train.config import DataConfig, SftConfig, TrainConfig
from t2l.train.dataset import prepare_data
from t2l.train.derive import CHECKS, CHOICES, LONGEST_ANSWER, MARKS, Check, Choose, derived, examples_of, wrong_answers
from t2l.train.relabel import Words

TEXTS = ("Say which.", "Which one is it?", "Name it; answer with Yes or No")


def task(*answers: str | tuple[str, ...], name: str = "a") -> Task:
    """Nine examples for each answer."""
    given = [(answer,) if isinstance(answer, str) else answer for answer in answers * 9]
    examples = tuple(Example(f"{n}", f"input {n}", outputs) for n, outputs in enumerate(given))
    return Task(name, TEXTS, {"train": examples})


FEW, OPEN = task("yes", "no", name="few"), task(*(f"{word} {n}" for word in ("oak", "elm") for n in range(6)))
SEVERAL = task(("red", "scarlet"), ("blue", "Azure."), ("green",), ("azure", "sky"), name="several")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# ----------------------------------------------------------------------------------------------- what is derived


@pytest.mark.parametrize("of", [FEW, OPEN, SEVERAL], ids=lambda task: task.name)
def test_half_of_what_is_proposed_is_right_and_the_reply_says_so(of: Task, rng: np.random.Generator) -> None:
    rights = []
    for seed in range(20):
        for check, _ in derived(of, 4, seed)[::2]:
            assert isinstance(check, Check) and check.right != check.wrong
            start, end = check.layout.split("{answer}")
            for example in check.examples:
                text, reply = check(example, example.outputs[0], rng)
                before = start.format(input=example.input)
                assert text.startswith(before) and text.endswith(end)
                proposed = text[len(before) : len(text) - len(end)]
                rights.append(reply == check.right)
                assert reply in (check.right, check.wrong)
                assert (proposed.strip(".").lower() in [x.strip(".").lower() for x in example.outputs]) == rights[-1]
                assert not rights[-1] or proposed == example.outputs[0]
    assert 0.4 < np.mean(rights) < 0.6


@pytest.mark.parametrize("of", [FEW, OPEN, SEVERAL], ids=lambda task: task.name)
def test_one_option_is_right_and_the_reply_is_its_mark(of: Task, rng: np.random.Generator) -> None:
    places, numbers = [], set()
    for seed in range(20):
        for choose, _ in derived(of, 4, seed)[1::2]:
            assert isinstance(choose, Choose)
            for example in choose.examples:
                text, reply = choose(example, example.outputs[0], rng)
                begin = example.input + choose.before
                assert text.startswith(begin)
                options = text[len(begin) :].split(choose.between)
                laid = [choose.option.format(mark=mark, answer="").strip() for mark in choose.marks[: len(options)]]
                answers = [o.removeprefix(mark).strip() for o, mark in zip(options, laid, strict=True)]
                assert [o.startswith(mark) for o, mark in zip(options, laid, strict=True)] == [True] * len(laid)
                plain = [answer.strip(".").lower() for answer in answers]
                assert len(set(plain)) == len(plain) >= 2
                right = [answer in [x.strip(".").lower() for x in example.outputs] for answer in plain]
                assert sum(right) == 1 and choose.marks[right.index(True)] == reply
                places.append(right.index(True))
                numbers.add(len(options))
    assert numbers == ({2} if of is FEW else {2, 3, 4})
    assert set(places) == set(range(max(numbers)))
    assert 0.3 < np.mean(np.array(places) == 0) < 0.7


@pytest.mark.parametrize("of", [FEW, OPEN], ids=lambda task: task.name)
def test_every_text_says_the_task_and_names_the_replies(of: Task) -> None:
    forms = set()
    for seed in range(60):
        for ask, texts in derived(of, 4, seed):
            assert len(texts) > 1
            replies = (ask.right, ask.wrong) if isinstance(ask, Check) else ask.marks
            for text in texts:
                assert any(said in text for said in TEXTS)
                assert all(re.search(rf"(?<!\w){re.escape(reply)}(?!\w)", text) for reply in replies), text
                assert "{" not in text
                for said in TEXTS:
                    text = text.replace(said, "")
                forms.add((type(ask), re.sub("|".join(map(re.escape, replies)), "_", text)))
    assert min(len(CHECKS), len(CHOICES)) >= 12 and len(set(CHECKS + CHOICES)) == len(CHECKS) + len(CHOICES)
    assert len(forms) > 40


def test_no_sentence_shares_wording_with_a_judged_description() -> None:
    judged = [text for what in WHATS for texts in written_descriptions(what).values() for text in texts]
    known = {gram for text in judged for gram in grams(text)}
    made = {text for seed in range(200) for _, texts in derived(OPEN, 4, seed) for text in texts}
    parts = [part for text in made for part in re.split("|".join(map(re.escape, TEXTS)), text)]
    assert len(known) > 5000 and not {gram for part in parts for gram in grams(part)} & known


def test_replies_and_marks_vary_and_are_no_answers_of_the_task() -> None:
    asks = [ask for seed in range(99) for ask, _ in derived(task("A", "B", "C"), 4, seed)]
    assert {ask.marks for ask in asks if isinstance(ask, Choose)} == {MARKS[n][0][:3] for n in (1, 4, 5)}
    checks = [(ask.right, ask.wrong) for ask in asks if isinstance(ask, Check)]
    assert 0.3 < checks.count(("Yes", "No")) / len(checks) < 0.6
    assert {("True", "False"), ("accept", "reject"), ("1", "0")} < set(checks) and len(set(checks)) > 20
    assert {ask.marks for seed in range(99) for ask, _ in derived(OPEN, 4, seed) if isinstance(ask, Choose)} == {
        marks for marks, _, _ in MARKS
    }


def test_same_seed_same_derived_tasks_and_another_seed_others() -> None:
    def laid(of: Task, number: int, seed: int) -> list[str]:
        return [repr((ask, texts)) for ask, texts in derived(of, number, seed)]

    assert laid(FEW, 5, 0) == laid(FEW, 5, 0) == laid(FEW, 9, 0)[:5]
    assert laid(FEW, 5, 0) != laid(FEW, 5, 1) and laid(FEW, 5, 0) != laid(replace(FEW, name="b"), 5, 0)


def test_what_differs_in_its_layout_alone_is_alike() -> None:
    one = Check("Yes", "No", "{input}\n{answer}", ())
    assert one == replace(one, layout="{input} -> {answer}") != replace(one, right="No", wrong="Yes")
    other = Choose(("A", "B"), "\n", "{mark}) {answer}", "\n", ())
    assert other == replace(other, between=" ") != replace(other, marks=("1", "2"))
    assert one != other


def test_a_task_whose_answers_are_all_alike_or_long_has_none() -> None:
    long = "x" * LONGEST_ANSWER
    assert derived(task("same"), 4, 0) == derived(task("same", "Same."), 4, 0) == []
    assert derived(task("a" + long, "b" + long), 4, 0) == []
    assert derived(Task("a", TEXTS, {}), 4, 0) == []
    mixed = task("yes", "no", "a" + long, ("no", "b" + long))
    assert {o for e in examples_of(mixed) for o in e.outputs} == {"yes", "no"}
    # Hardly any is short: a task of one answer in twelve is none any more.
    assert examples_of(task("yes", *(f"{n}{long}" for n in range(11)))) == ()


def test_an_input_stands_once_with_all_its_answers(rng: np.random.Generator) -> None:
    twice = [Example("0", "in", ("yes",)), Example("1", "in ", ("no", "yes")), Example("2", "other", ("so",))]
    both, other = examples_of(Task("a", TEXTS, {"train": tuple(twice)}))
    assert both.outputs == ("yes", "no") and wrong_answers(both, (both, other), 9, rng) == ["so"]
    # Where every answer is right, none can be wrong.
    more = [Example("3", "x", ("no",)), Example("4", "y", ("yes",))]
    assert [e.input for e in examples_of(Task("a", TEXTS, {"train": (*twice[:2], *more)}))] == ["x", "y"]
    assert examples_of(Task("a", TEXTS, {"train": (*twice[:2], more[0])})) == ()


@given(st.lists(st.lists(st.sampled_from(["a", "b", "B.", " c", ""]), min_size=1, max_size=3), max_size=6))
def test_whatever_the_answers_every_example_left_can_be_posed(outputs: list[list[str]]) -> None:
    examples = tuple(Example(f"{n}", f"{n}", tuple(some)) for n, some in enumerate(outputs))
    for ask, _ in derived(Task("a", TEXTS, {"train": examples}), 2, 0):
        for example in ask.examples:
            text, reply = ask(example, example.outputs[0], np.random.default_rng(0))
            assert example.input in text and reply in (ask.marks if isinstance(ask, Choose) else (ask.right, ask.wrong))


# ------------------------------------------------------------------------------------------------------ batches

SAID = ["Say yes or no.", "Is it right? Yes or No.", "Which? A or B.", "Do else.", "Say up for yes, down for no."]
CHECK = Check("Yes", "No", "{input}\nProposed: {answer}", FEW.examples["train"])
CHOOSE = Choose(("A", "B"), "\n", "{mark}. {answer}", "\n", FEW.examples["train"])
OWN = Pool("few", FEW.examples["train"], (0,))
DERIVED = (replace(OWN, descriptions=(1,), ask=CHECK), replace(OWN, descriptions=(2,), ask=CHOOSE))
RELABELLED = (replace(OWN, descriptions=(4,), reword=Words({"yes": "up", "no": "down"})),)
OTHER = Pool("b", tuple(Example(f"{n}", f"else {n}", ("so",)) for n in range(9)), (3,))


def batches(pool: Pool, **changes: Any) -> Batches:
    settings: dict[str, Any] = {"rows": 8, "tokens": 200, "answer_tokens": 24, "in_prompt": 0.5, "seed": 3}
    return Batches([pool, OTHER], SAID, make_tokenizer(), **settings | changes)


def documents(batch: Batch, row: int) -> list[str]:
    """The texts of a row's documents, each with what all begin with, and their answers."""
    tokenizer, found = make_tokenizer(), []
    for number in range(int(batch.documents[row].max()) + 1):
        mine = (batch.documents[row] == number) | (batch.documents[row] == -2)
        last = batch.labels[row][batch.label_documents[row] == number][-1:]
        found.append(tokenizer.decode([*batch.tokens[row][mine].tolist(), *last.tolist()]))
    return found


def test_rows_of_a_derived_task_pose_its_input_and_answer_under_its_description() -> None:
    read: list[int] = []
    for step in range(6):
        batch = batches(replace(OWN, derived=DERIVED, derived_share=0.6))[step]
        for row in range(8):
            described = int(batch.descriptions[row])
            read.append(described)
            assert int(batch.partners[row]) == described  # each has one text here
            for text in documents(batch, row):
                assert ("Proposed: " in text) == (described == 1) and ("A. " in text) == (described == 2)
                said = [n for n, description in enumerate(SAID) if description in text]
                assert said in ([], [described])
                if described == 1:
                    n, proposed, reply = re.search(r"input (\d+)\nProposed: (\w+)\n<assistant>(\w+)</s>", text).groups()  # type: ignore[union-attr]
                    assert (FEW.examples["train"][int(n)].outputs == (proposed,)) == (reply == "Yes")
                if described == 2:
                    n, *options, reply = re.search(  # type: ignore[union-attr]
                        r"input (\d+)\nA. (\w+)\nB. (\w+)\n<assistant>(\w)</s>", text
                    ).groups()
                    assert FEW.examples["train"][int(n)].outputs == (options["AB".index(reply)],)
    assert 0.4 < (read.count(1) + read.count(2)) / (len(read) - read.count(3)) < 0.8
    assert read.count(0) and read.count(1) and read.count(2)


def test_what_is_not_derived_is_relabelled_with_its_own_share() -> None:
    pool = replace(OWN, derived=DERIVED, derived_share=0.5, variants=RELABELLED, variant_share=1.0)
    read = [int(x) for step in range(6) for x in batches(pool)[step].descriptions]
    assert not read.count(0)
    assert 0.3 < read.count(4) / (len(read) - read.count(3)) < 0.7


def test_where_nothing_else_reads_it_only_prompts_that_say_it_are_derived() -> None:
    pool = replace(OWN, derived=DERIVED, derived_share=1.0)
    batch = batches(pool, relabel_unsaid=False, rows=32)[0]
    kinds = set()
    for row in range(32):
        described, first = int(batch.descriptions[row]), documents(batch, row)[0]
        kinds.add((described in (1, 2), SAID[described] in first))
        if described != 3:
            assert (described in (1, 2)) == (SAID[described] in first)
    assert kinds >= {(True, True), (False, False)}


def test_the_other_description_is_often_of_the_same_task_and_asks_something_else() -> None:
    twin = replace(DERIVED[0], descriptions=(4,), ask=replace(CHECK, layout="{input} {answer}"))
    found = [batches(replace(OWN, derived=(*DERIVED, twin), derived_share=1.0), rows=16)[step] for step in range(8)]
    pairs = [(int(mine), int(theirs)) for b in found for mine, theirs in zip(b.descriptions, b.others, strict=True)]
    pairs = [pair for pair in pairs if pair[0] != 3]
    assert set(pairs) == {(1, 0), (1, 2), (1, 3), (4, 0), (4, 2), (4, 3), (2, 0), (2, 1), (2, 3), (2, 4)}
    assert 0.35 < np.mean([theirs != 3 for _, theirs in pairs]) < 0.65


def test_a_teachers_rows_pose_the_same_input_after_others_of_the_kind() -> None:
    pool = replace(OWN, derived=DERIVED, derived_share=1.0)
    batch = batches(pool, teacher_tokens=2400, shots=3)[0]
    tokenizer = make_tokenizer()
    for row in range(8):
        posed = [text.split("<assistant>")[0].split("<user>")[1] for text in documents(batch, row)]
        for number, text in enumerate(posed):
            shown = tokenizer.decode(batch.teacher_tokens[row][batch.teacher_documents[row] == number])
            *before, last = shown.split("<user>")[1:]
            assert len(before) == 3 and last.split("<assistant>")[0].strip() == text.split("\n\n")[-1].strip()
            kind = {1: "Proposed: ", 2: "A. ", 3: "else"}[int(batch.descriptions[row])]
            assert all(kind in turn for turn in (*before, last))
            assert SAID[int(batch.descriptions[row])] in before[0]


def test_without_derived_tasks_the_draws_are_those_that_they_always_were() -> None:
    """What the tasks' rows hold, drawn here once more as it was drawn before tasks were derived."""
    tokenizer = make_tokenizer()
    several = Pool("a", tuple(Example(f"{n}", f"in {n}", (f"out {n}", f"or {n}")) for n in range(9)), (0, 1))
    given = [replace(several, variants=(replace(several, descriptions=(2,), reword=str.upper),), variant_share=0.5)]
    given.append(OTHER)
    made = Batches(given, SAID, tokenizer, rows=6, tokens=900, answer_tokens=99, in_prompt=0.5, seed=5)
    for step in range(3):
        batch, pools = made[step], [given[made.task_of_row(step, row)] for row in range(6)]
        rng, second, sixth = (np.random.default_rng((5, stream, step)) for stream in (0, 2, 6))
        shown = [int(rng.choice(pool.descriptions)) for pool in pools]
        prompts = [PromptConfig(description_in_prompt=bool(rng.random() < 0.5)) for _ in pools]
        others = [made._other(made.task_of_row(step, row), second) for row in range(6)]
        partners = [int(second.choice(pool.descriptions)) for pool in pools]
        for row, pool in enumerate(pools):
            if pool.variants and sixth.random() < 0.5:
                pools[row] = pool.variants[int(sixth.integers(1))]
                shown[row] = int(sixth.choice(pools[row].descriptions))
        orders = [rng.permutation(9) for _ in pools]
        assert (batch.descriptions.tolist(), batch.others.tolist(), batch.partners.tolist()) == (
            shown,
            others,
            partners,
        )
        for row, (pool, order) in enumerate(zip(pools, orders, strict=True)):
            expected = []
            for pick in order:
                outputs = pool.examples[pick].outputs
                answer = outputs[int(rng.integers(len(outputs)))]
                answer = answer if pool.reword is None else pool.reword(answer)
                prompt = render(tokenizer, SAID[shown[row]], pool.examples[pick].input, prompts[row])
                expected.append(f"{prompt}{answer}</s>")
            assert documents(batch, row) == expected


# ------------------------------------------------------------------------------------------------------ settings


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
            train=TrainConfig(steps=1),
        )
        return prepare_data(config, make_tokenizer(), lambda texts: [count + 63 * ("right" in t) for t in texts])

    return laid


def test_tasks_are_derived_if_asked_for_and_counted(prepare: Callable[..., Any]) -> None:
    data = prepare("few", "one", derive=0.3, derive_variants=3)
    few, one = data.train.pools
    assert (few.derived_share, [type(x.ask) for x in few.derived]) == (0.3, [Check, Choose, Check])
    assert one.derived == () and data.summary["tasks_with_derived"] == 1
    for pool in few.derived:
        assert pool.examples == pool.ask.examples
        assert all("Do few." in data.texts[text] for text in pool.descriptions)
    plain = prepare("few", "one")
    assert [pool.derived for pool in plain.train.pools] == [(), ()] and plain.summary["tasks_with_derived"] == 0
    assert set(plain.texts) < set(data.texts)


def test_texts_over_the_window_are_left_out_and_no_derived_task_at_all_is_an_error(prepare: Callable[..., Any]) -> None:
    (few,) = (data := prepare("few", count=2, derive=0.3, derive_variants=9)).train.pools
    assert few.derived and not any("right" in data.texts[text] for x in few.derived for text in x.descriptions)
    with pytest.raises(DataError, match=r"data\.derive: no task has different short answers.*max_tokens \(64\)"):
        prepare("one", derive=0.3)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"derive": 1.5}, r"data\.derive must be in \[0, 1\], got 1\.5"),
        ({"derive": -0.1}, r"data\.derive must be in"),
        ({"derive_variants": 0}, r"data\.derive_variants must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        DataConfig(**settings)


def test_what_reads_no_descriptions_cannot_be_told_what_is_asked() -> None:
    with pytest.raises(ConfigError, match=r"derive say in descriptions what to answer; here is read the 'task'"):
        SftConfig(
            base="tiny",
            conditioning="task",
            encoder=EncoderConfig(kind="onehot", model="none"),
            data=DataConfig(derive=0.3),
            train=TrainConfig(steps=1),
        )
