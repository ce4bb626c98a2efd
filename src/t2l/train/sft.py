"""Supervised fine-tuning of the hypernetwork: the loss of the base model under the adapters it writes.

    description ─ frozen encoder (cached) ─▶ hypernetwork ─▶ adapters ─ live on the frozen base ─▶ loss of the answers

The step, the judging and the run, in this order; after section 3.3 of Text-to-LoRA (arXiv 2506.06105). Settings stand
in `settings`, what is read and trained on in `data` and `batches`, what a run leaves in `state` and `watch`. The same
loop trains the baselines: a multi-task LoRA (`hypernet.variant: none`), adapters written from inputs or task names
(`reads`), the base's own weights (`method: full`).
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2l import models
from t2l.apply import LiveAdapters, compiled, live
from t2l.checkpoint import load_checkpoint, save_checkpoint, settings
from t2l.config import to_plain
from t2l.encoder import Encoded, Encoder, OneHotEncoder, encoder_revision, load_encoder, tokenize
from t2l.errors import ConfigError, DataError, TrainingError
from t2l.files import new_folder, sha256
from t2l.hypernet import Hypernet
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec
from t2l.train.batches import DROPPED, SHARED, TOLD, Batch
from t2l.train.curves import write_report
from t2l.train.data import DescriptionBank, RunData, prepare_data
from t2l.train.running import schedule, versions
from t2l.train.settings import SftConfig, TrainConfig
from t2l.train.state import (
    Progress,
    begin_run,
    differences,
    first_step,
    load_state,
    put_back,
    save_state,
    weights,
)
from t2l.train.watch import Watch, memory_gb

COMMITMENT = 0.25
"""Weight of a VQ codebook's commitment loss (arXiv 1711.00937)."""

# -------------------------------------------------------------------------------------------------- one step


class Teacher(NamedTuple):
    """Who the student is to answer like: the base on rows that show it more, without a gradient."""

    tokens: Tensor
    """(B, S), and so on as in `Batch`; the student may have more rows than these."""
    positions: Tensor
    documents: Tensor
    label_positions: Tensor
    lora: LoraTensors | None
    """A single adapter for all rows, or none."""
    temperature: float


def answer_losses(base: Any, slots: LiveAdapters, *, keep: bool = False, fuse: bool = False) -> Callable[..., Any]:
    """The function from a packed batch under adapters, one a row, to losses and hits, (B, A) each.

    With a teacher it also returns the divergence from it, (B, A) for as many rows as the teacher has.

    Args:
        base: The base model.
        slots: Where its adapters go.
        keep: Leave them there, for gradient checkpointing, which runs the layers once more in the backward pass.
        fuse: Compile the losses' part; the layers are compiled apart, see `t2l.apply.compiled`.
    """
    measure = torch.compile(_losses_and_hits, dynamic=False) if fuse else _losses_and_hits

    def answer_states(
        tokens: Tensor,
        positions: Tensor,
        documents: Tensor,
        label_positions: Tensor,
        lora: LoraTensors | None,
        noise: Tensor | None = None,
    ) -> Tensor:
        slots.lora = lora
        embedded = base.get_input_embeddings()(tokens)
        if noise is not None:
            embedded = embedded + noise.to(embedded.dtype)
        place = torch.arange(tokens.shape[1], device=tokens.device)
        # A token sees what came before it in its own document, and what all documents of the row begin with.
        seen = (documents[:, :, None] == documents[:, None, :]) | (documents == SHARED)[:, None, :]
        visible = seen & (place[:, None] >= place)
        hidden = base.base_model(
            inputs_embeds=embedded, position_ids=positions, attention_mask=visible[:, None], use_cache=False
        ).last_hidden_state
        if not keep:
            slots.lora = None
        # Only answer tokens meet the vocabulary.
        return hidden.gather(1, label_positions[..., None].expand(-1, -1, hidden.shape[-1]))

    def function(
        tokens: Tensor,
        positions: Tensor,
        documents: Tensor,
        label_positions: Tensor,
        labels: Tensor,
        a: tuple[Tensor, ...],
        b: tuple[Tensor, ...],
        scaling: float,
        noise: Tensor | None = None,
        smoothing: Tensor | None = None,
        teacher: Teacher | None = None,
    ) -> tuple[Tensor, ...]:
        taught: tuple[Any, ...] = ()
        if teacher is not None:  # first, for the student's adapters may have to stay where they are
            with torch.no_grad():
                taught = answer_states(*teacher[:5]), teacher.temperature
        lora = LoraTensors(a, b, scaling) if a else None
        hidden = answer_states(tokens, positions, documents, label_positions, lora, noise)
        return measure(base.lm_head, hidden, labels, smoothing, *taught)

    return function


