"""Many adapters side by side, and the optimiser that takes one step of all of them.

    slot k: A_k and B_k of every target, their two Adam moments, the best weights so far, and whether it still trains

Nothing that happens to one slot depends on another. Knows adapters' shapes and tensors. Knows no tasks and no models.
Shape letters as in `spec.py`; K slots.
"""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec
from t2l.train.loop import schedule
from t2l.train.task_config import TaskLorasTrainConfig

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Of Adam; torch's defaults."""


class Slots:
    """The adapters in training, stacked, with everything that is each one's own.

    Args:
        spec: Their shape.
        number: K.
        device: Where they are.
        freeze_a: Whether A stays as it is.
    """

    def __init__(self, spec: AdapterSpec, number: int, device: torch.device, *, freeze_a: bool = False) -> None:
        self.spec, self.number = spec, number
        length, rank = len(spec.layers), spec.rank

        def zeros() -> list[Tensor]:
            a = [torch.zeros(number, length, rank, t.in_features, device=device) for t in spec.targets]
            return a + [torch.zeros(number, length, t.out_features, rank, device=device) for t in spec.targets]

        self.weights = zeros()
        """A of every target, then B of every target."""
        first = len(spec.targets) if freeze_a else 0
        self.trained = [x.requires_grad_() for x in self.weights[first:]]
        """What has gradients and moments, in the same order."""
        self.mean, self.square, self.best = zeros()[first:], zeros()[first:], zeros()
        self.alive = torch.ones(number, dtype=torch.bool, device=device)
        """False once a gradient of the slot was not finite; its weights stay as they were before."""

    def tensors(self) -> dict[str, Tensor]:
        """Returns everything by name, for a saved state."""
        found = {"alive": self.alive.to(torch.uint8)}
        for name in ("weights", "mean", "square", "best"):
            found |= {f"{name}/{i}": x for i, x in enumerate(getattr(self, name))}
        return found

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Copies what `tensors` returned back into the slots."""
        self.alive.copy_(tensors["alive"].bool())
        for name in ("weights", "mean", "square", "best"):
            for i, x in enumerate(getattr(self, name)):
                x.copy_(tensors[f"{name}/{i}"])

    @torch.no_grad()
    def start(self, slot: int, name: str, *, seed: int, shared: bool, origin: LoraTensors | None = None) -> None:
        """Puts a copy of `origin` into a slot, or a fresh adapter as PEFT initialises it: A kaiming-uniform, B zero.

        Random numbers are drawn on the CPU, so that they are alike on any device.
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
    def keep_best(self, slots: Sequence[int]) -> None:
        """Copies the weights of these slots to their best ones."""
        improved_K = torch.zeros(self.number, dtype=torch.bool)
        improved_K[list(slots)] = True
        improved_K = improved_K.to(self.alive.device)
        for best, weight in zip(self.best, self.weights, strict=True):
            best.copy_(torch.where(improved_K[:, None, None, None], weight, best))

    def lora(self, rows_per_slot: int) -> LoraTensors:
        """Returns the adapters in training, each as often as there are rows of it in a batch."""
        weights = self.weights
        if rows_per_slot > 1:
            weights = [x[:, None].expand(-1, rows_per_slot, -1, -1, -1).flatten(0, 1) for x in weights]
        half = len(weights) // 2
        return LoraTensors(tuple(weights[:half]), tuple(weights[half:]), self.spec.scaling)

    def best_adapter(self, slot: int) -> dict[str, Tensor]:
        """Returns a slot's best weights under the names of a library's tensors."""
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


def step_sizes(
    steps: Sequence[Sequence[int | None]], train: TaskLorasTrainConfig, device: torch.device
) -> list[StepSizes]:
    """Computes the step sizes of several optimiser steps at once.

    Args:
        steps: For each of these steps and each slot how many steps the slot has taken before; None for an empty slot.
        train: Settings with the schedule.
        device: Where the step sizes are needed.
    """
    rate = [[0.0 if t is None else schedule(t, train.max_steps, train.warmup_ratio) for t in row] for row in steps]
    count = torch.tensor([[1 if t is None else t + 1 for t in row] for row in steps], dtype=torch.float64)
    tables = (torch.tensor(rate) * train.learning_rate, 1 - BETAS[0] ** count, 1 - BETAS[1] ** count)
    return [StepSizes(*row) for row in zip(*(x.float().to(device) for x in tables), strict=True)]


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
    """Takes one step of AdamW (arXiv 1711.05101) for K stacked adapters, as torch's AdamW would for each alone.

    Each adapter has its own gradient norm, clip, learning rate and bias correction. One whose gradient is not finite
    stays as it is from then on. All tensors are changed in place.
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
