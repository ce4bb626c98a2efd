"""Supervised fine-tuning of the hypernetwork: the loss of the base model under the adapters it writes.

    description ─ frozen encoder (cached) ─▶ hypernetwork ─▶ adapters ─ hooked on the frozen base ─▶ loss of the answers

After section 3.3 of Text-to-LoRA (arXiv 2506.06105). This file holds the step, the evaluation and the run: set up, fit,
evaluate, save. The settings stand in `config`, the data in `dataset` and `batches`, the loss in `loss`, the state a run
goes on from in `resume`. The same loop trains the baselines: a multi-task LoRA (`hypernet.variant: none`), adapters
written from inputs or task names (`conditioning`), the base's own weights (`method: full`).
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2l import hub
from t2l.apply import compiled, hooked
from t2l.checkpoint import CheckpointConfig, save_checkpoint
from t2l.config import to_plain
from t2l.encoder import Encoded, Encoder, OneHotEncoder, encoder_revision, load_encoder
from t2l.hypernet import Hypernet
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec
from t2l.train.batches import DROPPED, TOLD, Batch
from t2l.train.checkpoints import card, initialize, portable, require_origin, save_model
from t2l.train.config import SftConfig, TrainConfig
from t2l.train.dataset import RunData, prepare_data
from t2l.train.defaults import follow
from t2l.train.embeddings import EmbeddingCache
from t2l.train.loop import StopRequest, schedule
from t2l.train.loss import AnswerLosses, LossFunction, answer_losses, checkpoint_layers, neftune_noise, require_packable
from t2l.train.metrics import MetricLogger
from t2l.train.monitor import StepMonitor
from t2l.train.packing import PackedRows
from t2l.train.resume import Progress, begin_run, first_step, load_state, restore_weights, save_state, weights
from t2l.versions import versions

NO_ADAPTER = LoraTensors((), (), 1.0)

# -------------------------------------------------------------------------------------------------- one step


@dataclass
class Trainer:
    """What takes a step: model, hypernetwork, optimiser."""

    config: SftConfig
    base: Any
    hypernet: Hypernet | None
    """None where the base's own weights are trained."""
    write: Callable[..., LoraTensors] | None
    """The hypernetwork, compiled or not."""
    losses: LossFunction
    cache: EmbeddingCache | None
    """None where nothing is read."""
    optimizer: torch.optim.Optimizer
    device: torch.device

    def __post_init__(self) -> None:
        self.stopped = torch.zeros((), device=self.device)
        """1 from the first loss or gradient that is not finite: the fused optimiser then changes nothing any more, and
        the host need not wait for every step to find out."""
        # The attribute that torch's GradScaler sets and fused optimisers look for; there is no argument for it.
        self.optimizer.found_inf = self.stopped  # type: ignore[attr-defined]

    @property
    def trained(self) -> nn.Module:
        """What the optimiser changes."""
        return self.base if self.hypernet is None else self.hypernet

    def adapters(self, read: Tensor, *, learning: bool, kept: Tensor | None = None) -> LoraTensors:
        """Adapters (N of them) from the texts at `read` (N,); the shared LoRA alone where `kept` (N,) is false."""
        if self.hypernet is None:
            return NO_ADAPTER
        encoded = Encoded(read[:, None]) if self.cache is None else self.cache[read]
        # Without dropout there is no scale at all, so that a compiled hypernetwork need not multiply by ones.
        scale = kept.float() if kept is not None and self.config.train.conditioning_dropout else None
        # Evaluation runs the hypernetwork uncompiled: its evaluation mode would be compiled for a few batches only.
        write = self.write if learning and self.write is not None else self.hypernet
        return write(encoded.states, encoded.mask, scale).map(Tensor.contiguous)

    def forward(
        self, rows: PackedRows, read: Tensor, *, learning: bool, kept: Tensor | None = None
    ) -> tuple[AnswerLosses, LoraTensors]:
        """Losses of the answers of rows under the adapters written from `read` (B,); and these adapters."""
        train, noise, smoothing = self.config.train, None, None
        if train.neftune_noise_alpha:  # zeros in evaluation, so that there is one compiled function
            width = self.base.get_input_embeddings().embedding_dim
            noise = neftune_noise(rows.documents, width, train.neftune_noise_alpha if learning else 0.0)
        if train.label_smoothing_factor:
            smoothing = torch.full((), train.label_smoothing_factor if learning else 0.0, device=self.device)
        enabled = self.device.type == "cuda" if train.bf16 is None else train.bf16
        with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled):
            lora = self.adapters(read, learning=learning, kept=kept)
            answers = self.losses(rows, lora if lora.a else None, noise, smoothing)
        if not learning:  # or what a backward pass would need stayed in memory, of several batches at a time
            answers, lora = answers._replace(losses=answers.losses.detach()), lora.map(Tensor.detach)
        return answers, lora

    def compare(self, batch: Batch, *, learning: bool) -> tuple[AnswerLosses, AnswerLosses, LoraTensors]:
        """`forward` with the right and with another task's descriptions; the prompts are the same in both.

        In training with a margin loss, only the first rows are compared (`margin_loss_share`), in one pass of all rows
        and of these once more. Evaluation has passes of the same shape, for there is one compiled one.
        """
        train, number = self.config.train, len(batch.read)
        again = math.ceil(train.margin_loss_share * number) if train.margin_loss_weight else 0
        rows = batch.rows.followed_by(batch.rows.part(0, again))
        kept = torch.cat([batch.told, batch.told[:again]]) != DROPPED if learning else None
        read = torch.cat([batch.read, batch.negatives[:again]])
        answers, lora = self.forward(rows, read, learning=learning, kept=kept)
        right, wrong = (AnswerLosses(*(x[part] for x in answers)) for part in (slice(number), slice(number, None)))
        if not learning and again < number:
            negatives = torch.cat([batch.negatives, batch.negatives[:again]])
            wrong, _ = self.forward(rows, negatives, learning=False)
            wrong = AnswerLosses(*(x[:number] for x in wrong))
        return right, wrong, lora

    def loss(self, batch: Batch) -> Tensor:
        """The training loss: mean over rows, over a row's documents, over a document's answer tokens."""
        train, weights = self.config.train, batch.rows.weights
        if not train.margin_loss_weight:
            answers, lora = self.forward(batch.rows, batch.read, learning=True, kept=batch.told != DROPPED)
            loss = (answers.losses * weights).sum()
        else:
            right, wrong, lora = self.compare(batch, learning=True)
            loss = (right.losses * weights).sum()
            loss = loss + train.margin_loss_weight * self._hinge(batch, right.losses, wrong.losses)
        if train.l2_weight:
            sizes = [x.float().square().mean() for x in (*lora.a, *lora.b)]
            loss = loss + train.l2_weight * torch.stack(sizes).sum() / len(lora.a)
        return loss

    def _hinge(self, batch: Batch, right: Tensor, wrong: Tensor) -> Tensor:
        """How much the margins of the compared rows lack, on average over those whose adapter alone says what to do.

        The prompt of such a row shows no description, and its adapter is written from one: where a row's own text says
        nothing of its task, another text need cost nothing more.
        """
        number = len(wrong)
        weights = batch.rows.weights[:number]
        share = weights.sum(1)
        margin = ((wrong * weights).sum(1) - (right[:number] * weights).sum(1)) / share.clamp_min(1e-12)
        share = share.masked_fill(batch.in_prompt[:number] | (batch.told[:number] != TOLD), 0.0)
        return (F.relu(self.config.train.margin - margin) * share).sum() / share.sum().clamp_min(1e-12)

    def step(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """One optimiser step; returns loss and gradient norm, without waiting for them.

        From the first one that is not finite, no step changes the weights; `StepMonitor.settle` says so.
        """
        train = self.config.train
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, train.max_steps, train.warmup_ratio)
        loss = self.loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained.parameters(), train.max_grad_norm)
        loss = loss.detach()
        self.stopped.copy_(torch.maximum(self.stopped, 1 - torch.isfinite(loss + norm).float()))
        self.optimizer.step()
        return loss, norm


