"""Supervised fine-tuning of the hypernetwork: the loss of the base model under the adapters it writes.

    description ─ frozen encoder (cached) ─▶ hypernetwork ─▶ adapters ─ hooked on the frozen base ─▶ loss of the answers

After section 3.3 of Text-to-LoRA (arXiv 2506.06105). This file holds the evaluation and the run: set up, fit,
evaluate, save. The step stands in `sft_step`, the settings in `config`, the data in `dataset` and `batches`, the base's
loss in `loss`, the state a run goes on from in `resume`. The same loop trains the baselines: a multi-task LoRA
(`hypernet.variant: none`), adapters written from inputs or task names (`conditioning`).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2l import hub
from t2l.apply import compiled, decoder_layers, hooked
from t2l.checkpoint import CheckpointConfig, save_checkpoint
from t2l.encoder import Encoder, OneHotEncoder, encoder_revision, load_encoder
from t2l.hypernet import Hypernet
from t2l.spec import AdapterSpec
from t2l.train.checkpoints import card, initialize, portable, require_origin
from t2l.train.config import SftConfig
from t2l.train.dataset import RunData, prepare_data
from t2l.train.defaults import follow
from t2l.train.embeddings import EmbeddingCache
from t2l.train.launch import Launch
from t2l.train.loop import StopRequest
from t2l.train.loss import answer_losses, checkpoint_layers, document_gap, require_packable
from t2l.train.metrics import MetricLogger
from t2l.train.monitor import StepMonitor
from t2l.train.packing import PackedRows
from t2l.train.processes import Processes, is_main, load_base, require_shares
from t2l.train.resume import Progress, first_step, load_state, restore_weights, save_state
from t2l.train.sft_step import Trainer, make_optimizer
from t2l.versions import versions

# ------------------------------------------------------------------------------------------------- evaluation


def evaluate(trainer: Trainer, data: RunData) -> dict[str, float]:
    """Loss and exact match (teacher-forced) with the right and with another task's description.

    The prompt is the same in both; only the adapter's description is swapped. Where nothing is read, or an evaluation
    set has one task, there is no other to compare with. Runs with gradients switched on and thrown away: without them a
    compiled step would be compiled a second time.
    """
    report: dict[str, float] = {}
    number = trainer.config.train.eval_batches
    trainer.hypernet.eval()
    for name, batches in data.evaluation.items():
        both = batches.has_negatives and not trainer.config.unconditional
        # Of each batch, with the right and with another description: loss, documents that are right, all of them.
        sums = torch.zeros(number, 2, 3, dtype=torch.float64)
        for item in range(number):
            for part in trainer.parts(batches[item].to(trainer.device)):
                rows = part.batch.rows
                if both:
                    found = [*trainer.compare(part, learning=False)[:2]]
                else:
                    found = [trainer.forward(rows, part.batch.read, learning=False)[0]]
                for which, answers in enumerate(found):
                    loss = (answers.losses * rows.weights).sum().item()
                    sums[item, which] += torch.tensor([loss, *exact_matches(rows, answers.correct)])
        sums = trainer.processes.sum(sums)
        losses, right, total = (sums[..., i].T.tolist() for i in range(3))
        loss, wrong_loss = (sum(x / number for x in column) for column in losses)
        report[f"{name}/loss"] = loss
        report[f"{name}/exact_match"] = sum(x / n / number for x, n in zip(right[0], total[0], strict=True))
        if both:
            wrong = sum(x / n / number for x, n in zip(right[1], total[1], strict=True))
            report[f"{name}/wrong_exact_match"] = wrong
            report[f"{name}/margin"] = wrong_loss - loss
    trainer.hypernet.train()
    return report


def exact_matches(rows: PackedRows, correct: Tensor) -> tuple[int, int]:
    """Documents all of whose answer tokens are the model's first choice, and all documents."""
    right = total = 0
    for document in range(int(rows.label_documents.max()) + 1):
        own = rows.label_documents == document
        present = own.any(1)
        right += int(((correct | ~own).all(1) & present).sum())
        total += int(present.sum())
    return right, total


def _keep_best(trainer: Trainer, progress: Progress, report: dict[str, float]) -> None:
    """Early stopping: held-out tasks decide, or new examples of the trained tasks where there are none."""
    suite = "validation/" if any(key.startswith("validation/") for key in report) else "seen/"
    metric = "margin" if any(key.startswith("validation/") and key.endswith("/margin") for key in report) else "loss"
    found = [value for key, value in report.items() if key.startswith(suite) and key.endswith(f"/{metric}")]
    value = sum(found) / len(found) * (1 if metric == "margin" else -1)
    progress.chosen_by = metric
    if progress.best and not value > progress.best_value:
        progress.patience_count += 1
        progress.stopped = progress.patience_count >= trainer.config.train.early_stopping_patience
        return
    progress.best_step, progress.best_value, progress.patience_count = progress.step, value, 0
    progress.best = {name: x.detach().to("cpu", copy=True) for name, x in trainer.hypernet.state_dict().items()}


