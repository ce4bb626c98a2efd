"""Batches: a function of seed and step, whose rows hold their own task, description, examples and answers."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_tokenizer, random_lora
from sft_helpers import documents_of, within
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from t2l.apply import apply_adapters, hooked
from t2l.config import LoraConfig
from t2l.errors import DataError
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec
from t2l.tasks import Example
from t2l.text_to_lora import LoraAdapter
from t2l.train.augment import (
    AnswerCheck,
    AnswerChoice,
    LabelRemap,
)
from t2l.train.batches import PATTERN, Batch, Batches, Pool
from t2l.train.loss import answer_losses
from t2l.train.options import LAYOUTS, ListedChoice, Listing
from t2l.train.packing import SHARED


def make_batches(tokenizer: PreTrainedTokenizerBase, **changes: Any) -> Batches:
    """Three tasks, nine descriptions; examples of different lengths, one too long for any row."""
    texts = [f"Description {n}." for n in range(9)]
    pools = [
        Pool(
            f"task{t}",
            (
                *(Example(f"{t}-{n}", f"in {'x' * n}", (f"out {t}", f"or {n}")) for n in range(7)),
                Example(f"{t}-long", "y" * 300, ("never",)),
            ),
            tuple(range(3 * t, 3 * t + 3)),
        )
        for t in range(3)
    ]
    values = {"rows": 4, "tokens": 120, "answer_tokens": 24, "in_prompt": 0.5, "seed": 5}
    return Batches(pools, texts, tokenizer, **(values | changes))


def test_packed_rows_lose_what_their_documents_lose_alone(
    tiny_config: Any, tiny_base: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    """No token sees another document, positions begin anew, labels are the next tokens, each row has its adapter."""
    batch = make_batches(tiny_tokenizer)[0]
    assert (batch.rows.documents == SHARED).any(1).all()
    spec = AdapterSpec.from_config(tiny_config, "tiny", LoraConfig(r=4, lora_alpha=8))
    adapters = [LoraAdapter(random_lora(spec, seed), spec, "", {}) for seed in range(4)]
    stacked = LoraTensors.stack([x.lora for x in adapters])
    with hooked(tiny_base, spec) as slots, torch.no_grad():
        losses, correct = answer_losses(tiny_base, slots)(batch.rows, stacked)
    seen = 0
    for row in range(4):
        with apply_adapters(tiny_base, adapters[row]), torch.no_grad():
            for document in range(int(batch.rows.documents[row].max()) + 1):
                tokens = batch.rows.tokens[row][within(batch, row, document)]
                # Rotary positions are relative, so the losses alone would not tell.
                assert batch.rows.positions[row][within(batch, row, document)].tolist() == list(range(len(tokens)))
                own = batch.rows.label_documents[row] == document
                labels = batch.rows.labels[row][own]
                assert torch.equal(labels[:-1], tokens[1 - len(labels) :])
                assert labels[-1] == tiny_tokenizer.eos_token_id
                logits = tiny_base(tokens[None]).logits[0, -len(labels) :]
                alone = F.cross_entropy(logits, labels, reduction="none")
                assert (losses[row][own] - alone).abs().max() <= 1e-4
                assert torch.equal(correct[row][own], logits.argmax(-1) == labels)
                seen += 1
    assert seen >= 8


def test_what_prompts_begin_with_stands_once(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """So that more documents fit into a row; each is still a whole prompt with an answer of its own task."""
    shared, apart = (make_batches(tiny_tokenizer, in_prompt=1.0, share_beginnings=share) for share in (True, False))
    counts = []
    for batches in (shared, apart):
        count = 0
        for step in range(4):
            batch = batches[step]
            for row in range(4):
                pool = batches.pools[batches.task_of_row(step, row)]
                text = batches.texts[batch.read[row]]
                known = {e.input.strip(): e.outputs for e in pool.examples}
                for n, document in enumerate(documents_of(batch, tiny_tokenizer, row)):
                    start, question = document.split("<assistant>")[0].removesuffix("\n").split("\n\n")
                    assert start == f"<s><user>{text}"
                    own = batch.rows.label_documents[row] == n
                    answer = tiny_tokenizer.decode(batch.rows.labels[row][own]).removesuffix(tiny_tokenizer.eos_token)
                    assert answer in known[question]
                    count += 1
            assert bool((batch.rows.documents == SHARED).any()) == (batches is shared)
        counts.append(count)
    assert counts[0] > 1.2 * counts[1]


def test_weights_of_a_batch(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """Rows weigh the same, a row's documents the same, a document's tokens the same; padding nothing."""
    batch = make_batches(tiny_tokenizer)[1]
    assert batch.rows.weights.sum().item() == pytest.approx(1)
    for row in range(4):
        documents = int(batch.rows.label_documents[row].max()) + 1
        assert documents == int(batch.rows.documents[row].max()) + 1 > 1
        for document in range(documents):
            own = batch.rows.weights[row][batch.rows.label_documents[row] == document]
            assert own.sum().item() == pytest.approx(1 / 4 / documents)
            assert own.max() == own.min()
    assert not batch.rows.weights[batch.rows.label_documents < 0].any()


def equal(one: Batch, other: Batch) -> bool:
    pairs = zip((*one.rows, *one[1:]), (*other.rows, *other[1:]), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_batches_are_a_function_of_seed_and_step(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """Not of what was asked before, nor of who builds them."""
    batches = make_batches(tiny_tokenizer)
    expected = [batches[step] for step in range(4)]
    fresh = make_batches(tiny_tokenizer)
    for step in (3, 0, 2, 1):
        assert equal(fresh[step], expected[step])
    random_state = torch.get_rng_state()
    for workers in (0, 2):
        found = list(make_batches(tiny_tokenizer).loader(range(1, 4), workers=workers, pin=False))
        assert len(found) == 3
        for step, batch in enumerate(found, start=1):
            assert equal(batch, expected[step])
    assert torch.equal(torch.get_rng_state(), random_state), "a resumed run would draw other dropout"
    other = make_batches(tiny_tokenizer, seed=6)[0]
    assert not torch.equal(other.rows.tokens, expected[0].rows.tokens)
    assert not torch.equal(expected[0].rows.tokens, expected[1].rows.tokens)


def test_each_task_comes_once_before_any_again(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    batches = make_batches(tiny_tokenizer)
    order = [batches.task_of_row(step, row) for step in range(6) for row in range(4)]
    assert all(sorted(order[start : start + 3]) == [0, 1, 2] for start in range(0, 24, 3))
    assert len({tuple(order[start : start + 3]) for start in range(0, 24, 3)}) > 1


@pytest.mark.parametrize("in_prompt", [0.0, 1.0])
def test_rows_hold_their_task_and_description(in_prompt: float, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """The adapter's description belongs to the row's task, and stands in the prompt exactly where it is to."""
    batches = make_batches(tiny_tokenizer, in_prompt=in_prompt)
    skipped = 0
    for step in range(4):
        batch = batches[step]
        skipped += int(batch.skipped)
        for row in range(4):
            task, text = batches.task_of_row(step, row), batches.texts[batch.read[row]]
            assert int(batch.read[row]) // 3 == task
            for document in documents_of(batch, tiny_tokenizer, row):
                assert document.startswith("<s><user>")
                assert document.count("Description") == int(in_prompt)
                assert (text in document) == bool(in_prompt)
                answer = document.split("<assistant>")[1]
                assert answer == f"out {task}" or answer.startswith("or ")
    assert skipped > 0  # the example that fits into no row is counted, not cut


@pytest.mark.parametrize("reads", ["description", "input"])
def test_negatives_are_always_of_another_task(reads: str, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """Also where tasks repeat in a batch and share a description."""
    texts = [f"Description {n}." for n in range(7)]
    pools = [
        Pool(
            f"task{t}",
            tuple(Example(f"{t}-{n}", f"in {t} {n}", ("out",)) for n in range(3)),
            (0, 1 + 2 * t, 2 + 2 * t),  # all share the first
            () if reads == "description" else tuple(range(3 * t, 3 * t + 3)),
        )
        for t in range(3)
    ]
    values = {"rows": 8, "tokens": 120, "answer_tokens": 24, "in_prompt": 0.5, "seed": 5}
    batches = Batches(pools, texts, tiny_tokenizer, **values, one_example=reads == "input")
    seen = set()
    for step in range(20):
        batch = batches[step]
        for row in range(8):
            own = set(pools[batches.task_of_row(step, row)].readable)
            assert int(batch.read[row]) in own
            assert int(batch.negatives[row]) not in own
            seen.add(int(batch.negatives[row]))
            if reads == "input":  # one document, and it is the one that is read
                assert batch.rows.documents[row].max() == 0
                task, n = divmod(int(batch.read[row]), 3)
                assert f"in {task} {n}<assistant>" in documents_of(batch, tiny_tokenizer, row)[0].replace("\n", "")
    assert len(seen) >= 6
    assert batches.has_negatives
    assert not Batches(pools[:1], texts, tiny_tokenizer, **values).has_negatives
    twins = [replace(pool, descriptions=(0,), reads=()) for pool in pools]
    assert not Batches(twins, texts, tiny_tokenizer, **values).has_negatives


def examples_of(*answers: str, each: int = 3) -> tuple[Example, ...]:
    return tuple(Example(f"{n}", f"input {n}", (answer,)) for n, answer in enumerate(answers * each))


def test_rows_of_a_variant_answer_and_say_its_words() -> None:
    """The share of rows, their answers, what is read, and that all else is as without variants."""
    tokenizer = make_tokenizer()
    examples = examples_of("yes", "no")
    texts = ["Say yes or no.", "Say up for yes and down for no.", "Do else."]
    own = Pool("a", examples, (0,))
    with_variant = replace(
        own, variants=(replace(own, descriptions=(1,), augmentation=LabelRemap({"yes": "up", "no": "down"})),)
    )
    other = Pool("b", tuple(Example(f"{n}", f"else {n}", ("so",)) for n in range(9)), (2,))

    def batches(pool: Pool, share: float = 0.0, **changes: Any) -> Batches:
        pool = replace(pool, variant_prob=share)
        settings: dict[str, Any] = {"rows": 8, "tokens": 64, "answer_tokens": 24, "in_prompt": 0.5, "seed": 3}
        return Batches([pool, other], texts, tokenizer, **settings | changes)

    read: list[int] = []
    for step in range(6):
        batch = batches(with_variant, 0.5)[step]
        plain = batches(own)[step]
        for row in range(8):
            said = tokenizer.decode(batch.rows.labels[row][batch.rows.label_documents[row] >= 0])
            described = int(batch.read[row])
            read.append(described)
            assert ("up" in said or "down" in said) == (described == 1)
            assert ("so" in said) == (described == 2)
            shown = tokenizer.decode(batch.rows.tokens[row])
            assert "Say yes" not in shown or described == 0
            assert "Say up" not in shown or described == 1
            if described != 1:
                assert np.array_equal(batch.rows.tokens[row], plain.rows.tokens[row])
    share = read.count(1) / (read.count(0) + read.count(1))
    assert 0.25 < share < 0.75
    hidden = [batches(with_variant, 1.0, augment_unsaid=False, in_prompt=0.0)[step] for step in range(2)]
    assert not any((batch.read == 1).any() for batch in hidden)
    shown = [batches(with_variant, 1.0, augment_unsaid=False, in_prompt=1.0)[step] for step in range(2)]
    assert not any((batch.read == 0).any() for batch in shown)


def test_the_negative_is_often_of_the_same_task_with_other_answers() -> None:
    tokenizer = make_tokenizer()
    own = Pool("a", examples_of("yes", "no"), (0,))
    pool = replace(
        own,
        variant_prob=1.0,
        variants=(
            replace(own, descriptions=(1,), augmentation=LabelRemap({"yes": "up", "no": "down"})),
            replace(own, descriptions=(2,), augmentation=LabelRemap({"yes": "up", "no": "down"})),
            replace(own, descriptions=(3,), augmentation=LabelRemap({"yes": "left", "no": "right"})),
        ),
    )
    other = Pool("b", examples_of("so", "not"), (4,))
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
    pairs = [(int(mine), int(theirs)) for b in found for mine, theirs in zip(b.read, b.negatives, strict=True)]
    assert {pair for pair in pairs if pair[0] in (1, 2)} == {(1, 3), (2, 3), (1, 4), (2, 4)}
    assert {pair for pair in pairs if pair[0] == 3} == {(3, 1), (3, 2), (3, 4)}
    near = sum(theirs != 4 for mine, theirs in pairs if mine in (1, 2, 3))
    assert 0.25 < near / sum(mine in (1, 2, 3) for mine, _ in pairs) < 0.75


def test_some_rows_read_random_words_with_the_right_prompt_and_answers() -> None:
    tokenizer = make_tokenizer()
    pools = [Pool("a", examples_of("yes", "no"), (0,)), Pool("b", examples_of("so", "not"), (1,))]
    texts = ["Say yes or no.", "Say so or not.", "Xu qer.", "Omm ban."]
    settings: dict[str, Any] = {"rows": 16, "tokens": 64, "answer_tokens": 24, "in_prompt": 1.0, "seed": 0}
    plain = Batches(pools, texts, tokenizer, **settings)[0]
    batch = Batches(pools, texts, tokenizer, **settings, random_texts=(2, 3), random_text_prob=0.5)[0]
    assert all(torch.equal(x, y) for x, y in zip(batch.rows, plain.rows, strict=True))
    assert torch.equal(batch.negatives, plain.negatives)
    changed = batch.read != plain.read
    assert 3 < int(changed.sum()) < 13
    assert set(batch.read[changed].tolist()) == {2, 3}


FEW = examples_of("yes", "no", each=9)
SAID = ["Say yes or no.", "Is it right? Yes or No.", "Which? A or B.", "Do else.", "Say up for yes, down for no."]
CHECK = AnswerCheck("Yes", "No", "{input}\nProposed: {answer}", FEW)
CHOOSE = AnswerChoice(("A", "B"), "\n", "{mark}. {answer}", "\n", FEW)
OWN = Pool("few", FEW, (0,))
DERIVED = (replace(OWN, descriptions=(1,), augmentation=CHECK), replace(OWN, descriptions=(2,), augmentation=CHOOSE))
RELABELLED = (replace(OWN, descriptions=(4,), augmentation=LabelRemap({"yes": "up", "no": "down"})),)
OTHER = Pool("b", tuple(Example(f"{n}", f"else {n}", ("so",)) for n in range(9)), (3,))


def batches(pool: Pool, **changes: Any) -> Batches:
    settings: dict[str, Any] = {"rows": 8, "tokens": 200, "answer_tokens": 24, "in_prompt": 0.5, "seed": 3}
    return Batches([pool, OTHER], SAID, make_tokenizer(), **settings | changes)


def documents(batch: Batch, row: int) -> list[str]:
    """The texts of a row's documents, with the token that ends their answers."""
    return [f"{text}</s>" for text in documents_of(batch, make_tokenizer(), row)]