def _losses_and_hits(
    lm_head: nn.Module,
    hidden: Tensor,
    labels: Tensor,
    smoothing: Tensor | None,
    told: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, ...]:
    logits = lm_head(hidden).float()
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    if smoothing is not None:
        losses = torch.lerp(losses, logits.logsumexp(-1) - logits.mean(-1), smoothing)
    hits = logits.argmax(-1) == labels
    if told is None:
        return losses, hits
    own, theirs = (F.log_softmax(x / temperature, -1) for x in (logits[: len(told)], lm_head(told).float()))
    divergence = F.kl_div(own, theirs, reduction="none", log_target=True).sum(-1)
    return losses, hits, divergence * temperature**2


def neftune_noise(documents: Tensor, width: int, alpha: float) -> Tensor:
    """Noise for input embeddings (arXiv 2310.05914), (B, T, E): uniform in ± alpha / sqrt(T·E).

    T is the number of tokens of the document that a token stands in, so packing changes nothing; padding gets what it
    likes, nothing looks at it.

    Args:
        documents: (B, T) number of the document in its row.
        width: E.
        alpha: Strength.
    """
    lengths = (documents[:, :, None] == documents[:, None, :]).sum(-1, keepdim=True)
    noise = torch.rand(*documents.shape, width, device=documents.device) * 2 - 1
    return noise * (alpha / (lengths * width) ** 0.5)


