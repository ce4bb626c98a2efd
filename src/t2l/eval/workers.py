"""Evaluation on many workers: each holds the base and answers parts of the tasks, and their answers become one file.

A part's answers grow in a file of its own, beside the one they are for, which a new worker goes on with when one dies.
"""

import dataclasses
import json
import shutil
from contextlib import ExitStack
from pathlib import Path

from t2l import fanout
from t2l.eval import answers
from t2l.eval.run import Log, Settings, evaluate, opened, require_floor
from t2l.hub import best_device
from t2l.io import only_writer, writing
from t2l.pace import Pace

PARTS = 32
"""Of the tasks; which task is in which part does not depend on the number of workers."""


class Worker:
    """What one worker does: it loads everything once and answers the parts that it is given.

    Args:
        settings: As for one process.
        out: The file of answers that all parts are for.
    """

    def __init__(self, settings: Settings, out: Path) -> None:
        self.settings, self.out = settings, out
        self.ready = ExitStack().enter_context(opened(settings, log=_quiet))

    def __call__(self, number: int) -> int:
        """Gets the answers of a part that neither its file nor the whole one has; returns the part's number."""
        path = part_file(self.out, number)
        there = set()
        if self.out.exists() and self.out.stat().st_size:
            found = answers.read(self.out)
            answers.joined_header(self.out, found.header, self.ready.header)
            there = {answers.key_of(line) for line in found.lines}
        with only_writer(path):
            evaluate(self.ready, path, settings=self.settings, part=(number, PARTS), there=there, log=_quiet)
        return number


def _quiet(line: str) -> None:
    pass


def part_file(out: Path, number: int) -> Path:
    """The file of a part's answers."""
    return out.with_name(f"{out.name}.parts") / f"{number:02d}.jsonl"


def run_on_workers(settings: Settings, out: Path, *, workers: int, log: Log = print) -> None:
    """`run` by workers of Ray; the same call goes on after an interruption, also with another number of workers.

    The floor is checked when all answers are there, because a part has too few for it.

    Args:
        settings: What to run.
        out: JSONL file of answers, in a folder that all workers see.
        workers: How many there are.
        log: Where progress goes.

    Raises:
        ConfigError: if Ray is not installed, settings do not go together, or the file is of another run.
        EvaluationError, OutputError: as `run`.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(out):
        pace = Pace(PARTS, "parts of the tasks", log)
        arguments = (dataclasses.replace(settings, check_floor=False), out)
        for _ in fanout.run(Worker, arguments, range(PARTS), workers=workers, device=best_device(settings.device)):
            pace.add(1)
        files = [answers.read(part_file(out, number)) for number in range(PARTS)]
        done = answers.open_for_appending(out, files[0].header)
        lines = [line for line in answers.merge(files) if answers.key_of(line) not in done]
        with writing(out), out.open("a", encoding="utf-8") as file:
            file.write("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))
        shutil.rmtree(part_file(out, 0).parent)
    if settings.check_floor:
        require_floor(out)
    log(f"{out} is complete")
