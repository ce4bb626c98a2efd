"""Supervised fine-tuning of the hypernetwork: the loss of the base model under the adapters it writes.

    description ─ frozen encoder (cached) ─▶ hypernetwork ─▶ adapters ─ live on the frozen base ─▶ loss of the answers

Complete in this file: settings, the step, the loop, saving and resuming. After section 3.3 of Text-to-LoRA
(arXiv 2506.06105). With `hypernet.variant: none` the same loop trains the multi-task LoRA baseline.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from t2l import models
from t2l.apply import LiveAdapters, live
from t2l.checkpoint import load_checkpoint, save_checkpoint, settings
from t2l.config import EncoderConfig, HypernetConfig, LoraConfig, PromptConfig, to_plain
from t2l.encoder import Encoded, Encoder, load_encoder, tokenize
from t2l.errors import ConfigError, DataError, TrainingError
from t2l.files import new_folder, read_json, read_tensors
from t2l.hypernet import Hypernet
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec
from t2l.tasks import Task, held_out_descriptions, load_jsonl, load_sni, load_splits, require_trainable
from t2l.train.batches import Batch, Batches, Pool, without_long


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on."""

    tasks: str = "sni"
    """`sni`: the frozen split's training tasks without the held-back ones, read from `T2L_DATA`; or the path of a JSONL
    file of own tasks."""
    held_out_descriptions: int = 4
    """Paraphrases of each task that are kept for judging, where it has enough of them."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How it is trained."""

    steps: int
    tasks_per_step: int = 64
    sequence_tokens: int = 384
    """Tokens of a row; a row holds as many examples of one task as fit."""
    answer_tokens: int = 96
    """Answer tokens of a row."""
    description_in_prompt: float = 0.5
    """Share of rows whose prompt also holds the description. Between 0 and 1 the checkpoint serves both ways."""
    learning_rate: float = 5e-4
    offset_learning_rate: float = 5e-4
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises; it then falls linearly to zero."""
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0
    contrast: float = 0.0
    """Weight of a hinge on the steering margin: with another task's description, and the same prompt, the answers
    should cost `contrast_margin` more than with the right one. Doubles the rows of a step."""
    contrast_margin: float = 2.0
    """In nats per answer token."""
    start_from: str | None = None
    """Checkpoint to start from: of a multi-task LoRA (variant `none`) the offset, of a hypernetwork everything."""
    compile: bool = False
    """Compile the base model's step: a minute at the start, then much faster on a GPU."""
    workers: int = 0
    """Processes that build batches."""
    log_every: int = 50
    evaluate_every: int = 1000
    save_every: int = 2000

    def __post_init__(self) -> None:
        for name in ("steps", "tasks_per_step", "log_every", "evaluate_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("description_in_prompt", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"train.{name} must be in [0, 1], got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """One run of `t2l train sft`."""

    base: str
    """Model reference of the base."""
    seed: int = 0
    lora: LoraConfig = field(default_factory=LoraConfig)
    encoder: EncoderConfig
    hypernet: HypernetConfig = field(default_factory=HypernetConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    """How the finished checkpoint's users render prompts."""
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig


# --------------------------------------------------------------------------------------------- descriptions


class DescriptionBank:
    """Every description of a run, encoded once; hands out padded batches of one static shape."""

    def __init__(self, encoder: Encoder, texts: Sequence[str], *, chunk: int = 256) -> None:
        self.kind, self.width, self.window = encoder.kind, encoder.embedding_size, encoder.max_tokens
        states, lengths = [], []
        # In order of length, so that little of a chunk is padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), chunk):
            encoded = encoder.encode([texts[i] for i in order[start : start + chunk]])
            if encoded.mask is None:
                states.append(encoded.states)
            else:
                states.append(encoded.states[encoded.mask].bfloat16())
                lengths.append(encoded.mask.sum(1))
        self.states = torch.cat(states)
        place = torch.empty(len(order), dtype=torch.long)
        place[torch.tensor(order)] = torch.arange(len(order))
        self.place = place.to(self.states.device)
        if lengths:
            self.lengths = torch.cat(lengths)
            self.starts = self.lengths.cumsum(0) - self.lengths

    def __getitem__(self, index_N: Tensor) -> Encoded:
        """Descriptions by their position in the run's list: (N, E), or (N, window, E) with a mask."""
        place = self.place[index_N]
        if self.kind == "sentence":
            return Encoded(self.states[place])
        offsets = torch.arange(self.window, device=place.device)
        mask = offsets < self.lengths[place][:, None]
        where = (self.starts[place][:, None] + offsets).clamp_max(self.states.shape[0] - 1)
        return Encoded(self.states[where].float() * mask[..., None], mask)


# --------------------------------------------------------------------------------------------------- one step


def answer_losses(base: Any, slots: LiveAdapters) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function that is compiled: a packed batch under adapters, one a row, to losses and hits, (B, A) each."""

    def function(
        tokens: Tensor,
        positions: Tensor,
        documents: Tensor,
        label_positions: Tensor,
        labels: Tensor,
        a: tuple[Tensor, ...],
        b: tuple[Tensor, ...],
        scaling: float,
    ) -> tuple[Tensor, Tensor]:
        slots.lora = LoraTensors(a, b, scaling)
        place = torch.arange(tokens.shape[1], device=tokens.device)
        # A token sees what came before it in its own document.
        visible = (documents[:, :, None] == documents[:, None, :]) & (place[:, None] >= place)
        hidden = base.base_model(
            input_ids=tokens, position_ids=positions, attention_mask=visible[:, None], use_cache=False
        ).last_hidden_state
        slots.lora = None
        # Only answer tokens meet the vocabulary.
        index = label_positions[..., None].expand(-1, -1, hidden.shape[-1])
        logits = base.lm_head(hidden.gather(1, index)).float()
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        return losses, logits.argmax(-1) == labels

    return function


@dataclass
class Trainer:
    """What a run holds in memory; built by `prepare`."""

    config: SftConfig
    base: Any
    hypernet: Hypernet
    write: Callable[[Tensor, Tensor | None], LoraTensors]
    """The hypernetwork, compiled or not."""
    losses: Callable[..., tuple[Tensor, Tensor]]
    bank: DescriptionBank | None
    """None where the hypernetwork reads no description."""
    optimizer: torch.optim.Optimizer
    device: torch.device

    def forward(self, batch: Batch, descriptions: Tensor) -> tuple[Tensor, Tensor]:
        """Losses and hits, (B, A) each, of a batch under the adapters of `descriptions` (B,)."""
        encoded = Encoded(descriptions[:, None]) if self.bank is None else self.bank[descriptions]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            # Judging runs the hypernetwork uncompiled: its evaluation mode would be compiled for a few batches only.
            write = self.write if self.hypernet.training else self.hypernet
            lora = write(encoded.states, encoded.mask).map(Tensor.contiguous)
            return self.losses(*batch[:5], lora.a, lora.b, lora.scaling)

    def compare(self, batch: Batch) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """`forward` with the right and with another task's descriptions; the prompts are the same in both.

        Rows are tasks in shuffled order, so the next row's description is another task's. One pass of twice the rows
        where training does the same, so that there is one compiled shape.
        """
        others = batch.descriptions.roll(1)
        if not self.config.train.contrast:
            return self.forward(batch, batch.descriptions), self.forward(batch, others)
        twice = Batch(*(torch.cat([x, x]) if x.dim() else x for x in batch))
        losses, hits = self.forward(twice, torch.cat([batch.descriptions, others]))
        (right, wrong), (right_hits, wrong_hits) = losses.chunk(2), hits.chunk(2)
        return (right, right_hits), (wrong, wrong_hits)

    def loss(self, batch: Batch) -> Tensor:
        """The training loss: mean over rows, over a row's documents, over a document's answer tokens."""
        train = self.config.train
        if not train.contrast:
            return (self.forward(batch, batch.descriptions)[0] * batch.weights).sum()
        (right, _), (wrong, _) = self.compare(batch)
        share = batch.weights.sum(1).clamp_min(1e-12)
        right, wrong = (right * batch.weights).sum(1), (wrong * batch.weights).sum(1)
        hinge = F.relu(train.contrast_margin - (wrong - right) / share)
        return right.sum() + train.contrast * (hinge * batch.weights.sum(1)).sum()

    def step(self, batch: Batch, step: int) -> tuple[float, float]:
        """One optimiser step; returns loss and gradient norm.

        Raises:
            TrainingError: if loss or gradient is not finite; the weights are then as they were.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, self.config.train)
        loss = self.loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.hypernet.parameters(), self.config.train.max_gradient_norm)
        value, norm_value = loss.item(), norm.item()
        if not (math.isfinite(value) and math.isfinite(norm_value)):
            raise TrainingError(
                f"Step {step}: loss {value}, gradient norm {norm_value}. The weights were not changed; the batch is "
                f"item {step} of seed {self.config.seed}. Lower train.learning_rate or look at its data"
            )
        self.optimizer.step()
        return value, norm_value