@dataclass
class Trainer:
    """What a run holds in memory."""

    config: SftConfig
    base: Any
    hypernet: Hypernet | None
    """None where the base's own weights are trained."""
    write: Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None], LoraTensors]
    """The hypernetwork, compiled or not."""
    losses: Callable[..., tuple[Tensor, ...]]
    bank: DescriptionBank | None
    """None where nothing is read."""
    optimizer: torch.optim.Optimizer
    device: torch.device

    def __post_init__(self) -> None:
        self.stopped = torch.zeros((), device=self.device)
        """1 from the first loss or gradient that is not finite: the fused optimiser then changes nothing any more, and
        the host need not wait for every step to find out."""
        self.optimizer.found_inf = self.stopped  # type: ignore[attr-defined]

    @property
    def trained(self) -> nn.Module:
        """What the optimiser changes."""
        return self.base if self.hypernet is None else self.hypernet

    def adapters(self, read: Tensor, partners: Tensor, batch: Batch, *, learning: bool) -> LoraTensors:
        """Adapters (N of them) from the texts at `read` (N,); in training, from what the settings make of them."""
        if self.hypernet is None:
            return LoraTensors((), (), 1.0)
        encoded = Encoded(read[:, None]) if self.bank is None else self.bank[read]
        scale = None
        if learning and self.bank is not None:
            encoded = self._disturbed(encoded, self.bank, partners)
            if self.config.train.conditioning_dropout:
                scale = (batch.conditioning != DROPPED).float()
        # Judging runs the hypernetwork uncompiled: its evaluation mode would be compiled for a few batches only.
        write = self.write if learning else self.hypernet
        shows = batch.in_prompt if self.config.hypernet.prompt_aware else None
        return write(encoded.states, encoded.mask, scale, shows).map(Tensor.contiguous)

    def _disturbed(self, encoded: Encoded, bank: DescriptionBank, partners: Tensor) -> Encoded:
        train, states, mask = self.config.train, encoded.states, encoded.mask
        if train.mix_descriptions:
            share, chosen = torch.rand(2, len(states), 1, device=self.device)
            blended = torch.lerp(states, bank[partners].states, share)
            states = torch.where(chosen < train.mix_descriptions, blended, states)
        if train.encoding_noise:
            size = states.square().mean(-1, keepdim=True).sqrt()  # zero for padding, which so stays zero
            states = states + train.encoding_noise * size * torch.randn_like(states)
        return Encoded(states, mask)

    def forward(
        self, batch: Batch, read: Tensor, partners: Tensor, *, learning: bool
    ) -> tuple[Tensor, Tensor, LoraTensors, Tensor | None]:
        """Losses and hits, (B, A) each, of a batch under the adapters written from `read` (B,); and these.

        In training, also the divergence from the teacher, if there is one.
        """
        train, noise, smoothing = self.config.train, None, None
        if train.neftune_alpha:  # zeros when judging, so that there is one compiled function
            width = self.base.get_input_embeddings().embedding_dim
            noise = neftune_noise(batch.documents, width, train.neftune_alpha if learning else 0.0)
        if train.label_smoothing:
            smoothing = torch.full((), train.label_smoothing if learning else 0.0, device=self.device)
        enabled = self.device.type == "cuda" if train.bfloat16 is None else train.bfloat16
        with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled):
            lora = self.adapters(read, partners, batch, learning=learning)
            teacher = self.teacher(batch) if learning and train.distill else None
            losses, hits, *rest = self.losses(*batch[:5], lora.a, lora.b, lora.scaling, noise, smoothing, teacher)
        if not learning:  # or what a backward pass would need stayed in memory, of several batches at a time
            losses, lora = losses.detach(), lora.map(Tensor.detach)
        return losses, hits, lora, rest[0] if rest else None

    def teacher(self, batch: Batch) -> Teacher:
        """The base under the offset as it is now, or by itself, on the teacher's rows."""
        lora = None
        if self.config.train.distill_teacher == "offset":
            assert self.hypernet is not None, "settings refuse a teacher where the base is trained"
            lora = self.hypernet.offset_lora()
        rows = (batch.teacher_tokens, batch.teacher_positions, batch.teacher_documents, batch.teacher_label_positions)
        return Teacher(*rows, lora, self.config.train.distill_temperature)

    def compare(
        self, batch: Batch, *, learning: bool
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], LoraTensors, Tensor | None]:
        """`forward` with the right and with another task's descriptions; the prompts are the same in both.

        In training with a contrast, only the first rows are compared (`contrast_share`), in one pass of all rows and of
        these once more; judging has passes of the same shape, for there is one compiled one. The teacher has a batch's
        rows once: it knows what is right only.
        """
        train, rows = self.config.train, len(batch.descriptions)
        again = math.ceil(train.contrast_share * rows) if train.contrast else 0
        once = {name for name in Batch._fields if name.startswith("teacher_") or name == "skipped"}
        fields = {name: x if name in once else torch.cat([x, x[:again]]) for name, x in batch._asdict().items()}
        more = Batch(**fields)
        right, partners, other = (
            torch.cat([x, batch.others[:again]]) for x in (batch.descriptions, batch.partners, batch.others)
        )
        losses, hits, lora, divergence = self.forward(more, right, partners, learning=learning)
        first, second = (losses[:rows], hits[:rows]), (losses[rows:], hits[rows:])
        if not learning and again < rows:
            losses, hits, *_ = self.forward(more, other, other, learning=False)
            second = losses[:rows], hits[:rows]
        return first, second, lora, divergence

    def loss(self, batch: Batch) -> Tensor:
        """The training loss: mean over rows, over a row's documents, over a document's answer tokens."""
        train = self.config.train
        if not train.contrast:
            losses, _, lora, divergence = self.forward(batch, batch.descriptions, batch.partners, learning=True)
            loss = (losses * batch.weights).sum()
        else:
            (losses, _), (others, _), lora, divergence = self.compare(batch, learning=True)
            weights = batch.weights[: len(others)]
            # Another text need cost nothing more where the row's own says nothing of its task.
            share = weights.sum(1).masked_fill(batch.conditioning[: len(others)] != TOLD, 0.0)
            right, wrong = (losses[: len(others)] * weights).sum(1), (others * weights).sum(1)
            hinge = F.relu(train.contrast_margin - (wrong - right) / share.clamp_min(1e-12))
            if not train.contrast_in_prompt:
                share = share.masked_fill(batch.in_prompt[: len(others)], 0.0)
            hinge_mean = (hinge * share).sum() / share.sum().clamp_min(1e-12)
            loss = (losses * batch.weights).sum() + train.contrast * hinge_mean
        if divergence is not None:
            loss = loss + train.distill * (divergence * batch.teacher_weights).sum()
        if train.l2:
            sizes = [x.float().square().mean() for x in (*lora.a, *lora.b)]
            loss = loss + train.l2 * torch.stack(sizes).sum() / len(lora.a)
        commitment = None if self.hypernet is None else self.hypernet.commitment
        return loss if commitment is None else loss + COMMITMENT * commitment

    def step(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """One optimiser step; returns loss and gradient norm, without waiting for them.

        From the first one that is not finite, no step changes the weights; `require_finite` says so.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, self.config.train)
        loss = self.loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained.parameters(), self.config.train.max_gradient_norm)
        loss = loss.detach()
        self.stopped.copy_(torch.maximum(self.stopped, 1 - torch.isfinite(loss + norm).float()))
        self.optimizer.step()
        return loss, norm


def require_finite(losses: list[float], norms: list[float], first: int, data: RunData, config: SftConfig) -> None:
    """Checks the losses and gradient norms of the steps from `first` on.

    Raises:
        TrainingError: naming the first batch of a loss or gradient that is not finite.
    """
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=first):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            rows = range(config.train.tasks_per_step)
            names = list(dict.fromkeys(data.train.pools[data.train.task_of_row(step, row)].name for row in rows))
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            recent = list(zip(losses, norms, strict=True))[: step - first][-4:]
            before = ", ".join(f"{x:.3g} ({y:.3g})" for x, y in recent)
            raise TrainingError(
                f"Step {step}: loss {loss}, gradient norm {norm}{before and f', after {before}'}. "
                "The weights are as they were before it; the batch is "
                f"item {step} of seed {config.seed}, of tasks {', '.join(names[:8])}{more}. Lower train.learning_rate "
                "or look at its data"
            )


def require_learning(means: Sequence[float], vocabulary: int, step: int) -> None:
    """Checks that a run which has learnt something has not lost all of it.

    Args:
        means: Mean losses between one row of `metrics.jsonl` and the next, so far.
        vocabulary: The base's number of tokens.
        step: Steps done.

    Raises:
        TrainingError: if the last two are worse than guessing among all tokens, and one before was better. Such runs
            do not come back; a single burst often does.
    """
    chance, best = math.log(vocabulary), min(means)
    if best < chance and min(means[-2:]) > chance:
        raise TrainingError(
            f"The run diverged before step {step}: mean losses of {means[-2]:.1f} and {means[-1]:.1f}, where guessing "
            f"has {chance:.1f} and this run had {best:.2f}. Lower train.learning_rate, or cap what a description may "
            "change with hypernet.max_change; --resume goes on from what was saved last, which may be too late"
        )


def make_optimizer(trained: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with a rate of its own for the offset, and no decay of vectors."""
    named = [(name, p) for name, p in trained.named_parameters() if p.requires_grad]
    offset = [p for name, p in named if name.startswith("offset.")]
    others = [p for name, p in named if not name.startswith("offset.")]
    groups = [
        {"params": [p for p in others if p.dim() > 1], "weight_decay": train.weight_decay, "peak": train.learning_rate},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0, "peak": train.learning_rate},
        {"params": offset, "weight_decay": train.weight_decay, "peak": train.offset_learning_rate},
    ]
    # Fused on every device: it alone can be told on the device to change nothing.
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=train.learning_rate, fused=True)