# --------------------------------------------------------------------------------------------------- the run


def train(
    config: SftConfig,
    run: Path,
    *,
    resume: bool = False,
    max_minutes: float | None = None,
    device: str | None = None,
    bar: bool = False,
    watch: "Watch | None" = None,
    log: Callable[[str], None] = print,
) -> Path:
    """Runs a training to its end, its early stop or its time budget.

    Args:
        config: Settings.
        run: Folder for `config.json`, `metrics.jsonl`, `state.safetensors`, `tensorboard/` and, at the end,
            `checkpoint/`.
        resume: Go on from the folder's state.
        max_minutes: Wall time after which the state is saved and the run stops.
        device: `cuda`, `cpu`; the GPU if there is one.
        bar: Draw a progress bar on standard error in place of most lines.
        watch: Looks on; see `Watch`.
        log: Where lines go.

    Returns:
        The folder of the checkpoint.

    Raises:
        ConfigError: if settings do not go together.
        DataError: if data are missing, forbidden or do not fit.
        TrainingError: if the loss is not finite, the run diverges, or a resume has no state or other settings.
    """
    config = follow(config, log if is_main() else lambda line: None)
    steps = config.train.max_steps
    launch = Launch(config, run, resume=resume, max_minutes=max_minutes, device=device, bar=bar, log=log)
    with launch.processes as processes:
        require_shares(
            processes, config.train.tasks_per_batch, "train.tasks_per_batch", config.train.gradient_accumulation_steps
        )
        begin = processes.main_first(lambda: first_step(launch.settings, run, max_steps=steps, resume=resume))
        session = setup(config, processes, begin, launch.log)
        progress = Progress()
        if begin:
            progress = load_state(run, session.hypernet, session.optimizer)
            launch.log(f"resumed at step {begin} of {steps}")
        with launch.loop(begin, steps) as (logger, stop):
            fit(session, run, progress, logger, stop, watch if processes.number == 1 else None)
        stop.raise_if_interrupted(launch.log, f"after step {progress.step} is saved")
        folder = save(session, run, progress, launch.log)
        processes.wait()
    return folder


@dataclass
class Session:
    """What a run needs from its set-up to its end."""

    config: SftConfig
    processes: Processes
    tokenizer: Any
    base: Any
    encoder: Encoder
    data: RunData
    cache: EmbeddingCache | None
    spec: AdapterSpec
    hypernet: Hypernet
    origin: dict[str, str] | None
    """The checkpoint that the weights came from, without its place on this machine."""
    optimizer: torch.optim.Optimizer

    @property
    def device(self) -> torch.device:
        """Where this process trains."""
        return self.processes.device


def setup(config: SftConfig, processes: Processes, begin: int, log: Callable[[str], None]) -> Session:
    """Loads the models, prepares the data and encodes everything that will be read.

    Args:
        config: Settings.
        processes: This one, which says where the run is trained, and those that train it too.
        begin: The step it goes on from; a saved state then replaces all weights.
        log: Where lines go.
    """
    started, device = time.monotonic(), processes.device
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = hub.load_tokenizer(config.base)
    base = load_base(config.base, config.train.fsdp, device)
    spec = AdapterSpec.from_config(base.config, config.base, config.lora)  # what cannot be is said before slow work
    if config.train.init_from:
        require_origin(config, spec)
    if config.train.fsdp != "off":
        processes.shard(base, decoder_layers(base, spec))
    require_packable(base, config.base)
    encoder: Encoder | None = None
    if config.encoder.kind != "onehot":
        encoder = load_encoder(config.encoder, config.base, base=(base, tokenizer), device=str(device))
    count_tokens = encoder.count_tokens if encoder is not None else lambda texts: [1] * len(texts)
    data = prepare_data(config, tokenizer, count_tokens, gap=document_gap(base.config))
    for line in data.told():
        log(line)
    encoder = encoder or OneHotEncoder(data.texts, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bool(config.train.bf16)):
        cache = None if config.unconditional else EmbeddingCache(encoder, data.texts, log=log)
    log(f"ready after {time.monotonic() - started:.0f} s")

    if device.type == "cuda" and config.train.fsdp == "off":
        to_bfloat16(base)
    hypernet = Hypernet(spec, embedding_size=encoder.embedding_size, kind=encoder.kind, config=config.hypernet)
    if hypernet.normalizer is not None and cache is not None and not begin:  # a saved state has the constants
        hypernet.normalizer.fit(cache.sample(torch.tensor(data.train.readable)).cpu())
    origin = initialize(hypernet, Path(config.train.init_from)) if config.train.init_from else None
    hypernet.to(device).train()
    if config.train.gradient_checkpointing:
        checkpoint_layers(base)
    optimizer = make_optimizer(hypernet, config.train)
    return Session(config, processes, tokenizer, base, encoder, data, cache, spec, hypernet, origin, optimizer)


