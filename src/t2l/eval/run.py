"""Asks every instance under every condition and appends one line an answer; what is there is not asked again.

Knows suites, conditions and a base model. What the answers mean is computed by `report`, from the file alone.
"""

import dataclasses
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2l import hub
from t2l.errors import ConfigError, DataError, EvaluationError
from t2l.eval import answers, backends, requests, suites
from t2l.eval.adapters import AdapterCache
from t2l.eval.answers import Key, key_of
from t2l.eval.arrow import arrow
from t2l.eval.backends import Backend
from t2l.eval.conditions import Condition, can_show, choose_conditions, reasons
from t2l.eval.report import below_floor, gather
from t2l.eval.requests import Line, Request
from t2l.eval.sources import BaseModels, MultitaskLora, Sources, base_model_of, load_sources, shipped_multitask
from t2l.eval.suites import EvalInstance, EvalTask
from t2l.io import only_writer, write_text, writing
from t2l.library import AdapterLibrary
from t2l.pace import Pace
from t2l.text_to_lora import TextToLora
from t2l.versions import versions

Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is run; everything that can change an answer is recorded in the file's first line."""

    suites: tuple[str, ...]
    conditions: str = "standard"
    checkpoint: str | None = None
    multitask: str | None = None
    """The multi-task LoRA; for a checkpoint that ships with the package the one that ships beside it, if absent."""
    hyperdecoders: str | None = None
    libraries: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    per_task: int | None = None
    """Items of each task; None means 20, and 500 of a benchmark."""
    full: bool = False
    """All items."""
    held_out: int = 4
    """For the suite `seen` only: how many of a task's last descriptions training has not read."""
    max_new_tokens: int | None = None
    """Limit of an answer in place of each suite's own."""
    base: str | None = None
    """The base model, where no checkpoint or library says it."""
    device: str | None = None
    backend: str = "transformers"
    """Who answers, see `backends.open_backend`."""
    served_model: str | None = None
    """A server's name of the base model."""
    server: backends.Server = "vllm"
    """A server's way to address adapters."""
    adapter_folder: Path | None = None
    """A folder that the server sees; adapters that it lacks are written there and loaded."""
    batch_tokens: int | None = None
    allow_code_execution: bool = False
    check_floor: bool = True

    def items_of(self, suite: str) -> int | None:
        """Items of each task of a suite; None for all."""
        if self.full:
            return None
        return self.per_task or (500 if suite in ("benchmarks", "likelihood") else 20)


def run(settings: Settings, out: str | Path, *, log: Log = print) -> None:
    """Loads, asks, writes; the same call goes on after an interruption.

    Args:
        settings: What to run.
        out: JSONL file of answers; it is appended to if it holds answers of the same run.
        log: Where progress goes.

    Raises:
        ConfigError: if settings do not go together, or the file is of another run.
        EvaluationError: if a check of the scoring itself fails; the answers are kept.
        OutputError: if the file cannot be written.
    """
    out = Path(out)
    with opened(settings, log=log) as ready, only_writer(out):
        evaluate(ready, out, settings=settings, log=log)


@dataclass(frozen=True)
class Ready:
    """Everything that answers are got by."""

    adapters: AdapterCache
    backend: Backend
    tasks: list[EvalTask]
    chosen: list[Condition]
    header: dict[str, Any]
    """Facts of the run, the first line of its file."""


@contextmanager
def opened(settings: Settings, *, log: Log) -> Iterator[Ready]:
    """Loads what a run needs; errors as `run`."""
    chosen = choose_conditions(settings.conditions)
    if settings.backend != "transformers" and "likelihood" in settings.suites:
        raise ConfigError(
            f"Suite likelihood needs --backend transformers, got {settings.backend}: other backends give answers, not "
            "the likelihoods of all choices. Run it to a file of its own"
        )
    bases, sources = _load(settings)
    adapters = AdapterCache(bases.pair, sources, log=log)
    tasks = _load_tasks(settings, sources, log)
    unshown = [condition.name for condition in chosen if not any(can_show(condition, task) for task in tasks)]
    left_out = dict.fromkeys(unshown, "fewer than three training examples to show") | sources.left_out(chosen)
    if settings.backend != "transformers":
        needs = "it needs the base model's weights here, so --backend transformers"
        left_out |= {condition.name: needs for condition in chosen if condition.adapter == "arrow"}
    if left_out:
        log(f"conditions left out: {'; '.join(reasons(left_out))}")
    chosen = [condition for condition in chosen if condition.name not in left_out]
    if not chosen:
        raise ConfigError("No condition is left to run")
    with backends.open_backend(
        settings.backend,
        bases.pair,
        reference=bases.reference,
        device=bases.device,
        rank=sources.rank,
        server=settings.server,
        served_model=settings.served_model,
        folder=settings.adapter_folder,
        log=log,
    ) as backend:
        header = _header(settings, adapters, backend.facts(), bases.reference, tasks, chosen, left_out)
        yield Ready(adapters, backend, tasks, chosen, header)


