"""Reconstruction: a hypernetwork that writes the adapters of a library from their descriptions.

    description ─ frozen encoder (cached) ─▶ hypernetwork ─▶ A, B against the library's, all of it on the device

After section 3.2 of Text-to-LoRA (arXiv 2506.06105). Descriptions stand in `reconstruction_data`, targets and losses in
`reconstruction_losses`; here are the settings and the run: set up, fit, evaluate, save. The library's mean is the
hypernetwork's shared LoRA and the standard deviations its `output_std`, both saved with the weights, so what a
checkpoint writes is a plain LoRA. Shape letters as in `spec.py`; N adapters of the library, n of a step.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from t2l.cards import EXAMPLE, card_header
from t2l.checkpoint import CheckpointConfig, save_checkpoint
from t2l.config import (
    Count,
    EncoderConfig,
    HypernetConfig,
    NotNegative,
    Positive,
    PromptConfig,
    Seed,
    Share,
    check_ranges,
    to_plain,
)
from t2l.encoder import Encoded, Encoder, OneHotEncoder, encoder_revision, load_encoder
from t2l.errors import ConfigError, TrainingError
from t2l.heads import HeadBasis
from t2l.hypernet import Hypernet
from t2l.library import AdapterLibrary
from t2l.spec import AdapterSpec
from t2l.train.embeddings import EmbeddingCache
from t2l.train.launch import Launch
from t2l.train.loop import StopRequest, schedule
from t2l.train.metrics import MetricLogger, ReportTo, memory_gb
from t2l.train.processes import Processes, require_shares
from t2l.train.reconstruction_data import (
    AdapterSampler,
    Descriptions,
    ReconstructionDataConfig,
    choose_descriptions,
    names_as_texts,
    open_library,
)
from t2l.train.reconstruction_losses import (
    AdapterErrors,
    ReconstructionLossConfig,
    Targets,
    compare,
    components,
    make_targets,
    reconstruction_losses,
    require_shared_a,
)
from t2l.train.resume import Progress, first_step, load_state, save_state
from t2l.versions import versions


@dataclass(frozen=True, kw_only=True)
class ReconstructionTrainConfig:
    """How it is trained."""

    max_steps: Count
    adapters_per_batch: Count = 32
    """n, over all processes; with fewer adapters in the library, each batch has all of them."""
    learning_rate: Positive = 1e-3
    warmup_ratio: Share = 0.1
    """Share of the steps over which the learning rate rises; it then falls linearly to zero."""
    weight_decay: NotNegative = 0.0
    max_grad_norm: Positive = 1.0
    gradient_accumulation_steps: Count = 1
    """Parts that a process's share of a batch is computed in, one after another: less memory, the same gradient."""
    torch_compile: bool = False
    """Compile the step: a minute at the start, then faster on a GPU."""
    logging_steps: Count = 200
    """Steps between two rows of `metrics.jsonl`."""
    eval_steps: Count = 2000
    """Steps between two evaluations of all adapters."""
    save_steps: Count = 10000
    """Steps between two saved states."""
    ddp_timeout: Count = 600
    """Seconds after which a process that does not answer the others ends the run."""
    report_to: ReportTo = "tensorboard"

    def __post_init__(self) -> None:
        check_ranges(self, "train")


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """One run of `t2l train reconstruction`."""

    seed: Seed = 0
    encoder: EncoderConfig
    hypernet: HypernetConfig = field(default_factory=lambda: HypernetConfig(dropout=0.0, token_dropout=0.0))
    prompt: PromptConfig = field(default_factory=PromptConfig)
    """How the adapters' users render prompts: as the adapters were trained."""
    data: ReconstructionDataConfig
    loss: ReconstructionLossConfig = field(default_factory=ReconstructionLossConfig)
    train: ReconstructionTrainConfig

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.hypernet.variant == "none":
            raise ConfigError("hypernet.variant 'none' reads no description and cannot tell adapters apart")
        for name in ("pointer", "normalize_inputs"):
            if getattr(self.hypernet, name):
                raise ConfigError(f"hypernet.{name} has no place in reconstruction; leave it out")
        if self.encoder.names:
            raise ConfigError("encoder.names is filled in by training; leave it out")
        if self.encoder.kind == "tokens" and not self.encoder.layers:
            raise ConfigError("encoder.kind 'tokens' needs encoder.layers, for example [10, 20, 30]")

    @property
    def conditioning(self) -> Literal["description", "task"]:
        """What the hypernetwork reads, see `t2l.checkpoint.CheckpointConfig.conditioning`."""
        return "task" if self.encoder.kind == "onehot" else "description"