# --------------------------------------------------------------------------------------------------- judging


def evaluate(trainer: Trainer, data: RunData) -> dict[str, float]:
    """Loss and exact match (teacher-forced) with the right and with another task's description.

    The prompt is the same in both; only the adapter's description is swapped. Where nothing is read, or a suite has
    one task, there is no other to compare with. Runs with gradients switched on and thrown away: without them a
    compiled step would be compiled a second time.
    """
    report: dict[str, float] = {}
    number = trainer.config.train.evaluate_batches
    if trainer.hypernet is not None:
        trainer.hypernet.eval()
    for name, judged in data.judged.items():
        both = judged.told_apart and not trainer.config.blind
        sums = {"right": [0.0, 0.0], "wrong": [0.0, 0.0]}
        for item in range(number):
            batch = Batch(*(x.to(trainer.device) for x in judged[item]))
            if both:
                right, wrong, *_ = trainer.compare(batch, learning=False)
                found = {"right": right, "wrong": wrong}
            else:
                found = {"right": trainer.forward(batch, batch.descriptions, batch.partners, learning=False)[:2]}
            for which, (losses, hits) in found.items():
                sums[which][0] += (losses * batch.weights).sum().item() / number
                sums[which][1] += exact_match(batch, hits) / number
        report[f"{name}/loss"], report[f"{name}/exact_match"] = sums["right"]
        if both:
            report[f"{name}/wrong_exact_match"] = sums["wrong"][1]
            report[f"{name}/margin"] = sums["wrong"][0] - sums["right"][0]
    if trainer.hypernet is not None:
        trainer.hypernet.train()
    return report