def test_rows_of_an_auxiliary_task_pose_its_input_and_answer_under_its_description() -> None:
    read: list[int] = []
    for step in range(6):
        batch = batches(replace(OWN, auxiliary=DERIVED, auxiliary_prob=0.6))[step]
        for row in range(8):
            described = int(batch.read[row])
            read.append(described)
            for text in documents(batch, row):
                assert ("Proposed: " in text) == (described == 1) and ("A. " in text) == (described == 2)
                said = [n for n, description in enumerate(SAID) if description in text]
                assert said in ([], [described])
                if described == 1:
                    n, proposed, reply = re.search(r"input (\d+)\nProposed: (\w+)\n<assistant>(\w+)</s>", text).groups()  # type: ignore[union-attr]
                    assert (FEW[int(n)].outputs == (proposed,)) == (reply == "Yes")
                if described == 2:
                    n, *options, reply = re.search(  # type: ignore[union-attr]
                        r"input (\d+)\nA. (\w+)\nB. (\w+)\n<assistant>(\w)</s>", text
                    ).groups()
                    assert FEW[int(n)].outputs == (options["AB".index(reply)],)
    assert 0.4 < (read.count(1) + read.count(2)) / (len(read) - read.count(3)) < 0.8
    assert read.count(0) and read.count(1) and read.count(2)


