"""Exact match after tuning on 0, 8, 32 and 128 examples, from three beginnings, on the choosing tasks.

    python research/few_shot.py run --out few_shot.jsonl
    python research/few_shot.py report few_shot.jsonl
    python research/few_shot.py report few_shot.jsonl --page docs/tuning.md     # the table in the guide, made anew

On one GPU 17 minutes beside other jobs, 40 GB; stopped early, it keeps each finished number and seed:

    python research/few_shot.py run --out few_shot.jsonl --tasks 12 --per-task 30 --seeds 3 --tokens 32768

`run` tunes, for every task, seed and number of examples, the adapter that the checkpoint writes from a description,
the multi-task LoRA, and a fresh LoRA of the same shape; all three see the same examples, the same held-out share and
the same settings. `tune_many` does what `t2l tune` does, many times at once. Each line of the output is one task, seed,
number and beginning with its answers' scores; a run goes on where its file ends. `report` prints the curve: means over
tasks with bootstrap intervals, and the paired differences of the description's adapter to both others.

The rule, fixed before any run: the description's adapter is better at every number up to 32, and never worse.
"""

import argparse
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import exit_code
from tune_many import Job, tune_many

from t2l import hub
from t2l.errors import DataError
from t2l.eval import decode, stats
from t2l.eval.metrics import exact_match
from t2l.eval.suites import EvalTask, load_suite
from t2l.lora import LoraTensors
from t2l.prompt import render, token_ids
from t2l.text_to_lora import LoraAdapter, TextToLora
from t2l.train.tune import TuneConfig

NUMBERS = (0, 8, 32, 128)
STARTS = ("description", "multitask", "scratch")
SUITES = ("held-back", "validation")
"""The choosing tasks: nothing was trained on them, and settings may be chosen on them."""


def run(options: argparse.Namespace) -> None:
    """Writes a line for every task, seed, number of examples and beginning that the file lacks."""
    tasks = [task for suite in SUITES for task in load_suite(suite, per_task=options.per_task)]
    tasks = [task for task in tasks if len(task.shots) >= max(options.numbers)]
    tasks = tasks[:: math.ceil(len(tasks) / options.tasks)] if options.tasks else tasks
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator, base = _load(options.checkpoint, device)
    multitask = TextToLora.from_pretrained(options.multitask, base=base, device=device)
    generator.spec.require_same_shape(multitask.spec, this=options.checkpoint, that=options.multitask)
    done = {_key(row) for row in _read(options.out)} if options.out.exists() else set()
    for number, seed in itertools.product(options.numbers, range(options.seeds)):
        jobs = []
        for task in tasks:
            description = random.Random(f"{task.name}/{seed}").choice(task.descriptions)
            for start in STARTS:
                facts = {"task": task.name, "seed": seed, "examples": number, "start": start}
                if _key(facts) not in done:
                    source = multitask if start == "multitask" else generator
                    (adapter,) = source.generate([description])
                    jobs.append((facts, task, replace(adapter, description=description)))
        began = time.perf_counter()
        rows = _rows(jobs, base, generator, number, options.tokens) if jobs else []
        with options.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        seconds = time.perf_counter() - began
        print(f"{number} examples, seed {seed}: {len(jobs)} adapters in {seconds:.0f} s", file=sys.stderr, flush=True)


