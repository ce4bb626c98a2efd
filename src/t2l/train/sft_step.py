"""One step of supervised fine-tuning: the loss of the base under written adapters, and what the optimiser makes of it.

Each process computes its part of the step's batch, in several turns where gradients accumulate. Every term of the loss
is a sum over the whole batch's rows, so that the parts add up to what one process would compute.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2l.apply import AdapterHooks
from t2l.encoder import Encoded
from t2l.hypernet import Hypernet
from t2l.lora import LoraTensors
from t2l.train.batches import Batch
from t2l.train.config import SftConfig, TrainConfig
from t2l.train.embeddings import EmbeddingCache
from t2l.train.loop import schedule
from t2l.train.loss import AnswerLosses, LossFunction, neftune_noise
from t2l.train.packing import PackedRows
from t2l.train.processes import Processes

MARGIN = 1.0
"""Nats a token that the answers of a compared row should cost more with another task's description."""
COMPARED = 1 / 8
"""Share of a batch's rows that the margin loss compares."""


class Part(NamedTuple):
    """What one process computes at a time: some rows of a step's batch, and what they are part of."""

    batch: Batch
    """These rows, whose weights are what they are in the whole batch."""
    compared: int
    """How many of them, the first ones, are compared with another task's description."""
    whole: Batch
    """The step's batch."""
    all_compared: int
    """How many of its rows are compared."""

    @property
    def share(self) -> float:
        """What a mean over this part's adapters, those of compared rows counted twice, is of the whole batch's."""
        return (len(self.batch.read) + self.compared) / (len(self.whole.read) + self.all_compared)