def schedule(step: int, train: TrainConfig) -> float:
    """Share of the peak learning rate at a step: linear rise, then linear fall to zero."""
    warmup = max(1, round(train.warmup * train.steps))
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (train.steps - step) / max(1, train.steps - warmup))


def _optimizer(hypernet: Hypernet, train: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    offset = [p for p in hypernet.offset.parameters() if p.requires_grad]
    others = [p for name, p in hypernet.named_parameters() if not name.startswith("offset.")]
    groups = [
        {"params": [p for p in others if p.dim() > 1], "weight_decay": train.weight_decay, "peak": train.learning_rate},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0, "peak": train.learning_rate},
        {"params": offset, "weight_decay": train.weight_decay, "peak": train.offset_learning_rate},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=train.learning_rate, fused=device.type == "cuda")


# --------------------------------------------------------------------------------------------------- the data


@dataclass(frozen=True)
class RunData:
    """Batches of a run and the list of its descriptions."""

    texts: list[str]
    train: Batches
    judged: dict[str, Batches]
    """Batches for watching: tasks seen in training with new examples and descriptions, and validation tasks."""
    summary: dict[str, Any]


def load_tasks(config: DataConfig) -> tuple[list[Task], list[Task]]:
    """(training tasks, validation tasks).

    Raises:
        DataError: if data are missing, or hold a task that may not be trained on.
    """
    if config.tasks == "sni":
        splits = load_splits()
        names = sorted(splits.train - splits.held_back)
        require_trainable(names)
        chosen_on = splits.validation | splits.held_back
        return load_sni(names, splits=("train", "val")), load_sni(chosen_on, splits=("val",))
    tasks = load_jsonl(Path(config.tasks))
    require_trainable(task.name for task in tasks)
    trained = [task for task in tasks if task.examples.get("train")]
    if not trained:
        raise DataError(f"{config.tasks} has no task with examples of split 'train'")
    return trained, [task for task in tasks if not task.examples.get("train") and task.examples.get("val")]