def test_rows_without_an_auxiliary_task_are_remapped_with_their_own_share() -> None:
    pool = replace(OWN, auxiliary=DERIVED, auxiliary_prob=0.5, variants=RELABELLED, variant_prob=1.0)
    read = [int(x) for step in range(6) for x in batches(pool)[step].read]
    assert not read.count(0)
    assert 0.3 < read.count(4) / (len(read) - read.count(3)) < 0.7


def test_where_nothing_reads_a_description_only_prompts_that_show_it_are_augmented() -> None:
    pool = replace(OWN, auxiliary=DERIVED, auxiliary_prob=1.0)
    batch = batches(pool, augment_unsaid=False, rows=32)[0]
    kinds = set()
    for row in range(32):
        described, first = int(batch.read[row]), documents(batch, row)[0]
        kinds.add((described in (1, 2), SAID[described] in first))
        if described != 3:
            assert (described in (1, 2)) == (SAID[described] in first)
    assert kinds >= {(True, True), (False, False)}


def test_the_negative_is_often_of_the_same_task_and_asks_something_else() -> None:
    twin = replace(DERIVED[0], descriptions=(4,), augmentation=replace(CHECK, layout="{input} {answer}"))
    found = [batches(replace(OWN, auxiliary=(*DERIVED, twin), auxiliary_prob=1.0), rows=16)[step] for step in range(8)]
    pairs = [(int(mine), int(theirs)) for b in found for mine, theirs in zip(b.read, b.negatives, strict=True)]
    pairs = [pair for pair in pairs if pair[0] != 3]
    assert set(pairs) == {(1, 0), (1, 2), (1, 3), (4, 0), (4, 2), (4, 3), (2, 0), (2, 1), (2, 3), (2, 4)}
    assert 0.35 < np.mean([theirs != 3 for _, theirs in pairs]) < 0.65