@torch.no_grad()
def adapter_errors(
    hypernet: Hypernet,
    targets: Targets,
    embeddings: EmbeddingCache,
    texts: Sequence[int],
    processes: Processes | None = None,
) -> AdapterErrors:
    """Computes the errors of all adapters, each written from the description at its place in `texts`.

    With several processes each computes its share of them, and all of them get all.
    """
    hypernet.eval()
    device, processes = targets.mean.a[0].device, processes or Processes()
    own = processes.share(len(targets.names))
    found = AdapterErrors([], [], [])
    for chunk in torch.tensor(own, device=device).split(32):
        encoded = embeddings[torch.tensor([texts[i] for i in chunk.tolist()], device=device)]
        errors = compare(hypernet(encoded.states, encoded.mask), targets.adapters(chunk))
        for name, values in vars(errors).items():
            getattr(found, name).extend(values)
    hypernet.train()
    columns = torch.tensor(list(vars(found).values()), dtype=torch.float64).T
    return AdapterErrors(*processes.collect(columns, own, len(targets.names)).T.tolist())


# ----------------------------------------------------------------------------------------------------- the run


def train_reconstruction(
    config: ReconstructionConfig,
    run: Path,
    *,
    resume: bool = False,
    max_minutes: float | None = None,
    device: str | None = None,
    encoder: Encoder | None = None,
    bar: bool = False,
    watch: "Callable[[Trainer, Callable[[str], None]], None] | None" = None,
    log: Callable[[str], None] = print,
) -> Path:
    """Runs a reconstruction training to its end or its time budget.

    Args:
        config: Settings.
        run: Folder for `config.json`, `metrics.jsonl`, the state and, at the end, `checkpoint/`.
        resume: Go on from the folder's state.
        max_minutes: Wall time after which the state is saved and the run stops.
        device: `cuda`, `cpu`; the GPU if there is one.
        encoder: The encoder that the settings name, if in memory already.
        bar: Draw a progress bar on standard error in place of progress lines.
        watch: Looks on before the first step of a new run, and leaves everything as it is.
        log: Where progress lines go.

    Returns:
        The checkpoint's folder.

    Raises:
        ConfigError, DataError: before the first step, if settings or data will not do.
        TrainingError: if the loss is not finite, or a resume has no state or other settings.
    """
    torch.set_float32_matmul_precision("high")
    steps = config.train.max_steps
    launch = Launch(config, run, resume=resume, max_minutes=max_minutes, device=device, bar=bar, log=log)
    with launch.processes as processes:
        first = processes.main_first(lambda: first_step(launch.settings, run, max_steps=steps, resume=resume))
        trainer = setup(config, encoder, processes, launch.log)
        if first:
            load_state(run, trainer.hypernet, trainer.optimizer)
            launch.log(f"resumed at step {first} of {steps}")
        launch.log(f"ready after {time.monotonic() - launch.started:.0f} s")
        with launch.loop(first, steps) as (logger, stop):
            if watch is not None and not first and processes.number == 1:
                watch(trainer, logger.log)
            step = trainer.fit(run, first, logger, stop)
        stop.raise_if_interrupted(launch.log, f"after step {step} is saved")
        folder = save(trainer, run / "checkpoint", step, launch.log)
        processes.wait()
    return folder