def prepare_data(config: SftConfig, tokenizer: Any, lengths: Callable[[list[str]], list[int]]) -> RunData:
    """Loads tasks and lays out batches; `lengths` counts a description's tokens as the encoder does."""
    train, validation = load_tasks(config.data)
    texts = sorted({text for task in (*train, *validation) for text in task.descriptions})
    counts = dict(zip(texts, lengths(texts), strict=True))
    train, lost, dropped = without_long(train, counts, config.encoder.max_tokens)
    validation, _, _ = without_long(validation, counts, config.encoder.max_tokens)
    if not train:
        raise DataError(f"No task has a description within encoder.max_tokens ({config.encoder.max_tokens})")
    texts = sorted({text for task in (*train, *validation) for text in task.descriptions})
    index = {text: i for i, text in enumerate(texts)}

    def pool(task: Task, split: str, descriptions: Sequence[str]) -> Pool:
        return Pool(task.name, task.examples[split], tuple(index[text] for text in descriptions))

    held_out = {task.name: held_out_descriptions(task, config.data.held_out_descriptions) for task in train}
    common = {
        "rows": config.train.tasks_per_step,
        "tokens": config.train.sequence_tokens,
        "answer_tokens": config.train.answer_tokens,
    }
    share = config.train.description_in_prompt
    batches = Batches(
        [pool(task, "train", held_out[task.name][0]) for task in train],
        texts,
        tokenizer,
        in_prompt=share,
        seed=config.seed,
        **common,
    )
    seen = [pool(t, "val", held_out[t.name][1] or held_out[t.name][0]) for t in train if t.examples.get("val")]
    unseen = [pool(task, "val", task.descriptions) for task in validation if task.examples.get("val")]
    modes = [mode for mode, used in (("adapter", share < 1), ("adapter+prompt", share > 0)) if used]
    judged = {
        f"{name}/{mode}": Batches(pools, texts, tokenizer, in_prompt=float(mode != "adapter"), seed=1, **common)
        for name, pools in (("seen", seen), ("validation", unseen))
        if len(pools) > 1
        for mode in modes
    }
    summary = {
        "tasks": len(train),
        "examples": sum(len(task.examples["train"]) for task in train),
        "descriptions": sum(len(kept) for kept, _ in held_out.values()),
        "descriptions_over_window": dropped,
        "tasks_without_description_in_window": lost,
    }
    return RunData(texts, batches, judged, summary)


