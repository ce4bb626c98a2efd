"""Asks every question under every row and appends one line an answer; what is there already is not asked again.

Knows suites, rows and a base model. What the answers mean is computed by `report`, from the file alone.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from t2l import hub
from t2l.errors import ConfigError, DataError, EvaluationError, OutputError
from t2l.eval import answers, backends, conditions, decode, metrics, suites
from t2l.eval.answers import Key, key_of
from t2l.eval.arrow import arrow
from t2l.eval.backends import Backend
from t2l.eval.conditions import AdapterSource, Row
from t2l.eval.report import below_floor, gather
from t2l.eval.suites import Question
from t2l.io import write_text
from t2l.library import AdapterLibrary
from t2l.pace import Pace
from t2l.prompt import spaced, token_ids
from t2l.text_to_lora import TextToLora

Log = Callable[[str], None]
NEED_WEIGHTS = ("arrow", "t2l-best-of")
"""Adapters that are no plain LoRA of one prompt, or are made with the base model: no other backend serves them."""
ROUTED = 2**31
"""Arrow's routing holds tokens x adapters x rank numbers at a time; its batches are kept under this."""
LIKELIHOOD_TOKENS = 2**18
"""Most tokens that a batch of likelihoods is counted from where the user says nothing: larger ones are no faster."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is run; everything that can change an answer is recorded in the file's first line."""

    suites: tuple[str, ...]
    rows: str = "standard"
    checkpoint: str | None = None
    multitask: str | None = None
    hyperdecoders: str | None = None
    libraries: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    per_task: int | None = None
    """Items of each task; None means 20, and 500 of a benchmark."""
    full: bool = False
    """All items."""
    held_out: int = 4
    """`seen` only: how many of a task's last descriptions training has not read."""
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


@dataclass(frozen=True)
class Asked:
    """A question under a row."""

    row: Row
    question: Question
    prompt: str
    ids: list[int]
    twins: tuple["Asked", ...] = ()
    """Others with the same prompt and adapter, such as the base model's under another seed: answered along."""

    @property
    def key(self) -> Key:
        """What tells its answer from all others."""
        q = self.question
        return q.task.suite, self.row.name, q.seed, q.task.name, q.item.id


def run(settings: Settings, out: Path, *, log: Log = print) -> None:
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
    chosen = conditions.choose_rows(settings.rows)
    here = settings.backend == "transformers"
    if not here and "likelihood" in settings.suites:
        raise ConfigError(
            f"Suite likelihood needs --backend transformers, got {settings.backend}: other backends give answers, not "
            "the likelihoods of all choices. Run it to a file of its own"
        )
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = {
        name: None if reference is None else TextToLora.from_pretrained(reference, device=device)
        for name, reference in (
            ("checkpoint", settings.checkpoint),
            ("multitask", settings.multitask),
            ("hyperdecoders", settings.hyperdecoders),
        )
    }
    libraries = [AdapterLibrary.open(Path(folder)) for folder in settings.libraries]
    specs = [x.spec for x in (*loaded.values(), *libraries) if x is not None]
    reference = settings.base or (specs[0].base_model if specs else None)
    if reference is None:
        raise ConfigError("Nothing says which base model is judged: give --checkpoint, --library or --base")
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = hub.load_causal_lm(reference, device=device, dtype=dtype) if here else hub.load_meta_model(reference)
    base = (model, hub.load_tokenizer(reference))
    source = AdapterSource(base, **loaded, libraries=libraries, held_out=settings.held_out, log=log)
    tasks = [
        dataclasses.replace(task, max_new_tokens=settings.max_new_tokens or task.max_new_tokens)
        for suite in settings.suites
        for task in suites.load_suite(suite, per_task=settings.items_of(suite), held_out=settings.held_out)
    ]
    tasks, unread = suites.readable(tasks, source.fits)
    if unread:
        log(
            f"{len(unread)} tasks are left out: the encoder cannot read descriptions as long as those of "
            f"{', '.join(unread[:5])}"
        )
    if not tasks:
        raise DataError("No task is left to judge: every description is too long for the checkpoint's encoder")
    left_out = source.left_out(chosen)
    if not here:
        needs = "it needs the base model's weights here, so --backend transformers"
        left_out |= {row.name: needs for row in chosen if row.adapter in NEED_WEIGHTS or row.way in NEED_WEIGHTS}
    for name, why in left_out.items():
        log(f"row {name} is left out: {why}")
    chosen = [row for row in chosen if row.name not in left_out]
    if not chosen:
        raise ConfigError("No row is left to run")
    with backends.open_backend(
        settings.backend,
        base,
        reference=reference,
        device=device,
        rank=max((spec.rank for spec in specs), default=1),
        server=settings.server,
        served_model=settings.served_model,
        folder=settings.adapter_folder,
        log=log,
    ) as backend:
        header = _header(settings, source, backend.facts(), reference, tasks, chosen, left_out)
        judge(source, backend, tasks, chosen, out, header=header, settings=settings, log=log)


