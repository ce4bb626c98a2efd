"""Training: it learns from descriptions, resumes bit for bit, and its packed batches are what they claim to be."""

import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make_base, make_config, make_hypernet, make_tokenizer, random_lora, randomise_head
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from t2l import TextToLora
from t2l.apply import applied, compiled, live
from t2l.config import EncoderConfig, HypernetConfig, LoraConfig, PromptConfig, build, to_plain
from t2l.encoder import Encoded, TokenEncoder, load_encoder
from t2l.errors import CheckpointError, ConfigError, DataError, TrainingError
from t2l.generate import Adapter
from t2l.hypernet import Hypernet, VectorQuantizer
from t2l.lora import LoraTensors
from t2l.prompt import render, token_ids
from t2l.spec import AdapterSpec
from t2l.tasks import Example, Task
from t2l.train import data as train_data
from t2l.train import sft
from t2l.train.batches import DROPPED, SHARED, Batch, Batches, Pool
from t2l.train.data import DescriptionBank, RunData, prepare_data
from t2l.train.settings import DataConfig, SftConfig, TrainConfig
from t2l.train.sft import (
    Trainer,
    _checkpoint_layers,
    answer_losses,
    make_optimizer,
    neftune_noise,
    require_finite,
    require_learning,
    train,
)
from t2l.train.state import read_progress

VERBS = ("Say", "Answer", "Reply", "Write", "Always", "Just")
ANSWERS = {answer: tuple(f"{verb} {answer}." for verb in VERBS) for answer in ("yes", "no")}


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks with the same inputs: only the description says which answer is right."""
    rows = [
        {"task": name, "description": list(texts), "input": f"Is it {n}?", "output": name, "split": split}
        for name, texts in ANSWERS.items()
        for split, numbers in (("train", range(30, 90)), ("val", range(20, 26)))
        for n in numbers
    ]
    path = tmp_path_factory.mktemp("tasks") / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def config(base_folder: Path, jsonl: Path) -> SftConfig:
    return SftConfig(
        base=str(base_folder),
        lora=LoraConfig(rank=4, alpha=8),
        encoder=EncoderConfig(kind="tokens", model="base", layers=(1, 2), max_tokens=32),
        hypernet=HypernetConfig(width=24, head_size=16, token_blocks=1, attention_heads=4),
        data=DataConfig(tasks=str(jsonl), held_out_descriptions=1),
        train=TrainConfig(
            steps=6,
            tasks_per_step=4,
            sequence_tokens=96,
            answer_tokens=12,
            description_in_prompt=0.25,
            learning_rate=5e-3,
            offset_learning_rate=5e-3,
            log_every=1,
            evaluate_every=1000,
            save_every=3,
            tensorboard=False,
        ),
    )


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Drawing takes longer than these runs do."""
    if not request.node.name.startswith(("test_run_is_seen", "test_missing_companions")):
        monkeypatch.setattr(sft, "write_report", lambda run: run)


def quiet(_: str) -> None:
    pass


def shorter(config: SftConfig, **changes: Any) -> SftConfig:
    return replace(config, train=replace(config.train, **changes))


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# -------------------------------------------------------------------------------------------------- learning


def test_learns_what_only_the_description_says(config: SftConfig, tmp_path: Path) -> None:
    """Without reading the description the loss cannot fall below one coin toss a document; the answers must differ."""
    steps = 200
    # Two rows are always the two tasks, so the other row's description is the other task's.
    learning = shorter(config, steps=steps, tasks_per_step=2, description_in_prompt=0.0, log_every=20, save_every=1000)
    learning = replace(
        learning,
        encoder=replace(config.encoder, layers=(3,)),
        hypernet=replace(config.hypernet, dropout=0.0, token_dropout=0.0),
    )
    folder = train(learning, tmp_path / "run", device="cpu", log=quiet)
    rows = metrics(tmp_path / "run")
    losses = [row["loss"] for row in rows if "loss" in row]
    judged = rows[-1]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 3
    # ln 2 on the first of four or three answer tokens, nothing on the others: the best a blind model can do.
    assert losses[-1] < 0.8 * math.log(2) * (1 / 4 + 1 / 3) / 2
    # New inputs, and descriptions that were held out.
    assert judged["seen/adapter/margin"] > 0.5
    assert judged["seen/adapter/exact_match"] > 0.9 > 0.1 > judged["seen/adapter/wrong_exact_match"]

    t2l = TextToLora.from_pretrained(str(folder))
    base = LlamaForCausalLM.from_pretrained(config.base)
    prompt = torch.tensor(token_ids(make_tokenizer(), [render(make_tokenizer(), "", "Is it 21?", PromptConfig())] * 2))
    with applied(base, t2l.generate(["Say yes.", "Say no."])), torch.no_grad():
        first = base(prompt).logits[:, -1].argmax(-1)
    assert make_tokenizer().convert_ids_to_tokens(first) == ["y", "n"]


def test_multi_task_lora_trains_without_descriptions(config: SftConfig, tmp_path: Path) -> None:
    blind = replace(config, hypernet=replace(config.hypernet, variant="none"))
    folder = train(blind, tmp_path / "run", device="cpu", log=quiet)
    t2l = TextToLora.from_pretrained(str(folder))
    one, other = t2l.generate(["Say yes.", "Say no."])
    assert all(torch.equal(x, y) for x, y in zip(one.lora.b, other.lora.b, strict=True))
    assert all(b.abs().max() > 0 for b in one.lora.b)


# -------------------------------------------------------------------------------------------------- resuming


@pytest.fixture(scope="module")
def whole_run(config: SftConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps in one go."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(config, run, device="cpu", log=quiet)
    return run


class Interrupted(Exception):
    """Stands in for a crash."""


def interrupt_at(step: int) -> Callable[[str], None]:
    def log(line: str) -> None:
        if line.startswith(f"step {step} "):
            raise Interrupted

    return log


def test_standardized_run_keeps_what_it_measured(config: SftConfig, tmp_path: Path) -> None:
    """By the tokens of the texts that are trained on; saved, resumed, and no start for a run that does not."""
    standardized = replace(config, hypernet=replace(config.hypernet, standardize=True, centre=True))
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(standardized, run, device="cpu", log=interrupt_at(4))
    folder = train(standardized, run, resume=True, device="cpu", log=quiet)
    t2l = TextToLora.from_pretrained(str(folder))
    encoded = t2l.encoder.encode([text for texts in ANSWERS.values() for text in texts[:-1]])
    rows = encoded.states[encoded.mask].bfloat16().float()
    assert t2l.hypernet.standard is not None
    assert torch.allclose(t2l.hypernet.standard.mean_E, rows.mean(0), atol=2e-3)
    assert torch.allclose(1 / t2l.hypernet.standard.scale_E, rows.std(0, correction=0), rtol=2e-3, atol=2e-3)
    other = shorter(config, start_from=str(folder))
    with pytest.raises(
        ConfigError, match=r"hypernet\.centre is True, here False.*hypernet\.standardize is True, here False"
    ):
        train(other, tmp_path / "other", device="cpu", log=quiet)
    on = shorter(standardized, start_from=str(folder), steps=1)
    again = TextToLora.from_pretrained(str(train(on, tmp_path / "on", device="cpu", log=quiet)))
    assert again.hypernet.standard is not None
    assert torch.equal(again.hypernet.standard.mean_E, t2l.hypernet.standard.mean_E)


@pytest.mark.parametrize("noise", [b"", b"x"], ids=["same random state", "other random state"])
def test_resumed_run_is_the_same_run(noise: bytes, config: SftConfig, whole_run: Path, tmp_path: Path) -> None:
    """Six steps, or three, a crash in the fourth and three more: weights, optimiser and random state bit for bit."""
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(config, run, device="cpu", log=interrupt_at(4))
    assert read_progress(run).step == 3
    assert not (run / "checkpoint").exists()
    torch.rand(len(noise))
    train(config, run, resume=True, device="cpu", log=quiet)
    one, other = (load_file(folder / "state.safetensors") for folder in (whole_run, run))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    name = "checkpoint/hypernet.safetensors"
    assert (whole_run / name).read_bytes() == (run / name).read_bytes()
    last = [[row["loss"] for row in metrics(r) if row.get("step") == 6 and "loss" in row] for r in (whole_run, run)]
    assert last[0] == last[1]


def test_runs_of_one_seed_are_equal_and_of_another_differ(config: SftConfig, whole_run: Path, tmp_path: Path) -> None:
    for seed, same in ((config.seed, True), (config.seed + 1, False)):
        run = tmp_path / str(seed)
        train(replace(config, seed=seed), run, device="cpu", log=quiet)
        name = "checkpoint/hypernet.safetensors"
        assert ((whole_run / name).read_bytes() == (run / name).read_bytes()) is same


def test_resumed_run_with_a_teacher_is_the_same_run(config: SftConfig, tmp_path: Path) -> None:
    taught = shorter(config, distill=1.0, teacher_tokens=250, steps=4, save_every=2)
    train(taught, tmp_path / "whole", device="cpu", log=quiet)
    with pytest.raises(Interrupted):
        train(taught, tmp_path / "parts", device="cpu", log=interrupt_at(3))
    train(taught, tmp_path / "parts", resume=True, device="cpu", log=quiet)
    one, other = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "parts"))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert all(0 < row["taught"] < 1 for row in metrics(tmp_path / "whole") if "loss" in row)


