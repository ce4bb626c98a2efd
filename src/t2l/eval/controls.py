"""Does an adapter help because of its description? Greedy answers of every control row, one JSONL line each.

Rows that are compared see the same prompt: where the description stands in the prompt, it is always the right one,
and only the adapter's is swapped. Knows tasks, adapters and the base model; the table is made by `report`.
"""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from t2l import models
from t2l.apply import applied
from t2l.config import PromptConfig
from t2l.errors import DataError
from t2l.eval.metrics import exact_match
from t2l.files import write_text
from t2l.generate import Adapter, TextToLora
from t2l.prompt import render
from t2l.tasks import Example, Task, held_out_descriptions, load_sni, load_splits

ADAPTERS = ("none", "multi-task", "right", "wrong", "random")
"""Whose adapter a row uses: none (the base), the multi-task LoRA, or T2L's from the task's own description, from
another task's, or from random text."""


@dataclass(frozen=True)
class Question:
    """One instance of a task, with the texts its rows use."""

    suite: str
    task: str
    example: Example
    description: str
    wrong_description: str
    random_text: str


def choose_questions(suite: str, tasks: Sequence[Task], *, per_task: int, held_out: int, seed: int) -> list[Question]:
    """Draws test instances and descriptions.

    Args:
        suite: Name of the set of tasks, for the table.
        tasks: With examples of split `test`.
        per_task: Instances of each task.
        held_out: How many of a task's last descriptions training has not seen; 0 draws from all of them.
        seed: Of instances, descriptions, wrong descriptions and random texts.
    """
    if len(tasks) < 2:
        raise DataError(f"Suite {suite} needs at least two tasks, so that there is another task's description")
    questions = []
    pools = {task.name: held_out_descriptions(task, held_out)[1] if held_out else task.descriptions for task in tasks}
    for number, task in enumerate(tasks):
        # Seeded by name, so that a task's questions do not depend on which other tasks are judged.
        draw = random.Random(f"{seed}/{task.name}")
        other = tasks[(number + draw.randrange(1, len(tasks))) % len(tasks)]
        examples = draw.sample(task.examples["test"], min(per_task, len(task.examples["test"])))
        description, wrong = draw.choice(pools[task.name]), draw.choice(pools[other.name])
        text = random_text(draw)
        questions += [Question(suite, task.name, example, description, wrong, text) for example in examples]
    return questions