def judge(
    source: AdapterSource,
    backend: Backend,
    tasks: Sequence[suites.JudgedTask],
    chosen: Sequence[Row],
    out: Path,
    *,
    header: dict[str, Any],
    settings: Settings,
    log: Log = print,
) -> None:
    """`run` with everything loaded; see there."""
    if settings.allow_code_execution:
        _require_sandbox()
    done = answers.open_for_appending(out, header)
    asked = [
        Asked(row, question, text, [])
        for question in suites.questions(tasks, settings.seeds, fits=source.fits)
        for row in chosen
        if source.has(row, question)
        for text in (conditions.prompt_of(row, question, source.tokenizer),)
    ]
    if settings.allow_code_execution:
        _score_code(out, asked, log)
    asked = [a for a in asked if a.key not in done]
    log(f"{len(asked):,} answers to get, {len(done):,} in {out} already")
    number = len(asked)
    texts = list(dict.fromkeys(a.prompt for a in asked))
    ids = dict(zip(texts, token_ids(source.tokenizer, texts), strict=True)) if texts else {}
    same: dict[Any, list[Asked]] = {}
    for a in asked:
        task = a.question.task
        identity = (a.prompt, source.identity(a.row, a.question), task.suite, task.name, a.question.item.id)
        same.setdefault(identity, []).append(a)
    asked = [dataclasses.replace(a, ids=ids[a.prompt], twins=tuple(others)) for a, *others in same.values()]
    progress = Pace(number, "answers", log)
    try:
        with out.open("a", encoding="utf-8") as file:

            def write(lines: Iterable[dict[str, Any]]) -> None:
                text = [json.dumps(line, ensure_ascii=False) for line in lines]
                file.write("".join(f"{line}\n" for line in text))
                file.flush()
                progress.add(len(text))

            floor, plain, adapted, routed = _stages(asked)
            for line in _answer(source, backend, floor, settings):
                write(line)
            if settings.check_floor:
                require_floor(out)
            source.prepare((a.row, a.question) for a in adapted)
            for part in (plain, adapted, routed):
                if part:
                    with arrow(source.model, source.training[0]) if part is routed else nullcontext():
                        for line in _answer(source, backend, part, settings):
                            write(line)
    except OSError as error:
        raise OutputError(f"Cannot write answers to {out}: {error.strerror or error}") from error
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


def _stages(asked: Sequence[Asked]) -> tuple[list[Asked], ...]:
    """The base's likelihoods first (the floor check), then the plain base, adapters, and Arrow's own model."""
    stages: tuple[list[Asked], ...] = ([], [], [], [])
    for a in asked:
        if a.row.adapter == "base":
            stages[0 if a.question.task.kind == "likelihood" else 1].append(a)
        else:
            stages[3 if a.row.adapter == "arrow" else 2].append(a)
    return stages