def setup(
    config: ReconstructionConfig, encoder: Encoder | None, processes: Processes, log: Callable[[str], None]
) -> "Trainer":
    """Loads the library and the encoder, reads the descriptions and makes a fresh hypernetwork.

    Raises:
        ConfigError, DataError: if settings or data will not do.
    """
    device = processes.device
    library, names = open_library(config.data)
    config = basis_of_library(config, len(names))
    spec, lora = library.spec, library.stack(names)
    if config.hypernet.freeze_a:
        require_shared_a(lora, spec)
    if config.conditioning == "task":
        encoder = OneHotEncoder(names, device=device)
    else:
        encoder = encoder or load_encoder(config.encoder, spec.base_model, device=str(device))
    texts = read_descriptions(config, library, names, encoder)
    embeddings = EmbeddingCache(encoder, texts.texts, log=log)
    targets = make_targets(lora, names, device=device, freeze_a=config.hypernet.freeze_a)
    torch.manual_seed(config.seed)
    hypernet = new_hypernet(config.hypernet, spec, encoder, targets).to(device).train()
    log(
        f"{len(names)} adapters of {spec.num_parameters:,} parameters, {len(texts.texts)} descriptions "
        f"({texts.dropped} over the window); the network has {sum(p.numel() for p in hypernet.parameters()):,}"
    )
    trainer = Trainer(config, library, encoder, hypernet, targets, embeddings, texts, device, processes)
    number, turns = trainer.sampler.per_batch, config.train.gradient_accumulation_steps
    require_shares(processes, number, "train.adapters_per_batch", turns)
    return trainer


def read_descriptions(
    config: ReconstructionConfig, library: AdapterLibrary, names: Sequence[str], encoder: Encoder
) -> Descriptions:
    """Picks what the network reads for each adapter: its descriptions, or its name where it is conditioned on tasks.

    Raises:
        DataError: naming the adapters without a description that the encoder can read.
    """
    if config.conditioning == "task":
        return names_as_texts(names)
    return choose_descriptions(
        library, names, config.data, max_tokens=config.encoder.max_tokens, count_tokens=encoder.count_tokens
    )


def new_hypernet(config: HypernetConfig, spec: AdapterSpec, encoder: Encoder, targets: Targets) -> Hypernet:
    """A hypernetwork whose shared LoRA and output_std undo the targets' scaling.

    Its head starts as linear layers do, not at zero: the reference does so for reconstruction. A basis is the library's
    principal components and stays it: only what chooses among them is left to learn.
    """
    config = saved_config(config)
    hypernet = Hypernet(spec, embedding_size=encoder.embedding_size, kind=encoder.kind, config=config)
    assert hypernet.head is not None and hypernet.output_std is not None
    if isinstance(hypernet.head, HeadBasis):
        basis = components(targets, config.head_size).map(Tensor.cpu)
        hypernet.head.set_basis(basis.a, basis.b)
        hypernet.head.write.requires_grad_(False)
    else:
        for linear in hypernet.head.write:
            linear.reset_parameters()  # type: ignore[operator]
    hypernet.load_shared_lora(targets.mean.map(Tensor.cpu))
    with torch.no_grad():
        for parameter, value in zip(
            (*hypernet.output_std.a, *hypernet.output_std.b), (*targets.deviation.a, *targets.deviation.b), strict=True
        ):
            parameter.copy_(value)
    return hypernet


def basis_of_library(config: ReconstructionConfig, number: int) -> ReconstructionConfig:
    """N adapters and their mean are mixtures of N - 1: a larger basis would hold nothing more."""
    hypernet = config.hypernet
    if hypernet.variant != "basis" or hypernet.head_size < number:
        return config
    return replace(config, hypernet=replace(hypernet, head_size=max(1, number - 1)))


def saved_config(config: HypernetConfig) -> HypernetConfig:
    """The hypernetwork's settings with what reconstruction decides: statistics as constants."""
    return replace(config, output_std=True, train_shared_lora=False)


class _Loss(nn.Module):
    """A loss as a module, for DDP, which looks for the weights that a loss depends on in the module."""

    def __init__(self, hypernet: Hypernet, function: Callable[[Tensor, Tensor | None, Tensor], Tensor]) -> None:
        super().__init__()
        self.hypernet, self.function = hypernet, function

    def forward(self, states: Tensor, mask: Tensor | None, index_n: Tensor) -> Tensor:
        return self.function(states, mask, index_n)