def make_optimizer(trained: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with a learning rate of its own for the shared LoRA, and no decay of vectors."""
    named = [(name, p) for name, p in trained.named_parameters() if p.requires_grad]
    shared = [p for name, p in named if name.startswith("shared_lora.")]
    others = [p for name, p in named if not name.startswith("shared_lora.")]
    groups = [
        {"params": [p for p in others if p.dim() > 1], "weight_decay": train.weight_decay, "peak": train.learning_rate},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0, "peak": train.learning_rate},
        {"params": shared, "weight_decay": train.weight_decay, "peak": train.shared_lora_learning_rate},
    ]
    # Fused on every device: it alone can be told on the device to change nothing.
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=train.learning_rate, fused=True)


# ------------------------------------------------------------------------------------------------- evaluation


def evaluate(trainer: Trainer, data: RunData) -> dict[str, float]:
    """Loss and exact match (teacher-forced) with the right and with another task's description.

    The prompt is the same in both; only the adapter's description is swapped. Where nothing is read, or an evaluation
    set has one task, there is no other to compare with. Runs with gradients switched on and thrown away: without them a
    compiled step would be compiled a second time.
    """
    report: dict[str, float] = {}
    number = trainer.config.train.eval_batches
    if trainer.hypernet is not None:
        trainer.hypernet.eval()
    for name, batches in data.evaluation.items():
        both = batches.has_negatives and not trainer.config.unconditional
        sums = {"right": [0.0, 0.0], "wrong": [0.0, 0.0]}
        for item in range(number):
            batch = batches[item].to(trainer.device)
            if both:
                right, wrong, _ = trainer.compare(batch, learning=False)
                found = {"right": right, "wrong": wrong}
            else:
                found = {"right": trainer.forward(batch.rows, batch.read, learning=False)[0]}
            for which, answers in found.items():
                sums[which][0] += (answers.losses * batch.rows.weights).sum().item() / number
                sums[which][1] += exact_match(batch.rows, answers.correct) / number
        report[f"{name}/loss"], report[f"{name}/exact_match"] = sums["right"]
        if both:
            report[f"{name}/wrong_exact_match"] = sums["wrong"][1]
            report[f"{name}/margin"] = sums["wrong"][0] - sums["right"][0]
    if trainer.hypernet is not None:
        trainer.hypernet.train()
    return report


def exact_match(rows: PackedRows, correct: Tensor) -> float:
    """Share of documents all of whose answer tokens are the model's first choice."""
    right = total = 0
    for document in range(int(rows.label_documents.max()) + 1):
        own = rows.label_documents == document
        present = own.any(1)
        right += int(((correct | ~own).all(1) & present).sum())
        total += int(present.sum())
    return right / total


def _keep_best(trainer: Trainer, progress: Progress, report: dict[str, float]) -> None:
    """Early stopping: held-out tasks decide, or new examples of the trained tasks where there are none."""
    train = trainer.config.train
    suite = "validation/" if any(key.startswith("validation/") for key in report) else "seen/"
    metric = train.early_stopping
    found = [value for key, value in report.items() if key.startswith(suite) and key.endswith(f"/{metric}")]
    value = sum(found) / len(found) * (1 if metric == "margin" else -1)
    if progress.best and not value > progress.best_value:
        progress.patience_count += 1
        progress.stopped = progress.patience_count >= train.early_stopping_patience
        return
    progress.best_step, progress.best_value, progress.patience_count = progress.step, value, 0
    progress.best = {name: x.detach().to("cpu", copy=True) for name, x in weights(trainer.trained).items()}


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
            `checkpoint/` (`model/` for `method: full`).
        resume: Go on from the folder's state.
        max_minutes: Wall time after which the state is saved and the run stops.
        device: `cuda`, `cpu`; the GPU if there is one.
        bar: Draw a progress bar on standard error in place of most lines.
        watch: Looks on; see `Watch`.
        log: Where lines go.

    Returns:
        The folder of the checkpoint, or of the trained base.

    Raises:
        ConfigError: if settings do not go together.
        DataError: if data are missing, forbidden or do not fit.
        TrainingError: if the loss is not finite, the run diverges, or a resume has no state or other settings.
    """
    started = time.monotonic()
    config = follow(config, log)
    begin = first_step(to_plain(config), run, max_steps=config.train.max_steps, resume=resume)
    session = setup(config, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")), begin, log)
    progress = Progress()
    if not resume:
        begin_run(run, to_plain(config))
    elif begin:
        progress = load_state(run, session.trained, session.optimizer)
        log(f"resumed at step {begin} of {config.train.max_steps}")
    logger = MetricLogger(
        run,
        to_plain(config),
        steps=config.train.max_steps,
        first_step=begin,
        report_to=config.train.report_to,
        bar=bar,
        log=log,
    )
    with logger, StopRequest(max_minutes, started=started) as stop:
        fit(session, run, progress, logger, stop, watch)
    stop.raise_if_interrupted(log, f"after step {progress.step} is saved")
    return save(session, run, progress, log)


@dataclass
class Session:
    """What a run needs from its set-up to its end."""

    config: SftConfig
    device: torch.device
    tokenizer: Any
    base: Any
    encoder: Encoder
    data: RunData
    cache: EmbeddingCache | None
    spec: AdapterSpec
    hypernet: Hypernet | None
    origin: dict[str, str] | None
    """The checkpoint that the weights came from, without its place on this machine."""
    optimizer: torch.optim.Optimizer

    @property
    def trained(self) -> nn.Module:
        """What the optimiser changes."""
        return self.base if self.hypernet is None else self.hypernet


def setup(config: SftConfig, device: torch.device, begin: int, log: Callable[[str], None]) -> Session:
    """Loads the models, prepares the data and encodes everything that will be read.

    Args:
        config: Settings.
        device: Where the run is trained.
        begin: The step it goes on from; a saved state then replaces all weights.
        log: Where lines go.
    """
    started = time.monotonic()
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = hub.load_tokenizer(config.base)
    base = hub.load_causal_lm(config.base, device=str(device))
    spec = AdapterSpec.from_config(base.config, config.base, config.lora)  # what cannot be is said before slow work
    if config.train.init_from:
        require_origin(config, spec)
    require_packable(base, config.base)
    encoder: Encoder | None = None
    if config.encoder.kind != "onehot":
        encoder = load_encoder(config.encoder, config.base, base=(base, tokenizer), device=str(device))
    count_tokens = encoder.count_tokens if encoder is not None else lambda texts: [1] * len(texts)
    data = prepare_data(config, tokenizer, count_tokens)
    for line in data.told():
        log(line)
    encoder = encoder or OneHotEncoder(data.texts, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bool(config.train.bf16)):
        cache = None if config.unconditional else EmbeddingCache(encoder, data.texts, log=log)
    log(f"ready after {time.monotonic() - started:.0f} s: {len(data.texts)} texts to read")

    hypernet, origin = None, None
    if config.method == "full":
        base.requires_grad_(True)
    else:
        if device.type == "cuda":
            base = base.to(torch.bfloat16)
        hypernet = Hypernet(spec, embedding_size=encoder.embedding_size, kind=encoder.kind, config=config.hypernet)
        if hypernet.normalizer is not None and cache is not None and not begin:  # a saved state has the constants
            hypernet.normalizer.fit(cache.sample(torch.tensor(data.train.readable)).cpu())
        if config.train.init_from:
            origin = initialize(hypernet, Path(config.train.init_from))
        hypernet.to(device).train()
    if config.train.gradient_checkpointing:
        checkpoint_layers(base)
    optimizer = make_optimizer(base if hypernet is None else hypernet, config.train)
    return Session(config, device, tokenizer, base, encoder, data, cache, spec, hypernet, origin, optimizer)


Watch = Callable[[Session, Trainer, int, Callable[[str], None]], None]
"""Looks on: called before the first step, and after every planned evaluation, with what the run has, what takes its
steps, the number of steps done, and where lines go. It leaves weights, optimiser and random state as they are."""


@contextmanager
def stepping(session: Session) -> Iterator[Trainer]:
    """What takes the steps, for as long as the base bears its hooks."""
    train, hypernet = session.config.train, session.hypernet
    layers = compiled(session.base, session.spec) if train.torch_compile else nullcontext()
    with hooked(session.base, session.spec) as slots, layers:
        losses = answer_losses(session.base, slots, keep=train.gradient_checkpointing, fuse=train.torch_compile)
        write = torch.compile(hypernet, dynamic=False) if train.torch_compile and hypernet is not None else hypernet
        yield Trainer(
            session.config, session.base, hypernet, write, losses, session.cache, session.optimizer, session.device
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
                    if train.early_stopping != "off" and planned:
                        _keep_best(trainer, progress, report)
                    if watch is not None and planned:
                        watch(session, trainer, progress.step, logger.log)
                if saving or progress.stopped:
                    save_state(run, trainer.trained, trainer.optimizer, progress)
            if last or progress.stopped:
                return


def save(session: Session, run: Path, progress: Progress, log: Callable[[str], None]) -> Path:
    """Writes the weights that the run keeps as a checkpoint, or as a model folder; returns that folder."""
    config = session.config
    if progress.best:
        restore_weights(session.trained, progress.best, run)
    provenance = {
        "seed": config.seed,
        "steps": progress.best_step if progress.best else progress.step,
        "planned_steps": config.train.max_steps,
        "data": session.data.summary,
        "settings": portable(config, session.origin),
        "versions": versions(),
    }
    if progress.best:
        provenance |= {"chosen_by": config.train.early_stopping, "chosen_at": abs(progress.best_value)}
    if session.hypernet is None:
        folder = save_model(run / "model", session.base, session.tokenizer, provenance)
    else:
        folder = run / "checkpoint"
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