def _load(settings: Settings) -> tuple[BaseModels, Sources]:
    """The base model, and what adapters come from."""
    device = hub.best_device(settings.device)
    libraries = tuple(AdapterLibrary.open(Path(folder)) for folder in settings.libraries)
    multitask = settings.multitask or shipped_multitask(settings.checkpoint)
    references = settings.checkpoint, multitask, settings.hyperdecoders
    reference = settings.base or base_model_of(references, libraries)
    if reference is None:
        raise ConfigError("Nothing says which base model is evaluated: give --checkpoint, --library or --base")
    bases = BaseModels(reference, device=device, answers_here=settings.backend == "transformers")
    return bases, load_sources(bases, *references, libraries)


def _load_tasks(settings: Settings, sources: Sources, log: Log) -> list[EvalTask]:
    """The tasks of all suites whose descriptions the encoder can read."""
    found = [
        dataclasses.replace(task, max_new_tokens=settings.max_new_tokens or task.max_new_tokens)
        for suite in settings.suites
        for task in suites.load_suite(suite, per_task=settings.items_of(suite), held_out=settings.held_out)
    ]
    tasks, unread = suites.readable(found, sources.fits)
    if unread:
        log(
            f"{len(unread)} tasks are left out: the encoder cannot read descriptions as long as those of "
            f"{', '.join(unread[:5])}"
        )
    if not tasks:
        raise DataError("No task is left to evaluate: every description is too long for the checkpoint's encoder")
    return tasks