@dataclass
class Trainer:
    """What takes a step: model, hypernetwork, optimiser."""

    config: SftConfig
    base: Any
    hypernet: Hypernet
    write: Callable[..., LoraTensors]
    """The hypernetwork, compiled or not, prepared for several processes if there are any."""
    losses: LossFunction
    cache: EmbeddingCache | None
    """None where nothing is read."""
    optimizer: torch.optim.Optimizer
    device: torch.device
    processes: Processes = field(default_factory=Processes)
    hooks: AdapterHooks | None = None
    """Where the base bears adapters, for who looks on."""

    def __post_init__(self) -> None:
        self.stopped = torch.zeros((), device=self.device)
        """1 from the first loss or gradient that is not finite: the fused optimiser then changes nothing any more, and
        the host need not wait for every step to find out."""
        # The attribute that torch's GradScaler sets and fused optimisers look for; there is no argument for it.
        self.optimizer.found_inf = self.stopped  # type: ignore[attr-defined]

    def adapters(self, read: Tensor, *, learning: bool) -> LoraTensors:
        """Adapters (N of them) from the texts at `read` (N,)."""
        encoded = Encoded(read[:, None]) if self.cache is None else self.cache[read]
        # Evaluation runs the hypernetwork uncompiled: its evaluation mode would be compiled for a few batches only.
        write = self.write if learning else self.hypernet
        return write(encoded.states, encoded.mask).map(Tensor.contiguous)

    def forward(self, rows: PackedRows, read: Tensor, *, learning: bool) -> tuple[AnswerLosses, LoraTensors]:
        """Losses of the answers of rows under the adapters written from `read` (B,); and these adapters."""
        train, noise, smoothing = self.config.train, None, None
        if train.neftune_noise_alpha:  # zeros in evaluation, so that there is one compiled function
            width = self.base.get_input_embeddings().embedding_dim
            noise = neftune_noise(rows.documents, width, train.neftune_noise_alpha if learning else 0.0)
        if train.label_smoothing_factor:
            smoothing = torch.full((), train.label_smoothing_factor if learning else 0.0, device=self.device)
        enabled = self.device.type == "cuda" if train.bf16 is None else train.bf16
        with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled):
            lora = self.adapters(read, learning=learning)
            answers = self.losses(rows, lora, noise, smoothing)
        if not learning:  # or what a backward pass would need stayed in memory, of several batches at a time
            answers, lora = answers._replace(losses=answers.losses.detach()), lora.map(Tensor.detach)
        return answers, lora

    def parts(self, batch: Batch) -> list[Part]:
        """What this process computes of a batch, one after another: by itself the batch, unless gradients accumulate.

        Rows are dealt out in turn, so that every part has its share of the first ones, which are compared.
        """
        train, number = self.config.train, len(batch.read)
        again = math.ceil(COMPARED * number) if train.margin_loss_weight else 0
        parts = min(number, self.processes.number * train.gradient_accumulation_steps)
        return [
            Part(batch.every(parts, first), len(range(first, again, parts)), batch, again)
            for first in self.processes.share(parts)
        ]

    def compare(self, part: Part, *, learning: bool) -> tuple[AnswerLosses, AnswerLosses, LoraTensors]:
        """`forward` with the right and with another task's descriptions; the prompts are the same in both.

        In training with a margin loss, only the first rows are compared, in one pass of all rows and of these once
        more. Evaluation has passes of the same shape, for there is one compiled one.
        """
        batch, again, number = part.batch, part.compared, len(part.batch.read)
        rows = batch.rows.followed_by(batch.rows.part(0, again))
        read = torch.cat([batch.read, batch.negatives[:again]])
        answers, lora = self.forward(rows, read, learning=learning)
        right, wrong = (AnswerLosses(*(x[rows] for x in answers)) for rows in (slice(number), slice(number, None)))
        # As many passes in every process: a sharded base gathers its layers in each.
        if not learning and part.all_compared < len(part.whole.read):
            negatives = torch.cat([batch.negatives, batch.negatives[:again]])
            wrong, _ = self.forward(rows, negatives, learning=False)
            wrong = AnswerLosses(*(x[:number] for x in wrong))
        return right, wrong, lora

    def loss(self, part: Part) -> Tensor:
        """The training loss: mean over rows, over a row's documents, over a document's answer tokens.

        Of a part it is what the part adds to the whole batch's.
        """
        train, batch, weights = self.config.train, part.batch, part.batch.rows.weights
        if not train.margin_loss_weight:
            answers, lora = self.forward(batch.rows, batch.read, learning=True)
            loss = (answers.losses * weights).sum()
        else:
            right, wrong, lora = self.compare(part, learning=True)
            loss = (right.losses * weights).sum()
            loss = loss + train.margin_loss_weight * self._hinge(part, right.losses, wrong.losses)
        if train.l2_weight:
            sizes = [x.float().square().mean() for x in (*lora.a, *lora.b)]
            loss = loss + train.l2_weight * torch.stack(sizes).sum() / len(lora.a) * part.share
        return loss

    def margin_weights(self, batch: Batch, number: int) -> Tensor:
        """What the margins of the first rows weigh, (number,): nothing but where the adapter alone says what to do.

        The prompt of such a row shows no description, and its adapter is written from one: where a row's own text says
        nothing of its task, another text need cost nothing more.
        """
        others = batch.in_prompt[:number] | ~batch.told[:number]
        return batch.rows.weights[:number].sum(1).masked_fill(others, 0.0)

    def _hinge(self, part: Part, right: Tensor, wrong: Tensor) -> Tensor:
        """How much the margins of the compared rows lack, on average over those that count."""
        number = part.compared
        weights = part.batch.rows.weights[:number]
        margin = ((wrong * weights).sum(1) - (right[:number] * weights).sum(1)) / weights.sum(1).clamp_min(1e-12)
        share = self.margin_weights(part.batch, number)
        of = self.margin_weights(part.whole, part.all_compared).sum().clamp_min(1e-12)
        return (F.relu(MARGIN - margin) * share).sum() / of

    def step(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """One optimiser step; returns loss and gradient norm, without waiting for them.

        From the first one that is not finite, no step changes the weights; `StepMonitor.settle` says so.
        """
        train = self.config.train
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, train.max_steps, train.warmup_ratio)
        self.processes.seed(self.config.seed, step)
        self.optimizer.zero_grad(set_to_none=True)
        losses, parts = [], self.parts(batch)
        for place, part in enumerate(parts, start=1):
            with self.processes.accumulating(self.write, more=place < len(parts)):
                own = self.loss(part)
                self.processes.backward(own)
            losses.append(own.detach())
        loss = self.processes.sum(torch.stack(losses).sum())
        norm = nn.utils.clip_grad_norm_(self.hypernet.parameters(), train.max_grad_norm)
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