# ------------------------------------------------------------------------- sources, options, and texts that say little


def test_sources_come_as_their_weights_say_and_every_task_of_a_source_once_before_any_again() -> None:
    pools = [replace(OTHER, name=f"{n}", source=int(n >= 5)) for n in range(8)]
    settings: dict[str, Any] = {"rows": 10, "tokens": 200, "answer_tokens": 24, "in_prompt": 0.5, "seed": 3}
    made = Batches(pools, SAID, make_tokenizer(), **settings, source_weights=(0.7, 0.3))
    tasks = [made.task_of_row(step, row) for step in range(2 * PATTERN // 10) for row in range(10)]
    for start in (0, PATTERN):
        assert sum(task >= 5 for task in tasks[start : start + PATTERN]) == 0.3 * PATTERN
    for source in (range(5), range(5, 8)):
        own = [task for task in tasks if task in source]
        for start in range(0, len(own) - len(source), len(source)):
            assert sorted(own[start : start + len(source)]) == list(source)


def test_a_source_without_a_task_is_an_error() -> None:
    with pytest.raises(DataError, match="Source number 1 of 2 has no task"):
        batches(OWN, source_weights=(0.5, 0.5))


def test_options_are_listed_in_all_documents_of_a_row_or_in_none() -> None:
    pool, seen = replace(OWN, options=("yes", "no")), set()
    for step in range(6):
        batch = batches(pool, option_placement_prob=0.5, in_prompt=0.0)[step]
        for row in range(8):
            inputs = [text.rpartition("<assistant>")[0] for text in documents(batch, row)]
            listed = {"yes" in text and "no" in text for text in inputs}
            assert len(listed) == 1
            if int(batch.read[row]) == 3:
                assert listed == {False}, "a task without few answers has no options"
            else:
                seen |= listed
    assert seen == {True, False}


def test_rows_whose_text_says_nothing_ask_for_what_the_input_or_the_prompt_says() -> None:
    """An adapter that is written from a terse text cannot know other words for the answers."""
    contained = replace(
        OWN, descriptions=(0,), augmentation=ListedChoice(3, Listing(LAYOUTS[0], first=False), FEW), self_contained=True
    )
    pool = replace(OWN, variants=RELABELLED, variant_prob=1.0, auxiliary=(contained,), auxiliary_prob=0.3, terse=(2,))
    told = {False: 0, True: 0}
    listed = 0
    for step in range(20):
        batch = batches(pool, terse_prob=0.3)[step]
        for row in range(8):
            if int(batch.read[row]) == 3:
                continue
            kind = bool(batch.told[row])
            told[kind] += 1
            assert (int(batch.read[row]) == 2) is not kind
            for text in documents(batch, row):
                prompt, _, answer = text.rpartition("<assistant>")
                listed += "Options:" in prompt
                if answer in ("up</s>", "down</s>"):
                    assert kind
                if not kind:
                    assert SAID[4] not in prompt
                    assert (SAID[2] in prompt) == bool(batch.in_prompt[row])
    assert min(told.values()) > 10
    assert listed


def test_without_the_new_shares_nothing_is_drawn_otherwise() -> None:
    plain = batches(replace(OWN, variants=RELABELLED, variant_prob=0.5))[1]
    same = batches(replace(OWN, variants=RELABELLED, variant_prob=0.5, options=("yes", "no"), terse=(2,)))[1]
    assert all(torch.equal(x, y) for x, y in zip(plain.rows, same.rows, strict=True))
    assert torch.equal(plain.read, same.read)
    assert plain.told.all()
