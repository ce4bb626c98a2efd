"""Task LoRAs: one adapter a task, many of them trained at once on one frozen base.

    slot k: task n's A_n, B_n, Adam moments, step count, best weights ─ hooked, one adapter a row ─▶ loss of its rows

The loss of a step is the sum over slots of each slot's own mean loss, so no gradient crosses from one task to another;
clipping, schedule, early stopping and best weights are each slot's own. A task that is done gives its slot to one that
waits: shapes stay static, and a compiled step compiles once. What a task becomes does not depend on which tasks are
trained beside it. The settings stand in `task_config`, the tasks and their rows in `task_data`, the adapters with their
optimiser in `slots`; this file holds the step and the run: set up, fit, evaluate, save.

After the task-specific LoRAs of Text-to-LoRA (arXiv 2506.06105, table 11), which are trained one after another.
Shape letters as in `spec.py`; K slots, B = K · rows_per_task rows.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2l import hub
from t2l.apply import compiled, decoder_layers, hooked
from t2l.checkpoint import load_checkpoint
from t2l.config import to_plain
from t2l.errors import ConfigError, TrainingError
from t2l.io import new_folder, read_json, read_tensors, reading
from t2l.library import INDEX, AdapterLibrary, Purpose, save_library
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec
from t2l.train.launch import Launch
from t2l.train.loop import StopRequest
from t2l.train.loss import AnswerLosses, LossFunction, answer_losses, document_gap, require_packable
from t2l.train.metrics import MetricLogger, memory_gb
from t2l.train.packing import PackedRows, document_scores
from t2l.train.processes import Processes, load_base, require_shares
from t2l.train.resume import check_run, read_facts, read_state, write_state
from t2l.train.slots import Slots, StepSizes, adamw
from t2l.train.task_config import TaskLorasConfig
from t2l.train.task_data import (
    Benchmarks,
    Running,
    TaskData,
    lay_out_segment,
    load_tasks,
    tokenize_tasks,
    validation_batches,
)
from t2l.versions import versions

BROKEN = "a gradient that was not finite"


class Trainer:
    """Everything that a run holds in memory.

    Args:
        config: Settings.
        base: The frozen base model, on `device`.
        spec: The adapters' shape.
        data: The tasks, tokenised.
        run: Where finished adapters and states go.
        device: Where training happens.
        log: Where progress lines go.
        origin: What all adapters start from; None for fresh ones.
        processes: Those that train together. All of them know what every slot trains; each trains its own slots.
    """

    def __init__(
        self,
        config: TaskLorasConfig,
        base: Any,
        spec: AdapterSpec,
        data: Sequence[TaskData],
        run: Path,
        device: torch.device,
        log: Callable[[str], None],
        origin: LoraTensors | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.config, self.base, self.spec, self.run, self.device, self.log = config, base, spec, run, device, log
        self.origin = origin
        self.data = {x.task.name: x for x in data}
        self.nothing = data[0]
        """Whose documents an empty slot's rows hold none of."""
        number = min(config.train.tasks_per_batch, len(data))
        self.processes = processes or Processes(device)
        self.own = self.processes.share(number)
        """Which of all slots are this process's, in the order of `slots`."""
        self.slots = Slots(spec, len(self.own), device, freeze_a=config.train.freeze_a)
        self.running: list[Running | None] = [None] * number
        self.waiting = list(self.data)
        self.finished: dict[str, str] = {}
        """Name to why it ended."""
        self.steps = 0
        """Steps taken so far, each with a batch for all slots."""
        self.update: Callable[..., None] = adamw
        self.losses: LossFunction = _not_hooked
        self.validation: tuple[list[str | None], list[PackedRows]] = ([], [])
        """The slots' tasks, and their validation rows on the device."""

    # ------------------------------------------------------------------------------------------------ training

    @property
    def left(self) -> int:
        """Number of tasks that are not done."""
        return len(self.data) - len(self.finished)

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Puts the hooks on the base; steps can be taken for as long as they are there."""
        compile_ = self.config.train.torch_compile
        layers = compiled(self.base, self.spec) if compile_ else nullcontext()
        with hooked(self.base, self.spec) as hooks, layers:
            self.losses = answer_losses(self.base, hooks, fuse=compile_)
            self.update = torch.compile(adamw, dynamic=False) if compile_ else adamw
            yield

    def fit(self, logger: MetricLogger, stop: StopRequest, watch: "Watch | None" = None) -> None:
        """Trains until all tasks are done or the run has to stop, and saves the state then."""
        train = self.config.train
        with self.stepping():
            if watch is not None and not self.steps:
                watch(self, logger.log)
            while True:
                self.fill()
                before = self.steps
                if self.left:
                    logger.record(self._train_segment(stop))
                    logger.step(len(self.finished))
                if stop or not self.left or before // train.save_steps != self.steps // train.save_steps:
                    self.save()
                if stop or not self.left:
                    return

    def _train_segment(self, stop: StopRequest) -> dict[str, Any]:
        """Trains to the next evaluation and evaluates, or breaks off on Ctrl-C; returns a row of numbers."""
        clock = time.monotonic()
        segment = lay_out_segment(self.running, self.config, self.steps, self.nothing.train, self.device, self.own)
        total_K, taken = torch.zeros(self.slots.number, device=self.device), 0
        per_step = self.slots.number * self.config.train.rows_per_task
        for sizes in segment.sizes:
            if stop.interrupted:
                break
            total_K += self.step(segment.rows.part(taken * per_step, (taken + 1) * per_step), sizes)
            taken += 1
            stop.settle()
        self.steps += taken
        for running in filter(None, self.running):
            running.step += taken
        if taken == len(segment.sizes):
            self._evaluate(clock)
        else:
            for slot, place in zip(self.running, segment.places[taken], strict=True):
                if slot is not None and place is not None:
                    slot.stream.seek(*place)
        loss = float(self.processes.sum(total_K.sum())) / max(1, taken) / len(self.running)
        tokens = int(self.processes.sum(torch.tensor(segment.tokens)))
        return {
            "step": self.steps,
            "done": len(self.finished),
            "running": sum(running is not None for running in self.running),
            "waiting": len(self.waiting),
            "loss": loss,
            "tokens_per_second": tokens * taken / len(segment.sizes) / (time.monotonic() - clock),
            "memory_gb": memory_gb(self.device),
            "minutes": stop.minutes,
        }

    def step(self, rows: PackedRows, sizes: StepSizes) -> Tensor:
        """Takes one step of every slot of this process; returns each one's loss, (K,)."""
        losses = self._forward(rows).losses
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
                train.max_grad_norm,
            )
        return loss_K.detach()

    def _forward(self, rows: PackedRows) -> AnswerLosses:
        return self.losses(rows, self.slots.lora(rows.tokens.shape[0] // self.slots.number))

    # ------------------------------------------------------------------------------------------ between steps

    def fill(self) -> None:
        """Gives empty slots to waiting tasks; the new ones' validation loss as they start is their first."""
        fresh: list[tuple[int, Running]] = []
        for slot, running in enumerate(self.running):
            if running is None and self.waiting:
                data = self.data[self.waiting.pop(0)]
                new = Running(data, data.stream(self.config))
                self.running[slot] = new
                shared = self.config.train.shared_init
                if slot in self.own:
                    self.slots.start(
                        self.own.index(slot), data.task.name, seed=self.config.seed, shared=shared, origin=self.origin
                    )
                fresh.append((slot, new))
        if not fresh:
            return
        loss_K, match_K = torch.stack(self.everyones(*self.validate())).tolist()
        for slot, new in fresh:
            new.start_loss = new.best_loss = loss_K[slot]
            new.start_exact_match = new.best_exact_match = match_K[slot]
        self._keep_best([slot for slot, _ in fresh])

    def validate(self) -> tuple[Tensor, Tensor]:
        """Computes each own slot's mean loss over its validation examples and the share that is right, (K,) each.

        Runs with gradients switched on and thrown away: without them a compiled step would be compiled once more.
        """
        total = torch.zeros(3, self.slots.number, device=self.device)
        names = [None if running is None else running.data.task.name for running in self.running]
        if names != self.validation[0]:
            batches = validation_batches(self.running, self.config, self.nothing.validation, self.device, self.own)
            self.validation = (names, batches)
        for rows in self.validation[1]:
            answers = self._forward(rows)
            loss, right, there = document_scores(answers.losses.detach(), answers.correct, rows)
            for i, x in enumerate((loss * there, right, there)):
                total[i] += x.float().unflatten(0, (self.slots.number, -1)).sum((1, 2))
        return total[0] / total[2].clamp_min(1), total[1] / total[2].clamp_min(1)

    def everyones(self, *values_K: Tensor) -> tuple[Tensor, ...]:
        """Of several numbers of each own slot, (K,) each, those of all slots of all processes."""
        return self.processes.collect(torch.stack(values_K, dim=1), self.own, len(self.running)).unbind(1)

    def _keep_best(self, slots: Sequence[int]) -> None:
        """Copies the weights of those of these slots that are this process's to their best ones."""
        self.slots.keep_best([self.own.index(slot) for slot in slots if slot in self.own])

    def _evaluate(self, clock: float) -> None:
        """Evaluates every slot on its own validation examples: best weights, patience, done or not.

        The time since `clock` is shared among the tasks that were trained in it.
        """
        train = self.config.train
        found = self.everyones(*self.validate(), self.slots.alive.float())
        loss_K, match_K, alive_K = torch.stack(found).tolist()
        share = (time.monotonic() - clock) / sum(running is not None for running in self.running)
        improved, done = [], {}
        for slot, running in enumerate(self.running):
            if running is None:
                continue
            running.seconds += share
            if loss_K[slot] < running.best_loss:
                running.best_loss, running.best_exact_match = loss_K[slot], match_K[slot]
                running.best_step, running.patience_count = running.step, 0
                improved.append(slot)
            else:
                running.patience_count += 1
            if not alive_K[slot]:
                done[slot] = BROKEN
            elif running.patience_count >= train.early_stopping_patience:
                done[slot] = "no better validation loss"
            elif running.step >= train.max_steps:
                done[slot] = "all steps done"
        self._keep_best(improved)
        for slot, why in done.items():
            self._finish(slot, why)

    def _finish(self, slot: int, why: str) -> None:
        """Writes a slot's best adapter to `finished/` and empties the slot; the main process writes."""
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
        name, owner = running.data.task.name, slot % self.processes.number
        adapter = self.slots.best_adapter(self.own.index(slot) if slot in self.own else 0)
        adapter = {part: self.processes.broadcast(x, owner) for part, x in adapter.items()}
        self.finished[name], self.running[slot] = why, None
        if not self.processes.main:
            return
        # A run that was killed since its last state trains the task once more, and finds the folder here.
        with new_folder(self.run / "finished" / name, overwrite=True) as temporary:
            save_file(adapter, temporary / "adapter.safetensors")
            (temporary / "facts.json").write_text(json.dumps(facts, ensure_ascii=False) + "\n", encoding="utf-8")

    # ---------------------------------------------------------------------------------- saving and resuming

    def save(self) -> None:
        """Writes a state of all slots, whole or not at all; of a run that is complete only that it is."""
        facts = {
            "running": [None if running is None else running.plain() for running in self.running],
            "waiting": self.waiting,
            "finished": self.finished,
            "steps": self.steps,
        }
        tensors = self.slots.tensors() if self.left else {"alive": self.slots.alive.to(torch.uint8)}
        if self.processes.number > 1:  # one tensor at a time, through the hosts' memory
            number = len(self.running)
            tensors = {name: self.processes.collect(x.detach().cpu(), self.own, number) for name, x in tensors.items()}
        if self.processes.main:
            write_state(self.run, tensors, facts)

    def load(self, facts: dict[str, Any]) -> None:
        """Goes back to the run's saved state.

        Raises:
            CheckpointError: if the state is damaged, or another run's.
            TrainingError: if the run is complete.
        """
        with reading(str(self.run), "state"):
            self._go_back(facts)

    def _go_back(self, facts: dict[str, Any]) -> None:
        self.waiting, self.finished = list(facts["waiting"]), dict(facts["finished"])
        if not self.left and self._library_is_written():
            raise TrainingError(f"{self.run} is finished: all {len(self.finished)} adapters are done")
        if self.left:  # otherwise it was killed between its last state and its library, which is still to be written
            saved = {name: x[list(self.own)] for name, x in read_state(self.run).items()}
            self.slots.load({name: x.to(self.device) for name, x in saved.items()})
        self.steps = facts["steps"]
        for slot, plain in enumerate(facts["running"]):
            if plain is None:
                continue
            data = self.data[plain["name"]]
            stream = data.stream(self.config)
            stream.seek(plain["epoch"], plain["place"])
            own = {name: value for name, value in plain.items() if name not in ("name", "epoch", "place")}
            self.running[slot] = Running(data, stream, **own)

    def _library_is_written(self) -> bool:
        """Whether the run's library holds every adapter that is finished, but for those that it may leave out."""
        path = self.run / "library" / INDEX
        kept = {name for name, why in self.finished.items() if why != BROKEN}
        return path.exists() and kept <= set(AdapterLibrary.open(path.parent).names)

    def library(self, folder: Path) -> AdapterLibrary:
        """Writes the library of the finished adapters, without those that broke before they learned anything.

        Raises:
            TrainingError: if there is none.
        """
        broken = [name for name, why in self.finished.items() if why == BROKEN]
        if broken:
            self.log(f"stopped at {BROKEN}: {', '.join(broken)}")
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
        purpose: Purpose = "evaluation" if self.config.for_evaluation_only else "training"
        library = save_library(
            folder, lora, self.spec, kept, purpose=purpose, sources=self.config.data.tasks, overwrite=True
        )
        left = f"; {self.left} left, go on with --resume" if self.left else ""
        self.log(f"{len(library.names)} adapters in {library.folder}{left}")
        return library


Watch = Callable[[Trainer, Callable[[str], None]], None]
"""Looks on before the first step of a new run, with what takes its steps and where lines go; leaves all as it is."""


def _not_hooked(*_: Any) -> AnswerLosses:
    raise AssertionError("the base is hooked in `fit`")


def train_task_loras(
    config: TaskLorasConfig,
    run: Path,
    *,
    resume: bool = False,
    max_minutes: float | None = None,
    device: str | None = None,
    benchmarks: Benchmarks | None = None,
    bar: bool = False,
    watch: Watch | None = None,
    log: Callable[[str], None] = print,
) -> AdapterLibrary:
    """Trains an adapter for every task, to the end or to the time budget.

    Args:
        config: Settings.
        run: Folder for `config.json`, `metrics.jsonl`, `finished/`, the state and, at the end, `library/`.
        resume: Go on from the folder's state.
        max_minutes: Wall time after which the state is saved and the run stops.
        device: `cuda` or `cpu`; the GPU if there is one.
        benchmarks: Loads the benchmarks' tasks, for the source `benchmarks`.
        bar: Draw a progress bar of the tasks on standard error in place of progress lines.
        watch: Looks on; see `Watch`.
        log: Where progress lines go.

    Returns:
        The library of the adapters that are finished; all of them unless time ran out.

    Raises:
        ConfigError, DataError: before the first step, if settings or data will not do.
        TrainingError: if no adapter was finished, or a resume has no state or other settings.
        KeyboardInterrupt: after Ctrl-C, once the state is saved.
    """
    torch.set_float32_matmul_precision("high")
    launch = Launch(config, run, resume=resume, max_minutes=max_minutes, device=device, bar=bar, log=log)
    with launch.processes as processes:
        going_on = processes.main_first(lambda: int(check_run(run, launch.settings, resume=resume)))
        trainer = setup(config, run, processes, launch.log, benchmarks)
        if going_on:
            trainer.load(read_facts(run))
            launch.log(f"resumed: {len(trainer.finished)} of {len(trainer.data)} done")
        number = len(trainer.running)
        launch.log(f"ready after {time.monotonic() - launch.started:.0f} s: {number} adapters at once")
        with launch.loop(trainer.steps, len(trainer.data), "tasks") as (logger, stop):
            trainer.fit(logger, stop, watch if processes.number == 1 else None)
        stop.raise_if_interrupted(launch.log, f"is saved, {trainer.left} adapters are left")
        if not trainer.finished:
            raise TrainingError(f"No adapter was finished within {max_minutes} minutes; go on with --resume")
        library = trainer.library(run / "library") if processes.main else None
        processes.wait()
    return library or AdapterLibrary.open(run / "library")


def setup(
    config: TaskLorasConfig,
    run: Path,
    processes: Processes,
    log: Callable[[str], None],
    benchmarks: Benchmarks | None = None,
) -> Trainer:
    """Loads what a run needs: tasks, tokenizer, base, and what the adapters start from.

    Raises:
        ConfigError, DataError: if settings or data will not do.
    """
    tasks = load_tasks(config, benchmarks)
    gap = document_gap(hub.load_config(config.base))
    data = tokenize_tasks(tasks, config, hub.load_tokenizer(config.base), gap=gap)
    too_long = sum(x.train.too_long for x in data)
    log(f"{len(data)} tasks, {sum(len(x.train.variants) for x in data)} examples ({too_long} too long and left out)")
    require_shares(processes, min(config.train.tasks_per_batch, len(data)), "train.tasks_per_batch")
    device, fsdp = processes.device, config.train.fsdp
    base = load_base(config.base, fsdp, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    spec = AdapterSpec.from_config(base.config, config.base, config.lora)
    if fsdp != "off":
        processes.shard(base, decoder_layers(base, spec))
    require_packable(base, config.base)
    origin = None if config.train.init_from is None else _origin(Path(config.train.init_from), spec)
    return Trainer(config, base, spec, data, run, device, log, origin, processes)


def _origin(folder: Path, spec: AdapterSpec) -> LoraTensors:
    """The multi-task LoRA of a checkpoint."""
    loaded = load_checkpoint(folder)
    if loaded.hypernet.head is not None:
        raise ConfigError(
            f"train.init_from: {folder} is a hypernetwork of variant '{loaded.config.hypernet.variant}'; adapters "
            "start from a multi-task LoRA, a checkpoint of variant 'none'"
        )
    spec.require_same_shape(loaded.spec, this="This run", that=f"train.init_from {folder}")
    return loaded.hypernet.shared_adapter().of_targets(spec.places_in(loaded.spec))
