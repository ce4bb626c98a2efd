"""Many tunings side by side: what `t2l.train.tune.tune` computes for each of them, with the base's passes in common.

Every job has its own examples, order, held-out share, clip, best round and end. Jobs of one call have the same number
of examples, so that all take the same steps. Jobs that have stopped leave the batch. Prompts are padded on the right
and need no mask: attention is causal.

K jobs, B sequences of all of them, T tokens.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from t2l import peft_io
from t2l.apply import AdapterHooks, hooked
from t2l.config import PromptConfig
from t2l.errors import TrainingError
from t2l.lora import LoraTensors
from t2l.text_to_lora import LoraAdapter
from t2l.train import tune as one
from t2l.train.slots import BETAS, StepSizes, adamw

Row = tuple[list[int], list[int]]
"""Token ids of a prompt and its answer."""


@dataclass(frozen=True)
class Job:
    """What one call of `tune` gets."""

    adapter: LoraAdapter
    examples: one.Pairs
    start: Literal["adapter", "scratch"]
    seed: int


@dataclass
class _Running:
    trained: list[Row]
    held_out: list[Row]
    draw: random.Random
    first: LoraTensors
    losses: list[float] = field(default_factory=list)
    best: int = 0
    lora: LoraTensors | None = None

    @property
    def length(self) -> int:
        return max(len(asked) + len(said) for asked, said in self.trained + self.held_out)


def tune_many(
    jobs: Sequence[Job], base: tuple[Any, Any], *, prompt: PromptConfig, config: one.TuneConfig, tokens: int
) -> list[tuple[LoraTensors, list[float], int]]:
    """For each job the tuned tensors, the held-out losses and the best round.

    Args:
        jobs: With equally many examples, for one base and of one shape.
        base: The base model, a Llama or alike, and its tokenizer.
        prompt: How inputs become prompts.
        config: As for `tune`; each job has its own seed.
        tokens: Of one training batch at most, padding included.
    """
    model, tokenizer = base
    running = [_begin(job, base, prompt, config) for job in jobs]
    pad = tokenizer.pad_token_id or 0
    with hooked(model, jobs[0].adapter.spec) as hooks:
        for wave in _waves(running, config.batch_size, tokens):
            _Wave(wave, model, hooks, config, pad).fit()
    return [(run.lora or run.first, run.losses, run.best) for run in running]


def _begin(job: Job, base: tuple[Any, Any], prompt: PromptConfig, config: one.TuneConfig) -> _Running:
    """A job's rows and first weights, drawn as `tune` draws them."""
    model, tokenizer = base
    rows = one._encode(tokenizer, job.adapter.description, job.examples, prompt, config)
    draw = random.Random(job.seed)
    order = draw.sample(range(len(rows)), len(rows))
    kept_out = min(len(rows) - 1, max(1, round(config.held_out * len(rows))))
    first = job.adapter.lora
    if job.start == "scratch":
        with one._peft_model(model, job.adapter, "scratch", job.seed) as fresh:
            first = peft_io.from_state_dict(one._state(fresh), job.adapter.spec)
    first = first.map(lambda x: x.detach().float().cpu())  # whatever device it was written on
    return _Running([rows[i] for i in order[kept_out:]], [rows[i] for i in order[:kept_out]], draw, first)


def _waves(running: list[_Running], rows: int, tokens: int) -> Iterator[list[_Running]]:
    """Jobs with texts of like length together, as many as a batch has room for."""
    wave: list[_Running] = []
    for run in sorted(running, key=lambda run: -run.length):
        if wave and (len(wave) + 1) * rows * wave[0].length > tokens:
            yield wave
            wave = []
        wave.append(run)
    if wave:
        yield wave