def test_time_budget_stops_saves_and_can_go_on(config: SftConfig, whole_run: Path, tmp_path: Path) -> None:
    """With no time at all one step is done, and what follows after resuming is the uninterrupted run."""
    run = tmp_path / "run"
    folder = train(config, run, max_minutes=0, device="cpu", log=quiet)
    assert read_progress(run).step == 1
    training = TextToLora.from_pretrained(str(folder)).config.training
    assert (training["steps"], training["planned_steps"], training["seed"]) == (1, 6, 0)
    train(config, run, resume=True, device="cpu", log=quiet)
    name = "checkpoint/hypernet.safetensors"
    assert (whole_run / name).read_bytes() == (run / name).read_bytes()


def test_resume_is_refused_where_it_would_be_another_run(config: SftConfig, whole_run: Path, tmp_path: Path) -> None:
    before = (whole_run / "config.json").read_bytes()
    for other, match in (
        (shorter(config, learning_rate=1e-4), r"other settings: train\.learning_rate was 0\.005, is 0\.0001\."),
        (replace(config, seed=3), "seed was 0, is 3"),
        (replace(config, lora=replace(config.lora, rank=2)), r"lora\.rank was 4, is 2"),
    ):
        with pytest.raises(TrainingError, match=match):
            train(other, whole_run, resume=True, device="cpu", log=quiet)
    with pytest.raises(TrainingError, match="is finished: 6 of 6"):
        train(config, whole_run, resume=True, device="cpu", log=quiet)
    with pytest.raises(TrainingError, match="no saved state"):
        train(config, tmp_path / "absent", resume=True, device="cpu", log=quiet)
    with pytest.raises(TrainingError, match="is not empty"):
        train(config, whole_run, device="cpu", log=quiet)
    assert (whole_run / "config.json").read_bytes() == before


def test_settings_are_read_strictly(config: SftConfig) -> None:
    plain = to_plain(config)
    assert build(SftConfig, plain) == config
    plain["train"]["lerning_rate"] = 1.0
    with pytest.raises(ConfigError, match=r"train\.lerning_rate: unknown key; did you mean 'learning_rate'"):
        build(SftConfig, plain)


def test_nothing_fits_is_an_error_not_an_empty_step(config: SftConfig, tmp_path: Path) -> None:
    """Before the first step, with the numbers on both sides; nothing is written."""
    match = r"2 tasks have no example within train\.sequence_tokens \(8\).*: no needs at least 30 tokens, 3 of them"
    with pytest.raises(DataError, match=match):
        train(shorter(config, sequence_tokens=8), tmp_path / "run", device="cpu", log=quiet)
    with pytest.raises(
        DataError, match=r"1 tasks.*train\.answer_tokens \(3\): yes needs at least 31 tokens, 4 of them"
    ):
        train(shorter(config, answer_tokens=3), tmp_path / "run", device="cpu", log=quiet)
    kept = replace(shorter(config, answer_tokens=3), data=replace(config.data, drop_long_tasks=True))
    data = prepare_data(kept, make_tokenizer(), lambda texts: [len(text) for text in texts])
    assert ([pool.name for pool in data.train.pools], data.summary["tasks_too_long"]) == (["no"], ["yes"])
    with pytest.raises(DataError, match=r"No task has a description within encoder\.max_tokens"):
        few = replace(config, encoder=replace(config.encoder, max_tokens=3))
        train(few, tmp_path / "run", device="cpu", log=quiet)
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------- batches


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
    assert (batch.documents == SHARED).any(1).all()
    spec = AdapterSpec.from_config(tiny_config, "tiny", LoraConfig(rank=4, alpha=8))
    adapters = [Adapter(random_lora(spec, seed), spec, "", {}) for seed in range(4)]
    stacked = LoraTensors.stack([x.lora for x in adapters])
    with live(tiny_base, spec) as slots, torch.no_grad():
        losses, hits = answer_losses(tiny_base, slots)(*batch[:5], stacked.a, stacked.b, stacked.scaling)
    seen = 0
    for row in range(4):
        with applied(tiny_base, adapters[row]), torch.no_grad():
            for document in range(int(batch.documents[row].max()) + 1):
                tokens = batch.tokens[row][within(batch, row, document)]
                # Rotary positions are relative, so the losses alone would not tell.
                assert batch.positions[row][within(batch, row, document)].tolist() == list(range(len(tokens)))
                own = batch.label_documents[row] == document
                labels = batch.labels[row][own]
                assert torch.equal(labels[:-1], tokens[1 - len(labels) :])
                assert labels[-1] == tiny_tokenizer.eos_token_id
                logits = tiny_base(tokens[None]).logits[0, -len(labels) :]
                alone = F.cross_entropy(logits, labels, reduction="none")
                assert (losses[row][own] - alone).abs().max() <= 1e-4
                assert torch.equal(hits[row][own], logits.argmax(-1) == labels)
                seen += 1
    assert seen >= 8


def within(batch: Batch, row: int, document: int) -> torch.Tensor:
    """Where a row holds a document, what it begins with in common with the others included."""
    return (batch.documents[row] == document) | (batch.documents[row] == SHARED)


def documents_of(batch: Batch, tokenizer: PreTrainedTokenizerBase, row: int) -> list[str]:
    return [
        tokenizer.decode(batch.tokens[row][within(batch, row, n)]) for n in range(int(batch.documents[row].max()) + 1)
    ]


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
                text = batches.texts[batch.descriptions[row]]
                known = {e.input.strip(): e.outputs for e in pool.examples}
                for n, document in enumerate(documents_of(batch, tiny_tokenizer, row)):
                    start, question = document.split("<assistant>")[0].removesuffix("\n").split("\n\n")
                    assert start == f"<s><user>{text}"
                    own = batch.label_documents[row] == n
                    answer = tiny_tokenizer.decode(batch.labels[row][own]).removesuffix(tiny_tokenizer.eos_token)
                    assert answer in known[question]
                    count += 1
            assert bool((batch.documents == SHARED).any()) == (batches is shared)
        counts.append(count)
    assert counts[0] > 1.2 * counts[1]


def test_noise_on_embeddings_keeps_documents_apart(config: SftConfig) -> None:
    """It is drawn by a document's own length."""
    for alpha in (0.0, 5.0):
        data = prepare_data(shorter(config, neftune_alpha=alpha), make_tokenizer(), lengths)
        assert bool((data.train[0].documents == SHARED).any()) == (alpha == 0.0)