def exact_match(batch: Batch, hits: Tensor) -> float:
    """Share of documents all of whose answer tokens are the model's first choice."""
    right = total = 0
    for document in range(int(batch.label_documents.max()) + 1):
        own = batch.label_documents == document
        present = own.any(1)
        right += int(((hits | ~own).all(1) & present).sum())
        total += int(present.sum())
    return right / total


def _keep_best(trainer: Trainer, progress: Progress, report: dict[str, float]) -> None:
    """Early stopping: held-out tasks decide, or new examples of the trained tasks where there are none."""
    train = trainer.config.train
    suite = "validation/" if any(key.startswith("validation/") for key in report) else "seen/"
    found = [value for key, value in report.items() if key.startswith(suite) and key.endswith(f"/{train.early_stop}")]
    value = sum(found) / len(found) * (1 if train.early_stop == "margin" else -1)
    if progress.best and not value > progress.best_value:
        progress.worse += 1
        progress.stopped = progress.worse >= train.patience
        return
    progress.best_step, progress.best_value, progress.worse = progress.step, value, 0
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
    log: Callable[[str], None] = print,
) -> Path:
    """Runs a training to its end, its early stop or its time budget.

    Args:
        config: Settings.
        run: Folder for `config.json`, `metrics.jsonl`, `state.safetensors`, `tensorboard/` and, at the end,
            `checkpoint/` (`model/` for `method: full`) and `report.html`.
        resume: Go on from the folder's state.
        max_minutes: Wall time after which the state is saved and the run stops.
        device: `cuda`, `cpu`; the GPU if there is one.
        bar: Draw a progress bar on standard error in place of most lines.
        log: Where lines go.

    Returns:
        The folder of the checkpoint, or of the trained base.

    Raises:
        ConfigError: if settings do not go together.
        DataError: if data are missing, forbidden or do not fit.
        TrainingError: if the loss is not finite, the run diverges, or a resume has no state or other settings.
    """
    started = time.monotonic()
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    begin = first_step(config, run, resume=resume)
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")

    tokenizer = models.load_tokenizer(config.base)
    base = models.load_causal_lm(config.base, device=str(chosen))
    encoder: Encoder | None = None
    if config.encoder.kind != "onehot":
        encoder = load_encoder(config.encoder, config.base, base=(base, tokenizer), device=str(chosen))
    data = prepare_data(config, tokenizer, lambda texts: _token_counts(encoder, texts))
    log(f"data: {json.dumps(data.summary)}")
    if encoder is None:
        config_encoder = replace(config.encoder, names=tuple(data.texts))
        encoder = OneHotEncoder(data.texts, device=chosen)
    else:
        config_encoder = config.encoder
    with torch.autocast(chosen.type, torch.bfloat16, enabled=bool(config.train.bfloat16)):
        bank = None if config.blind else DescriptionBank(encoder, data.texts, log=log)
    log(f"ready after {time.monotonic() - started:.0f} s: {len(data.texts)} texts to read")

    spec = AdapterSpec.from_config(base.config, config.base, config.lora)
    revision = encoder_revision(config.encoder, config.base)
    hypernet, origin = None, None
    if config.method == "full":
        base.requires_grad_(True)
    else:
        if chosen.type == "cuda":
            base = base.to(torch.bfloat16)
        hypernet = Hypernet(spec, embedding_size=encoder.embedding_size, kind=encoder.kind, config=config.hypernet)
        if hypernet.standard is not None and bank is not None and not begin:  # a saved state has the constants
            hypernet.standard.fit(bank.sample(torch.tensor(data.train.readable)).cpu())
        if config.train.start_from:
            origin = _start_from(hypernet, config, spec, revision)
        hypernet.to(chosen).train()
    if config.train.gradient_checkpointing:
        _checkpoint_layers(base)
    trained: nn.Module = base if hypernet is None else hypernet
    optimizer = make_optimizer(trained, config.train)
    progress = Progress()
    if not resume:
        begin_run(run, to_plain(config))
    elif begin:
        progress = load_state(run, trained, optimizer)
        log(f"resumed at step {begin} of {config.train.steps}")

    watch = Watch(
        run,
        to_plain(config),
        steps=config.train.steps,
        first_step=begin,
        tensorboard=config.train.tensorboard,
        tracker=config.train.tracker,
        bar=bar,
        log=log,
    )
    with live(base, spec) as slots, watch, compiled(base, spec) if config.train.compile else nullcontext():
        losses = answer_losses(base, slots, keep=config.train.gradient_checkpointing, fuse=config.train.compile)
        write: Callable[..., Any] = hypernet if hypernet is not None else _nothing
        if config.train.compile and hypernet is not None:
            write = torch.compile(hypernet, dynamic=False)
        trainer = Trainer(config, base, hypernet, write, losses, bank, optimizer, chosen)
        _loop(trainer, data, run, progress, watch, started, max_minutes)

    if progress.best:
        put_back(trained, progress.best, run)
    provenance = {
        "seed": config.seed,
        "steps": progress.best_step if progress.best else progress.step,
        "planned_steps": config.train.steps,
        "data": data.summary,
        "settings": _portable(config, origin),
        "versions": versions(),
    }
    if progress.best:
        provenance |= {"chosen_by": config.train.early_stop, "chosen_at": abs(progress.best_value)}
    if hypernet is None:
        folder = _save_model(run / "model", base, tokenizer, provenance)
    else:
        folder = run / "checkpoint"
        saved = settings(
            provenance,
            embedding_size=encoder.embedding_size,
            encoder=config_encoder,
            encoder_revision=revision,
            hypernet=config.hypernet,
            prompt=config.prompt,
            reads=config.reads,
        )
        save_checkpoint(folder, hypernet, spec, saved, card=_card(spec, provenance), overwrite=True)
    log(f"checkpoint of step {provenance['steps']}: {folder}")
    try:
        write_report(run)
    except DataError as error:
        log(str(error))
    return folder