def _answer(
    source: AdapterSource, backend: Backend, asked: Sequence[Asked], settings: Settings
) -> Iterator[list[dict[str, Any]]]:
    """Lines of one batch after the other."""
    # Together what can share a batch: adapters of one shape, and answers of one limit.
    groups: dict[Any, list[Asked]] = {}
    for a in asked:
        task = a.question.task
        votes = max(1, len(source.keys(a.row, a.question)))
        group = (task.kind == "likelihood", task.max_new_tokens, votes, source.shape(a.row))
        groups.setdefault(group, []).append(a)
    for (likelihood, limit, votes, _), part in groups.items():
        # Another backend makes its own batches; these are what an interruption loses.
        tokens, sequences = decode.room(source.model, source.spec(part[0].row))
        tokens = settings.batch_tokens or (min(tokens, LIKELIHOOD_TOKENS) if likelihood else tokens)
        if part[0].row.adapter == "arrow":
            library = source.training[0]
            tokens = max(1, min(tokens, ROUTED // (library.spec.rank * len(library.names))))
        if likelihood:
            # Every token of a choice meets the whole vocabulary: logits are what takes memory.
            yield from _likelihoods(source, part, max(1, tokens // 4))
            continue
        lengths = [len(a.ids) + limit for a in part]
        for batch in decode.batches(lengths, max_tokens=tokens // votes, max_sequences=max(1, sequences // votes)):
            chosen = [part[i] for i in batch]
            decode.require_room(source.model, len(chosen[0].ids) + limit, f"{chosen[0].key}")
            used = _adapters(source, chosen)
            said = backend.answers(
                [a.prompt for a in chosen for _ in range(votes)],
                [adapter for mine in used for adapter in (mine or (None,))],
                limit,
            )
            lines = []
            for n, a in enumerate(chosen):
                mine = said[n * votes : (n + 1) * votes]
                won = metrics.vote(mine)
                text = mine[won] if a.question.task.kind == "code" else mine[won].strip()
                adapter = used[n][won] if used[n] else None
                lines.append((a, _line(a, adapter, text, suites.score(a.question, text))))
            if settings.allow_code_execution:
                _run_code([(a.question, line) for a, line in lines])
            yield [line for a, first in lines for line in _with_twins(a, first)]


def _likelihoods(source: AdapterSource, asked: Sequence[Asked], budget: int) -> Iterator[list[dict[str, Any]]]:
    """Each choice is a sequence; a question's choices share a batch."""
    space = {row: source.answer_space(row) for row in {a.row for a in asked}}
    choices = {a.key: [spaced(choice, space[a.row]) for choice in a.question.item.choices] for a in asked}
    texts = sorted({choice for found in choices.values() for choice in found})
    ids = dict(zip(texts, token_ids(source.tokenizer, texts), strict=True))
    lengths = [(len(a.ids) + max(len(ids[c]) for c in choices[a.key])) * len(choices[a.key]) for a in asked]
    for batch in decode.batches(lengths, max_tokens=budget):
        chosen = [asked[i] for i in batch]
        used = _adapters(source, chosen)
        pairs = [(n, choice) for n, a in enumerate(chosen) for choice in choices[a.key]]
        longest = max(len(chosen[n].ids) + len(ids[choice]) for n, choice in pairs)
        decode.require_room(source.model, longest, f"A question of {chosen[0].key}")
        each = [adapter for n, _ in pairs for adapter in used[n]] or None
        values = decode.log_likelihoods(
            source.model, source.tokenizer, [chosen[n].ids for n, _ in pairs], [ids[c] for _, c in pairs], each
        )
        lines: list[dict[str, Any]] = []
        start = 0
        for a, adapters in zip(chosen, used, strict=True):
            mine = values[start : start + len(a.question.item.choices)]
            start += len(mine)
            rounded = [round(value, 3) for value in mine]
            adapter = adapters[0] if adapters else None
            lines += _with_twins(a, _line(a, adapter, rounded, suites.score_likelihoods(a.question, mine)))
        yield lines


def _adapters(source: AdapterSource, chosen: Sequence[Asked]) -> list[tuple[conditions.UsedAdapter, ...]]:
    """Each question's adapters; rows are looked up together, because some write theirs only now."""
    found: dict[int, tuple[conditions.UsedAdapter, ...]] = {}
    for row in {a.row for a in chosen}:
        mine = [i for i, a in enumerate(chosen) if a.row == row]
        found |= dict(zip(mine, source.of(row, [chosen[i].question for i in mine]), strict=True))
    assert len({len(adapters) for adapters in found.values()}) == 1, "questions of a batch have equally many adapters"
    return [found[i] for i in range(len(chosen))]


def _line(
    a: Asked,
    adapter: conditions.UsedAdapter | None,
    answer: str | list[float],
    scores: dict[str, float | None],
) -> dict[str, Any]:
    """An answer as it is kept: of the data hashes, and what the model said or its choices' log-likelihoods."""
    description = None if adapter is None else adapter.description
    suite, row, seed, task, id_ = a.key
    return {
        "suite": suite,
        "row": row,
        "seed": seed,
        "task": task,
        "id": id_,
        "prompt": conditions.short_hash(a.prompt),
        "description": None if description is None else conditions.short_hash(description),
        "adapter": None if adapter is None else adapter.id,
        "answer": answer,
        "scores": scores,
    }


def _with_twins(a: Asked, line: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of an answer and of those that are the same."""
    parts = ("suite", "row", "seed", "task", "id")
    return [line, *(line | dict(zip(parts, twin.key, strict=True)) for twin in a.twins)]


def _header(
    settings: Settings,
    source: AdapterSource,
    backend: backends.Facts,
    reference: str,
    tasks: Sequence[suites.JudgedTask],
    chosen: Sequence[Row],
    left_out: dict[str, str],
) -> dict[str, Any]:
    """Facts of a run; those that `answers.FACTS` names must be equal to go on with a file."""

    def checksum(loaded: TextToLora | None) -> str | None:
        return None if loaded is None else loaded.config.weights_sha256

    return {
        "format_version": answers.FORMAT_VERSION,
        "base": _public(reference),
        "base_revision": hub.fingerprint(reference),
        "backend": backend.name,
        "served_model": backend.model,
        "dtype": backend.dtype,
        "checkpoint": settings.checkpoint and _public(settings.checkpoint),
        "checkpoint_sha256": checksum(source.checkpoint),
        "description_in_training_prompts": source.checkpoint and source.checkpoint.prompt.description_in_prompt,
        "multitask_sha256": checksum(source.multitask),
        "hyperdecoders_sha256": checksum(source.hyperdecoders),
        "library_sha256": [library.checksum for library in source.libraries],
        "abstain_bounds": [source.familiarity.low, source.familiarity.high]
        if any(row.way == "t2l-abstain" for row in chosen)
        else None,
        "per_task": "all" if settings.full else settings.per_task,
        "held_out": settings.held_out,
        "max_new_tokens": settings.max_new_tokens,
        "versions": TextToLora.versions() | backend.versions,
        "seeds": list(settings.seeds),
        "rows": [row.name for row in chosen],
        "left_out": left_out,
        "suites": {
            suite: {
                "kind": sorted({task.kind for task in mine}),
                "tasks": len(mine),
                "items": sum(len(task.items) for task in mine),
                "chance": {t.name: round(t.chance, 4) for t in mine if t.chance},
                "floor": {t.name: round(t.floor, 4) for t in mine if t.chance},
            }
            for suite in dict.fromkeys(task.suite for task in tasks)
            for mine in ([task for task in tasks if task.suite == suite],)
        },
        "device": backend.device,
        "batch_tokens": settings.batch_tokens,
    }


def _public(reference: str) -> str:
    """A reference as files show it: of a local folder its name alone, as files are passed on and folders are not."""
    return Path(reference).name if Path(reference).is_dir() else reference


# ------------------------------------------------------------------------------------------------- code that is run


def _require_sandbox() -> None:
    """Raises EvaluationError where code cannot be isolated."""
    from t2l.eval import sandbox

    reason = sandbox.available()
    if reason is not None:
        raise EvaluationError(f"--allow-code-execution: no code is run here, because {reason}")


def _run_code(answered: Sequence[tuple[Question, dict[str, Any]]]) -> None:
    """Runs answers in code in the sandbox and fills their scores in."""
    from t2l.eval import sandbox

    chosen = [(q, line) for q, line in answered if q.task.kind == "code" and line["scores"]["correct"] is None]
    programs = [suites.program(q.item, line["answer"]) for q, line in chosen]
    different = list(dict.fromkeys(programs))  # rows and seeds often give the same answer
    outcomes = dict(zip(different, sandbox.run_many(different, allow=True), strict=True))
    for (_, line), program in zip(chosen, programs, strict=True):
        line["scores"]["correct"] = float(outcomes[program].ok)


def _score_code(out: Path, asked: Sequence[Asked], log: Log) -> None:
    """Runs code of answers that were written without --allow-code-execution."""
    file = answers.read(out)
    by_key = {a.key: a.question for a in asked}
    unscored = [
        (by_key[key_of(line)], line)
        for line in file.lines
        if key_of(line) in by_key and line["scores"].get("correct", 0.0) is None
    ]
    if unscored:
        log(f"running {len(unscored)} answers in code that are there already")
        _run_code(unscored)
        write_text(out, answers.to_text(file.header, file.lines))
