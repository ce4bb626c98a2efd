"""Oracle adapters: one LoRA a task, many trained at once on one frozen base.

    slot k holds task n's A_n, B_n, Adam moments, step count, best weights ─ live, one adapter a row ─▶ loss of its rows

The loss of a step is the sum over slots of each slot's own mean loss, so no gradient crosses from one task to
another; clipping, schedule, early stopping and best weights are each slot's own. A task that is done gives its slot
to one that waits: shapes stay static, and a compiled step compiles once. Nothing a task becomes depends on which
tasks are trained beside it. Complete in this file: settings, the step, the loop, saving and resuming.

After the task-specific LoRAs of Text-to-LoRA (arXiv 2506.06105, table 11), which are trained one after another.
Shape letters as in `spec.py`; K slots, B = K · rows_per_task rows.
"""

import json
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from t2l import hub
from t2l.apply import compiled, hooked
from t2l.checkpoint import load_checkpoint
from t2l.config import LoraConfig, PromptConfig, to_plain
from t2l.errors import ConfigError, DataError, TrainingError
from t2l.io import new_folder, read_json, read_tensors, require_folder_names
from t2l.library import AdapterLibrary, Purpose, save_library
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec
from t2l.tasks import Example, Task, data_dir, load_own, load_sni, load_splits, read_parquet, require_trainable
from t2l.train.loop import schedule
from t2l.train.loss import AnswerLosses, LossFunction, answer_losses, require_packable
from t2l.train.metrics import MetricLogger, memory_gb
from t2l.train.packing import PackedRows, Stream, TaskDocuments, document_scores, fixed_rows, pack, tokenize_examples
from t2l.train.resume import STATE, begin_run, check_run, read_facts, write_state
from t2l.versions import versions

BROKEN = "a gradient that was not finite"
BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Of Adam, torch's defaults."""


@dataclass(frozen=True, kw_only=True)
class OracleDataConfig:
    """Which tasks get an adapter."""

    sources: tuple[str, ...] = ("sni-paper",)
    """`sni`: the frozen split's training tasks; `sni-paper`: those of them that are the paper's; `sni-validation` and
    `sni-test` for judging only; `benchmarks`: the paper's benchmarks that have training data; or own tasks, as a
    JSONL file, a folder or `hf:NAME`."""
    tasks: tuple[str, ...] = ()
    """Only these of them; empty means all."""
    validation_examples: int = 60
    """Training examples kept for early stopping where a task has none of split val; at most a fifth of them."""


@dataclass(frozen=True, kw_only=True)
class OracleTrainConfig:
    """How each adapter is trained."""

    steps: int = 400
    """Most steps of one adapter, and the length of its schedule."""
    tasks_at_once: int = 64
    """K."""
    rows_per_task: int = 1
    """Rows of a step that belong to one task."""
    sequence_tokens: int = 384
    """Tokens of a row; a row holds as many of the task's examples as fit."""
    answer_tokens: int = 128
    """Answer tokens of a row."""
    learning_rate: float = 1e-3
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises; it then falls linearly to zero."""
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0
    """For each adapter on its own."""
    evaluate_every: int = 25
    """Steps between two looks at an adapter's own validation loss."""
    validation_rows: int = 8
    """Most rows of validation examples a task."""
    patience: int = 4
    """Looks without a better validation loss after which an adapter is done; its best weights are kept."""
    shared_start: bool = True
    """Whether all adapters start from the same A, which keeps them close to one another and easy to reconstruct."""
    start_from: str | None = None
    """Checkpoint of a multi-task LoRA (variant `none`) that all adapters start from: what tasks have in common then is
    in all of them alike, and a network that reconstructs them need not learn it."""
    train_a: bool = True
    """Whether A is trained. If not, all adapters keep the A that they start from and differ in B alone (LoRA-FA,
    arXiv 2308.03303)."""
    compile: bool = False
    """Compile the step: a minute at the start, then much faster on a GPU."""
    save_minutes: float = 2.0
    """Minutes between two saved states."""
    tensorboard: bool = True
    """Write TensorBoard files too, if it is installed."""
    tracker: Literal["none", "wandb", "trackio"] = "none"
    """Report to this tracker too."""

    def __post_init__(self) -> None:
        for name in ("steps", "tasks_at_once", "rows_per_task", "evaluate_every", "validation_rows", "patience"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"train.warmup must be in [0, 1], got {self.warmup}")
        if self.steps % self.evaluate_every:
            raise ConfigError(
                f"train.steps ({self.steps}) must be a multiple of train.evaluate_every ({self.evaluate_every})"
            )
        if not (self.train_a or self.shared_start or self.start_from):
            raise ConfigError(
                "train.train_a false is for adapters that have one A, but with train.shared_start false each has its "
                "own; share it, or name a train.start_from"
            )