# --------------------------------------------------------------------------------------------------- the run


def train(
    config: SftConfig,
    run: Path,
    *,
    resume: bool = False,
    max_minutes: float | None = None,
    device: str | None = None,
    log: Callable[[str], None] = print,
) -> Path:
    """Runs a training to its end or its time budget.

    Args:
        config: Settings.
        run: Folder for `config.json`, `metrics.jsonl`, `state/` and, at the end, `checkpoint/`.
        resume: Go on from the folder's state.
        max_minutes: Wall time after which the state is saved and the run stops.
        device: `cuda`, `cpu`; the GPU if there is one.
        log: Where progress lines go.

    Returns:
        The checkpoint's folder.

    Raises:
        ConfigError: if settings do not go together.
        DataError: if data are missing or forbidden.
        TrainingError: if the loss is not finite, or a resume has no state or other settings.
    """
    started = time.monotonic()
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    first_step = _first_step(config, run, resume=resume)
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")

    tokenizer = models.load_tokenizer(config.base)
    base = models.load_causal_lm(config.base, device=str(chosen))
    encoder = load_encoder(config.encoder, config.base, base=(base, tokenizer), device=str(chosen))
    data = prepare_data(config, tokenizer, lambda texts: _token_counts(encoder, texts))
    log(f"data: {json.dumps(data.summary)}")
    bank = None if config.hypernet.variant == "none" else DescriptionBank(encoder, data.texts)
    log(f"ready after {time.monotonic() - started:.0f} s: {len(data.texts)} descriptions")
    if chosen.type == "cuda":
        base = base.to(torch.bfloat16)

    spec = AdapterSpec.from_config(base.config, config.base, config.lora)
    hypernet = Hypernet(spec, embedding_size=encoder.embedding_size, kind=encoder.kind, config=config.hypernet)
    if config.train.start_from:
        _start_from(hypernet, Path(config.train.start_from))
    hypernet.to(chosen).train()
    optimizer = _optimizer(hypernet, config.train, chosen)
    if not resume:
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.json").write_text(json.dumps(to_plain(config), indent=2) + "\n", encoding="utf-8")
    else:
        load_state(run / "state", hypernet, optimizer)
        log(f"resumed at step {first_step} of {config.train.steps}")

    with live(base, spec) as slots:
        losses: Callable[..., Any] = answer_losses(base, slots)
        write: Callable[..., Any] = hypernet
        if config.train.compile:
            losses, write = torch.compile(losses, dynamic=False), torch.compile(hypernet, dynamic=False)
        trainer = Trainer(config, base, hypernet, write, losses, bank, optimizer, chosen)
        step = _loop(trainer, data, run, first_step, started, max_minutes, log)

    folder = run / "checkpoint"
    provenance = {
        "seed": config.seed,
        "steps": step,
        "planned_steps": config.train.steps,
        "data": data.summary,
        "settings": to_plain(config),
        "versions": _versions(),
    }
    saved = settings(
        provenance,
        embedding_size=encoder.embedding_size,
        encoder=config.encoder,
        encoder_revision=models.fingerprint(config.base if config.encoder.model == "base" else config.encoder.model),
        hypernet=config.hypernet,
        prompt=config.prompt,
    )
    save_checkpoint(folder, hypernet, spec, saved, card=_card(spec, provenance), overwrite=True)
    log(f"checkpoint after step {step}: {folder}")
    return folder


