"""Packed rows: every example once an epoch, static shapes, weights, and nothing lost or invented on the way."""

from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from transformers import PreTrainedTokenizerBase

from t2l.config import PromptConfig
from t2l.errors import DataError
from t2l.prompt import render
from t2l.tasks import Example, Task
from t2l.train.packing import Documents, Stream, document_scores, fixed_rows, pack, tokenize_examples

TOKENS, ANSWERS = 120, 24


def make_task(name: str = "count", number: int = 11) -> Task:
    examples = tuple(
        Example(f"{name}-{i}", "say " + "x" * (i % 5), (f"{name} {i}", f"or {i}")[: 1 + i % 2]) for i in range(number)
    )
    long = Example(f"{name}-long", "y" * 300, ("never",))
    return Task(name, ("First way.", "Second way."), {"train": (*examples, long)})


def documents(task: Task, tokenizer: PreTrainedTokenizerBase, *, in_prompt: bool = False, **changes: Any) -> Documents:
    values = {"tokens": TOKENS, "answer_tokens": ANSWERS, "seed": 3} | changes
    prompt = PromptConfig(description_in_prompt=in_prompt)
    return tokenize_examples(task, task.examples["train"], tokenizer, prompt, **values)


def text(store: Documents, document: int, tokenizer: PreTrainedTokenizerBase) -> str:
    start = store.start[document]
    return tokenizer.decode(store.pool[start : start + store.prompt[document] + store.answer[document]].tolist())