class _Wave:
    """Jobs that train together, and their stacked weights and Adam moments."""

    def __init__(
        self, running: list[_Running], model: Any, hooks: AdapterHooks, config: one.TuneConfig, pad: int
    ) -> None:
        self.running, self.model, self.hooks, self.config, self.pad = running, model, hooks, config, pad
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        first = LoraTensors.stack([run.first for run in running])
        self.scaling = first.scaling
        self.weights = [x.detach().float().to(self.device).requires_grad_() for x in (*first.a, *first.b)]
        self.mean = [torch.zeros_like(x) for x in self.weights]
        self.square = [torch.zeros_like(x) for x in self.weights]

    def fit(self) -> None:
        """Trains all jobs to their ends."""
        config, trained = self.config, len(self.running[0].trained)
        each = math.ceil(trained / config.batch_size)
        steps, step = config.max_epochs * each, 0
        warmup = max(1, round(config.warmup_ratio * steps))
        self.measure(0)
        for epoch in range(1, config.max_epochs + 1):
            orders = [run.draw.sample(run.trained, trained) for run in self.running]
            for begin in range(0, trained, config.batch_size):
                scale = min((step + 1) / warmup, (steps - step) / max(1, steps - warmup + 1))
                self.step([order[begin : begin + config.batch_size] for order in orders], step, scale)
                step += 1
            self.measure(epoch)
            going = [
                k
                for k, run in enumerate(self.running)
                if epoch - run.best < config.patience and run.losses[run.best] >= one.SOLVED
            ]
            if not going:
                break
            if len(going) < len(self.running):
                self.keep(going)

    def step(self, rows: list[list[Row]], step: int, scale: float) -> None:
        """One step of AdamW for each job on its own rows."""
        total_K, tokens_K = self.loss(rows)
        gradients = list(torch.autograd.grad((total_K / tokens_K).sum(), self.weights))
        ones_K = torch.ones(len(rows), device=self.device)
        sizes = StepSizes(
            ones_K * self.config.learning_rate * scale,
            ones_K * (1 - BETAS[0] ** (step + 1)),
            ones_K * (1 - BETAS[1] ** (step + 1)),
        )
        with torch.no_grad():
            decay, norm = self.config.weight_decay, self.config.max_grad_norm
            adamw(self.weights, gradients, self.mean, self.square, ones_K.bool(), sizes, decay, norm)

    @torch.no_grad()
    def measure(self, epoch: int) -> None:
        """Held-out losses; where one is the lowest, the weights are kept."""
        size, held_out = self.config.batch_size, len(self.running[0].held_out)
        parts = [self.loss([run.held_out[i : i + size] for run in self.running]) for i in range(0, held_out, size)]
        losses_K = sum(total for total, _ in parts) / sum(tokens for _, tokens in parts)
        half = len(self.weights) // 2
        for k, (run, loss) in enumerate(zip(self.running, losses_K.tolist(), strict=True)):
            if not math.isfinite(loss):
                raise TrainingError(f"The loss on held-out examples is {loss}; lower learning_rate")
            run.losses.append(loss)
            if loss < run.losses[run.best]:
                values = [x[k].detach().cpu().clone() for x in self.weights]
                run.best, run.lora = epoch, LoraTensors(tuple(values[:half]), tuple(values[half:]), self.scaling)

    def keep(self, going: list[int]) -> None:
        """Leaves out the jobs that have ended."""
        self.running = [self.running[k] for k in going]
        self.weights = [x.detach()[going].requires_grad_() for x in self.weights]
        self.mean, self.square = [x[going] for x in self.mean], [x[going] for x in self.square]

    def loss(self, rows: list[list[Row]]) -> tuple[Tensor, Tensor]:
        """Summed loss of the answers' tokens, and their number; (K,) each."""
        flat = [row for part in rows for row in part]
        length = max(len(asked) + len(said) for asked, said in flat)
        tokens_BT, targets_BT = torch.full((len(flat), length), self.pad), torch.full((len(flat), length), -100)
        for n, (asked, said) in enumerate(flat):
            tokens_BT[n, : len(asked) + len(said)] = torch.tensor([*asked, *said])
            targets_BT[n, len(asked) : len(asked) + len(said)] = torch.tensor(said)
        wanted_BT = targets_BT[:, 1:] != -100
        job_of_B = torch.arange(len(rows)).repeat_interleave(len(rows[0]))
        job_of = job_of_B[:, None].expand_as(wanted_BT)[wanted_BT].to(self.device)
        targets = targets_BT[:, 1:][wanted_BT].to(self.device)
        half = len(self.weights) // 2
        lora = LoraTensors(tuple(self.weights[:half]), tuple(self.weights[half:]), self.scaling)
        self.hooks.lora = lora.map(lambda x: x.to(self.dtype)).select(job_of_B.to(self.device))
        hidden = self.model.get_decoder()(tokens_BT.to(self.device), use_cache=False).last_hidden_state
        logits = self.model.get_output_embeddings()(hidden[:, :-1][wanted_BT.to(self.device)])
        losses = cross_entropy(logits.float(), targets, reduction="none")
        zeros_K = torch.zeros(len(rows), device=self.device)
        return zeros_K.index_add(0, job_of, losses), zeros_K.index_add(0, job_of, torch.ones_like(losses))