def _loop(
    trainer: Trainer,
    data: RunData,
    run: Path,
    first_step: int,
    started: float,
    max_minutes: float | None,
    log: Callable[[str], None],
) -> int:
    """Trains from `first_step`; returns the number of steps done in all."""
    train, device = trainer.config.train, trainer.device
    batches = data.train.loader(range(first_step, train.steps), workers=train.workers, pin=device.type == "cuda")
    losses: list[float] = []
    examples = tokens = skipped = 0
    clock, done = time.monotonic(), first_step
    for step, cpu_batch in enumerate(batches, start=first_step):
        batch = Batch(*(x.to(device, non_blocking=True) for x in cpu_batch))
        loss, norm = trainer.step(batch, step)
        losses.append(loss)
        done = step + 1
        examples += int(cpu_batch.documents.amax(1).add(1).sum())
        tokens += int((cpu_batch.documents >= 0).sum())
        skipped += int(cpu_batch.skipped)
        out_of_time = max_minutes is not None and time.monotonic() - started > 60 * max_minutes
        last = out_of_time or done == train.steps
        if done % train.log_every == 0 or last:
            spent = time.monotonic() - clock
            row = {
                "step": done,
                "loss": sum(losses) / len(losses),
                "gradient_norm": norm,
                "examples": examples,
                "too_long": skipped,
                "tokens_per_second": tokens / spent,
                "seconds_per_step": spent / len(losses),
                "minutes": (time.monotonic() - started) / 60,
            }
            _record(run, row, log)
            losses, examples, tokens, skipped, clock = [], 0, 0, 0, time.monotonic()
        if done % train.evaluate_every == 0 or last:
            _record(run, {"step": done, **evaluate(trainer, data)}, log)
            clock = time.monotonic()
        if done % train.save_every == 0 or last:
            save_state(run / "state", trainer.hypernet, trainer.optimizer, done)
            clock = time.monotonic()
        if last:
            break
    return done


def evaluate(trainer: Trainer, data: RunData, *, batches: int = 2) -> dict[str, float]:
    """Loss and exact match (teacher-forced) with the right and with another task's description.

    The prompt is the same in both; only the adapter's description is swapped. Runs with gradients switched on and
    thrown away: without them a compiled step would be compiled a second time.
    """
    report: dict[str, float] = {}
    trainer.hypernet.eval()
    for name, judged in data.judged.items():
        sums = {"right": [0.0, 0.0], "wrong": [0.0, 0.0]}
        for number in range(batches):
            batch = Batch(*(x.to(trainer.device) for x in judged[number]))
            for which, (losses, hits) in zip(("right", "wrong"), trainer.compare(batch), strict=True):
                sums[which][0] += (losses * batch.weights).sum().item() / batches
                sums[which][1] += exact_match(batch, hits) / batches
        report[f"{name}/loss"], report[f"{name}/exact_match"] = sums["right"]
        report[f"{name}/wrong_exact_match"] = sums["wrong"][1]
        report[f"{name}/margin"] = sums["wrong"][0] - sums["right"][0]
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


# ------------------------------------------------------------------------------------- saving and resuming