def random_text(draw: random.Random) -> str:
    """Made-up words in the length of a usual description."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ("".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(draw.randint(12, 28)))
    return " ".join(words).capitalize() + "."


def sni_suites(*, per_task: int, held_out: int, seed: int) -> list[Question]:
    """New instances of tasks seen in training, with descriptions not seen, and the validation tasks."""
    splits = load_splits()
    seen = [
        t for t in load_sni(splits.train - splits.held_back, splits=("test",)) if held_out_descriptions(t, held_out)[1]
    ]
    validation = load_sni(splits.validation, splits=("test",))
    more = max(1, 200 // len(validation))
    return [
        *choose_questions("seen", seen, per_task=per_task, held_out=held_out, seed=seed),
        *choose_questions("validation", validation, per_task=more, held_out=0, seed=seed),
    ]


def judge(
    t2l: TextToLora,
    multitask: TextToLora,
    questions: Sequence[Question],
    out: Path,
    *,
    base: tuple[Any, Any],
    seed: int,
    batch_size: int = 64,
    max_new_tokens: int = 64,
    log: Callable[[str], None] = print,
) -> None:
    """Answers every question under every row and writes one line per answer.

    Args:
        t2l: The hypernetwork that is judged.
        multitask: A checkpoint of variant `none` for the same base.
        questions: What is asked.
        out: JSONL file; it holds no texts of the data (hashes in their place), only what the models said.
        base: The base model and its tokenizer.
        seed: What the questions were drawn with, for the record.
        batch_size: Sequences at a time, one adapter each.
        max_new_tokens: Limit of an answer.
        log: Where progress goes.
    """
    model, tokenizer = base
    texts = sorted({t for q in questions for t in (q.description, q.wrong_description, q.random_text)})
    written: dict[str, Adapter] = {}
    for start in range(0, len(texts), 64):
        chunk = texts[start : start + 64]
        written |= dict(zip(chunk, t2l.generate(chunk), strict=True))
    (shared,) = multitask.generate([texts[0]])
    log(f"{len(texts)} adapters written for {len(questions)} questions")
    lines: list[str] = []
    for in_prompt in (False, True):
        prompt = PromptConfig(description_in_prompt=in_prompt)
        prompts = [render(tokenizer, q.description, q.example.input, prompt) for q in questions]
        for kind in ADAPTERS:
            adapters = [_adapter(kind, q, written, shared) for q in questions]
            answers = greedy_answers(
                model, tokenizer, prompts, adapters, batch_size=batch_size, max_new_tokens=max_new_tokens
            )
            for question, text, adapter, answer in zip(questions, prompts, adapters, answers, strict=True):
                line = {
                    "suite": question.suite,
                    "adapter": kind,
                    "description_in_prompt": in_prompt,
                    "task": question.task,
                    "id": question.example.id,
                    "adapter_description_sha256": _short_hash(adapter.description)
                    if adapter and kind != "multi-task"
                    else None,
                    "adapter_id": adapter_id(adapter) if adapter else None,
                    "prompt_sha256": _short_hash(text),
                    "answer": answer,
                    "exact_match": exact_match(answer, question.example.outputs),
                    "seed": seed,
                }
                lines.append(json.dumps(line, ensure_ascii=False))
            right = sum(json.loads(line)["exact_match"] for line in lines[-len(questions) :])
            log(f"{kind}, description in prompt {in_prompt}: {right} of {len(questions)} exact")
    header = {
        "checkpoint_sha256": t2l.config.weights_sha256,
        "multitask_sha256": multitask.config.weights_sha256,
        "base": t2l.spec.base_model,
        "device": str(next(model.parameters()).device),
        "dtype": str(next(model.parameters()).dtype),
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "versions": t2l.versions(),
    }
    write_text(out, "\n".join([json.dumps({"run": header}), *lines]) + "\n")


def _adapter(kind: str, question: Question, written: dict[str, Adapter], shared: Adapter) -> Adapter | None:
    if kind == "none":
        return None
    if kind == "multi-task":
        return shared
    texts = {"right": question.description, "wrong": question.wrong_description, "random": question.random_text}
    return written[texts[kind]]


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def adapter_id(adapter: Adapter) -> str:
    """Content hash of an adapter's weights."""
    digest = hashlib.sha256()
    for tensor in (*adapter.lora.a, *adapter.lora.b):
        digest.update(tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    adapters: Sequence[Adapter | None],
    *,
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """Greedy continuations, batched by length, one adapter per sequence (None everywhere means the plain base)."""
    ids = tokenizer(list(prompts), add_special_tokens=False).input_ids
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    answers = [""] * len(ids)
    device = next(model.parameters()).device
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = max(len(ids[i]) for i in chosen)
        tokens = torch.full((len(chosen), longest), tokenizer.pad_token_id)
        mask = torch.zeros(len(chosen), longest, dtype=torch.long)
        for row, i in enumerate(chosen):
            tokens[row, longest - len(ids[i]) :] = torch.tensor(ids[i])
            mask[row, longest - len(ids[i]) :] = 1
        options = {
            "input_ids": tokens.to(device),
            "attention_mask": mask.to(device),
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "pad_token_id": tokenizer.pad_token_id,
        }
        used = [adapters[i] for i in chosen]
        present = [adapter for adapter in used if adapter is not None]
        if present:
            assert len(present) == len(used), "a batch has adapters for all sequences or for none"
            with applied(model, present):
                output = model.generate(**options)
        else:
            output = model.generate(**options)
        for row, i in enumerate(chosen):
            answers[i] = tokenizer.decode(output[row, longest:], skip_special_tokens=True).strip()
    return answers


def run(
    checkpoint: str,
    multitask: str,
    out: Path,
    *,
    per_task: int = 2,
    held_out: int = 4,
    seed: int = 0,
    batch_size: int = 64,
    device: str | None = None,
    log: Callable[[str], None] = print,
) -> None:
    """The whole measurement: load, draw, answer, write. See `judge`."""
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    questions = sni_suites(per_task=per_task, held_out=held_out, seed=seed)
    loaded = TextToLora.from_pretrained(checkpoint, device=chosen)
    reference = loaded.spec.base_model
    dtype = torch.bfloat16 if chosen == "cuda" else torch.float32
    base = (models.load_causal_lm(reference, device=chosen, dtype=dtype), models.load_tokenizer(reference))
    shared = TextToLora.from_pretrained(multitask, device=chosen)
    judge(loaded, shared, questions, out, base=base, seed=seed, batch_size=batch_size, log=log)
