"""Dry runs: each trainer set up as for a run, a few of its steps, and an estimate of the whole; nothing is written.

What is measured are the trainer's own steps on its own batches. Those have one static shape, so that any batch is as
long as the longest. Knows the three trainers. How steps become an estimate stands in `estimate`.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn

from t2l import hub
from t2l.errors import TrainingError
from t2l.train import reconstruction, sft, task_loras
from t2l.train.batches import Batch
from t2l.train.defaults import follow
from t2l.train.embeddings import EmbeddingCache
from t2l.train.estimate import Estimate, Work, device_name, estimate, memory_available, size, tensor_bytes
from t2l.train.packing import PackedRows
from t2l.train.processes import Processes
from t2l.train.resume import Progress, restore_weights, state_metadata, whole_state
from t2l.train.slots import StepSizes
from t2l.train.task_data import Benchmarks, lay_out_segment

BUDGET = 60.0
"""Seconds that a dry run may spend on steps."""
PREVIEW = 8.0
"""The same before the first step of a run, which waits for it."""
Log = Callable[[str], None]


# ---------------------------------------------------------------------------------------------- fine-tuning


def dry_run_sft(config: sft.SftConfig, *, device: str | None = None, log: Log = print) -> Estimate:
    """Estimates a run of `t2l.train.sft.train`.

    Raises:
        ConfigError, DataError: as the run itself would before its first step.
    """
    started = time.monotonic()
    with _in_memory(config.base):
        session = sft.setup(follow(config, log), Processes(torch.device(hub.best_device(device))), 0, log)
    with sft.stepping(session) as trainer:
        return estimate(sft_work(session, trainer, time.monotonic() - started), budget=BUDGET)


def preview_sft(session: sft.Session, trainer: sft.Trainer) -> Estimate:
    """The estimate for a run that is about to take its first step; everything is then as it was before."""
    with unchanged(trainer.hypernet, trainer.optimizer):
        found = estimate(sft_work(session, trainer, 0.0), budget=PREVIEW, fresh=False)
        trainer.stopped.zero_()
    return found


def sft_work(session: sft.Session, trainer: sft.Trainer, setup_seconds: float) -> Work:
    """A run of fine-tuning as an estimate sees it."""
    config, data = session.config, session.data
    train, workers = config.train, config.train.dataloader_num_workers
    trained = [p for p in trainer.hypernet.parameters() if p.requires_grad]
    models = (session.base, getattr(session.encoder, "model", None))
    numbers = count()

    def build() -> Batch:
        return data.train[next(numbers) % train.max_steps]

    started = time.perf_counter()
    built = [build(), build()][-1]
    build_seconds = (time.perf_counter() - started) / 2

    def step(rows: int, tokens: int) -> None:
        batch = built if workers else build()  # without workers the loop waits for every batch
        trainer.step(_cut(batch, rows, tokens).to(session.device), 0)

    def evaluate() -> None:
        name, batches = next(iter(data.evaluation.items()))
        sft.evaluate(trainer, replace(data, evaluation={name: batches}))

    def disk() -> dict[str, int]:
        best = trainer.hypernet.state_dict() if train.early_stopping_patience else {}
        found = _state(trainer.hypernet, trainer.optimizer, Progress(train.max_steps, best=best))
        return found | _checkpoint(session.hypernet)

    return Work(
        device=session.device,
        setting="train.tasks_per_batch",
        rows=train.tasks_per_batch,
        tokens=train.max_seq_length,
        step=step,
        steps=train.max_steps,
        evaluate=evaluate if data.evaluation else None,
        evaluations=-(-train.max_steps // train.eval_steps) * len(data.evaluation),
        passes=2 * train.eval_batches,
        trained=sum(p.numel() for p in trained),
        frozen=_parameters(session.hypernet, *models) - sum(p.numel() for p in trained),
        held=_held(trained, session.hypernet, base=models[0], encoder=models[1]) | _texts(session.cache),
        disk=disk,
        setup_seconds=setup_seconds,
        compiled=train.torch_compile,
        least_seconds=build_seconds / workers if workers else 0.0,
        least=train.gradient_accumulation_steps,
        turns=train.gradient_accumulation_steps,
        remedies=() if train.gradient_checkpointing else ("train.gradient_checkpointing=true",),
    )


def _cut(batch: Batch, rows: int, tokens: int) -> Batch:
    """The first rows of a batch, and the first tokens of each."""
    return Batch(_cut_rows(batch.rows, rows, tokens), *(x[:rows] if x.dim() else x for x in batch[1:]))


def _cut_rows(packed: PackedRows, rows: int, tokens: int) -> PackedRows:
    part = packed.part(0, rows)
    long, short = part.tokens.shape[1], part.labels.shape[1]
    if tokens >= long:
        return part
    answers = max(1, short * tokens // long)
    cut = PackedRows(*(x[:, :tokens] if x.shape[1] == long else x[:, :answers] for x in part))
    return cut._replace(label_positions=cut.label_positions.clamp_max(tokens - 1))


# ---------------------------------------------------------------------------------------------- reconstruction


def dry_run_reconstruction(
    config: reconstruction.ReconstructionConfig,
    *,
    device: str | None = None,
    log: Log = print,
) -> Estimate:
    """Estimates a run of `t2l.train.reconstruction.train_reconstruction`.

    Args:
        config: Settings.
        device: `cuda`, `cpu`; the GPU if there is one.
        log: Where lines go.

    Raises:
        ConfigError, DataError: as the run itself would before its first step.
    """
    started = time.monotonic()
    trainer = reconstruction.setup(config, None, Processes(torch.device(hub.best_device(device))), log)
    return estimate(reconstruction_work(trainer, time.monotonic() - started), budget=BUDGET)


def preview_reconstruction(trainer: reconstruction.Trainer) -> Estimate:
    """As `preview_sft`."""
    with unchanged(trainer.hypernet, trainer.optimizer):
        found = estimate(reconstruction_work(trainer, 0.0), budget=PREVIEW, fresh=False)
        trainer.stopped.zero_()
    return found


def reconstruction_work(trainer: reconstruction.Trainer, setup_seconds: float) -> Work:
    """A run of reconstruction as an estimate sees it."""
    train, hypernet, targets = trainer.config.train, trainer.hypernet, trainer.targets
    started = time.perf_counter()
    drawn = trainer.sampler.steps(0, min(train.logging_steps, train.max_steps))
    sampling = (time.perf_counter() - started) / len(drawn[0])
    adapters_n, texts_n = (x[0].to(trainer.device) for x in drawn)
    parts = (targets.z, targets.mean, targets.deviation)
    trained = sum(p.numel() for p in trainer.parameters)
    encoder = getattr(trainer.encoder, "model", None)

    def step(rows: int, tokens: int) -> None:
        trainer.step(0, adapters_n[:rows], texts_n[:rows])

    def evaluate() -> None:
        trainer.evaluate()

    return Work(
        device=trainer.device,
        setting="train.adapters_per_batch",
        rows=trainer.sampler.per_batch,
        tokens=1,
        step=step,
        steps=train.max_steps,
        evaluate=evaluate,
        evaluations=-(-train.max_steps // train.eval_steps) + 1,  # once more for the card
        passes=2,
        trained=trained,
        frozen=_parameters(hypernet, encoder) - trained,
        held=_held(trainer.parameters, hypernet, encoder=encoder)
        | {"adapters": _bytes(x for lora in parts for x in (*lora.a, *lora.b))}
        | _texts(trainer.embeddings),
        disk=lambda: _state(hypernet, trainer.optimizer, Progress(train.max_steps)) | _checkpoint(hypernet),
        setup_seconds=setup_seconds,
        compiled=train.torch_compile,
        added_seconds=sampling,
    )


# -------------------------------------------------------------------------------------------------- task LoRAs


def dry_run_task_loras(
    config: task_loras.TaskLorasConfig,
    *,
    device: str | None = None,
    benchmarks: Benchmarks | None = None,
    log: Log = print,
) -> Estimate:
    """Estimates a run of `t2l.train.task_loras.train_task_loras`; its time is the most that it can take.

    Args:
        config: Settings.
        device: `cuda`, `cpu`; the GPU if there is one.
        benchmarks: Loads the benchmarks' tasks, for the source `benchmarks`.
        log: Where lines go.

    Raises:
        ConfigError, DataError: as the run itself would before its first step.
    """
    started = time.monotonic()
    with _in_memory(config.base):
        trainer = task_loras.setup(config, Path(), Processes(torch.device(hub.best_device(device))), log, benchmarks)
    with trainer.stepping():
        trainer.fill()
        return estimate(task_loras_work(trainer, time.monotonic() - started), budget=BUDGET)


def preview_task_loras(trainer: task_loras.Trainer) -> Estimate:
    """As `preview_sft`: what was trained in the slots is thrown away, and all tasks wait again."""
    trainer.fill()
    found = estimate(task_loras_work(trainer, 0.0), budget=PREVIEW, fresh=False)
    trainer.running, trainer.waiting = [None] * trainer.slots.number, list(trainer.data)
    return found


def task_loras_work(trainer: task_loras.Trainer, setup_seconds: float) -> Work:
    """A run of task LoRAs as an estimate sees it."""
    config, slots, train = trainer.config, trainer.slots, trainer.config.train
    started = time.perf_counter()
    segment = lay_out_segment(trainer.running, config, 0, trainer.nothing.train, trainer.device)
    laying = (time.perf_counter() - started) / len(segment.sizes)
    number = sum(x.numel() for x in slots.trained)

    @lru_cache(maxsize=1)
    def sized(tasks: int) -> task_loras.Trainer:
        if tasks == slots.number:
            return trainer
        smaller = replace(config, train=replace(train, tasks_per_batch=tasks))
        found = task_loras.Trainer(
            smaller, trainer.base, trainer.spec, list(trainer.data.values()), trainer.run, trainer.device, trainer.log
        )
        found.losses, found.update = trainer.losses, trainer.update
        return found

    def step(tasks: int, tokens: int) -> None:
        rows = _cut_rows(segment.rows, tasks * train.rows_per_task, tokens)
        sized(tasks).step(rows, StepSizes(*(x[:tasks] for x in segment.sizes[0])))

    def evaluate() -> None:
        trainer.validate()[0].sum().item()

    def disk() -> dict[str, int]:
        one = tensor_bytes(slots.best_adapter(0), None)
        whole = 4 * trainer.spec.num_parameters * len(trainer.data)
        state = tensor_bytes(slots.tensors(), state_metadata({"waiting": list(trainer.data)}))
        return _twice(state) | {"finished adapters": one * len(trainer.data), "library": whole}

    rounds = -(-len(trainer.data) // slots.number)
    steps = rounds * train.max_steps
    return Work(
        device=trainer.device,
        setting="train.tasks_per_batch",
        rows=slots.number,
        tokens=train.max_seq_length,
        step=step,
        steps=steps,
        evaluate=evaluate,
        evaluations=steps // train.eval_steps + rounds,
        passes=-(-train.eval_rows // train.rows_per_task),
        trained=number // slots.number * len(trainer.data),
        frozen=_parameters(trainer.base),
        held={
            "base": _bytes((*trainer.base.parameters(), *trainer.base.buffers())),
            "adapters, twice": _bytes((*slots.weights, *slots.best)),
            "gradients": _bytes(slots.trained),
            "moments": _bytes((*slots.mean, *slots.square)),
        },
        disk=disk,
        setup_seconds=setup_seconds,
        compiled=train.torch_compile,
        added_seconds=laying,
    )


# -------------------------------------------------------------------------------------------- what they share


@contextmanager
def unchanged(module: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Whatever steps are taken inside: weights, a fresh optimiser and random state are afterwards as they were.

    Args:
        module: What is trained.
        optimizer: That has not taken a step yet.
    """
    kept = {name: x.detach().to("cpu", copy=True) for name, x in module.state_dict().items()}
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(list(devices)):
        yield
    restore_weights(module, kept, Path("the trial"))
    optimizer.zero_grad(set_to_none=True)
    optimizer.state.clear()


