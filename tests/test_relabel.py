"""Variants of a task: other words for its answers, said by the description and meant in the examples."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from t2l.errors import ConfigError
from t2l.tasks import Example, Task
from t2l.train.batches import Batches, Pool
from t2l.train.config import DataConfig
from t2l.train.relabel import FORMS, MOST_ANSWERS, Form, Words, answers_of, variants, vocabulary


def task(*answers: str, descriptions: tuple[str, ...] = ("Say which.", "Which one is it?"), name: str = "a") -> Task:
    examples = tuple(Example(f"{n}", f"input {n}", (answer,)) for n, answer in enumerate(answers * 3))
    return Task(name, descriptions, {"train": examples})


@given(
    st.lists(st.text("abcXYZ_-01 .", min_size=1, max_size=12).map(str.strip).filter(bool), min_size=2, unique=True)
    .filter(lambda answers: len(set(answers)) <= MOST_ANSWERS)
    .map(lambda answers: answers[:MOST_ANSWERS]),
    st.integers(0, 5),
)
def test_every_answer_has_its_own_new_one_and_every_text_says_it(answers: list[str], seed: int) -> None:
    found = variants(task(*answers), 6, seed)
    assert len(found) == 6
    for change, texts in found:
        assert isinstance(change, Words)
        new = change.new
        assert [change(f" {answer} ") for answer in answers] == [new[answer] for answer in answers]
        assert set(new) == set(answers) and len(set(new.values())) == len(answers)
        kept = all(old == word for old, word in new.items())
        assert kept or not {w.casefold() for w in new.values()} & {a.casefold() for a in answers}
        assert texts
        for text in texts:
            assert "Say which" in text or "Which one is it" in text
            assert all(word in text for word in new.values())
            assert kept or all(old in text for old in answers)


def test_sentences_pair_old_and_new_and_are_varied() -> None:
    found = variants(task("positive", "negative"), 40, 0)
    named = [(change.new, texts) for change, texts in found if isinstance(change, Words)]
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
    one = task("yes", "no")
    assert variants(one, 5, 0) == variants(one, 5, 0)
    assert variants(one, 5, 0) != variants(one, 5, 1)
    assert variants(one, 5, 0) == variants(one, 9, 0)[:5]
    assert variants(one, 5, 0) != variants(replace(one, name="b"), 5, 0)


@pytest.mark.parametrize(
    "answers",
    [
        ("alone",),
        tuple(map(str, range(MOST_ANSWERS + 1))),
        ("yes", "a whole sentence is no label, is it, or so one says"),
    ],
)
def test_open_answers_change_their_form(answers: tuple[str, ...]) -> None:
    assert answers_of(task(*answers)) == ()
    found = variants(task(*answers), 60, 0)
    assert {change for change, _ in found} == set(FORMS)
    for change, texts in found:
        assert isinstance(change, Form)
        for answer in answers:
            assert answer.casefold() in change(f"{answer} ").casefold()
        assert all(any(said in text for said in FORMS[change]) for text in texts)


def test_forms_are_told_apart() -> None:
    """No two forms make the same of an answer, and no sentence says two of them."""
    assert len({form("Two words") for form in FORMS}) == len(FORMS)
    sentences = [said for texts in FORMS.values() for said in texts]
    assert len(set(sentences)) == len(sentences)


def test_rows_of_a_variant_answer_and_say_its_words() -> None:
    """The share of rows, their answers, what is read, and that all else is as without variants."""
    tokenizer = make_tokenizer()
    examples = task("yes", "no").examples["train"]
    texts = ["Say yes or no.", "Say up for yes and down for no.", "Do else."]
    own = Pool("a", examples, (0,))
    with_variant = replace(own, variants=(replace(own, descriptions=(1,), reword=Words({"yes": "up", "no": "down"})),))
    other = Pool("b", tuple(Example(f"{n}", f"else {n}", ("so",)) for n in range(9)), (2,))

    def batches(pool: Pool, share: float = 0.0, **changes: Any) -> Batches:
        pool = replace(pool, variant_share=share)
        settings: dict[str, Any] = {"rows": 8, "tokens": 64, "answer_tokens": 24, "in_prompt": 0.5, "seed": 3}
        return Batches([pool, other], texts, tokenizer, **settings | changes)

    read: list[int] = []
    for step in range(6):
        batch = batches(with_variant, 0.5)[step]
        plain = batches(own)[step]
        for row in range(8):
            said = tokenizer.decode(batch.labels[row][batch.label_documents[row] >= 0])
            described = int(batch.descriptions[row])
            read.append(described)
            assert ("up" in said or "down" in said) == (described == 1)
            assert ("so" in said) == (described == 2)
            shown = tokenizer.decode(batch.tokens[row])
            assert "Say yes" not in shown or described == 0
            assert "Say up" not in shown or described == 1
            if described != 1:
                assert np.array_equal(batch.tokens[row], plain.tokens[row])
    share = read.count(1) / (read.count(0) + read.count(1))
    assert 0.25 < share < 0.75
    hidden = [batches(with_variant, 1.0, relabel_unsaid=False, in_prompt=0.0)[step] for step in range(2)]
    assert not any((batch.descriptions == 1).any() for batch in hidden)
    shown = [batches(with_variant, 1.0, relabel_unsaid=False, in_prompt=1.0)[step] for step in range(2)]
    assert not any((batch.descriptions == 0).any() for batch in shown)


def test_the_other_description_is_often_of_the_same_task_with_other_answers() -> None:
    tokenizer = make_tokenizer()
    own = Pool("a", task("yes", "no").examples["train"], (0,))
    pool = replace(
        own,
        variant_share=1.0,
        variants=(
            replace(own, descriptions=(1,), reword=Words({"yes": "up", "no": "down"})),
            replace(own, descriptions=(2,), reword=Words({"yes": "up", "no": "down"})),
            replace(own, descriptions=(3,), reword=Words({"yes": "left", "no": "right"})),
        ),
    )
    other = Pool("b", task("so", "not", name="b").examples["train"], (4,))
    batches = Batches(
        [pool, other],
        list("abcde"),
        tokenizer,
        rows=16,
        tokens=64,
        answer_tokens=24,
        in_prompt=0.0,
        seed=0,
    )
    found = [batches[step] for step in range(8)]
    pairs = [(int(mine), int(theirs)) for b in found for mine, theirs in zip(b.descriptions, b.others, strict=True)]
    assert {pair for pair in pairs if pair[0] in (1, 2)} == {(1, 3), (2, 3), (1, 4), (2, 4)}
    assert {pair for pair in pairs if pair[0] == 3} == {(3, 1), (3, 2), (3, 4)}
    near = sum(theirs != 4 for mine, theirs in pairs if mine in (1, 2, 3))
    assert 0.25 < near / sum(mine in (1, 2, 3) for mine, _ in pairs) < 0.75


def test_some_rows_read_made_up_words_with_the_right_prompt_and_answers() -> None:
    tokenizer = make_tokenizer()
    pools = [Pool("a", task("yes", "no").examples["train"], (0,)), Pool("b", task("so", "not").examples["train"], (1,))]
    texts = ["Say yes or no.", "Say so or not.", "Xu qer.", "Omm ban."]
    settings: dict[str, Any] = {"rows": 16, "tokens": 64, "answer_tokens": 24, "in_prompt": 1.0, "seed": 0}
    plain = Batches(pools, texts, tokenizer, **settings)[0]
    batch = Batches(pools, texts, tokenizer, **settings, made_up=(2, 3), made_up_share=0.5)[0]
    for name in ("tokens", "labels", "others", "weights"):
        assert np.array_equal(getattr(batch, name), getattr(plain, name)), name
    changed = batch.descriptions != plain.descriptions
    assert 3 < int(changed.sum()) < 13
    assert set(batch.descriptions[changed].tolist()) == {2, 3}


def test_a_teachers_examples_have_the_variants_answers_too() -> None:
    tokenizer = make_tokenizer()
    own = Pool("a", task("yes", "no").examples["train"], (0,))
    variant = replace(own, descriptions=(1,), reword=Words({"yes": "up", "no": "down"}))
    pool = replace(own, variant_share=1.0, variants=(variant,))
    batch = Batches(
        [pool],
        ["Say yes or no.", "Say up or down."],
        tokenizer,
        rows=4,
        tokens=64,
        answer_tokens=24,
        in_prompt=0.0,
        seed=0,
        teacher_tokens=256,
        shots=3,
    )[0]
    shown = tokenizer.batch_decode(batch.teacher_tokens)
    assert all(" yes" not in row and " no" not in row for row in shown)
    assert all("up" in row and "down" in row for row in shown)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"relabel": 1.5}, r"data\.relabel must be in \[0, 1\], got 1\.5"),
        ({"made_up": -0.1}, r"data\.made_up must be in"),
        ({"relabel_variants": 0}, "relabel_variants must be at least 1"),
        ({"file_share": 0.5}, "file_share needs a file"),
        ({"file_share": 1.0, "descriptions": "x.jsonl"}, "set keep_descriptions false"),
        ({"file_share": 0.5, "descriptions": "x.jsonl", "keep_descriptions": False}, "keep_descriptions true"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        DataConfig(**settings)


# ------------------------------------------------------------------------------------------------------- vocabulary


def test_vocabulary_is_what_several_tasks_say() -> None:
    texts = ("Decide whether the review is positive, or non-positive.", "Judge the Review: it's positive or negative.")
    tasks = [Task(f"t{n}", (text,), {}) for n, text in enumerate(texts)] + [Task("t2", ("negative negative ok",), {})]
    assert vocabulary(tasks) == ("negative", "positive")


def test_other_words_come_from_the_vocabulary_that_is_given() -> None:
    """In every kind of variant but the letters, numbers and opposites; and the draws stay those of the seed."""
    some = task("Yes", "No")
    words = tuple(f"{a}{b}zq" for a in "bcdfgh" for b in "aeiou")
    found = [change.new for change, _ in variants(some, 60, 0, words=words) if isinstance(change, Words)]
    assert found == [change.new for change, _ in variants(some, 60, 0, words=words) if isinstance(change, Words)]
    taken = {word.lower() for new in found for word in re.findall(r"[A-Za-z]+zq", " ".join(new.values()), re.I)}
    assert len(taken) > 15 and taken <= set(words)
    plain = {word.lower() for change, _ in variants(some, 60, 0) for word in change.new.values()}
    assert not taken & plain