@dataclass(frozen=True, kw_only=True)
class OracleConfig:
    """One run of `t2l train oracle`."""

    base: str
    """Model reference of the base."""
    seed: int = 0
    lora: LoraConfig = field(default_factory=LoraConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    """Whether the description stands in the prompts that the adapters are trained on."""
    data: OracleDataConfig = field(default_factory=OracleDataConfig)
    train: OracleTrainConfig = field(default_factory=OracleTrainConfig)
    oracle_for_judging: bool = False
    """Trains also on tasks that no hypernetwork may see, to have an upper bound in a table. The library is marked, and
    reconstruction refuses it."""


# --------------------------------------------------------------------------------------------------- the data

Benchmarks = Callable[[], Sequence[Task]]
"""Gives the benchmarks' tasks; they belong to evaluation, which training does not know."""


def load_tasks(config: OracleConfig, benchmarks: Benchmarks | None = None) -> list[Task]:
    """The tasks of a run, in the order of their names.

    Raises:
        DataError: if data are missing or a task may not be trained on (unless `oracle_for_judging`), naming it.
        ConfigError: if there is no such source.
    """
    splits = load_splits()
    found: dict[str, Task] = {}
    for source in config.data.sources:
        if source == "benchmarks":
            if benchmarks is None:
                raise ConfigError("data.sources names the benchmarks, but this caller does not provide them")
            tasks = [task for task in benchmarks() if task.examples.get("train")]
        elif source.startswith("sni"):
            names = {"sni": splits.train, "sni-validation": splits.validation, "sni-test": splits.test}
            if source == "sni-paper":
                chosen = splits.train & _paper_tasks()
            elif source in names:
                chosen = names[source]
            else:
                raise ConfigError(f"data.sources: there is no '{source}'; known are sni-paper, {', '.join(names)}")
            wanted = chosen & set(config.data.tasks) if config.data.tasks else chosen
            tasks = load_sni(sorted(wanted), splits=("train", "val")) if wanted else []
        else:
            tasks = load_own(source)
        found |= {task.name: task for task in tasks}
    unknown = [name for name in config.data.tasks if name not in found]
    if unknown:
        raise DataError(f"data.tasks: {', '.join(unknown[:5])} is not in {', '.join(config.data.sources)}")
    if config.data.tasks:
        found = {name: found[name] for name in config.data.tasks}
    if not config.oracle_for_judging:
        require_trainable(found)
    require_folder_names(found, "a task", DataError)  # each adapter is written to a folder of its task's name
    return [found[name] for name in sorted(found)]


def _paper_tasks() -> set[str]:
    """Names of the paper's training tasks, as the packed files mark them."""
    table = read_parquet(data_dir() / "sni_tasks.parquet", ("task", "lol_split"))
    return {row["task"] for row in table.to_pylist() if row["lol_split"] == "train"}


@dataclass(frozen=True)
class TaskData:
    """One task, tokenised."""

    task: Task
    train: TaskDocuments
    validation: TaskDocuments

    def facts(self) -> dict[str, Any]:
        """What the library remembers of it."""
        return {
            "descriptions": list(self.task.descriptions),
            "examples": len(self.train.variants),
            "validation_examples": len(self.validation.variants),
            "too_long": self.train.too_long,
        }


def tokenize_tasks(tasks: Sequence[Task], config: OracleConfig, tokenizer: Any) -> list[TaskData]:
    """Tokenises training and validation examples.

    Raises:
        DataError: naming every task without an example that fits into a row.
    """
    train = config.train

    def tokenized(task: Task, examples: Sequence[Example], *, first_answer: bool) -> TaskDocuments:
        return tokenize_examples(
            task,
            examples,
            tokenizer,
            config.prompt,
            tokens=train.sequence_tokens,
            answer_tokens=train.answer_tokens,
            seed=config.seed,
            first_answer=first_answer,
        )

    result, empty = [], []
    for task in tasks:
        examples = list(task.examples.get("train", ()))
        validation = list(task.examples.get("val", ()))
        if not validation:
            rng = np.random.default_rng((config.seed, 4, zlib.crc32(task.name.encode())))
            kept = set(rng.permutation(len(examples))[: min(config.data.validation_examples, len(examples) // 5)])
            validation = [example for i, example in enumerate(examples) if i in kept]
            examples = [example for i, example in enumerate(examples) if i not in kept]
        data = TaskData(
            task,
            tokenized(task, examples, first_answer=False),
            tokenized(task, validation, first_answer=True),
        )
        if data.train.variants and data.validation.variants:
            result.append(data)
        else:
            part = "validation" if data.train.variants else "training"
            empty.append(f"{task.name} (no {part} example of {len(validation if part != 'training' else examples)})")
    if empty:
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        raise DataError(
            f"Tasks without an example that fits into train.sequence_tokens ({train.sequence_tokens}) and "
            f"train.answer_tokens ({train.answer_tokens}): {', '.join(empty[:5])}{more}. Raise them, or take those out"
        )
    if not result:
        raise DataError("There are no tasks to train")
    return result


# --------------------------------------------------------------------------------------------------- one step


class Slots:
    """The adapters in training, stacked, with everything that is each one's own.

    Args:
        spec: Their shape.
        number: K.
        device: Where they are.
        train_a: Whether A is trained.
    """

    def __init__(self, spec: AdapterSpec, number: int, device: torch.device, *, train_a: bool = True) -> None:
        self.spec, self.number = spec, number
        length, rank = len(spec.layers), spec.rank

        def zeros() -> list[Tensor]:
            a = [torch.zeros(number, length, rank, t.in_features, device=device) for t in spec.targets]
            return a + [torch.zeros(number, length, t.out_features, rank, device=device) for t in spec.targets]

        self.weights = zeros()
        """A of every target, then B of every target."""
        first = 0 if train_a else len(spec.targets)
        self.trained = [x.requires_grad_() for x in self.weights[first:]]
        """What has gradients and moments, in the same order."""
        self.mean, self.square, self.best = zeros()[first:], zeros()[first:], zeros()
        self.alive = torch.ones(number, dtype=torch.bool, device=device)
        """False once a gradient of the slot was not finite; its weights stay as they were before."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything, by name, for a saved state."""
        found = {"alive": self.alive.to(torch.uint8)}
        for name in ("weights", "mean", "square", "best"):
            found |= {f"{name}/{i}": x for i, x in enumerate(getattr(self, name))}
        return found

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Puts back what `tensors` gave."""
        self.alive.copy_(tensors["alive"].bool())
        for name in ("weights", "mean", "square", "best"):
            for i, x in enumerate(getattr(self, name)):
                x.copy_(tensors[f"{name}/{i}"])

    @torch.no_grad()
    def start(self, slot: int, name: str, *, seed: int, shared: bool, origin: LoraTensors | None = None) -> None:
        """A copy of `origin`, or a fresh adapter as PEFT initialises it: A kaiming-uniform, B zero.

        Drawn on the CPU, alike on any device.
        """
        for x in (*self.mean, *self.square):
            x[slot].zero_()
        self.alive[slot] = True
        if origin is not None:
            for weight, value in zip(self.weights, (*origin.a, *origin.b), strict=True):
                weight[slot].copy_(value)
            return
        generator = torch.Generator().manual_seed(seed if shared else (seed << 32) + zlib.crc32(name.encode()))
        for i, target in enumerate(self.spec.targets):
            weight, bound = self.weights[i][slot], target.in_features**-0.5
            weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))
            self.weights[len(self.spec.targets) + i][slot].zero_()

    @torch.no_grad()
    def keep_best(self, improved_K: Tensor) -> None:
        """Copies the weights of the slots that improved to `best`."""
        for best, weight in zip(self.best, self.weights, strict=True):
            best.copy_(torch.where(improved_K[:, None, None, None], weight, best))

    def adapter(self, slot: int) -> dict[str, Tensor]:
        """A slot's best weights under the names of a library's tensors."""
        names = [f"{t.name}.{part}" for part in "AB" for t in self.spec.targets]
        return {name: x[slot].detach().cpu().contiguous() for name, x in zip(names, self.best, strict=True)}


class StepSizes(NamedTuple):
    """What one optimiser step needs to know of each slot, (K,) each."""

    rate: Tensor
    """Learning rate, 0 where a slot is empty."""
    correction1: Tensor
    """1 - beta1^t"""
    correction2: Tensor
    """1 - beta2^t"""


def adamw(
    weights: list[Tensor],
    gradients: list[Tensor],
    mean: list[Tensor],
    square: list[Tensor],
    alive: Tensor,
    sizes: StepSizes,
    weight_decay: float,
    max_norm: float,
) -> None:
    """One step of AdamW (arXiv 1711.05101) for K stacked adapters, as torch's would be for each alone.

    Each has its own gradient norm, clip, learning rate and bias correction. One whose gradient is not finite stays
    as it is from then on. All tensors are changed in place.
    """
    norm_K = torch.stack([g.float().square().flatten(1).sum(1) for g in gradients]).sum(0).sqrt()
    alive.logical_and_(norm_K.isfinite())
    clip_K = (max_norm / (norm_K + 1e-6)).clamp_max(1.0)
    rate_K = torch.where(alive, sizes.rate, 0.0)

    def each(x_K: Tensor) -> Tensor:
        return x_K[:, None, None, None]

    for w, g, m, v in zip(weights, gradients, mean, square, strict=True):
        g = torch.where(each(alive), g * each(clip_K), 0.0)
        m.lerp_(g, 1 - BETAS[0])
        v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
        w.mul_(1 - each(rate_K) * weight_decay)
        denominator = v.sqrt() / each(sizes.correction2).sqrt() + EPSILON
        w.sub_(each(rate_K / sizes.correction1) * m / denominator)


def step_sizes(steps: Sequence[Sequence[int | None]], train: OracleTrainConfig, device: torch.device) -> StepSizes:
    """For every step of a segment and every slot, (E, K), from the slots' own step numbers; None for an empty slot."""
    rate = [[0.0 if t is None else schedule(t, train.steps, train.warmup) for t in row] for row in steps]
    count = torch.tensor([[1 if t is None else t + 1 for t in row] for row in steps], dtype=torch.float64)
    tables = (torch.tensor(rate) * train.learning_rate, 1 - BETAS[0] ** count, 1 - BETAS[1] ** count)
    return StepSizes(*(x.float().to(device) for x in tables))


# --------------------------------------------------------------------------------------------------- the run


@dataclass
class Running:
    """A task in a slot."""

    data: TaskData
    stream: Stream
    step: int = 0
    start_loss: float = float("nan")
    start_exact_match: float = float("nan")
    best_loss: float = float("inf")
    best_exact_match: float = 0.0
    best_step: int = 0
    bad_looks: int = 0
    seconds: float = 0.0

    def plain(self) -> dict[str, Any]:
        """For a saved state."""
        own = {name: value for name, value in vars(self).items() if name not in ("data", "stream")}
        return own | {"name": self.data.task.name, "epoch": self.stream.epoch, "place": self.stream.place}


class OracleTrainer:
    """What a run holds in memory.

    Args:
        config: Settings.
        base: The frozen base model, on `device`.
        spec: The adapters' shape.
        data: The tasks, tokenised.
        run: Where finished adapters and states go.
        device: Where training happens.
        log: Where progress lines go.
        origin: What all adapters start from, if not from nothing.
    """

    def __init__(
        self,
        config: OracleConfig,
        base: Any,
        spec: AdapterSpec,
        data: Sequence[TaskData],
        run: Path,
        device: torch.device,
        log: Callable[[str], None],
        origin: LoraTensors | None = None,
    ) -> None:
        self.origin = origin
        self.config, self.base, self.spec, self.run, self.device, self.log = config, base, spec, run, device, log
        self.data = {x.task.name: x for x in data}
        at_once = min(config.train.tasks_at_once, len(data))
        self.slots = Slots(spec, at_once, device, train_a=config.train.train_a)
        self.running: list[Running | None] = [None] * self.slots.number
        self.waiting = list(self.data)
        self.finished: dict[str, str] = {}
        """Name to why it ended."""
        self.update: Callable[..., None] = adamw
        self.losses: LossFunction = _not_hooked
        self.steps = 0
        """Taken so far, each with a batch for all slots."""
        self.tokens = 0
        """Trained on so far, padding not counted."""
        self.looks: tuple[list[str | None], list[PackedRows]] = ([], [])
        """The slots' tasks, and their validation rows on the device."""

    def train(self, watch: MetricLogger, *, started: float, max_minutes: float | None) -> bool:
        """Trains until all tasks are done or time is up; returns whether all are done."""
        train = self.config.train
        saved = time.monotonic()
        layers = compiled(self.base, self.spec) if train.compile else nullcontext()
        with hooked(self.base, self.spec) as hooks, layers:
            self.losses = answer_losses(self.base, hooks, fuse=train.compile)
            if train.compile:
                self.update = torch.compile(adamw, dynamic=False)
            while True:
                self._fill()
                if not any(self.running):
                    return True
                clock, tokens = time.monotonic(), self.tokens
                rows, sizes = self._segment()
                total_K = torch.zeros(self.slots.number, device=self.device)
                per_step = self.slots.number * train.rows_per_task
                for e in range(train.evaluate_every):
                    total_K += self.step(rows.part(e * per_step, (e + 1) * per_step), StepSizes(*(x[e] for x in sizes)))
                self._look(clock)
                self.steps += train.evaluate_every
                watch.record(self._row(total_K, (self.tokens - tokens) / (time.monotonic() - clock), started))
                out_of_time = max_minutes is not None and time.monotonic() - started > 60 * max_minutes
                if out_of_time or time.monotonic() - saved > 60 * train.save_minutes:
                    self.save()
                    saved = time.monotonic()
                if out_of_time:
                    return not any(self.running) and not self.waiting

    def step(self, rows: PackedRows, sizes: StepSizes) -> Tensor:
        """One step of every slot; returns each slot's loss, (K,)."""
        losses, _ = self._forward(rows)
        loss_K = (losses * rows.weights).unflatten(0, (self.slots.number, -1)).sum((1, 2))
        gradients = torch.autograd.grad(loss_K.sum(), self.slots.trained)
        train, slots = self.config.train, self.slots
        with torch.no_grad():
            self.update(
                slots.trained,
                list(gradients),
                slots.mean,
                slots.square,
                slots.alive,
                sizes,
                train.weight_decay,
                train.max_gradient_norm,
            )
        return loss_K.detach()

    def _forward(self, rows: PackedRows) -> AnswerLosses:
        repeats = rows.tokens.shape[0] // self.slots.number
        weights = self.slots.weights
        if repeats > 1:
            weights = [x[:, None].expand(-1, repeats, -1, -1, -1).flatten(0, 1) for x in weights]
        half = len(weights) // 2
        return self.losses(rows, LoraTensors(tuple(weights[:half]), tuple(weights[half:]), self.spec.scaling))

    # ------------------------------------------------------------------------------------------ between steps

    def _fill(self) -> None:
        """Gives empty slots to waiting tasks; the new ones' validation loss as they start is their first."""
        fresh = []
        train = self.config.train
        for slot, running in enumerate(self.running):
            if running is None and self.waiting:
                data = self.data[self.waiting.pop(0)]
                name = data.task.name
                stream = Stream(
                    name,
                    data.train,
                    tokens=train.sequence_tokens,
                    answer_tokens=train.answer_tokens,
                    seed=self.config.seed,
                )
                self.running[slot] = Running(data, stream)
                self.slots.start(slot, name, seed=self.config.seed, shared=train.shared_start, origin=self.origin)
                fresh.append(slot)
        if not fresh:
            return
        loss_K, match_K = torch.stack(self._validate()).tolist()
        for slot in fresh:
            running = self.running[slot]
            assert running is not None
            running.start_loss = running.best_loss = loss_K[slot]
            running.start_exact_match = running.best_exact_match = match_K[slot]
        self.slots.keep_best(self._mask(fresh))

    def _mask(self, slots: Sequence[int]) -> Tensor:
        mask = torch.zeros(self.slots.number, dtype=torch.bool)
        mask[list(slots)] = True
        return mask.to(self.device)

    def _segment(self) -> tuple[PackedRows, StepSizes]:
        """Rows and step sizes of all steps until the next look, on the device."""
        train = self.config.train
        steps: list[list[int | None]] = []
        listed: list[tuple[TaskDocuments, Sequence[int]]] = []
        groups: list[int] = []
        nothing = next(iter(self.data.values())).train
        for e in range(train.evaluate_every):
            steps.append([None if running is None else running.step + e for running in self.running])
            for slot, running in enumerate(self.running):
                for _ in range(train.rows_per_task):
                    row = [] if running is None else running.stream.row()
                    listed.append((nothing if running is None else running.data.train, row))
                    groups.append(e * self.slots.number + slot)
        rows = pack(listed, tokens=train.sequence_tokens, answer_tokens=train.answer_tokens, groups=groups)
        self.tokens += int((rows.documents >= 0).sum())
        return rows.to(self.device), step_sizes(steps, train, self.device)

    def _validation_rows(self) -> list[PackedRows]:
        """Every slot's validation rows as batches of the training step's shape; laid out anew only for other tasks."""
        names = [None if running is None else running.data.task.name for running in self.running]
        if names == self.looks[0]:
            return self.looks[1]
        train = self.config.train
        sizes = {"tokens": train.sequence_tokens, "answer_tokens": train.answer_tokens}
        nothing = next(iter(self.data.values())).validation
        stores = [nothing if running is None else running.data.validation for running in self.running]
        chosen = [
            [] if name is None else fixed_rows(store, **sizes, limit=train.validation_rows)
            for name, store in zip(names, stores, strict=True)
        ]
        batches = []
        for start in range(0, max(map(len, chosen)), train.rows_per_task):
            places = range(start, start + train.rows_per_task)
            listed = [
                (store, found[i] if i < len(found) else [])
                for store, found in zip(stores, chosen, strict=True)
                for i in places
            ]
            rows = pack(
                listed, tokens=train.sequence_tokens, answer_tokens=train.answer_tokens, groups=[0] * len(listed)
            )
            batches.append(rows.to(self.device))
        self.looks = (names, batches)
        return batches

    def _validate(self) -> tuple[Tensor, Tensor]:
        """Each slot's mean loss over its validation examples and the share that is right, (K,) each.

        Runs with gradients switched on and thrown away: without them a compiled step would be compiled once more.
        """
        total = torch.zeros(3, self.slots.number, device=self.device)
        for rows in self._validation_rows():
            losses, correct = self._forward(rows)
            loss, right, there = document_scores(losses.detach(), correct, rows)
            for i, x in enumerate((loss * there, right, there)):
                total[i] += x.float().unflatten(0, (self.slots.number, -1)).sum((1, 2))
        return total[0] / total[2].clamp_min(1), total[1] / total[2].clamp_min(1)

    def _look(self, clock: float) -> None:
        """Judges every slot on its own validation examples: best weights, patience, done or not.

        The time since `clock` is shared among the tasks that were trained in it.
        """
        train = self.config.train
        loss_K, match_K, alive_K = torch.stack([*self._validate(), self.slots.alive.float()]).tolist()
        share = (time.monotonic() - clock) / sum(running is not None for running in self.running)
        improved, done = [], {}
        for slot, running in enumerate(self.running):
            if running is None:
                continue
            running.step += train.evaluate_every
            running.seconds += share
            if loss_K[slot] < running.best_loss:
                running.best_loss, running.best_exact_match = loss_K[slot], match_K[slot]
                running.best_step, running.bad_looks = running.step, 0
                improved.append(slot)
            else:
                running.bad_looks += 1
            if not alive_K[slot]:
                done[slot] = BROKEN
            elif running.bad_looks >= train.patience:
                done[slot] = "no better validation loss"
            elif running.step >= train.steps:
                done[slot] = "all steps done"
        self.slots.keep_best(self._mask(improved))
        for slot, why in done.items():
            self._finish(slot, why)

    def _finish(self, slot: int, why: str) -> None:
        """Writes a slot's best adapter to `finished/` and empties the slot."""
        from safetensors.torch import save_file

        running = self.running[slot]
        assert running is not None
        facts = running.data.facts() | {
            "steps": running.best_step,
            "stopped_at": running.step,
            "stopped_by": why,
            "start_loss": running.start_loss,
            "loss": running.best_loss,
            "start_exact_match": running.start_exact_match,
            "exact_match": running.best_exact_match,
            "seconds": round(running.seconds, 3),
        }
        name = running.data.task.name
        with new_folder(self.run / "finished" / name, overwrite=True) as temporary:
            save_file(self.slots.adapter(slot), temporary / "adapter.safetensors")
            (temporary / "facts.json").write_text(json.dumps(facts, ensure_ascii=False) + "\n", encoding="utf-8")
        self.finished[name], self.running[slot] = why, None

    def _row(self, total_K: Tensor, tokens_per_second: float, started: float) -> dict[str, Any]:
        """What is worth watching after a segment."""
        return {
            "step": self.steps,
            "done": len(self.finished),
            "running": sum(running is not None for running in self.running),
            "waiting": len(self.waiting),
            "loss": float(total_K.sum()) / self.config.train.evaluate_every / self.slots.number,
            "tokens_per_second": tokens_per_second,
            "memory_gb": memory_gb(self.device),
            "minutes": (time.monotonic() - started) / 60,
        }

    # ---------------------------------------------------------------------------------- saving and resuming

    def save(self) -> None:
        """Writes a state, whole or not at all; of a run that is complete only that it is."""
        facts = {
            "running": [None if running is None else running.plain() for running in self.running],
            "waiting": self.waiting,
            "finished": self.finished,
            "steps": self.steps,
        }
        tensors = (
            self.slots.tensors() if any(self.running) or self.waiting else {"alive": self.slots.alive.to(torch.uint8)}
        )
        write_state(self.run, tensors, facts)

    def load(self, facts: dict[str, Any]) -> None:
        """Goes back to the run's saved state.

        Raises:
            TrainingError: if the run is complete.
        """
        if not any(facts["running"]) and not facts["waiting"]:
            raise TrainingError(f"{self.run} is finished: all {len(facts['finished'])} adapters are done")
        self.slots.load({name: x.to(self.device) for name, x in read_tensors(self.run / STATE).items()})
        self.waiting, self.finished = list(facts["waiting"]), dict(facts["finished"])
        self.steps = facts["steps"]
        train = self.config.train
        for slot, plain in enumerate(facts["running"]):
            if plain is None:
                continue
            data = self.data[plain["name"]]
            stream = Stream(
                plain["name"],
                data.train,
                tokens=train.sequence_tokens,
                answer_tokens=train.answer_tokens,
                seed=self.config.seed,
            )
            stream.seek(plain["epoch"], plain["place"])
            own = {name: value for name, value in plain.items() if name not in ("name", "epoch", "place")}
            self.running[slot] = Running(data, stream, **own)

    def library(self, folder: Path) -> AdapterLibrary:
        """Puts the finished adapters together, without those that broke before they learned anything.

        Raises:
            TrainingError: if there is none.
        """
        names = [name for name in self.data if name in self.finished]
        facts = {name: read_json(self.run / "finished" / name / "facts.json") for name in names}
        broken = [name for name in names if self.finished[name] == BROKEN and not facts[name]["steps"]]
        if broken:
            self.log(f"left out, because a gradient was not finite from the start: {', '.join(broken)}")
            names = [name for name in names if name not in broken]
        if not names:
            raise TrainingError(f"{self.run} has no finished adapter to put into a library")
        parts = [read_tensors(self.run / "finished" / name / "adapter.safetensors") for name in names]
        targets = self.spec.targets
        lora = LoraTensors(
            tuple(torch.stack([part[f"{t.name}.A"] for part in parts]) for t in targets),
            tuple(torch.stack([part[f"{t.name}.B"] for part in parts]) for t in targets),
            self.spec.scaling,
        )
        own = {"seed": self.config.seed, "prompt": to_plain(self.config.prompt), **versions()}
        kept = {name: facts[name] | own for name in names}
        purpose: Purpose = "judging" if self.config.oracle_for_judging else "training"
        return save_library(folder, lora, self.spec, kept, purpose=purpose, overwrite=True)


def _start_from(folder: Path, spec: AdapterSpec) -> LoraTensors:
    """The multi-task LoRA of a checkpoint."""
    loaded = load_checkpoint(folder)
    if loaded.hypernet.head is not None:
        raise ConfigError(
            f"train.start_from: {folder} is a hypernetwork of variant '{loaded.config.hypernet.variant}'; adapters "
            "start from a multi-task LoRA, a checkpoint of variant 'none'"
        )
    spec.require_same_shape(loaded.spec, this="This run", that=f"train.start_from {folder}")
    return loaded.hypernet.shared_adapter()


def _not_hooked(*_: Any) -> AnswerLosses:
    raise AssertionError("the base is hooked in `train`")


def train_oracles(
    config: OracleConfig,
    run: Path,
    *,
    resume: bool = False,
    max_minutes: float | None = None,
    device: str | None = None,
    benchmarks: Benchmarks | None = None,
    log: Callable[[str], None] = print,
) -> AdapterLibrary:
    """Trains an adapter for every task, to the end or to the time budget.

    Args:
        config: Settings.
        run: Folder for `config.json`, `metrics.jsonl`, `finished/`, the state and, at the end, `library/`.
        resume: Go on from the folder's state.
        max_minutes: Wall time after which the state is saved and the run stops.
        device: `cuda`, `cpu`; the GPU if there is one.
        benchmarks: Loads the benchmarks' tasks, for the source `benchmarks`.
        log: Where progress lines go.

    Returns:
        The library of the adapters that are finished; all of them unless time ran out.

    Raises:
        ConfigError, DataError: before the first step, if settings or data will not do.
        TrainingError: if no adapter was finished, or a resume has no state or other settings.
    """
    started = time.monotonic()
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.set_float32_matmul_precision("high")
    plain = to_plain(config)
    going_on = check_run(run, plain, resume=resume)
    tokenizer = hub.load_tokenizer(config.base)
    data = tokenize_tasks(load_tasks(config, benchmarks), config, tokenizer)
    too_long = sum(x.train.too_long for x in data)
    log(f"{len(data)} tasks, {sum(len(x.train.variants) for x in data)} examples ({too_long} too long and left out)")
    dtype = torch.bfloat16 if chosen.type == "cuda" else torch.float32
    base = hub.load_causal_lm(config.base, device=str(chosen), dtype=dtype)
    require_packable(base, config.base)
    spec = AdapterSpec.from_config(base.config, config.base, config.lora)
    origin = None if config.train.start_from is None else _start_from(Path(config.train.start_from), spec)
    trainer = OracleTrainer(config, base, spec, data, run, chosen, log, origin)
    if not going_on:
        begin_run(run, plain)
    else:
        trainer.load(read_facts(run))
        log(f"resumed: {len(trainer.finished)} of {len(data)} done")
    log(f"ready after {time.monotonic() - started:.0f} s: {trainer.slots.number} adapters at once")
    watch = MetricLogger(
        run,
        plain,
        steps=0,
        first_step=trainer.steps,
        report_to="tensorboard" if config.train.tensorboard else config.train.tracker,
        bar=False,
        log=log,
    )
    with watch:
        complete = trainer.train(watch, started=started, max_minutes=max_minutes)
    if complete:
        trainer.save()
    if not trainer.finished:
        raise TrainingError(f"No adapter was finished within {max_minutes} minutes; go on with --resume")
    broken = [name for name, why in trainer.finished.items() if why == BROKEN]
    if broken:
        log(f"stopped at {BROKEN}: {', '.join(broken)}")
    library = trainer.library(run / "library")
    left = len(data) - len(trainer.finished)
    log(f"{len(library.names)} adapters in {library.folder}" + (f"; {left} left, go on with --resume" if left else ""))
    return library