def evaluate(
    ready: Ready,
    out: Path,
    *,
    settings: Settings,
    part: tuple[int, int] = (0, 1),
    there: Collection[Key] = (),
    log: Log = print,
) -> None:
    """`run` with everything loaded.

    Args:
        ready: What answers are got by.
        out: File of answers.
        settings: What to run.
        part: Which of how many parts of the tasks are asked.
        there: Answers that another file has.
        log: Where progress goes.

    Raises:
        ConfigError, EvaluationError, OutputError: as `run`.
    """
    adapters, backend = ready.adapters, ready.backend
    if settings.allow_code_execution:
        _require_sandbox()
    done = answers.open_for_appending(out, ready.header) | set(there)
    instances = suites.instances(ready.tasks, settings.seeds, fits=adapters.sources.fits)
    # Drawn for all tasks, so that a part's instances are those of the whole.
    mine = {(task.suite, task.name) for task in ready.tasks[part[0] :: part[1]]}
    instances = [instance for instance in instances if (instance.task.suite, instance.task.name) in mine]
    asked = requests.make_requests(instances, ready.chosen, adapters)
    if settings.allow_code_execution:
        _score_code(out, asked, log)
    asked = [request for request in asked if request.key not in done]
    log(f"{len(asked):,} answers to get, {len(done):,} in {out} already")
    progress = Pace(len(asked), "answers", log)
    floor, plain, adapted, routed = requests.stages(requests.merge_duplicates(asked, adapters))
    with writing(out), out.open("a", encoding="utf-8") as file:

        def write_answers(part: Sequence[Request]) -> None:
            for answered in requests.answer(part, adapters, backend, batch_tokens=settings.batch_tokens):
                if settings.allow_code_execution:
                    _run_code([(request.instance, line) for request, line in answered])
                lines = [line for request, first in answered for line in requests.with_duplicates(request, first)]
                file.write("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))
                file.flush()
                progress.add(len(lines))

        try:
            write_answers(floor)
            if settings.check_floor:
                require_floor(out)
            adapters.prepare((request.condition, request.instance) for request in adapted)
            write_answers(plain)
            write_answers(adapted)
            if routed and adapters.sources.training is not None:
                with arrow(adapters.model, adapters.sources.training):
                    write_answers(routed)
        except KeyboardInterrupt:
            log(f"interrupted: the answers so far are in {out}; the same command goes on")
            raise
    log(f"{out} is complete")


def require_floor(out: Path) -> None:
    """Checks the base model's likelihood scores against chance.

    Raises:
        EvaluationError: if an interval lies below.
    """
    low = [text for suite in gather([answers.read(out)], partial=True) for text in below_floor(suite)]
    if low:
        raise EvaluationError(
            f"The base model scores below what ignoring the question gives on {'; '.join(low)}: the scoring or the "
            f"prompt must be wrong. The answers are in {out}; --skip-floor-check goes on regardless"
        )


def _header(
    settings: Settings,
    adapters: AdapterCache,
    backend: backends.Facts,
    reference: str,
    tasks: Sequence[EvalTask],
    chosen: Sequence[Condition],
    left_out: dict[str, str],
) -> dict[str, Any]:
    """Facts of a run; those that `answers.FACTS` names must be equal to go on with a file."""
    sources = adapters.sources

    def checksum(loaded: TextToLora | MultitaskLora | None) -> str | None:
        return None if loaded is None else loaded.config.weights_sha256

    return {
        "format_version": answers.FORMAT_VERSION,
        "base": _public(reference),
        "base_revision": hub.fingerprint(reference),
        "backend": backend.name,
        "served_model": backend.model,
        "dtype": backend.dtype,
        "checkpoint": settings.checkpoint and _public(settings.checkpoint),
        "checkpoint_sha256": checksum(sources.checkpoint),
        "description_in_training_prompts": sources.checkpoint and sources.checkpoint.prompt.description_in_prompt,
        "multitask_sha256": checksum(sources.multitask),
        "hyperdecoders_sha256": checksum(sources.hyperdecoders),
        "library_sha256": [library.checksum for library in sources.libraries],
        "per_task": "all" if settings.full else settings.per_task,
        "held_out": settings.held_out,
        "max_new_tokens": settings.max_new_tokens,
        "versions": versions() | backend.versions,
        "seeds": list(settings.seeds),
        "conditions": [condition.name for condition in chosen],
        "left_out": left_out,
        "suites": {
            suite: _suite_facts([task for task in tasks if task.suite == suite])
            for suite in dict.fromkeys(task.suite for task in tasks)
        },
        "device": backend.device,
        "batch_tokens": settings.batch_tokens,
    }


def _suite_facts(tasks: Sequence[EvalTask]) -> dict[str, Any]:
    return {
        "kind": sorted({task.kind for task in tasks}),
        "tasks": len(tasks),
        "items": sum(len(task.items) for task in tasks),
        "chance": {task.name: round(task.chance, 4) for task in tasks if task.chance},
        "floor": {task.name: round(task.floor, 4) for task in tasks if task.chance},
        "questions": [] if tasks[0].suite in suites.PACKED else suites.questions(tasks),
    }


def _public(reference: str) -> str:
    """A reference as files show it: of a local folder its name alone, as files are passed on and folders are not.

    A training calls its result `checkpoint`: there the name of the run says more.
    """
    folder = Path(reference)
    if not folder.is_dir():
        return reference
    folder = folder.resolve()
    return f"{folder.parent.name}/{folder.name}" if folder.name == "checkpoint" else folder.name


# ------------------------------------------------------------------------------------------------- code that is run


def _require_sandbox() -> None:
    """Raises EvaluationError where code cannot be isolated."""
    from t2l.eval import sandbox

    reason = sandbox.available()
    if reason is not None:
        raise EvaluationError(f"--allow-code-execution: no code is run here, because {reason}")


def _run_code(answered: Iterable[tuple[EvalInstance, Line]]) -> None:
    """Runs answers in code in the sandbox and fills their scores in."""
    from t2l.eval import sandbox

    chosen = [(i, line) for i, line in answered if i.task.kind == "code" and line["scores"]["correct"] is None]
    programs = [suites.program(instance.item, line["answer"]) for instance, line in chosen]
    different = list(dict.fromkeys(programs))  # conditions and seeds often give the same answer
    outcomes = dict(zip(different, sandbox.run_many(different, allow=True), strict=True))
    for (_, line), program in zip(chosen, programs, strict=True):
        line["scores"]["correct"] = float(outcomes[program].ok)


def _score_code(out: Path, asked: Sequence[Request], log: Log) -> None:
    """Runs code of answers that were written without --allow-code-execution."""
    file = answers.read(out)
    by_key = {request.key: request.instance for request in asked}
    unscored = [
        (by_key[key_of(line)], line)
        for line in file.lines
        if key_of(line) in by_key and line["scores"].get("correct", 0.0) is None
    ]
    if unscored:
        log(f"running {len(unscored)} answers in code that are there already")
        _run_code(unscored)
        write_text(out, answers.to_text(file.header, file.lines))