def test_documents_are_prompt_and_answer(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    task = make_task()
    store = documents(task, tiny_tokenizer)
    assert (len(store.variants), store.too_long) == (11, 1)
    assert store.ids == tuple(f"count-{i}" for i in range(11))
    for i, (variants, example) in enumerate(zip(store.variants, task.examples["train"], strict=False)):
        assert len(variants) == 1 + i % 2
        for document, answer in zip(variants, example.outputs, strict=True):
            prompt = render(tiny_tokenizer, "", example.input, PromptConfig())
            assert text(store, document, tiny_tokenizer) == f"{prompt}{answer}</s>"
            assert store.answer[document] == len(answer) + 1  # one token a byte, and the end
    assert all(len(variants) == 1 for variants in documents(task, tiny_tokenizer, first_answer=True).variants)


def test_answers_begin_with_a_space_where_wanted(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    task = make_task()
    prompt = PromptConfig(answer_space=True)
    examples = task.examples["train"]
    store = tokenize_examples(task, examples, tiny_tokenizer, prompt, tokens=TOKENS, answer_tokens=ANSWERS, seed=3)
    begun = render(tiny_tokenizer, "", examples[0].input, prompt)
    assert text(store, store.variants[0][0], tiny_tokenizer) == f"{begun} {examples[0].outputs[0]}</s>"


def test_descriptions_stand_in_prompts_where_wanted(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    store = documents(make_task(), tiny_tokenizer, in_prompt=True)
    texts = [text(store, d, tiny_tokenizer) for d in range(len(store.start))]
    assert all(t.count(" way.\n\nsay") == 1 for t in texts)
    assert {t.split(" way.")[0].removeprefix("<s><user>") for t in texts} == {"First", "Second"}
    nameless = Task("nameless", (), make_task().examples)
    assert len(documents(nameless, tiny_tokenizer).variants) == 11
    with pytest.raises(DataError, match="nameless has no description"):
        documents(nameless, tiny_tokenizer, in_prompt=True)


def test_a_stream_gives_each_example_once_before_any_again(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    store = documents(make_task(), tiny_tokenizer)
    stream = Stream("count", store, tokens=TOKENS, answer_tokens=ANSWERS, seed=1)
    example = {d: i for i, variants in enumerate(store.variants) for d in variants}
    rows = [stream.row() for _ in range(30)]
    flat = [example[d] for row in rows for d in row]
    epochs = [flat[start : start + 11] for start in range(0, len(flat) - 11, 11)]
    assert len(epochs) > 3
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)  # in another order each time
    # Its second right answer comes in the second epoch.
    assert {d for row in rows for d in row} == set(example)
    for row in rows:
        assert row
        assert sum(store.prompt[d] + store.answer[d] - 1 for d in row) <= TOKENS
        assert sum(store.answer[d] for d in row) <= ANSWERS
    again = Stream("count", store, tokens=TOKENS, answer_tokens=ANSWERS, seed=1)
    assert [again.row() for _ in range(30)] == rows
    halfway = Stream("count", store, tokens=TOKENS, answer_tokens=ANSWERS, seed=1)
    for _ in range(9):
        halfway.row()
    later = Stream("count", store, tokens=TOKENS, answer_tokens=ANSWERS, seed=1)
    later.seek(halfway.epoch, halfway.place)
    assert [later.row() for _ in range(21)] == rows[9:]
    for changed in (("other", 1), ("count", 2)):
        other = Stream(changed[0], store, tokens=TOKENS, answer_tokens=ANSWERS, seed=changed[1])
        assert [other.row() for _ in range(30)] != rows


def test_a_task_smaller_than_a_row_is_not_repeated_in_it(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    store = documents(make_task(number=2), tiny_tokenizer, tokens=500, answer_tokens=200)
    stream = Stream("count", store, tokens=500, answer_tokens=200, seed=0)
    assert [len(stream.row()) for _ in range(3)] == [3, 3, 3]  # the long one fits here


def test_fixed_rows_hold_everything_once_or_a_fair_part(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    store = documents(make_task(number=40), tiny_tokenizer)
    rows = fixed_rows(store, tokens=TOKENS, answer_tokens=ANSWERS)
    assert sorted(d for row in rows for d in row) == [variants[0] for variants in store.variants]
    few = fixed_rows(store, tokens=TOKENS, answer_tokens=ANSWERS, limit=4)
    assert 2 <= len(few) <= 4
    lengths = [int(store.prompt[d]) for row in few for d in row]
    assert lengths[0] == store.prompt.min() and lengths[-1] == store.prompt.max()
    assert len(fixed_rows(store, tokens=TOKENS, answer_tokens=ANSWERS, limit=1)) == 1


def test_a_gap_keeps_documents_apart(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    store = documents(make_task(number=40), tiny_tokenizer, gap=5)
    stream = Stream("count", store, tokens=TOKENS, answer_tokens=60, seed=1)
    listed = [stream.row() for _ in range(8)] + fixed_rows(store, tokens=TOKENS, answer_tokens=60)
    rows = pack([(store, found) for found in listed], tokens=TOKENS, answer_tokens=60)
    assert max(map(len, listed)) > 2
    for row, found in zip(rows.documents, listed, strict=True):
        places = [torch.where(row == n)[0] for n in range(len(found))]
        lengths = [int(store.prompt[d] + store.answer[d]) - 1 for d in found]
        assert [len(x) for x in places] == lengths
        assert [int(x[0]) for x in places] == [sum(lengths[:n]) + 5 * n for n in range(len(found))]


def test_packed_rows_say_what_the_documents_say(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """Tokens, positions, labels and weights, read back; empty rows stay empty."""
    one, other = (documents(make_task(name), tiny_tokenizer) for name in ("one", "two"))
    listed: list[tuple[Documents, list[int]]] = [(one, [3, 0]), (other, []), (other, [5]), (one, [1, 2])]
    rows = pack(listed, tokens=TOKENS, answer_tokens=30, groups=[0, 1, 2, 0])
    assert [tuple(x.shape) for x in rows] == [(4, TOKENS)] * 3 + [(4, 30)] * 4
    for r, (store, found) in enumerate(listed):
        assert int(rows.documents[r].max()) == len(found) - 1
        for n, document in enumerate(found):
            own = rows.documents[r] == n
            whole = text(store, document, tiny_tokenizer)
            assert tiny_tokenizer.decode(rows.tokens[r][own]) + "</s>" == whole
            assert rows.positions[r][own].tolist() == list(range(int(own.sum())))
            labelled = rows.label_documents[r] == n
            labels, places = rows.labels[r][labelled], rows.label_positions[r][labelled]
            assert whole.endswith(tiny_tokenizer.decode(labels)) and len(labels) == store.answer[document]
            assert torch.equal(rows.tokens[r][places[1:]], labels[:-1])  # a label is the next position's token
            assert rows.tokens[r][places[0]] == tiny_tokenizer.convert_tokens_to_ids(">")  # the prompt's last
            assert rows.documents[r][places].tolist() == [n] * len(labels)
    for group, number in ((0, 4), (2, 1)):
        members = [r for r, g in enumerate((0, 1, 2, 0)) if g == group]
        assert rows.weights[members].sum().item() == pytest.approx(1)
        for r in members:
            for n in range(len(listed[r][1])):
                own = rows.weights[r][rows.label_documents[r] == n]
                assert own.sum().item() == pytest.approx(1 / number) and own.max() == own.min()
    assert not rows.weights[rows.label_documents < 0].any()
    empty = pack([(one, [])], tokens=TOKENS, answer_tokens=5, groups=[0])
    assert not empty.weights.any() and (empty.documents == -1).all()


def test_document_scores(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    store = documents(make_task(), make_tokenizer())
    rows = pack([(store, [0, 1]), (store, [2])], tokens=TOKENS, answer_tokens=30, groups=[0, 1])
    losses = torch.rand(2, 30)
    hits = torch.ones(2, 30, dtype=torch.bool)
    hits[0, int((rows.label_documents[0] == 0).sum())] = False  # the first label of the second document
    loss, right, there = document_scores(losses, hits, rows)
    assert there.nonzero().tolist() == [[0, 0], [0, 1], [1, 0]]
    assert right.nonzero().tolist() == [[0, 0], [1, 0]]
    for r, n in ((0, 0), (0, 1), (1, 0)):
        assert loss[r, n].item() == pytest.approx(losses[r][rows.label_documents[r] == n].mean().item())


def test_without_an_end_of_sequence_answers_could_not_end() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        documents(make_task(), tokenizer)