def _loop(
    trainer: Trainer,
    data: RunData,
    run: Path,
    progress: Progress,
    watch: Watch,
    started: float,
    max_minutes: float | None,
) -> None:
    """Trains on from where `progress` stands."""
    config, train, device = trainer.config, trainer.config.train, trainer.device
    if progress.stopped:
        return
    first = progress.step
    batches = data.train.loader(range(first, train.steps), workers=train.workers, pin=device.type == "cuda")
    pending: list[tuple[Tensor, Tensor]] = []
    losses: list[float] = []
    norms: list[float] = []
    means: list[float] = []
    vocabulary = trainer.base.config.get_text_config().vocab_size

    def settle() -> None:
        """Waits for the steps so far, and sees whether they were sound."""
        if pending:
            found, sizes = torch.stack([torch.stack(pair) for pair in pending]).T.tolist()
            require_finite(found, sizes, progress.step - len(pending), data, config)
            losses.extend(found)
            norms.extend(sizes)
            pending.clear()

    examples = tokens = skipped = 0
    taught = 0.0
    clock = time.monotonic()
    for step, cpu_batch in enumerate(batches, start=first):
        batch = Batch(*(x.to(device, non_blocking=True) for x in cpu_batch))
        pending.append(trainer.step(batch, step))
        progress.step = step + 1
        watch.step(progress.step)
        examples += int(cpu_batch.documents.amax(1).add(1).sum())
        tokens += int((cpu_batch.documents != -1).sum())
        skipped += int(cpu_batch.skipped)
        taught += float(cpu_batch.teacher_weights.sum())
        out_of_time = max_minutes is not None and time.monotonic() - started > 60 * max_minutes
        last = out_of_time or progress.step == train.steps
        planned = progress.step % train.evaluate_every == 0 or progress.step == train.steps
        if progress.step % train.log_every == 0 or last:
            settle()
            spent = time.monotonic() - clock
            each = spent / len(losses)
            row = {
                "step": progress.step,
                "loss": sum(losses) / len(losses),
                "gradient_norm": norms[-1],
                "examples": examples,
                "too_long": skipped,
                "tokens_per_second": tokens / spent,
                "seconds_per_step": each,
                "minutes": (time.monotonic() - started) / 60,
                "minutes_left": each * (train.steps - progress.step) / 60,
                "memory_gb": memory_gb(device),
            }
            if train.distill:
                row["taught"] = taught / len(losses)
            watch.record(row)
            means.append(row["loss"])
            require_learning(means, vocabulary, progress.step)
            examples = tokens = skipped = 0
            taught = 0.0
            losses.clear()
            norms.clear()
            clock = time.monotonic()
        if planned or last:
            settle()
            before = time.monotonic()
            report = evaluate(trainer, data)
            watch.record({"step": progress.step, **report})
            # An evaluation that only a time budget brought about must not count, or the resumed run were another.
            if train.early_stop != "off" and planned:
                _keep_best(trainer, progress, report)
            clock += time.monotonic() - before
        if progress.step % train.save_every == 0 or last or progress.stopped:
            settle()
            before = time.monotonic()
            save_state(run, trainer.trained, trainer.optimizer, progress)
            clock += time.monotonic() - before
        if last or progress.stopped:
            return


