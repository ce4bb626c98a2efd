"""The main job, shown: three descriptions become three adapters, which plain PEFT loads onto one base model.

Prints, for every input of `demo_inputs.yaml`, the base model's answer and the answers under the adapter of the right
description and of another task's, all to the same prompt. Run by `make demo`.
"""

import argparse
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from t2l import TextToLora, hub
from t2l.config import build, load_yaml
from t2l.errors import DataError, T2LError
from t2l.prompt import pad_on_the_left, render
from t2l.text_to_lora import DEFAULT

INPUTS = Path(__file__).with_name("demo_inputs.yaml")


@dataclass(frozen=True, kw_only=True)
class DemoInput:
    text: str
    expected: str


@dataclass(frozen=True, kw_only=True)
class DemoTask:
    name: str
    description: str
    inputs: tuple[DemoInput, ...]


@dataclass(frozen=True, kw_only=True)
class Demo:
    tasks: tuple[DemoTask, ...]


def read_tasks(path: Path = INPUTS) -> tuple[DemoTask, ...]:
    tasks = build(Demo, load_yaml(path), where=path.name).tasks
    if len(tasks) < 2:
        raise DataError(f"{path} needs at least two tasks: the wrong description is another task's")
    return tasks


def same(answer: str, expected: str) -> bool:
    """Exactly right: nothing but the expected answer; case and a final full stop do not count."""
    return answer.strip().casefold().removesuffix(".") == expected.casefold()


def answers(model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int) -> list[str]:
    tokens = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt").to(model.device)
    with torch.no_grad():
        output = model.generate(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    new = output[:, tokens["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default=DEFAULT, help="checkpoint folder, Hub id or t2l:NAME")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the adapters")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    args = parser.parse_args()
    # Libraries talk to each other about coming versions; nobody who watches a demo can act on it.
    warnings.simplefilter("ignore", FutureWarning)
    try:
        show(args.checkpoint, args.out, args.max_new_tokens)
    except T2LError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def show(checkpoint: str, out: Path, max_new_tokens: int) -> None:
    console = Console() if sys.stdout.isatty() else Console(width=150)
    tasks = read_tasks()
    start = time.perf_counter()
    generator = TextToLora.from_pretrained(checkpoint)
    base: Any = hub.load_causal_lm(generator.spec.base_model)
    tokenizer: Any = hub.load_tokenizer(generator.spec.base_model)
    pad_on_the_left(tokenizer)
    loaded = time.perf_counter()

    # One forward pass writes all adapters; each folder appears whole or not at all.
    adapters = generator.generate([task.description for task in tasks])
    generated = time.perf_counter()
    folders = [
        adapter.save_pretrained(out / t.name, overwrite=True) for t, adapter in zip(tasks, adapters, strict=True)
    ]
    saved = time.perf_counter()

    # From here on nothing of t2l but the prompt: any program that reads PEFT folders could do this.
    from peft import PeftModel

    model: Any = PeftModel.from_pretrained(base, folders[0], adapter_name=tasks[0].name)
    for task, folder in zip(tasks[1:], folders[1:], strict=True):
        model.load_adapter(folder, adapter_name=task.name)
    model.eval()
    in_prompt = generator.prompt.description_in_prompt
    where = "The description stands in all three prompts" if in_prompt else "The description stands in no prompt"
    console.print(f"Checkpoint [b]{escape(checkpoint)}[/b] for {escape(generator.spec.base_model)}, on {model.device}.")
    console.print(f"{where}: base, right and wrong get the same prompt; only the adapter differs. Greedy decoding.\n")

    count, spent = 0, 0.0
    for position, task in enumerate(tasks):
        wrong = tasks[(position + 1) % len(tasks)]
        prompts = [render(tokenizer, task.description, item.text, generator.prompt) for item in task.inputs]
        before = time.perf_counter()
        with model.disable_adapter():
            columns = [answers(model, tokenizer, prompts, max_new_tokens)]
        for name in (task.name, wrong.name):
            model.set_adapter(name)
            columns.append(answers(model, tokenizer, prompts, max_new_tokens))
        spent += time.perf_counter() - before
        count += 3 * len(prompts)
        print_task(console, task, wrong, folders[position], columns)
        if position == 0:
            console.print("The first prompt, as the model reads it:", style="dim")
            console.print(prompts[0] + "\n", style="dim", markup=False, highlight=False)

    console.print(
        f"Loading {loaded - start:.1f} s; generating {len(tasks)} adapters {generated - loaded:.2f} s, saving them "
        f"{saved - generated:.2f} s; {count} answers in {spent:.1f} s, {spent / count:.2f} s each (in batches)."
    )
    console.print(f"The adapters: {', '.join(map(str, folders))}", highlight=False)


def print_task(console: Console, task: DemoTask, wrong: DemoTask, folder: Path, columns: list[list[str]]) -> None:
    title = f"{task.name}: “{task.description}”\nright adapter: {folder}   wrong adapter: written for “{wrong.name}”"
    table = Table(title=escape(title), title_justify="left", title_style="bold", show_lines=False, expand=True)
    headings = ("input", "expected", "base", "adapter of this description", "adapter of the wrong one")
    for heading, ratio in zip(headings, (6, 2, 5, 4, 4), strict=True):
        table.add_column(heading, ratio=ratio, overflow="fold")
    right = [0, 0, 0]
    for item, *row in zip(task.inputs, *columns, strict=True):
        cells = []
        for kind, answer in enumerate(row):
            hit = same(answer, item.expected)
            right[kind] += hit
            text = escape(" ⏎ ".join(answer.splitlines()) or "(nothing)")
            cells.append(f"[green]✓ {text}[/green]" if hit else f"  {text}")
        table.add_row(escape(item.text), escape(item.expected), *cells)
    console.print(table)
    total = len(task.inputs)
    console.print(
        f"exactly right (case and a final full stop apart): base {right[0]}/{total}, right description "
        f"{right[1]}/{total}, wrong description {right[2]}/{total}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