def test_weights_of_a_batch(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """Rows weigh the same, a row's documents the same, a document's tokens the same; padding nothing."""
    batch = make_batches(tiny_tokenizer)[1]
    assert batch.weights.sum().item() == pytest.approx(1)
    for row in range(4):
        documents = int(batch.label_documents[row].max()) + 1
        assert documents == int(batch.documents[row].max()) + 1 > 1
        for document in range(documents):
            own = batch.weights[row][batch.label_documents[row] == document]
            assert own.sum().item() == pytest.approx(1 / 4 / documents)
            assert own.max() == own.min()
    assert not batch.weights[batch.label_documents < 0].any()


def test_batches_are_a_function_of_seed_and_step(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """Not of what was asked before, nor of who builds them."""
    batches = make_batches(tiny_tokenizer)
    expected = [batches[step] for step in range(4)]
    fresh = make_batches(tiny_tokenizer)
    for step in (3, 0, 2, 1):
        assert all(torch.equal(x, y) for x, y in zip(fresh[step], expected[step], strict=True))
    random_state = torch.get_rng_state()
    for workers in (0, 2):
        found = list(make_batches(tiny_tokenizer).loader(range(1, 4), workers=workers, pin=False))
        assert len(found) == 3
        for step, batch in enumerate(found, start=1):
            assert all(torch.equal(x, y) for x, y in zip(batch, expected[step], strict=True))
    assert torch.equal(torch.get_rng_state(), random_state), "a resumed run would draw other dropout"
    other = make_batches(tiny_tokenizer, seed=6)[0]
    assert not torch.equal(other.tokens, expected[0].tokens)
    assert not torch.equal(expected[0].tokens, expected[1].tokens)


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
            task, text = batches.task_of_row(step, row), batches.texts[batch.descriptions[row]]
            assert int(batch.descriptions[row]) // 3 == task
            for document in documents_of(batch, tiny_tokenizer, row):
                assert document.startswith("<s><user>")
                assert document.count("Description") == int(in_prompt)
                assert (text in document) == bool(in_prompt)
                answer = document.split("<assistant>")[1]
                assert answer == f"out {task}" or answer.startswith("or ")
    assert skipped > 0  # the example that fits into no row is counted, not cut


def test_held_out_descriptions_never_train(config: SftConfig, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    data = prepare_data(config, tiny_tokenizer, lambda texts: [len(text) for text in texts])
    held_out = {texts[-1] for texts in ANSWERS.values()}
    everything = shorter(config, description_in_prompt=1.0)
    shown = prepare_data(everything, tiny_tokenizer, lambda texts: [len(text) for text in texts])
    seen: set[str] = set()
    for step in range(25):
        seen |= {data.texts[n] for n in data.train[step].descriptions.tolist()}
        tokens = shown.train[step].tokens
        assert not any(text in tiny_tokenizer.decode(row) for row in tokens for text in held_out)
    assert seen == {text for texts in ANSWERS.values() for text in texts} - held_out
    judged = data.judged["seen/adapter"][0]
    assert {data.texts[n] for n in judged.descriptions.tolist()} == held_out
    # Judged on inputs that were not trained on.
    inputs = " ".join(document for row in range(4) for document in documents_of(judged, tiny_tokenizer, row))
    assert "Is it 2" in inputs and "Is it 3" not in inputs


def test_bank_gives_back_what_the_encoder_said(
    tiny_base: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    """In any order and from any chunk, up to bfloat16; the window pads to one static shape."""
    encoder = TokenEncoder(tiny_base, tiny_tokenizer, layers=(2,), max_tokens=40)
    texts = ["Add the numbers.", "No.", "Translate into French, please.", "Sort."]
    said: list[str] = []
    bank = DescriptionBank(encoder, texts, chunk=2, log=said.append, every=0)
    assert [line.split(",")[0] for line in said] == ["2 of 4 texts read", "4 of 4 texts read"]
    assert said[-1].endswith(" 0.0 min left")
    index = torch.tensor([2, 0, 3, 2, 1])
    found = bank[index]
    assert found.mask is not None and found.states.shape == (5, 40, 32)
    for n, i in enumerate(index.tolist()):
        alone = encoder.encode([texts[i]]).states[0]
        assert int(found.mask[n].sum()) == len(alone)
        assert found.mask[n, : len(alone)].all()
        assert (found.states[n, : len(alone)] - alone).abs().max() <= 0.02 * alone.abs().max()
        assert not found.states[n, len(alone) :].any()


# ------------------------------------------------------------------------------------------------- teacher


def test_teacher_sees_the_same_documents_after_other_examples(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """Description and examples of the task, never one with the document's input; then the input and its answer."""
    plain, taught = make_batches(tiny_tokenizer), make_batches(tiny_tokenizer, teacher_tokens=230, shots=2)
    twin = Example("twin", taught.pools[0].examples[0].input, ("twin's",))
    taught.pools = [replace(pool, examples=(*pool.examples[:7], twin)) for pool in taught.pools]
    plain.pools = taught.pools
    fitting = missing = 0
    for step in range(8):
        batch = taught[step]
        for ours, theirs in zip(batch[:11], plain[step], strict=False):
            assert torch.equal(ours, theirs), "a teacher must not change what the student sees"
        assert batch.teacher_tokens.shape == (4, 230)
        for row in range(4):
            pool = taught.pools[taught.task_of_row(step, row)]
            known = {(e.input.strip(), answer) for e in pool.examples for answer in e.outputs}
            text = taught.texts[batch.descriptions[row]]
            for number in range(int(batch.documents[row].max()) + 1):
                own = batch.label_documents[row] == number
                shown = batch.teacher_tokens[row][batch.teacher_documents[row] == number]
                if not len(shown):
                    assert not batch.teacher_weights[row][own].any()
                    missing += 1
                    continue
                assert torch.equal(batch.teacher_weights[row][own], batch.weights[row][own])
                labels = batch.labels[row][own]
                places = batch.teacher_label_positions[row][own]
                assert torch.equal(batch.teacher_tokens[row][places[1:]], labels[:-1])
                assert batch.teacher_documents[row][places].unique().tolist() == [number]
                place = batch.teacher_positions[row][batch.teacher_documents[row] == number]
                assert place.tolist() == list(range(len(shown)))
                assert batch.teacher_positions[row][places[0]] == len(shown) - len(labels)
                written = tiny_tokenizer.decode(shown).removeprefix(f"<s><user>{text}\n\n")
                turns = [turn.split("\n<assistant>") for turn in written.split("<user>")]
                student = documents_of(batch, tiny_tokenizer, row)[number]
                assert student.endswith("\n<assistant>".join(turns[-1]))
                before = [(question, answer.removesuffix("\n")) for question, answer in turns[:-1]]
                assert len(before) == 2 and set(before) <= known
                assert len({question for question, _ in (*before, turns[-1])}) == 3
                fitting += 1
    assert fitting > 20 < 4 * missing


def test_teacher_is_shown_training_examples_alone(config: SftConfig, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    taught = shorter(config, distill=1.0, teacher_tokens=400, distill_shots=4)
    data = prepare_data(taught, tiny_tokenizer, lambda texts: [len(text) for text in texts])
    held_out = [texts[-1] for texts in ANSWERS.values()]
    for step in range(10):
        batch = data.train[step]
        assert batch.teacher_weights.sum() > 0.5
        text = tiny_tokenizer.decode(batch.teacher_tokens.flatten())
        assert "Is it 3" in text and "Is it 2" not in text
        assert not any(description in text for description in held_out)
    assert not data.judged["seen/adapter"][0].teacher_tokens.numel()
    assert not prepare_data(config, tiny_tokenizer, lengths).train[0].teacher_tokens.numel()


# ------------------------------------------------------------------------------- another task's description


@pytest.mark.parametrize("reads", ["description", "input"])
def test_other_descriptions_are_always_of_another_task(reads: str, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """Also where tasks repeat in a batch and share a description; partners are always the task's own."""
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
            assert int(batch.descriptions[row]) in own
            assert int(batch.partners[row]) in own
            assert int(batch.others[row]) not in own
            seen.add(int(batch.others[row]))
            if reads == "input":  # one document, and it is the one that is read
                assert batch.documents[row].max() == 0
                task, n = divmod(int(batch.descriptions[row]), 3)
                assert f"in {task} {n}<assistant>" in documents_of(batch, tiny_tokenizer, row)[0].replace("\n", "")
    assert len(seen) >= 6
    assert batches.told_apart
    assert not Batches(pools[:1], texts, tiny_tokenizer, **values).told_apart
    twins = [replace(pool, descriptions=(0,), reads=()) for pool in pools]
    assert not Batches(twins, texts, tiny_tokenizer, **values).told_apart


def test_comparing_needs_two_tasks_that_can_be_told_apart(config: SftConfig, jsonl: Path, tmp_path: Path) -> None:
    one = replace(shorter(config, contrast=1.0), data=replace(config.data, only=("yes",)))
    with pytest.raises(DataError, match=r"train\.contrast needs two tasks or more.*there are 1"):
        train(one, tmp_path / "run", device="cpu", log=quiet)
    rows = [json.loads(line) | {"description": "Say something."} for line in jsonl.read_text().splitlines()]
    (tmp_path / "twins.jsonl").write_text("\n".join(map(json.dumps, rows)))
    twins = replace(shorter(config, contrast=1.0), data=DataConfig(tasks=str(tmp_path / "twins.jsonl")))
    with pytest.raises(DataError, match="each with descriptions of its own"):
        train(twins, tmp_path / "run", device="cpu", log=quiet)
    with pytest.raises(ConfigError, match=r"early_stop 'margin' needs two held-out tasks.*there are 0"):
        train(shorter(config, early_stop="margin"), tmp_path / "run", device="cpu", log=quiet)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------- starting from a checkpoint


def test_start_from_is_refused_where_the_checkpoint_is_of_another_kind(
    config: SftConfig, whole_run: Path, tmp_path: Path
) -> None:
    """Every difference that would make the weights mean something else is named with both values."""
    start = shorter(config, start_from=str(whole_run / "checkpoint"))
    for other, match in (
        (replace(start, encoder=replace(config.encoder, layers=(2, 3))), r"encoder\.layers is \[1, 2\], here \[2, 3\]"),
        (replace(start, lora=replace(config.lora, rank=2, alpha=4)), r"spec\.rank is 4, here 2"),
        (
            replace(start, lora=replace(config.lora, targets=("v_proj", "q_proj"))),
            r"spec\.targets is \['q_proj 32 x 32', 'v_proj 32 x 16'\], here \['v_proj 32 x 16', 'q_proj 32 x 32'\]",
        ),
        # The same shapes, another network.
        (
            replace(start, hypernet=replace(config.hypernet, attention_heads=2)),
            r"hypernet\.attention_heads is 4, here 2",
        ),
        (replace(start, hypernet=replace(config.hypernet, variant="none")), r"hypernet\.variant is 'L', here 'none'"),
        (replace(start, hypernet=replace(config.hypernet, writes="B")), r"hypernet\.writes is 'AB', here 'B'"),
    ):
        with pytest.raises(ConfigError, match=match):
            train(other, tmp_path / "run", device="cpu", log=quiet)
    assert not (tmp_path / "run").exists()


def test_start_from_an_encoder_of_another_revision_is_refused(
    config: SftConfig, whole_run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole_run / "checkpoint", copy)
    plain = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(plain | {"encoder_revision": "sha256:other"}))
    with pytest.raises(
        ConfigError, match=r"encoder\.revision is 'sha256:other .*tiny-base\)', here 'sha256:.*tiny-base"
    ):
        train(shorter(config, start_from=str(copy)), tmp_path / "run", device="cpu", log=quiet)


def test_started_run_begins_with_the_checkpoints_adapters_and_says_so_without_a_path(
    config: SftConfig, whole_run: Path, tmp_path: Path
) -> None:
    """From a hypernetwork everything, from a multi-task LoRA the offset: at rate 0 adapters stay what they were."""
    blind = replace(config, hypernet=replace(config.hypernet, variant="none"))
    train(blind, tmp_path / "multitask", device="cpu", log=quiet)
    for source in (whole_run, tmp_path / "multitask"):
        still = shorter(
            config, start_from=str(source / "checkpoint"), steps=1, learning_rate=0.0, offset_learning_rate=0.0
        )
        folder = train(still, tmp_path / f"from-{source.name}", device="cpu", log=quiet)
        before, after = (TextToLora.from_pretrained(str(f)) for f in (source / "checkpoint", folder))
        (one,), (other,) = before.generate(["Say yes."]), after.generate(["Say yes."])
        assert all(torch.equal(x, y) for x, y in zip(one.lora.b, other.lora.b, strict=True))
        assert all(b.abs().max() > 0 for b in other.lora.b)
        recorded = after.config.training["settings"]
        assert recorded["train"]["start_from"] == {
            "name": "checkpoint",
            "weights_sha256": before.config.weights_sha256,
        }
        assert recorded["data"]["tasks"] == "own.jsonl"


# ---------------------------------------------------------------------------------------- tasks and descriptions


def lengths(texts: list[str]) -> list[int]:
    return [len(text) for text in texts]


def test_own_tasks_come_from_a_folder_too(config: SftConfig, jsonl: Path, tmp_path: Path) -> None:
    for number, line in enumerate(jsonl.read_text().splitlines()[::20]):
        with (tmp_path / f"{number % 2}.jsonl").open("a") as file:
            file.write(line + "\n")
    data = prepare_data(replace(config, data=DataConfig(tasks=str(tmp_path))), make_tokenizer(), lengths)
    assert [pool.name for pool in data.train.pools] == ["no", "yes"]


def test_short_answers_change_their_words_and_open_ones_their_form(config: SftConfig, tmp_path: Path) -> None:
    lines = [{"task": "few", "input": f"{n}?", "output": ("yes", "no")[n % 2]} for n in range(9)]
    lines += [{"task": "open", "input": f"{n}?", "output": f"{n} it is"} for n in range(9)]
    described = [line | {"description": f"Do {line['task']}."} for line in lines]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in described))

    def shares(**changes: Any) -> dict[str, tuple[float, int]]:
        settings = DataConfig(tasks=str(tmp_path / "own.jsonl"), relabel_variants=3, **changes)
        data = prepare_data(replace(config, data=settings), make_tokenizer(), lambda texts: [1] * len(texts))
        return {pool.name: (pool.variant_share, len(pool.variants)) for pool in data.train.pools}

    assert shares(relabel=0.4, reform=0.1) == {"few": (0.4, 3), "open": (0.1, 3)}
    assert shares(relabel=0.4) == {"few": (0.4, 3), "open": (0.0, 0)}
    assert shares(reform=0.1) == {"few": (0.0, 0), "open": (0.1, 3)}
    for name, said in (("few", r"data\.reform: every task"), ("open", r"data\.relabel: no task has a few short")):
        alone = [json.dumps(line) + "\n" for line in described if line["task"] == name]
        (tmp_path / "own.jsonl").write_text("".join(alone))
        with pytest.raises(DataError, match=said):
            shares(relabel=0.4, reform=0.1)


def test_description_file_adds_or_replaces(config: SftConfig, tmp_path: Path) -> None:
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
    judged = next(iter(data.judged.values()))
    assert {pool.name: {data.texts[n] for n in pool.descriptions} for pool in judged.pools} == {
        name: {texts_[-1]} for name, texts_ in ANSWERS.items()
    }
    # A task's two texts of the file are drawn as often as its six others.
    settings = replace(config.data, held_out_descriptions=0, descriptions=str(path), file_share=0.5)
    data = prepare_data(replace(config, data=settings), make_tokenizer(), lengths)
    (yes,) = (pool for pool in data.train.pools if pool.name == "yes")
    drawn = Counter(data.texts[n] for n in yes.descriptions)
    assert sum(drawn[text] for text in ("Agree with me.", "Say yes.")) == pytest.approx(sum(drawn.values()) / 2, abs=1)
    assert texts(keep_descriptions=False) == {"yes": {"Agree with me.", "Say yes."}}
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

    def prepare(*, reads: Any = "description", share: float = 0.0, **changes: Any) -> RunData:
        encoder = EncoderConfig(kind="onehot") if reads == "task" else config.encoder
        settings = replace(config, reads=reads, encoder=encoder, data=DataConfig(held_out_descriptions=0, **changes))
        return prepare_data(
            shorter(settings, description_in_prompt=share),
            make_tokenizer(),
            lambda texts: [len(t.split()) for t in texts],
        )

    return prepare


def described(data: RunData) -> dict[str, set[str]]:
    return {pool.name: {data.texts[n] for n in pool.descriptions} for pool in data.train.pools}


def test_kinds_of_descriptions(packed: Callable[..., RunData], monkeypatch: pytest.MonkeyPatch) -> None:
    """Definitions, what is not one on the same tasks, and the same made-up text for a task in every run."""
    odd = {f"task{n}" for n in range(1, 24, 2)}
    long, uneven = "word " * 40, sni_tasks(6)
    uneven[2] = replace(uneven[3], name="task2", descriptions=(long, "Short."), definition=long)
    uneven[3] = replace(uneven[3], descriptions=(uneven[3].definition,))
    definitions = described(packed(descriptions="definitions"))
    assert definitions == {f"task{n}": {f"Full text {n}."} for n in range(1, 24, 2)}
    paraphrases = described(packed(descriptions="paraphrases", with_definition=True))
    assert paraphrases == {f"task{n}": {f"Short {n}.", f"Other {n}."} for n in range(1, 24, 2)}
    assert described(packed(with_definition=True)).keys() == odd
    random = described(packed(descriptions="random"))
    assert random == described(packed(descriptions="random", seed=7))
    assert len(set.union(*random.values())) == len(random) == 24
    assert not any("Short" in text for texts in random.values() for text in texts)
    # Those of one kind alone, and with a definition over the window, are left out of both.
    for kind in ("definitions", "paraphrases"):
        monkeypatch.setattr(train_data, "load_sni", lambda _, splits: uneven[: 4 if "train" in splits else 0])
        assert described(packed(descriptions=kind, with_definition=True)).keys() == {"task1"}


def test_held_out_tasks_and_subsets(packed: Callable[..., RunData]) -> None:
    """The held-out tasks are spread over categories and the same at every size; small subsets lie in large ones."""
    runs = {n: packed(hold_out=6, max_tasks=n) for n in (4, 12, None)}
    names = {n: {pool.name for pool in run.train.pools} for n, run in runs.items()}
    assert [len(x) for x in names.values()] == [4, 12, 18]
    assert names[4] < names[12] < names[None]
    held_out = runs[4].summary["held_out_tasks"]
    assert all(run.summary["held_out_tasks"] == held_out for run in runs.values())
    assert not set(held_out) & names[None]
    category = {task.name: task.category for task in sni_tasks(26)}
    assert Counter(category[name] for name in held_out if name not in ("task24", "task25")) == {"a": 2, "b": 2, "c": 2}
    assert {pool.name for pool in runs[4].judged["validation/adapter"].pools} == set(held_out)
    assert {p.name for p in packed(hold_out=6, max_tasks=4, seed=1).train.pools} != names[4]
    with pytest.raises(DataError, match=r"data\.hold_out is 24, of 24 training tasks"):
        packed(hold_out=24)
    with pytest.raises(DataError, match=r"data\.only names task24, which sni does not offer"):
        packed(only=("task3", "task24"))
    alone = packed(only=("task3",))
    assert ([pool.name for pool in alone.train.pools], alone.judged.keys()) == (["task3"], {"seen/adapter"})


def test_choosing_tasks_are_watched_by_their_written_descriptions(
    packed: Callable[..., RunData], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever descriptions are trained on."""
    written = {"task24": ("By hand.", "Written by hand.")}
    monkeypatch.setattr(train_data, "written_descriptions", lambda what: {"choosing": written}[what])
    for kind in ("own", "definitions", "random"):
        data = packed(descriptions=kind)
        pools = {pool.name: pool for pool in data.judged["validation/adapter"].pools}
        assert {data.texts[n] for n in pools["task24"].descriptions} == set(written["task24"])


def test_categories_come_equally_often(packed: Callable[..., RunData]) -> None:
    """Two thirds of the tasks are of one category, and its tasks still come once before any comes again."""
    train = packed(by_category=True).train
    order = [train.pools[train.task_of_row(step, row)] for step in range(24) for row in range(4)]
    assert Counter(pool.category for pool in order) == {"a": 32, "b": 32, "c": 32}
    first = [pool.name for pool in order if pool.category == "a"][:16]
    assert len(set(first)) == 16
    plain = packed().train
    order = [plain.pools[plain.task_of_row(step, row)] for step in range(6) for row in range(4)]
    assert Counter(pool.category for pool in order)["a"] == 16


def test_task_without_examples_is_named(packed: Callable[..., RunData], monkeypatch: pytest.MonkeyPatch) -> None:
    def load(names: Any, *, splits: tuple[str, ...]) -> list[Task]:
        return [replace(task, examples={"train": ()}) if task.name == "task1" else task for task in sni_tasks(4)]

    monkeypatch.setattr(train_data, "load_sni", load)
    with pytest.raises(DataError, match="No training examples for task1; take them out"):
        packed()


def test_names_are_read_only_of_tasks_that_are_trained_on(packed: Callable[..., RunData]) -> None:
    data = packed(reads="task")
    assert data.texts == sorted(f"task{n}" for n in range(24))
    assert data.judged.keys() == {"seen/adapter"}
    batch = data.train[0]
    for row in range(4):
        own = data.train.task_of_row(0, row)
        assert data.texts[batch.descriptions[row]] == data.train.pools[own].name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_run_is_nearly_the_plain_one(config: SftConfig, tmp_path: Path) -> None:
    config = replace(config, hypernet=replace(config.hypernet, dropout=0.0, token_dropout=0.0))
    rows = []
    for compile_ in (False, True):
        run = tmp_path / str(compile_)
        train(shorter(config, compile=compile_, contrast=0.5), run, device="cpu", log=quiet)
        rows.append([row["loss"] for row in metrics(run) if "loss" in row])
    assert len(rows[0]) == config.train.steps
    assert rows[1] == pytest.approx(rows[0], rel=1e-3)


# ------------------------------------------------------------------------------------------ losses and settings


MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make_trainer() -> Iterator[MakeTrainer]:
    """Builds trainers as `train` does, their heads filled so that everything has a gradient."""
    with ExitStack() as stack:

        def make(config: SftConfig, base: Any, data: RunData) -> Trainer:
            encoder = load_encoder(config.encoder, config.base, base=(base, make_tokenizer()))
            spec = AdapterSpec.from_config(base.config, config.base, config.lora)
            with torch.random.fork_rng():
                torch.manual_seed(1)
                sizes = {"embedding_size": encoder.embedding_size, "kind": encoder.kind}
                hypernet = Hypernet(spec, **sizes, config=config.hypernet)
                randomise_head(hypernet)
            slots = stack.enter_context(live(base, spec))
            losses = answer_losses(base, slots, keep=config.train.gradient_checkpointing, fuse=config.train.compile)
            bank = None if config.blind else DescriptionBank(encoder, data.texts)
            optimizer = make_optimizer(hypernet, config.train)
            return Trainer(config, base, hypernet, hypernet, losses, bank, optimizer, torch.device("cpu"))

        yield make


@pytest.fixture
def own_base(tiny_config: Any) -> LlamaForCausalLM:
    """A base that may be hooked and left so."""
    return make_base(tiny_config)


@pytest.fixture
def still(config: SftConfig) -> SftConfig:
    """Without dropout, so that two passes are the same."""
    return replace(config, hypernet=replace(config.hypernet, dropout=0.0, token_dropout=0.0))


def prepared(config: SftConfig) -> tuple[RunData, Batch]:
    data = prepare_data(config, make_tokenizer(), lengths)
    return data, data.train[0]


def test_batches_say_which_prompts_show_the_description(
    make_trainer: MakeTrainer, still: SftConfig, own_base: LlamaForCausalLM
) -> None:
    """And a hypernetwork that is told so learns from both; with one kind only there is nothing to tell apart."""
    aware = replace(still, hypernet=replace(still.hypernet, prompt_aware=True))
    data, batch = prepared(aware)
    seen = set()
    for step in range(4):
        rows = data.train[step]
        for row in range(len(rows.tokens)):
            text = data.texts[int(rows.descriptions[row])]
            shown = text in data.train.tokenizer.decode(rows.tokens[row])
            assert shown == bool(rows.in_prompt[row])
            seen.add(shown)
    assert seen == {True, False}
    trainer = make_trainer(aware, own_base, data)
    trainer.loss(batch).backward()
    assert trainer.hypernet.trunk.prompts.grad.abs().sum() > 0
    for share in (0.0, 1.0):
        with pytest.raises(ConfigError, match=f"description_in_prompt {share:g} has one kind only"):
            shorter(aware, description_in_prompt=share)
    with pytest.raises(ConfigError, match="prompt_aware would do nothing"):
        replace(aware.hypernet, variant="none")


def test_contrast_of_some_rows(make_trainer: MakeTrainer, still: SftConfig, own_base: LlamaForCausalLM) -> None:
    """A quarter of four rows: the first one's hinge, and the loss of all; judging sees all rows under both texts."""
    config = shorter(still, contrast=0.5, contrast_margin=5.0, contrast_share=0.25)
    data, batch = prepared(config)
    trainer, plain = make_trainer(config, own_base, data), make_trainer(still, make_base(own_base.config), data)
    (right, _), (wrong, _), _, _ = plain.compare(batch, learning=False)
    of_row = (wrong - right) * batch.weights
    hinge = 5.0 - of_row[0].sum() / batch.weights[0].sum()
    assert hinge > 0
    assert trainer.loss(batch).item() == pytest.approx((plain.loss(batch) + 0.5 * hinge).item(), rel=1e-5)
    judged = [t.compare(batch, learning=False)[:2] for t in (trainer, plain)]
    for (mine, _), (theirs, _) in zip(*judged, strict=True):
        assert mine.shape == batch.labels.shape
        assert torch.allclose(mine, theirs, atol=1e-5)
    assert not torch.allclose(judged[0][0][0], judged[0][1][0], atol=1e-3)


def test_contrast_of_plain_prompts_alone(
    make_trainer: MakeTrainer, still: SftConfig, own_base: LlamaForCausalLM
) -> None:
    """Of four rows two show the description: the hinge is the mean over the others, whatever the two cost."""
    config = shorter(still, contrast=0.5, contrast_margin=5.0, contrast_in_prompt=False, description_in_prompt=0.5)
    data, batch = prepared(config)
    batch = batch._replace(in_prompt=torch.tensor([True, False, True, False]))
    trainer, plain = make_trainer(config, own_base, data), make_trainer(still, make_base(own_base.config), data)
    (right, _), (wrong, _), _, _ = plain.compare(batch, learning=False)
    share = batch.weights.sum(1)
    hinges = (5.0 - ((wrong - right) * batch.weights).sum(1) / share).relu()
    assert (hinges > 0).all()
    hinge = (hinges * share)[1::2].sum() / share[1::2].sum()
    assert trainer.loss(batch).item() == pytest.approx((plain.loss(batch) + 0.5 * hinge).item(), rel=1e-5)
    shown = batch._replace(in_prompt=torch.ones(4, dtype=torch.bool))
    assert trainer.loss(shown).item() == pytest.approx(plain.loss(shown).item(), rel=1e-5)


def test_bfloat16_where_there_is_no_gpu(
    make_trainer: MakeTrainer, still: SftConfig, own_base: LlamaForCausalLM
) -> None:
    """Rounded products, so another loss of nearly the same size; weights and their gradients stay in float32."""
    data, batch = prepared(still)
    exact = make_trainer(still, own_base, data)
    rounded = make_trainer(shorter(still, bfloat16=True), make_base(own_base.config), data)
    loss = rounded.loss(batch)
    assert loss.item() != exact.loss(batch).item()
    assert loss.item() == pytest.approx(exact.loss(batch).item(), rel=0.02)
    loss.backward()
    assert all(p.dtype == torch.float32 for p in rounded.trained.parameters())
    assert all(p.grad.dtype == torch.float32 for p in rounded.trained.parameters() if p.grad is not None)


def test_judging_keeps_nothing_for_a_backward_pass(
    make_trainer: MakeTrainer, still: SftConfig, own_base: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU three batches' activations stayed in memory at a time, three times a training step's."""
    data, batch = prepared(still)
    trainer = make_trainer(still, own_base, data)
    held: list[torch.Tensor] = []

    def compare(*arguments: Any, **options: Any) -> Any:
        right, wrong, lora, divergence = Trainer.compare(trainer, *arguments, **options)
        held.extend([right[0], wrong[0], *lora.a, *lora.b])
        return right, wrong, lora, divergence

    monkeypatch.setattr(trainer, "compare", compare)
    sft.evaluate(trainer, data)
    assert held and not any(x.requires_grad for x in held)
    assert trainer.loss(batch).requires_grad


def test_label_smoothing_is_torchs_and_only_in_training(
    make_trainer: MakeTrainer, still: SftConfig, own_base: LlamaForCausalLM
) -> None:
    smooth = shorter(still, label_smoothing=0.1)
    data, batch = prepared(smooth)
    trainer = make_trainer(smooth, own_base, data)
    plain = make_trainer(still, make_base(own_base.config), data)
    with torch.no_grad():
        learning = trainer.forward(batch, batch.descriptions, batch.partners, learning=True)[0]
        judging = trainer.forward(batch, batch.descriptions, batch.partners, learning=False)[0]
        expected, _, lora, _ = plain.forward(batch, batch.descriptions, batch.partners, learning=True)
    assert torch.equal(judging, expected)
    with torch.no_grad():
        row, own = 0, batch.label_documents[0] == 0
        length = int(within(batch, 0, 0).sum())
        adapter = Adapter(lora.unbind()[row], trainer_spec(trainer), "", {})
        with applied(make_base(own_base.config), adapter) as model:
            logits = model(batch.tokens[:1, :length]).logits[0][batch.label_positions[row][own]]
    reference = F.cross_entropy(logits, batch.labels[row][own], reduction="none", label_smoothing=0.1)
    assert (learning[row][own] - reference).abs().max() <= 1e-4
    assert (learning[row][own] - expected[row][own]).abs().max() > 1e-2


def trainer_spec(trainer: Trainer) -> AdapterSpec:
    return AdapterSpec.from_config(trainer.base.config, trainer.config.base, trainer.config.lora)


@pytest.mark.parametrize("contrast", [0.0, 0.5])
@pytest.mark.parametrize("teacher", ["offset", "base"])
def test_distilled_loss_is_the_divergence_document_by_document(
    teacher: str, contrast: float, make_trainer: MakeTrainer, still: SftConfig, own_base: LlamaForCausalLM
) -> None:
    """Each document alone: the student under its row's adapter, the teacher on its longer prompt."""
    without = shorter(still, contrast=contrast)
    settings = {"distill": 0.7, "distill_temperature": 2.0, "distill_shots": 2, "teacher_tokens": 200}
    config = shorter(without, **settings, distill_teacher=teacher)
    data, batch = prepared(config)
    trainer = make_trainer(config, own_base, data)
    plain = make_trainer(without, make_base(own_base.config), data)
    spec, hypernet = trainer_spec(trainer), trainer.hypernet
    students = trainer.adapters(batch.descriptions, batch.partners, batch, learning=True).unbind()
    offset = LoraTensors(*hypernet.offset(), hypernet.scaling)

    def log_probabilities(tokens: torch.Tensor, number: int, lora: LoraTensors | None) -> torch.Tensor:
        base = make_base(own_base.config)
        with nullcontext() if lora is None else applied(base, Adapter(lora, spec, "", {})):
            return (base(tokens[None]).logits[0, -number:] / 2.0).log_softmax(-1)

    expected, rows = 0.0, []
    with torch.no_grad():
        for row in range(4):
            found = 0.0
            for number in range(int(batch.documents[row].max()) + 1):
                labels = int((batch.label_documents[row] == number).sum())
                longer = batch.teacher_tokens[row][batch.teacher_documents[row] == number]
                rows.append(len(longer) > 0)
                if rows[-1]:
                    own = log_probabilities(batch.tokens[row][within(batch, row, number)], labels, students[row])
                    theirs = log_probabilities(longer, labels, offset if teacher == "offset" else None)
                    found += (theirs.exp() * (theirs - own)).sum(-1).mean().item() * 2.0**2
            expected += found / (int(batch.documents[row].max()) + 1) / 4
    assert any(rows) and not all(rows)
    assert (trainer.loss(batch) - plain.loss(batch)).item() == pytest.approx(0.7 * expected, rel=1e-4)
    assert expected > 0.1


def test_only_the_student_learns_from_the_difference(
    make_trainer: MakeTrainer, still: SftConfig, own_base: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient is that of a teacher whose weights are constants; without one there is no second pass at all."""
    config = shorter(still, distill=1.0, teacher_tokens=200)
    data, batch = prepared(config)
    trainer = make_trainer(config, own_base, data)
    teacher = trainer.teacher(batch)
    constant = teacher._replace(lora=teacher.lora.map(lambda x: x.detach().clone()))

    def gradients(trainer: Trainer) -> list[torch.Tensor]:
        trainer.hypernet.zero_grad()
        trainer.loss(batch).backward()
        return [p.grad for p in trainer.hypernet.parameters()]

    found = gradients(trainer)
    monkeypatch.setattr(trainer, "teacher", lambda _: constant)
    assert all(torch.equal(x, y) for x, y in zip(found, gradients(trainer), strict=True))
    assert all(p.grad is None for p in trainer.base.parameters())
    calls, plain = [], make_trainer(still, make_base(own_base.config), data)
    plain.base.model.register_forward_pre_hook(lambda *_: calls.append(1))
    without = gradients(plain)
    assert len(calls) == 1
    assert any((x - y).abs().max() > 1e-3 for x, y in zip(found, without, strict=True))


def test_l2_is_the_mean_square_of_what_is_written(
    make_trainer: MakeTrainer, still: SftConfig, own_base: LlamaForCausalLM
) -> None:
    data, batch = prepared(still)
    plain = make_trainer(still, own_base, data).loss(batch)
    trainer = make_trainer(shorter(still, l2=0.5), make_base(own_base.config), data)
    lora = trainer.adapters(batch.descriptions, batch.partners, batch, learning=True)
    squares = [torch.stack([x.square().mean() for x in part]).mean() for part in (lora.a, lora.b)]
    assert (trainer.loss(batch) - plain - 0.5 * (squares[0] + squares[1])).abs() <= 1e-5
    assert 0.5 * (squares[0] + squares[1]) > 1e-2


def test_neftune_noise_is_scaled_by_each_documents_length() -> None:
    """Uniform in ± alpha / sqrt(T·E): a packed document gets what it would get alone."""
    documents = torch.tensor([[0] * 4 + [1] * 36 + [-1] * 10])
    noise = neftune_noise(documents, 400, 5.0)[0]
    for part, length in ((noise[:4], 4), (noise[4:40], 36)):
        bound = 5 / math.sqrt(length * 400)
        assert part.abs().max() <= bound
        assert part.abs().max() > 0.99 * bound
        assert part.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert abs(part.mean().item()) < 0.05 * bound
    assert not neftune_noise(documents, 400, 0.0).any()


def test_neftune_disturbs_training_alone(
    make_trainer: MakeTrainer, still: SftConfig, own_base: LlamaForCausalLM
) -> None:
    noisy = shorter(still, neftune_alpha=5.0)
    data, batch = prepared(noisy)
    trainer = make_trainer(noisy, own_base, data)
    plain = make_trainer(still, make_base(own_base.config), data)
    with torch.no_grad():
        one, other, judged = (
            trainer.forward(batch, batch.descriptions, batch.partners, learning=learning)[0]
            for learning in (True, True, False)
        )
        expected = plain.forward(batch, batch.descriptions, batch.partners, learning=False)[0]
    assert torch.equal(judged, expected)
    assert not torch.equal(one, other) and not torch.equal(one, expected)


def test_dropped_descriptions_leave_the_offset(
    make_trainer: MakeTrainer, still: SftConfig, own_base: LlamaForCausalLM
) -> None:
    dropping = shorter(still, conditioning_dropout=0.5)
    data, _ = prepared(dropping)
    trainer = make_trainer(dropping, own_base, data)
    offset = trainer.hypernet.offset.b[0]
    seen = set()
    for step in range(8):
        batch = data.train[step]
        written = trainer.adapters(batch.descriptions, batch.partners, batch, learning=True).b[0]
        whole = trainer.adapters(batch.descriptions, batch.partners, batch, learning=False).b[0]
        for row in range(4):
            kept, dropped = torch.allclose(written[row], whole[row]), torch.equal(written[row], offset)
            assert kept is not dropped
            assert dropped is bool(batch.conditioning[row] == DROPPED)
            seen.add(kept)
    assert seen == {True, False}


def test_encodings_are_disturbed_in_training_alone(
    make_trainer: MakeTrainer, still: SftConfig, own_base: LlamaForCausalLM, sentence_folder: Path
) -> None:
    """Noise in proportion to the encoding, blends on the line between two descriptions of one task."""
    sentence = replace(still, encoder=EncoderConfig(kind="sentence", model=str(sentence_folder), max_tokens=96))
    data, batch = prepared(shorter(sentence, tasks_per_step=16))
    trainer = make_trainer(shorter(sentence, mix_descriptions=0.5), own_base, data)
    bank = trainer.bank
    one, other = bank[batch.descriptions].states, bank[batch.partners].states
    mixed = trainer._disturbed(Encoded(one), bank, batch.partners).states
    # How far along the line from one to the other, and how far off it.
    line = other - one
    share = ((mixed - one) * line).sum(-1) / line.square().sum(-1).clamp_min(1e-9)
    assert (mixed - one - share[:, None] * line).abs().max() <= 1e-5
    assert 0 < (share > 1e-6).sum() < 16 and share.max() <= 1 + 1e-5
    trainer = make_trainer(shorter(still, encoding_noise=0.1), make_base(own_base.config), data)
    encoded = trainer.bank[batch.descriptions]
    noisy = trainer._disturbed(encoded, trainer.bank, batch.partners).states
    assert torch.equal(noisy[~encoded.mask], encoded.states[~encoded.mask])
    ratio = (noisy - encoded.states)[encoded.mask].square().mean().sqrt() / encoded.states[
        encoded.mask
    ].square().mean().sqrt()
    assert ratio.item() == pytest.approx(0.1, rel=0.1)


def test_gradient_checkpointing_changes_no_gradient(
    make_trainer: MakeTrainer, still: SftConfig, own_base: LlamaForCausalLM
) -> None:
    """The layers run again in the backward pass, under the same adapters."""
    data, batch = prepared(still)
    runs = []
    for checkpointing in (False, True):
        base, calls = make_base(own_base.config), []
        config = shorter(still, gradient_checkpointing=checkpointing)
        trainer = make_trainer(config, base, data)
        if checkpointing:
            _checkpoint_layers(base)
        base.model.layers[1].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        trainer.loss(batch).backward()
        runs.append((len(calls), [p.grad for p in trainer.hypernet.parameters()]))
    assert [calls for calls, _ in runs] == [1, 2]
    pairs = list(zip(runs[0][1], runs[1][1], strict=True))
    assert all((x - y).abs().max() <= 1e-6 * x.abs().max().clamp_min(1) for x, y in pairs)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler itself looks at it
@pytest.mark.parametrize(
    ("checkpointing", "contrast", "distill"), [(False, 1.0, 0.0), (True, 0.0, 0.0), (True, 1.0, 1.0)]
)
def test_compiled_step_is_the_same_step(
    checkpointing: bool,
    contrast: float,
    distill: float,
    make_trainer: MakeTrainer,
    still: SftConfig,
    own_base: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layers and hypernetwork are traced whole, with nothing left to Python, gradient checkpointing included."""
    torch.compiler.reset()  # what other tests compiled counts towards a limit
    layer_compile, torch_compile = torch.nn.Module.compile, torch.compile
    plain = {"backend": "aot_eager"}  # graphs are made as ever, but not turned into kernels
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: layer_compile(self, **options | plain))
    monkeypatch.setattr(torch, "compile", lambda f, **options: torch_compile(f, **options | plain))
    config = shorter(still, contrast=contrast, label_smoothing=0.1, gradient_checkpointing=checkpointing)
    config = shorter(config, distill=distill, teacher_tokens=200)
    data, batch = prepared(config)
    gradients = []
    for compile_ in (False, True):
        base = make_base(own_base.config)
        trainer = make_trainer(shorter(config, compile=compile_), base, data)
        if checkpointing:
            _checkpoint_layers(base)
        if compile_:
            trainer.write = torch.compile(trainer.hypernet, dynamic=False, fullgraph=True)
        with compiled(base, trainer_spec(trainer)) if compile_ else nullcontext():
            trainer.loss(batch).backward()
        gradients.append({name: p.grad for name, p in trainer.hypernet.named_parameters()})
    for name, one in gradients[0].items():
        assert (one - gradients[1][name]).abs().max() <= 1e-4 * one.abs().max().clamp_min(1), name


def test_vector_quantizer_learns_its_codes() -> None:
    """Codes move to the middle of what is near to them; the gradient passes through to what is quantised."""
    quantizer = VectorQuantizer(4, 3, decay=0.5).train()
    points = torch.tensor([[4.0, 0, 0, 0], [0, 4, 0, 0], [0, 0, 4, 0]])
    quantizer.codes.copy_(points * 0.5)
    for _ in range(40):
        noise = 0.1 * torch.randn(30, 4)
        x = (points.repeat(10, 1) + noise).requires_grad_()
        found = quantizer(x)
    assert (quantizer.codes - points).abs().max() < 0.15
    assert len(found.detach().round(decimals=5).unique(dim=0)) == 3
    (found * torch.arange(4.0)).sum().backward()
    assert torch.equal(x.grad, torch.arange(4.0).expand(30, 4))
    assert quantizer.commitment.item() == pytest.approx(0.01, rel=0.5)
    before = quantizer.codes.clone()
    quantizer.eval()(x)
    assert torch.equal(quantizer.codes, before)


@pytest.mark.parametrize("config", [{"codebook": "vq"}, {"codebook": "softmax"}, {"max_change": 0.01}], ids=str)
def test_mixed_precision_trains_every_part(config: dict[str, Any], tiny_config: Any) -> None:
    """As on a GPU: weights in float32, products in bfloat16, averages in float32."""
    spec = AdapterSpec.from_config(tiny_config, "tiny", LoraConfig(rank=4, alpha=8))
    hypernet = make_hypernet(spec, **config).train()
    with torch.autocast("cpu", torch.bfloat16):
        lora = hypernet(torch.randn(3, 32), None, torch.tensor([0.0, 1.0, 0.5]))
        loss = sum(x.float().square().mean() for x in (*lora.a, *lora.b))
    (loss if hypernet.commitment is None else loss + hypernet.commitment).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in hypernet.parameters())
    assert all(torch.equal(x[0], offset) for x, offset in zip(lora.b, hypernet.offset.b, strict=True))
    assert all(x.dtype == torch.float32 for x in hypernet.state_dict().values())


def test_cap_on_the_change_scales_it_down(tiny_config: Any) -> None:
    spec = AdapterSpec.from_config(tiny_config, "tiny", LoraConfig(rank=4, alpha=8))
    free = make_hypernet(spec)
    capped = make_hypernet(spec, max_change=0.01)
    states = torch.randn(3, 32)
    for name in ("a", "b"):
        pairs = zip(getattr(free(states), name), getattr(capped(states), name), getattr(free.offset, name), strict=True)
        for one, other, offset in pairs:
            change, small = one - offset, other - offset
            size = small.square().mean((-2, -1)).sqrt()
            assert (change.square().mean((-2, -1)).sqrt() > 0.01).all()
            assert (size - 0.01).abs().max() <= 1e-5
            assert F.cosine_similarity(change.flatten(1), small.flatten(1)).min() > 0.9
    untouched = make_hypernet(spec, max_change=10.0)(states)
    pairs = zip((*free(states).a, *free(states).b), (*untouched.a, *untouched.b), strict=True)
    assert all((one - other).abs().max() <= 1e-5 for one, other in pairs)
    fresh = make_hypernet(spec, max_change=0.01, randomise=False).train()
    sum(x.square().sum() + x.sum() for x in fresh(states).b).backward()
    assert all(linear.weight.grad.isfinite().all() and linear.weight.grad.any() for linear in fresh.head.write)


# ------------------------------------------------------------------------------------------- when runs stop


def test_loss_that_is_not_finite_stops_before_the_weights_change(
    config: SftConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third loss is NaN, found out later; the state on disk and the weights in memory are those before it."""
    original, kept = Trainer.loss, {}

    def loss(self: Trainer, batch: Batch) -> torch.Tensor:
        kept["trainer"] = self
        kept["calls"] = kept.get("calls", 0) + 1
        if kept["calls"] == 3:
            kept["before"] = {name: x.detach().clone() for name, x in self.trained.named_parameters()}
        return original(self, batch) * (float("nan") if kept["calls"] == 3 else 1)

    monkeypatch.setattr(Trainer, "loss", loss)
    with pytest.raises(
        TrainingError, match=r"Step 2: loss nan.*the batch is item 2 of seed 0, of tasks (no, yes|yes, no)\."
    ):
        train(shorter(config, log_every=6, save_every=2), tmp_path / "run", device="cpu", log=quiet)
    assert kept["calls"] == 4, "found out when the state was to be saved"
    data, _ = prepared(config)
    with pytest.raises(
        TrainingError, match=r"Step 7: loss nan, gradient norm 1\.0, after 3 \(0\.5\), 2 \(0\.25\)\. The"
    ):
        require_finite([3.0, 2.0, float("nan")], [0.5, 0.25, 1.0], 5, data, config)
    after = dict(kept["trainer"].trained.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in kept["before"].items())
    assert read_progress(tmp_path / "run").step == 2
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_run_that_diverges_stops(config: SftConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One window worse than guessing may be a burst; the second in a row ends the run, what was saved before stays."""
    original, calls = Trainer.step, []

    def step(self: Trainer, batch: Batch, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(number)
        loss, norm = original(self, batch, number)
        return loss * 0 + (1.0, 20.0, 1.0, 20.0, 30.0, 1.0)[number], norm

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(
        TrainingError, match=r"diverged before step 5: mean losses of 20\.0 and 30\.0, .* this run had 1\.00\. Lower"
    ):
        train(shorter(config, steps=6, log_every=1, save_every=4), tmp_path / "run", device="cpu", log=quiet)
    assert calls == [0, 1, 2, 3, 4]
    assert read_progress(tmp_path / "run").step == 4
    assert metrics(tmp_path / "run")[-1]["loss"] == 30.0
    require_learning([12.0, 13.0, 14.0], 100, 3)  # never better than guessing: not what this is about


@pytest.mark.parametrize("metric", ["margin", "loss"])
def test_early_stopping_keeps_the_best(
    metric: str, config: SftConfig, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluations get better once, then worse twice: the run ends, and the checkpoint is of the best one."""
    scores = [1.0, 3.0, 2.0, 1.5, 9.0]
    seen: list[dict[str, torch.Tensor]] = []

    def evaluate(trainer: Trainer, data: RunData) -> dict[str, float]:
        seen.append({name: x.detach().clone() for name, x in trainer.trained.named_parameters()})
        value = scores[len(seen) - 1]
        return {
            "seen/adapter/margin": 50.0,
            "validation/adapter/margin": value - 1,
            "validation/adapter+prompt/margin": value + 1,
            "validation/adapter/loss": -value,
        }

    monkeypatch.setattr(sft, "evaluate", evaluate)
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
    rows += [row | {"task": f"{row['task']}2", "split": "val", "description": f"2 {row['task']}"} for row in rows[:80]]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = replace(
        shorter(config, early_stop=metric, patience=2, evaluate_every=1, steps=6, save_every=1),
        data=replace(config.data, tasks=str(tmp_path / "own.jsonl")),
    )
    folder = train(config, tmp_path / "run", device="cpu", log=quiet)
    assert len(seen) == 4
    saved = load_file(folder / "hypernet.safetensors")
    assert all(torch.equal(saved[name], value.half()) for name, value in seen[1].items())
    training = TextToLora.from_pretrained(str(folder)).config.training
    assert (training["steps"], training["chosen_by"], training["chosen_at"]) == (2, metric, 3.0)
    with pytest.raises(TrainingError, match="is finished: 4 of 6"):
        train(config, tmp_path / "run", resume=True, device="cpu", log=quiet)


def test_early_stopping_survives_an_interruption(
    config: SftConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second evaluation is the best: a run resumed after it chooses what the whole run chose."""
    stopping = shorter(config, early_stop="loss", patience=9, evaluate_every=1, steps=5)

    def run(name: str, *, parts: int) -> bytes:
        scores = iter([3.0, 1.0, 2.0, 2.5, 2.0])
        monkeypatch.setattr(sft, "evaluate", lambda *_: {"seen/adapter/loss": next(scores)})
        for part in range(parts):
            train(stopping, tmp_path / name, resume=part > 0, max_minutes=0, device="cpu", log=quiet)
        train(stopping, tmp_path / name, resume=parts > 0, device="cpu", log=quiet)
        assert read_progress(tmp_path / name).best_step == 2
        return (tmp_path / name / "checkpoint" / "hypernet.safetensors").read_bytes()

    assert run("whole", parts=0) == run("parts", parts=3)


def test_evaluation_forced_by_a_time_budget_does_not_count(config: SftConfig, tmp_path: Path) -> None:
    """The uninterrupted run does not have it, and would choose and stop differently."""
    stopping = shorter(config, early_stop="loss", evaluate_every=2)
    train(stopping, tmp_path / "run", max_minutes=0, device="cpu", log=quiet)
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 1]
    assert (read_progress(tmp_path / "run").step, read_progress(tmp_path / "run").best_step) == (1, 0)


def test_full_fine_tuning_resumes_bit_for_bit(config: SftConfig, tmp_path: Path) -> None:
    """Tied weights are saved once and put back as one."""
    full = replace(config, method="full", hypernet=replace(config.hypernet, variant="none"))
    tied = make_base(make_config(tie_word_embeddings=True))
    tied.save_pretrained(tmp_path / "tied")
    make_tokenizer().save_pretrained(tmp_path / "tied")
    full = replace(full, base=str(tmp_path / "tied"))
    files = []
    for name, parts in (("whole", 0), ("parts", 2)):
        for part in range(parts):
            train(full, tmp_path / name, resume=part > 0, max_minutes=0, device="cpu", log=quiet)
        folder = train(full, tmp_path / name, resume=parts > 0, device="cpu", log=quiet)
        files.append((folder / "model.safetensors").read_bytes())
    assert files[0] == files[1] != (tmp_path / "tied" / "model.safetensors").read_bytes()


def test_run_killed_before_its_checkpoint_can_still_write_it(
    config: SftConfig, whole_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    shutil.rmtree(run / "checkpoint")
    train(config, run, resume=True, device="cpu", log=quiet)
    name = "checkpoint/hypernet.safetensors"
    assert (whole_run / name).read_bytes() == (run / name).read_bytes()


def test_damaged_state_is_refused(config: SftConfig, whole_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    shutil.rmtree(run / "checkpoint")
    (run / "state.safetensors").write_bytes((whole_run / "state.safetensors").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"state\.safetensors is damaged"):
        train(config, run, resume=True, device="cpu", log=quiet)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_time_a_run_goes_on_bit_for_bit(config: SftConfig, tmp_path: Path) -> None:
    """SIGKILL at random moments, whatever the process is doing; what is left in the end is an uninterrupted run's."""
    long = shorter(config, steps=24, save_every=3, evaluate_every=5, early_stop="loss", patience=99)

    def start() -> int:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                train(long, tmp_path / "run", resume=(tmp_path / "run").exists(), device="cpu", log=quiet)
                code = 0
            finally:
                os._exit(code)
        return child

    def steps() -> int:
        state = tmp_path / "run" / "state.safetensors"
        return read_progress(tmp_path / "run").step if state.exists() else 0

    whole = train(long, tmp_path / "whole", device="cpu", log=quiet)
    draw, killed, reached = random.Random(0), 0, []
    for goal in (1, 6, 12, 18):
        child = start()
        deadline = time.monotonic() + 60
        while steps() < goal and os.waitpid(child, os.WNOHANG) == (0, 0):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(draw.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        reached.append(steps())
    assert killed >= 3 and len(set(reached)) >= 3, (killed, reached)
    _, status = os.waitpid(start(), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    one, other = (load_file(run / "state.safetensors") for run in (tmp_path / "whole", tmp_path / "run"))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert (whole / "hypernet.safetensors").read_bytes() == (
        tmp_path / "run" / "checkpoint" / "hypernet.safetensors"
    ).read_bytes()
    rows = [[r["loss"] for r in metrics(tmp_path / name) if "gradient_norm" in r] for name in ("whole", "run")]
    assert len(rows[0]) == 24 and rows[0] == rows[1]
    assert [path.name for path in (tmp_path / "run").glob(".*")] == []


# ------------------------------------------------------------------------------------------------ what is seen


def test_run_is_seen_in_events_a_tracker_and_a_page(
    config: SftConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers everywhere; the page needs no other file; the tracker is told the settings."""
    told: list[tuple[str, Any]] = []
    tracker = types.ModuleType("trackio")
    tracker.init = lambda **values: told.append(("init", values))
    tracker.log = lambda row, step: told.append(("log", (step, row)))
    tracker.finish = lambda: told.append(("finish", None))
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    watched = shorter(config, tensorboard=True, tracker="trackio", evaluate_every=3)
    train(watched, tmp_path / "run", device="cpu", log=quiet)
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert {"loss", "gradient_norm", "tokens_per_second", "minutes_left", "memory_gb"} <= rows[0].keys()
    assert rows[0]["memory_gb"] > 0.05 and rows[-2]["minutes_left"] == 0
    assert [what for what, _ in told] == ["init", *["log"] * 8, "finish"]
    assert told[0][1]["project"] == "t2l" and told[0][1]["config"]["seed"] == 0
    assert all({"step": step, **row} == rows[n] for n, (_, (step, row)) in enumerate(told[1:-1]))

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(
        [r["loss"] for r in rows if "loss" in r], rel=1e-6
    )
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<svg") == 6
    assert "seen/adapter+prompt/margin" in page and "&quot;seed&quot;: 0" in page
    assert not re.search(r"(src|href)=\"(?!#)", page), "the page must not need other files"


def test_missing_companions_are_named(config: SftConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracker that was asked for is an error before the first step; TensorBoard and matplotlib are said once."""
    for name in ("wandb", "tensorboard", "torch.utils.tensorboard", "matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"train\.tracker is wandb, which is not installed: pip install wandb"):
        train(shorter(config, tracker="wandb"), tmp_path / "one", device="cpu", log=quiet)
    assert metrics(tmp_path / "one") == []
    lines: list[str] = []
    train(shorter(config, tensorboard=True, steps=2), tmp_path / "two", device="cpu", log=lines.append)
    for what in ("TensorBoard is not installed", "needs matplotlib"):
        assert sum(what in line for line in lines) == 1
    assert (tmp_path / "two" / "checkpoint").exists()


def test_no_tracker_is_imported_unasked(config: SftConfig, tmp_path: Path) -> None:
    train(shorter(config, steps=1), tmp_path / "run", device="cpu", log=quiet)
    assert not {"wandb", "trackio"} & sys.modules.keys()


def test_bar_shows_numbers_in_place_of_lines(
    config: SftConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    lines: list[str] = []
    train(shorter(config, evaluate_every=3), tmp_path / "run", device="cpu", bar=True, log=lines.append)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert "6/6" in shown and "tokens/s" in shown and "GB" in shown
    assert re.search(r"loss \d", shown) and re.search(r"margin -?\d", shown)
    assert not any(line.startswith("step ") for line in lines)