def _start_from(hypernet: Hypernet, config: SftConfig, spec: AdapterSpec, revision: str) -> dict[str, str]:
    """Copies a checkpoint's weights; returns which checkpoint it was, without its place on this machine."""
    folder = Path(config.train.start_from or "")
    loaded = load_checkpoint(folder)
    whole = loaded.hypernet.head is not None

    def facts(spec: AdapterSpec, config: Any, revision: str) -> dict[str, Any]:
        targets = [f"{t.name} {t.in_features} x {t.out_features}" for t in spec.targets]
        found: dict[str, Any] = {
            "spec": {
                "num_layers": spec.num_layers,
                "layers": list(spec.layers),
                "targets": targets,
                "rank": spec.rank,
                "scaling": spec.scaling,
            }
        }
        if whole:
            model = spec.base_model if config.encoder.model == "base" else config.encoder.model
            sizes = ("width", "head_size", "token_blocks", "attention_heads", "codebook", "codebook_size")
            shape = ("variant", "writes", "centre", "pointer", "pointer_gate", "prompt_aware", "standardize", *sizes)
            found |= {
                "reads": config.reads,
                "encoder": {
                    "kind": config.encoder.kind,
                    "layers": list(config.encoder.layers),
                    "revision": f"{revision} ({model})" if theirs_differ else "",
                },
                "hypernet": {name: getattr(config.hypernet, name) for name in shape},
            }
        return found

    theirs_differ = loaded.config.encoder_revision != revision
    found = differences(
        facts(loaded.spec, loaded.config, loaded.config.encoder_revision),
        facts(spec, config, revision),
        words=("is", "here"),
    )
    if found:
        raise ConfigError(f"train.start_from: {folder} does not fit this run: {'; '.join(found)}. Use its settings")
    if whole:
        try:
            hypernet.load_state_dict(loaded.hypernet.state_dict(), strict=True)
        except RuntimeError as error:  # one-hot: other tasks
            raise ConfigError(f"train.start_from: {folder} is a hypernetwork of another shape. {error}") from error
    else:
        hypernet.load_offset(loaded.hypernet.offset_lora())
    return {"name": folder.resolve().name, "weights_sha256": loaded.config.weights_sha256}