def _first_step(config: SftConfig, run: Path, *, resume: bool) -> int:
    """Checks the run's folder before anything is loaded; returns the step to begin with."""
    plain = to_plain(config)
    if not resume:
        if run.exists() and any(run.iterdir()):
            raise TrainingError(f"{run} is not empty; choose another folder, or go on with --resume")
        return 0
    if not (run / "state" / "state.json").exists():
        raise TrainingError(f"{run} holds no saved state to resume from; start it without --resume")
    before = read_json(run / "config.json")
    changed = _differences(before, plain)
    if changed:
        raise TrainingError(
            f"{run} was started with other settings: {'; '.join(changed)}. Use the same, or a new folder"
        )
    step = read_json(run / "state" / "state.json")["step"]
    assert isinstance(step, int)
    if step >= config.train.steps:
        raise TrainingError(f"{run} is finished: {step} of {config.train.steps} steps are done")
    return step


def _differences(before: dict[str, Any], now: dict[str, Any], where: str = "") -> list[str]:
    found = []
    for key in before.keys() | now.keys():
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{where}{key}.")
        elif old != new:
            found.append(f"{where}{key} was {old!r}, is {new!r}")
    return sorted(found)


def save_state(folder: Path, hypernet: Hypernet, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Writes everything a resumed run needs, whole or not at all. The schedule and the sampler follow from `step`."""
    from safetensors.torch import save_file

    tensors = {f"weight/{name}": value for name, value in hypernet.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{number}/{name}": torch.as_tensor(value) for name, value in state.items()}
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    with new_folder(folder, overwrite=True) as temporary:
        save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, temporary / "state.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")


def load_state(folder: Path, hypernet: Hypernet, optimizer: torch.optim.Optimizer) -> None:
    """Puts back what `save_state` wrote."""
    tensors = read_tensors(folder / "state.safetensors")
    groups: dict[str, dict[str, Tensor]] = {"weight": {}, "optimizer": {}, "random": {}}
    for name, value in tensors.items():
        group, _, rest = name.partition("/")
        groups[group][rest] = value
    hypernet.load_state_dict(groups["weight"], strict=True)
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in groups["optimizer"].items():
        number, _, key = name.partition("/")
        state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    torch.set_rng_state(groups["random"]["cpu"])
    if torch.cuda.is_available() and "cuda" in groups["random"]:
        torch.cuda.set_rng_state(groups["random"]["cuda"])


def _start_from(hypernet: Hypernet, folder: Path) -> None:
    loaded = load_checkpoint(folder).hypernet
    if loaded.head is None:
        a, b = loaded.offset()
        hypernet.load_offset(LoraTensors(a, b, loaded.scaling))
        return
    try:
        hypernet.load_state_dict(loaded.state_dict(), strict=True)
    except RuntimeError as error:
        raise ConfigError(f"train.start_from: {folder} is a hypernetwork of another shape. {error}") from error


def _record(run: Path, row: dict[str, Any], log: Callable[[str], None]) -> None:
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    log("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))


def _token_counts(encoder: Encoder, texts: list[str]) -> list[int]:
    tokenizer, prefix = encoder.tokenizer, getattr(encoder, "prefix", ())  # type: ignore[attr-defined]
    return [len(row) for row in tokenize(tokenizer, texts, 1 << 30, prefix=prefix)]


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("t2l", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # t2l itself, run from a source tree that is not installed
            found[name] = "not installed"
    return found


def _card(spec: AdapterSpec, provenance: dict[str, Any]) -> str:
    targets = ", ".join(t.name for t in spec.targets)
    return (
        f"# Text-to-LoRA hypernetwork for {spec.base_model}\n\n"
        f"Reads a task description and writes a LoRA adapter: rank {spec.rank}, alpha {spec.alpha:g}, "
        f"targets {targets}.\n\n"
        f"Trained for {provenance['steps']} of {provenance['planned_steps']} steps on "
        f"{provenance['data']['tasks']} tasks, seed {provenance['seed']}. All settings stand in `config.json`.\n"
    )
