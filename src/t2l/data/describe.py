"""Asks a chat endpoint for further descriptions of tasks, and writes them down task by task.

Knows tasks and one question to an endpoint.
"""

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from t2l.encoder import check_description
from t2l.endpoint import Endpoint, Say, call, choice, short
from t2l.errors import DataError, DescriptionError, DownloadError, OutputError
from t2l.io import parse_json
from t2l.tasks import Task, load_descriptions

TEMPERATURE = 1.0
MAX_CHARACTERS = 1000
"""A longer text is no description but an answer that went astray."""
SHOWN_DESCRIPTIONS, SHOWN_EXAMPLES, SHOWN_CHARACTERS = 6, 4, 600
ROUNDS = 3
"""How often a task is asked about before too few usable descriptions are an error or are accepted."""


def ask(endpoint: Endpoint, messages: list[dict[str, str]], *, say: Say, sleep: Callable[[float], None]) -> str:
    """The text of the answer.

    Raises:
        DownloadError: as in `t2l.endpoint.call`.
    """
    body = {"model": endpoint.model, "messages": messages, "temperature": TEMPERATURE}
    return choice(call(endpoint, "chat/completions", body, say=say, sleep=sleep), endpoint, "message", "content")


def make_messages(task: Task, known: Sequence[str], number: int) -> list[dict[str, str]]:
    """What is asked. Test examples are never shown."""
    examples = [*task.examples.get("train", ()), *task.examples.get("val", ())][:SHOWN_EXAMPLES]
    parts = ["A task for a language model is described like this:"]
    parts += [f"- {_clip(text)}" for text in known[:SHOWN_DESCRIPTIONS]]
    if examples:
        parts += ["", "Examples of its inputs and right outputs:"]
        parts += [f"Input: {_clip(e.input)}\nOutput: {_clip(e.outputs[0])}" for e in examples]
    parts += [
        "",
        f"Write {number} further descriptions of this same task. Each says what to do and what the answer looks like, "
        "is worded differently from all others, has one to three sentences, and quotes no example. Answer with a JSON "
        f"list of {number} strings and nothing else.",
    ]
    system = "You write clear descriptions of tasks. You answer with valid JSON only."
    return [{"role": "system", "content": system}, {"role": "user", "content": "\n".join(parts)}]


def _clip(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


def read_answer(content: str, known: Sequence[str]) -> list[str]:
    """The usable descriptions of an answer: valid, short enough, and not there already.

    Raises:
        DataError: if the answer holds no JSON list of texts.
    """
    start, end = content.find("["), content.rfind("]")
    try:
        found = parse_json(content[start : end + 1], "the answer", DataError)
    except DataError as error:
        raise DataError(f"the answer holds no JSON list: “{' '.join(content.split())[:120]}”") from error
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise DataError("the answer is no JSON list of texts")
    seen = {_plain(text) for text in known}
    usable = []
    for text in found:
        try:
            checked = check_description(text)
        except DescriptionError:
            continue
        if len(checked) <= MAX_CHARACTERS and _plain(checked) not in seen:
            seen.add(_plain(checked))
            usable.append(checked)
    return usable


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold())) or text


# ----------------------------------------------------------------------------------------------------- writing


def describe(
    tasks: Sequence[Task],
    out: Path,
    endpoint: Endpoint,
    *,
    number: int = 8,
    resume: bool = False,
    say: Say = lambda text: None,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Writes one line {task, description: [...]} for each task as soon as it is answered.

    Args:
        tasks: What is described.
        out: JSONL file; `t2l.tasks.load_descriptions` reads it.
        endpoint: Whom to ask.
        number: Descriptions for each task.
        resume: Go on with a file that an interrupted run left.
        say: Receives what the user should know.
        sleep: Pauses between attempts.

    Returns:
        How many tasks were written now.

    Raises:
        OutputError: if the file exists and `resume` is off, or cannot be written.
        DownloadError: if the endpoint fails for good; lines written so far stay.
        DataError: if it answers, but never with usable descriptions.
    """
    done = _finished(out, resume)
    written = 0
    todo = [task for task in tasks if task.name not in done]
    for task in todo:
        try:
            texts = _ask_until_enough(task, endpoint, number, say, sleep)
        except (DownloadError, DataError) as error:
            kept = f"{len(done) + written} of {len(tasks)} tasks are in {out}"
            raise type(error)(f"{task.name}: {error}. {kept}; go on with --resume") from error
        if len(texts) < number:
            say(f"{task.name}: only {len(texts)} of {number} descriptions could be used")
        _append(out, {"task": task.name, "description": texts})
        written += 1
        say(f"{task.name}: {len(texts)} descriptions ({len(done) + written} of {len(tasks)} tasks)")
    return written


def _finished(out: Path, resume: bool) -> set[str]:
    if not out.exists():
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"Cannot write to {out.parent}: {error.strerror}") from error
        return set()
    if not resume:
        raise OutputError(f"{out} exists already; pass --resume to go on with it, or choose another file")
    try:
        data = out.read_bytes()
        if not data.endswith(b"\n"):  # a line that an interruption cut
            os.truncate(out, data.rfind(b"\n") + 1)
    except OSError as error:
        raise OutputError(f"Cannot go on with {out}: {error.strerror}") from error
    return set(load_descriptions(out)) if out.stat().st_size else set()


def _append(out: Path, row: dict[str, Any]) -> None:
    """One line in one write, on the disk before the next task is asked about."""
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
    try:
        with out.open("ab", buffering=0) as file:
            file.write(line)
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"Cannot write {out}: {error.strerror}") from error


def _ask_until_enough(
    task: Task, endpoint: Endpoint, number: int, say: Say, sleep: Callable[[float], None]
) -> list[str]:
    known, found = list(task.descriptions), list[str]()
    problem: DataError | None = None
    for _ in range(ROUNDS):
        content = ask(endpoint, make_messages(task, known, number - len(found)), say=say, sleep=sleep)
        try:
            new = read_answer(content, [*known, *found])
        except DataError as error:
            problem = error
            say(f"{task.name}: {short(str(error), endpoint)}; asking again")
            continue
        found = [*found, *new][:number]
        if len(found) == number:
            return found
    if not found:
        why = short(str(problem), endpoint) if problem else "all descriptions were blank, too long or there already"
        raise DataError(f"no usable descriptions after {ROUNDS} answers: {why}")
    return found