def _load(checkpoint: str, device: str) -> tuple[TextToLora, tuple[Any, Any]]:
    from t2l.checkpoint import read_config
    from t2l.text_to_lora import checkpoint_folder

    spec, _ = read_config(checkpoint_folder(checkpoint))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model: Any = hub.load_causal_lm(spec.base_model, device=device, dtype=dtype)
    tokenizer: Any = hub.load_tokenizer(spec.base_model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return TextToLora.from_pretrained(checkpoint, base=(model, tokenizer), device=device), (model, tokenizer)


def _rows(
    jobs: list[tuple[dict[str, Any], EvalTask, LoraAdapter]],
    base: tuple[Any, Any],
    generator: TextToLora,
    number: int,
    tokens: int,
) -> list[dict[str, Any]]:
    """Scores of each job's items after tuning; a fresh LoRA that is not tuned is the base."""
    tuned: list[tuple[LoraTensors, list[float], int]] = []
    if number:
        tunings = []
        for facts, task, adapter in jobs:
            seed, start = facts["seed"], facts["start"]
            chosen = random.Random(f"{task.name}/examples/{seed}").sample(task.shots, len(task.shots))[:number]
            pairs = [(item.text, item.outputs[0]) for item in chosen]
            tunings.append(Job(adapter, pairs, "scratch" if start == "scratch" else "adapter", seed))
        tuned = tune_many(tunings, base, prompt=generator.prompt, config=TuneConfig(), tokens=tokens)
    else:
        for facts, _, adapter in jobs:
            plain = adapter.lora.map(torch.zeros_like) if facts["start"] == "scratch" else adapter.lora
            tuned.append((plain, [], 0))
    ready = [(task, replace(adapter, lora=x[0])) for (_, task, adapter), x in zip(jobs, tuned, strict=True)]
    answers = _answers(ready, base, generator)
    return [
        facts
        | {"held_out_losses": losses, "best_epoch": best}
        | {"scores": {item.id: float(exact_match(found[item.id], item.outputs)) for item in task.items}}
        for (facts, task, _), (_, losses, best), found in zip(jobs, tuned, answers, strict=True)
    ]


def _answers(
    jobs: list[tuple[EvalTask, LoraAdapter]], base: tuple[Any, Any], generator: TextToLora
) -> list[dict[str, str]]:
    """Each job's greedy answers by the items' ids; the prompts of all jobs share batches."""
    model, tokenizer = base
    asked = [(k, item) for k, (task, _) in enumerate(jobs) for item in task.items]
    texts = [render(tokenizer, jobs[k][1].description, item.text, generator.prompt) for k, item in asked]
    prompts, limit = token_ids(tokenizer, texts), max(task.max_new_tokens for task, _ in jobs)
    max_tokens, max_sequences = decode.room(model, generator.spec)
    found: list[dict[str, str]] = [{} for _ in jobs]
    lengths = [len(ids) + limit for ids in prompts]
    for batch in decode.batches(lengths, max_tokens=max_tokens, max_sequences=min(max_sequences, 1024)):
        adapters = [jobs[asked[i][0]][1] for i in batch]
        answers = decode.greedy(model, tokenizer, [prompts[i] for i in batch], adapters, max_new_tokens=limit)
        for i, answer in zip(batch, answers, strict=True):
            found[asked[i][0]][asked[i][1].id] = answer
    return found


# ------------------------------------------------------------------------------------------------------- report


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["task"], row["seed"], row["examples"], row["start"]


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"Cannot read {path}: {error}") from error


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The curve as a Markdown table, over the tasks and seeds that all three beginnings have."""
    lines = [
        "| examples | from the description | from the multi-task LoRA | from scratch | description − multi-task | "
        "description − scratch |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for number in sorted({row["examples"] for row in rows}):
        cells = [
            {_key(row)[:2]: row["scores"] for row in rows if row["examples"] == number and row["start"] == s}
            for s in STARTS
        ]
        shared = sorted(set.intersection(*map(set, cells)))
        if not shared:
            continue
        scores: list[stats.Scores] = []
        for cell in cells:
            found: stats.Scores = {}
            for task, seed in shared:
                for item, value in cell[task, seed].items():
                    found.setdefault(task, {}).setdefault(item, []).append(value)
            scores.append(found)
        means = " | ".join(str(stats.estimate(found)) for found in scores)
        differences = " | ".join(str(stats.difference(scores[0], other)) for other in scores[1:])
        lines.append(f"| {number} | {means} | {differences} |")
    if len(lines) == 2:
        raise DataError("No number of examples has answers from all three beginnings")
    return "\n".join(lines) + "\n"


BEGIN, END = "<!-- by research/few_shot.py -->\n", "<!-- end -->"


def put(page: Path, table: str) -> None:
    """Replaces what stands between a page's two marks.

    Raises:
        DataError: if the page has no such marks.
    """
    text = page.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise DataError(f"{page} has no lines {BEGIN.strip()} and {END} for the table to stand between; add them")
    page.write_text(head + begin + table + end + tail, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--out", type=Path, required=True)
    running.add_argument("--checkpoint", default="t2l:smollm2-135m")
    running.add_argument("--multitask", default="t2l:smollm2-135m-multitask")
    running.add_argument("--seeds", type=int, default=3)
    running.add_argument("--per-task", type=int, default=50)
    running.add_argument("--numbers", type=int, nargs="+", default=list(NUMBERS))
    running.add_argument("--tasks", type=int, default=0, help="so many tasks at most, evenly taken; 0 for all")
    running.add_argument("--tokens", type=int, default=16384, help="tokens of a training batch, padding included")
    reporting = commands.add_parser("report")
    reporting.add_argument("file", type=Path)
    reporting.add_argument("--page", type=Path, help="write the table into this page, between its two marks")
    options = parser.parse_args(arguments)
    if options.command == "run":
        run(options)
        return
    table = report(_read(options.file))
    if options.page is not None:
        put(options.page, table)
    print(table, end="")


if __name__ == "__main__":
    sys.exit(exit_code(main))