def _portable(config: SftConfig, origin: dict[str, str] | None) -> dict[str, Any]:
    """The settings as they are published: without paths of this machine."""
    plain = to_plain(config)
    plain["train"]["start_from"] = origin
    for key in ("tasks", "descriptions"):
        if not plain["data"][key].startswith("hf:"):
            plain["data"][key] = Path(plain["data"][key]).name
    plain["data"]["extra_tasks"] = [x if x.startswith("hf:") else Path(x).name for x in plain["data"]["extra_tasks"]]
    return plain


def _checkpoint_layers(base: Any) -> None:
    """Switches gradient checkpointing on in the decoder layers alone.

    Not by the model's own switch: that makes the embeddings ask for a gradient, so that the backward pass would run
    through layers below the first adapter.
    """
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[Any] = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(f"train.gradient_checkpointing: {type(base).__name__} has no layers that know how to")
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        layer.training = True  # checkpointing is tied to it; what is inside stays as it is, dropout off


def _nothing(*_: Any) -> LoraTensors:
    return LoraTensors((), (), 1.0)


def _token_counts(encoder: Encoder | None, texts: list[str]) -> list[int]:
    if encoder is None:
        return [0] * len(texts)
    tokenizer, prefix = encoder.tokenizer, getattr(encoder, "prefix", ())  # type: ignore[attr-defined]
    return [len(row) for row in tokenize(tokenizer, texts, 1 << 30, prefix=prefix)]


def _save_model(folder: Path, base: Any, tokenizer: Any, provenance: dict[str, Any]) -> Path:
    """The trained base as a model folder that any tool reads."""
    with new_folder(folder, overwrite=True) as temporary:
        with models.quiet_transformers():
            base.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        weights_sha256 = {path.name: sha256(path) for path in sorted(temporary.glob("*.safetensors"))}
        record = provenance | {"weights_sha256": weights_sha256}
        (temporary / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return folder


def _card(spec: AdapterSpec, provenance: dict[str, Any]) -> str:
    targets = ", ".join(t.name for t in spec.targets)
    plain = provenance["settings"]
    reads = {"description": "a task description", "input": "an input", "task": "the name of a trained task"}
    does = f"Reads {reads[plain['reads']]} and writes a LoRA adapter"
    if plain["hypernet"]["variant"] == "none":
        does = "One LoRA adapter, the same whatever the description"
    return (
        f"# Text-to-LoRA hypernetwork for {spec.base_model}\n\n"
        f"{does}: rank {spec.rank}, alpha {spec.alpha:g}, targets {targets}.\n\n"
        f"Trained for {provenance['steps']} of {provenance['planned_steps']} steps on "
        f"{provenance['data']['tasks']} tasks, seed {provenance['seed']}. All settings stand in `config.json`.\n"
    )