@contextmanager
def _in_memory(base: str) -> Iterator[None]:
    """Says of a base that a device cannot hold how large it is.

    Raises:
        TrainingError: in place of torch's own error.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            number = _parameters(AutoModelForCausalLM.from_config(hub.load_config(base)))
        gpu = torch.device("cuda")
        raise TrainingError(
            f"{base} has {number:,} parameters, {size(4 * number)} as it is loaded (float32) and {size(2 * number)} in "
            f"bfloat16; {device_name(gpu)} has {size(memory_available(gpu))}. Take a smaller base or a larger device, "
            "or shard the base over several (train.fsdp)"
        ) from error


def _parameters(*modules: nn.Module | None) -> int:
    """Parameters of modules, each once."""
    return sum({id(p): p.numel() for module in modules if module is not None for p in module.parameters()}.values())


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each storage once."""
    found = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(found.values())


def _held(
    trained: list[nn.Parameter],
    network: nn.Module | None,
    *,
    base: nn.Module | None = None,
    encoder: nn.Module | None = None,
) -> dict[str, int]:
    """Bytes of models, of the gradients and of AdamW's two moments."""
    found, seen = {}, set[int]()
    for name, module in (("base", base), ("network", network), ("encoder", encoder)):
        tensors = [] if module is None else [x for x in (*module.parameters(), *module.buffers()) if id(x) not in seen]
        seen |= {id(x) for x in tensors}
        found[name] = _bytes(tensors)
    own = _bytes(trained)
    return found | {"gradients": own, "moments": 2 * own}


def _texts(cache: EmbeddingCache | None) -> dict[str, int]:
    return {} if cache is None else {"encoded texts": _bytes([cache.states])}


def _twice(state: int) -> dict[str, int]:
    """A state is written beside the one before it."""
    return {"state": state, "state while it is replaced": state}


def _state(module: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> dict[str, int]:
    tensors, facts = whole_state(module, optimizer, progress)
    return _twice(tensor_bytes(tensors, state_metadata(facts)))


def _checkpoint(hypernet: nn.Module) -> dict[str, int]:
    return {"checkpoint": tensor_bytes(hypernet.state_dict(), {"format": "pt"}, torch.float16)}