class Trainer:
    """What a run holds in memory.

    Args:
        config: Settings.
        library: The library whose adapters are written.
        encoder: The encoder that `embeddings` come from.
        hypernet: On `device`.
        targets: On `device`.
        embeddings: The descriptions, encoded, on `device`.
        texts: Which descriptions belong to which adapter.
        device: Where training happens.
        processes: Those that train together; each has its share of every batch.
    """

    def __init__(
        self,
        config: ReconstructionConfig,
        library: AdapterLibrary,
        encoder: Encoder,
        hypernet: Hypernet,
        targets: Targets,
        embeddings: EmbeddingCache,
        texts: Descriptions,
        device: torch.device,
        processes: Processes | None = None,
    ) -> None:
        self.config, self.library, self.encoder, self.hypernet = config, library, encoder, hypernet
        self.targets, self.embeddings, self.texts, self.device = targets, embeddings, texts, device
        self.processes = processes or Processes(device)
        self.parameters = [p for p in hypernet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.parameters if p.dim() > 1], "weight_decay": config.train.weight_decay},
                {"params": [p for p in self.parameters if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=config.train.learning_rate,
            fused=True,
        )
        self.stopped = torch.zeros((), device=device)
        """1 from the first gradient that is not finite, 0 before. torch's fused optimisers read it as `found_inf`,
        which its gradient scaler sets too: they then change nothing, and the host need not wait for each step."""
        self.optimizer.found_inf = self.stopped  # type: ignore[attr-defined]
        self.sampler = AdapterSampler(texts.trained, per_batch=config.train.adapters_per_batch, seed=config.seed)

    @cached_property
    def loss(self) -> Callable[[Tensor, Tensor | None, Tensor], Tensor]:
        """Made at the first step: a resumed run has its weights by then."""
        loss = reconstruction_losses(self.hypernet, self.targets, self.config.loss)
        loss = torch.compile(loss, dynamic=False) if self.config.train.torch_compile else loss
        return self.processes.prepare(_Loss(self.hypernet, loss))

    def step(self, step: int, index_n: Tensor, texts_n: Tensor) -> Tensor:
        """One optimiser step; returns this process's part of the loss, on the device.

        Args:
            step: Its number.
            index_n: The adapters of the whole batch.
            texts_n: Their descriptions.
        """
        train = self.config.train
        for group in self.optimizer.param_groups:
            group["lr"] = train.learning_rate * schedule(step, train.max_steps, train.warmup_ratio)
        self.processes.seed(self.config.seed, step)
        self.optimizer.zero_grad(set_to_none=True)
        number, losses = len(index_n), []
        parts = min(number, self.processes.number * train.gradient_accumulation_steps)
        for first in self.processes.share(parts):
            own_n = index_n[first::parts]
            encoded: Encoded = self.embeddings[texts_n[first::parts]]
            with self.processes.accumulating(self.loss, more=first + self.processes.number < parts):
                # A mean over a part's adapters becomes its part of the mean over all.
                loss = self.loss(encoded.states, encoded.mask, own_n) * (len(own_n) / number)
                self.processes.backward(loss)
            losses.append(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, train.max_grad_norm)
        self.stopped.copy_(torch.maximum(self.stopped, (~norm.isfinite()).float()))
        self.optimizer.step()
        return torch.stack(losses).sum()

    def fit(self, run: Path, first: int, logger: MetricLogger, stop: StopRequest) -> int:
        """Trains from step `first` to the end, or until it has to stop; returns the number of steps done in all.

        Raises:
            TrainingError: if a gradient is not finite.
        """
        train, done = self.config.train, first
        while done < train.max_steps:
            # To the next multiple, so that the rows of a resumed run are those of one that was not interrupted.
            end = min(train.max_steps, done + train.logging_steps - done % train.logging_steps)
            before, clock = done, time.monotonic()
            total, done = self._steps(done, end, stop)
            if self.stopped.item():
                raise TrainingError(
                    f"A gradient between steps {before} and {done} was not finite; the weights were not changed from "
                    "there on, and the last saved state stands. Lower train.learning_rate"
                )
            row = {
                "step": done,
                "loss": total / (done - before),
                "steps_per_second": (done - before) / (time.monotonic() - clock),
                "memory_gb": memory_gb(self.device),
                "minutes": stop.minutes,
            }
            logger.record(row)
            logger.step(done)
            last = bool(stop) or done == train.max_steps
            if not stop.interrupted and (last or before // train.eval_steps != done // train.eval_steps):
                logger.record({"step": done, **self.evaluate()})
            if (last or before // train.save_steps != done // train.save_steps) and self.processes.main:
                save_state(run, self.hypernet, self.optimizer, Progress(step=done))
            if stop:
                break
        return done

    def _steps(self, first: int, end: int, stop: StopRequest) -> tuple[float, int]:
        """Takes the steps from `first` to `end`, fewer on Ctrl-C; returns their losses' sum and where they ended."""
        adapters, texts = (x.to(self.device) for x in self.sampler.steps(first, end))
        total = torch.zeros((), device=self.device)
        for number, step in enumerate(range(first, end)):
            total += self.step(step, adapters[number], texts[number])
            stop.settle()
            if stop.interrupted:
                end = step + 1
                break
        return self.processes.sum(total).item(), end

    def evaluate(self) -> dict[str, float]:
        """Computes mean errors with a description of training and with one that was held out."""
        report: dict[str, float] = {}
        for name, texts in (("trained", [mine[0] for mine in self.texts.trained]), ("held_out", self.texts.held_out)):
            errors = adapter_errors(self.hypernet, self.targets, self.embeddings, texts, self.processes)
            report |= {f"{name}/{key}": value for key, value in errors.means().items()}
        return report


def save(trainer: Trainer, folder: Path, step: int, log: Callable[[str], None]) -> Path:
    """Writes the checkpoint after a number of steps, with its errors in the card; returns its folder."""
    config, library, encoder, spec = trainer.config, trainer.library, trainer.encoder, trainer.library.spec
    errors = trainer.evaluate()
    if not trainer.processes.main:
        return folder
    provenance: dict[str, Any] = {
        "seed": config.seed,
        "steps": step,
        "planned_steps": config.train.max_steps,
        "library_sha256": library.checksum,
        "adapters": list(trainer.targets.names),
        "errors": errors,
        # The library's name alone: the path says something about the machine, and nothing that a reader needs.
        "settings": to_plain(replace(config, data=replace(config.data, library=library.folder.name))),
        "versions": versions(),
    }
    saved = CheckpointConfig.current(
        provenance,
        embedding_size=encoder.embedding_size,
        encoder=replace(config.encoder, names=trainer.targets.names)
        if config.conditioning == "task"
        else config.encoder,
        encoder_revision=encoder_revision(config.encoder, spec.base_model),
        conditioning=config.conditioning,
        hypernet=saved_config(config.hypernet),
        prompt=config.prompt,
    )
    card = (
        f"{card_header(spec.base_model, 'lora', 'text-to-lora', library='text-to-lora', example=EXAMPLE)}"
        f"# Text-to-LoRA hypernetwork for {spec.base_model}\n\n"
        f"Writes the {len(trainer.targets.names)} LoRA adapters of a library (sha256 {library.checksum}) from their "
        f"descriptions: rank {spec.rank}, alpha {spec.alpha:g}, targets {', '.join(t.name for t in spec.targets)}. "
        f"Relative error of ΔW {errors['trained/relative']:.3f}, with descriptions not trained on "
        f"{errors['held_out/relative']:.3f}.\n\n"
        f"Reconstruction training, {step} of {config.train.max_steps} steps, seed {config.seed}. All settings stand in "
        f"`config.json`.\n"
    )
    save_checkpoint(folder, trainer.hypernet, spec, saved, card=card, overwrite=True)
    log(f"checkpoint after step {step}: {folder}")
    return folder
