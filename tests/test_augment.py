"""Augmentations: other words, forms and questions, said by the description and meant in input and answer."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_written_descriptions import WHATS, grams

from t2l.tasks import Example, Task, written_descriptions
from t2l.train.augment import (
    FORMATS,
    LONGEST_ANSWER,
    MOST_LABELS,
    AnswerCheck,
    AnswerChoice,
    FormatVariation,
    LabelRemap,
    answer_variants,
    answers_of,
    auxiliary_tasks,
    checkable_examples,
    vocabulary,
    wrong_answers,
)
from t2l.train.templates import CHECKS, CHOICES, MARKS

TEXTS = ("Say which.", "Which one is it?", "Name it; answer with Yes or No")


def task(*answers: str | tuple[str, ...], name: str = "a") -> Task:
    """Nine examples for each answer."""
    given = [(answer,) if isinstance(answer, str) else answer for answer in answers * 9]
    examples = tuple(Example(f"{n}", f"input {n}", outputs) for n, outputs in enumerate(given))
    return Task(name, TEXTS, {"train": examples})


FEW, OPEN = task("yes", "no", name="few"), task(*(f"{word} {n}" for word in ("oak", "elm") for n in range(6)))


SEVERAL = task(("red", "scarlet"), ("blue", "Azure."), ("green",), ("azure", "sky"), name="several")


EXAMPLE, RNG = Example("0", "in", ("out",)), np.random.default_rng(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def labelled(
    *answers: str, descriptions: tuple[str, ...] = ("Say which.", "Which one is it?"), name: str = "a"
) -> Task:
    examples = tuple(Example(f"{n}", f"input {n}", (answer,)) for n, answer in enumerate(answers * 3))
    return Task(name, descriptions, {"train": examples})


@given(
    st.lists(st.text("abcXYZ_-01 .", min_size=1, max_size=12).map(str.strip).filter(bool), min_size=2, unique=True)
    .filter(lambda answers: len(set(answers)) <= MOST_LABELS)
    .map(lambda answers: answers[:MOST_LABELS]),
    st.integers(0, 5),
)
def test_every_answer_has_its_own_new_one_and_every_text_says_it(answers: list[str], seed: int) -> None:
    found = answer_variants(labelled(*answers), seed, number=6)
    assert len(found) == 6
    for change, _, texts in found:
        assert isinstance(change, LabelRemap)
        new = change.new
        assert [change(EXAMPLE, f" {answer} ", RNG) for answer in answers] == [
            ("in", new[answer]) for answer in answers
        ]
        assert set(new) == set(answers) and len(set(new.values())) == len(answers)
        kept = all(old == word for old, word in new.items())
        assert kept or not {w.casefold() for w in new.values()} & {a.casefold() for a in answers}
        assert texts
        for text in texts:
            assert "Say which" in text or "Which one is it" in text
            assert all(word in text for word in new.values())
            assert kept or all(old in text for old in answers)


def test_sentences_pair_old_and_new_and_are_varied() -> None:
    found = answer_variants(labelled("positive", "negative"), 0, number=40)
    named = [(change.new, texts) for change, _, texts in found if isinstance(change, LabelRemap)]
    swaps = [(new, text) for new, texts in named for text in texts if new["positive"] != "positive"]
    assert len(swaps) > 60
    for new, text in swaps:
        for old, other in (("positive", "negative"), ("negative", "positive")):
            (part,) = (part for part in re.split(r", | and ", text) if old in part)
            assert re.search(rf"\b{re.escape(new[old])}\b", part), text
            # One may be the other with a word before it, as in "maple" and "not maple".
            assert new[other] in new[old] or not re.search(rf"\b{re.escape(new[other])}\b", part), text
    assert len({new["positive"] for new, _ in swaps}) > 12
    assert len({re.sub("|".join(map(re.escape, new.values())), "_", text) for new, text in swaps}) > 25


def test_same_seed_same_variants_and_another_seed_others() -> None:
    one = labelled("yes", "no")
    assert answer_variants(one, 0, number=5) == answer_variants(one, 0, number=5)
    assert answer_variants(one, 0, number=5) != answer_variants(one, 1, number=5)
    assert answer_variants(one, 0, number=5) == answer_variants(one, 0, number=9)[:5]
    assert answer_variants(one, 0, number=5) != answer_variants(replace(one, name="b"), 0, number=5)


@pytest.mark.parametrize(
    "answers",
    [
        ("alone",),
        tuple(map(str, range(MOST_LABELS + 1))),
        ("yes", "a whole sentence is no label, is it, or so one says"),
    ],
)
def test_open_answers_change_their_form(answers: tuple[str, ...]) -> None:
    assert answers_of(labelled(*answers)) == ()
    found = answer_variants(labelled(*answers), 0, number=60)
    assert {change for change, *_ in found} == set(FORMATS)
    for change, _, texts in found:
        assert isinstance(change, FormatVariation)
        for answer in answers:
            text, changed = change(EXAMPLE, f"{answer} ", RNG)
            assert text == "in" and answer.casefold() in changed.casefold()
        assert all(any(said in text for said in FORMATS[change]) for text in texts)


def test_forms_are_told_apart() -> None:
    """No two forms make the same of an answer, and no sentence says two of them."""
    assert len({form(EXAMPLE, "Two words", RNG) for form in FORMATS}) == len(FORMATS)
    sentences = [said for texts in FORMATS.values() for said in texts]
    assert len(set(sentences)) == len(sentences)


def test_vocabulary_is_what_several_tasks_say() -> None:
    texts = ("Decide whether the review is positive, or non-positive.", "Judge the Review: it's positive or negative.")
    tasks = [Task(f"t{n}", (text,), {}) for n, text in enumerate(texts)] + [Task("t2", ("negative negative ok",), {})]
    assert vocabulary(tasks) == ("negative", "positive")


def test_other_words_come_from_the_vocabulary_that_is_given() -> None:
    """In every kind of variant but the letters, numbers and opposites; and the draws stay those of the seed."""
    some = labelled("Yes", "No")
    words = tuple(f"{a}{b}zq" for a in "bcdfgh" for b in "aeiou")
    found = [
        change.new for change, *_ in answer_variants(some, 0, number=60, words=words) if isinstance(change, LabelRemap)
    ]
    assert found == [
        change.new for change, *_ in answer_variants(some, 0, number=60, words=words) if isinstance(change, LabelRemap)
    ]
    taken = {word.lower() for new in found for word in re.findall(r"[A-Za-z]+zq", " ".join(new.values()), re.I)}
    assert len(taken) > 15 and taken <= set(words)
    plain = {word.lower() for change, *_ in answer_variants(some, 0, number=60) for word in change.new.values()}
    assert not taken & plain


@pytest.mark.parametrize("of", [FEW, OPEN, SEVERAL], ids=lambda task: task.name)
def test_half_of_what_is_proposed_is_right_and_the_reply_says_so(of: Task, rng: np.random.Generator) -> None:
    rights = []
    for seed in range(20):
        for check, *_ in auxiliary_tasks(of, seed)[::2]:
            assert isinstance(check, AnswerCheck) and check.right != check.wrong
            assert sorted(re.findall(r"\{\w+\}", check.layout)) == ["{answer}", "{input}"]
            check = replace(check, layout="{input}\t{answer}")
            for example in check.examples:
                text, reply = check(example, example.outputs[0], rng)
                posed, proposed = text.split("\t")
                assert posed == example.input
                rights.append(reply == check.right)
                assert reply in (check.right, check.wrong)
                assert (proposed.strip(".").lower() in [x.strip(".").lower() for x in example.outputs]) == rights[-1]
                assert not rights[-1] or proposed == example.outputs[0]
    assert 0.4 < np.mean(rights) < 0.6


@pytest.mark.parametrize("of", [FEW, OPEN, SEVERAL], ids=lambda task: task.name)
def test_one_option_is_right_and_the_reply_is_its_mark(of: Task, rng: np.random.Generator) -> None:
    places, numbers = [], set()
    for seed in range(20):
        for choose, *_ in auxiliary_tasks(of, seed)[1::2]:
            assert isinstance(choose, AnswerChoice)
            assert sorted(re.findall(r"\{\w+\}", choose.option)) == ["{answer}", "{mark}"]
            choose = replace(choose, before="\n", option="{mark}\t{answer}", between="\n")
            for example in choose.examples:
                text, reply = choose(example, example.outputs[0], rng)
                posed, *options = text.split("\n")
                marks, answers = zip(*(option.split("\t") for option in options), strict=True)
                assert posed == example.input and marks == choose.marks[: len(options)]
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
        for ask, _, texts in auxiliary_tasks(of, seed):
            assert len(texts) > 1
            replies = (ask.right, ask.wrong) if isinstance(ask, AnswerCheck) else ask.marks
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
    made = {text for seed in range(200) for *_, texts in auxiliary_tasks(OPEN, seed) for text in texts}
    parts = [part for text in made for part in re.split("|".join(map(re.escape, TEXTS)), text)]
    assert len(known) > 5000 and not {gram for part in parts for gram in grams(part)} & known


def test_replies_and_marks_vary_and_are_no_answers_of_the_task() -> None:
    asks = [ask for seed in range(99) for ask, *_ in auxiliary_tasks(task("A", "B", "C"), seed)]
    assert {ask.marks for ask in asks if isinstance(ask, AnswerChoice)} == {MARKS[n][0][:3] for n in (1, 4, 5)}
    checks = [(ask.right, ask.wrong) for ask in asks if isinstance(ask, AnswerCheck)]
    assert 0.3 < checks.count(("Yes", "No")) / len(checks) < 0.6
    assert {("True", "False"), ("accept", "reject"), ("1", "0")} < set(checks) and len(set(checks)) > 20
    assert {
        ask.marks for seed in range(99) for ask, *_ in auxiliary_tasks(OPEN, seed) if isinstance(ask, AnswerChoice)
    } == {marks for marks, _, _ in MARKS}


def test_same_seed_same_derived_tasks_and_another_seed_others() -> None:
    def laid(of: Task, number: int, seed: int) -> list[str]:
        return [repr((ask, texts)) for ask, _, texts in auxiliary_tasks(of, seed, number=number)]

    assert laid(FEW, 5, 0) == laid(FEW, 5, 0) == laid(FEW, 9, 0)[:5]
    assert laid(FEW, 5, 0) != laid(FEW, 5, 1) and laid(FEW, 5, 0) != laid(replace(FEW, name="b"), 5, 0)


def test_what_differs_in_its_layout_alone_is_alike() -> None:
    one = AnswerCheck("Yes", "No", "{input}\n{answer}", ())
    assert one == replace(one, layout="{input} -> {answer}") != replace(one, right="No", wrong="Yes")
    other = AnswerChoice(("A", "B"), "\n", "{mark}) {answer}", "\n", ())
    assert other == replace(other, between=" ") != replace(other, marks=("1", "2"))
    assert one != other


def test_a_task_whose_answers_are_all_alike_or_long_has_none() -> None:
    long = "x" * LONGEST_ANSWER
    assert auxiliary_tasks(task("same"), 0) == auxiliary_tasks(task("same", "Same."), 0) == []
    assert auxiliary_tasks(task("a" + long, "b" + long), 0) == []
    assert auxiliary_tasks(Task("a", TEXTS, {}), 0) == []
    mixed = task("yes", "no", "a" + long, ("no", "b" + long))
    assert {o for e in checkable_examples(mixed) for o in e.outputs} == {"yes", "no"}
    # Hardly any is short: a task of one answer in twelve is none any more.
    assert checkable_examples(task("yes", *(f"{n}{long}" for n in range(11)))) == ()


def test_an_input_stands_once_with_all_its_answers(rng: np.random.Generator) -> None:
    twice = [Example("0", "in", ("yes",)), Example("1", "in ", ("no", "yes")), Example("2", "other", ("so",))]
    both, other = checkable_examples(Task("a", TEXTS, {"train": tuple(twice)}))
    assert both.outputs == ("yes", "no") and wrong_answers(both, (both, other), 9, rng) == ["so"]
    # Where every answer is right, none can be wrong.
    more = [Example("3", "x", ("no",)), Example("4", "y", ("yes",))]
    assert [e.input for e in checkable_examples(Task("a", TEXTS, {"train": (*twice[:2], *more)}))] == ["x", "y"]
    assert checkable_examples(Task("a", TEXTS, {"train": (*twice[:2], more[0])})) == ()


@given(st.lists(st.lists(st.sampled_from(["a", "b", "B.", " c", ""]), min_size=1, max_size=3), max_size=6))
def test_whatever_the_answers_every_example_left_can_be_posed(outputs: list[list[str]]) -> None:
    examples = tuple(Example(f"{n}", f"{n}", tuple(some)) for n, some in enumerate(outputs))
    for ask, *_ in auxiliary_tasks(Task("a", TEXTS, {"train": examples}), 0, number=2):
        for example in ask.examples:
            text, reply = ask(example, example.outputs[0], np.random.default_rng(0))
            assert example.input in text and reply in (
                ask.marks if isinstance(ask, AnswerChoice) else (ask.right, ask.wrong)
            )