def to_bfloat16(base: nn.Module) -> None:
    """Turns a base's parameters into bfloat16, in place, as if it had been loaded so.

    Its buffers stay as they are: rotary frequencies that are rounded turn a position of 400 by the wrong angle (cosines
    0.17 off), and a base that is loaded in bfloat16, as for answering, has them in float32.
    """
    for parameter in base.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


Watch = Callable[[Session, Trainer, int, Callable[[str], None]], None]
"""Looks on: called before the first step, and after every planned evaluation, with what the run has, what takes its
steps, the number of steps done, and where lines go. It leaves weights, optimiser and random state as they are. Of
several processes that train together none looks on, for it may take steps that the others do not."""


@contextmanager
def stepping(session: Session) -> Iterator[Trainer]:
    """What takes the steps, for as long as the base bears its hooks; alike in several processes."""
    train, base, hypernet, processes = session.config.train, session.base, session.hypernet, session.processes
    layers = compiled(base, session.spec) if train.torch_compile else nullcontext()
    with hooked(base, session.spec) as slots, layers:
        write = processes.prepare(torch.compile(hypernet, dynamic=False) if train.torch_compile else hypernet)
        losses = answer_losses(base, slots, keep=train.gradient_checkpointing, fuse=train.torch_compile)
        yield Trainer(
            session.config,
            base,
            hypernet,
            write,
            losses,
            session.cache,
            session.optimizer,
            session.device,
            processes,
            slots,
        )


def fit(
    session: Session,
    run: Path,
    progress: Progress,
    logger: MetricLogger,
    stop: StopRequest,
    watch: Watch | None = None,
) -> None:
    """Trains on from where `progress` stands, and evaluates, logs and saves on the way."""
    train, data, device = session.config.train, session.data, session.device
    if progress.stopped:
        return
    first = progress.step
    with stepping(session) as trainer:
        if watch is not None:
            watch(session, trainer, first, logger.log)
        vocabulary = session.base.config.get_text_config().vocab_size
        monitor = StepMonitor(session.config, data, device, vocabulary=vocabulary, started=stop.started)
        steps, workers = range(first, train.max_steps), train.dataloader_num_workers
        for step, batch in enumerate(data.train.loader(steps, workers=workers, pin=device.type == "cuda"), start=first):
            monitor.add(batch, *trainer.step(batch.to(device), step))
            progress.step = step + 1
            logger.step(progress.step)
            stop.settle()
            last = bool(stop) or progress.step == train.max_steps
            planned = progress.step % train.eval_steps == 0 or progress.step == train.max_steps
            if progress.step % train.logging_steps == 0 or last:
                logger.record(monitor.close(progress.step))
                monitor.require_learning(progress.step)
            saving = progress.step % train.save_steps == 0 or last
            if planned or saving:
                monitor.settle(progress.step)
            with monitor.paused():
                if planned or (last and not stop.interrupted):
                    report = evaluate(trainer, data)
                    logger.record({"step": progress.step, **report})
                    # One that only a time budget brought about must not count, or the resumed run were another.
                    if train.early_stopping_patience and planned:
                        _keep_best(trainer, progress, report)
                    if watch is not None and planned:
                        watch(session, trainer, progress.step, logger.log)
                if (saving or progress.stopped) and session.processes.main:
                    save_state(run, trainer.hypernet, trainer.optimizer, progress)
            if last or progress.stopped:
                return


def save(session: Session, run: Path, progress: Progress, log: Callable[[str], None]) -> Path:
    """Writes the weights that the run keeps as a checkpoint; returns its folder."""
    config, folder = session.config, run / "checkpoint"
    if not session.processes.main:
        return folder
    if progress.best:
        restore_weights(session.hypernet, progress.best, run)
    provenance = {
        "seed": config.seed,
        "steps": progress.best_step if progress.best else progress.step,
        "planned_steps": config.train.max_steps,
        "data": session.data.summary,
        "settings": portable(config, session.origin),
        "versions": versions(),
    }
    if progress.best:
        provenance |= {"chosen_by": progress.chosen_by, "chosen_at": abs(progress.best_value)}
    names = session.encoder.names if isinstance(session.encoder, OneHotEncoder) else ()
    saved = CheckpointConfig.current(
        provenance,
        embedding_size=session.encoder.embedding_size,
        encoder=replace(config.encoder, names=tuple(names)),
        encoder_revision=encoder_revision(config.encoder, config.base),
        hypernet=config.hypernet,
        prompt=config.prompt,
        conditioning=config.conditioning,
    )
    text = card(session.spec, provenance)
    save_checkpoint(folder, session.hypernet, session.spec, saved, card=text, overwrite=True)
    log(f"checkpoint of step {provenance['steps']}: {folder}")
    return folder
