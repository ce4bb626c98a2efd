"""Watches the steps of a run: their numbers, and whether they are sound. Knows losses and batches; knows no models."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from t2l.errors import TrainingError
from t2l.train.batches import Batch
from t2l.train.config import SftConfig
from t2l.train.dataset import RunData
from t2l.train.metrics import memory_gb


class StepMonitor:
    """The steps since the last row of numbers. Waits for the device only when it is settled or closed.

    Args:
        config: Settings of the run.
        data: The run's batches, to name one that is not sound.
        device: Where the steps are taken.
        vocabulary: The base's number of tokens.
        started: When the run began.
    """

    def __init__(
        self, config: SftConfig, data: RunData, device: torch.device, *, vocabulary: int, started: float
    ) -> None:
        self.config, self.data, self.device, self.vocabulary, self.started = config, data, device, vocabulary, started
        self.means: list[float] = []
        """The mean loss of each window so far."""
        self.pending: list[tuple[Tensor, Tensor]] = []
        self._open()

    def _open(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.examples = self.tokens = self.skipped = 0
        self.clock = time.monotonic()

    def add(self, batch: Batch, loss: Tensor, norm: Tensor) -> None:
        """One more step was taken, on a batch that is still on the CPU."""
        self.pending.append((loss, norm))
        self.examples += int(batch.rows.documents.amax(1).add(1).sum())
        self.tokens += int((batch.rows.documents != -1).sum())
        self.skipped += int(batch.skipped)

    def settle(self, step: int) -> None:
        """Waits for the steps so far, `step` in all, and checks that they were sound."""
        if self.pending:
            losses, norms = torch.stack([torch.stack(pair) for pair in self.pending]).T.tolist()
            require_finite(losses, norms, step - len(self.pending), self.data, self.config)
            self.losses += losses
            self.norms += norms
            self.pending.clear()

    def close(self, step: int) -> dict[str, float]:
        """The numbers of the window, after which the next one begins."""
        self.settle(step)
        spent = time.monotonic() - self.clock
        each = spent / len(self.losses)
        row = {
            "step": step,
            "loss": sum(self.losses) / len(self.losses),
            "gradient_norm": self.norms[-1],
            "examples": self.examples,
            "too_long": self.skipped,
            "tokens_per_second": self.tokens / spent,
            "seconds_per_step": each,
            "minutes": (time.monotonic() - self.started) / 60,
            "minutes_left": each * (self.config.train.max_steps - step) / 60,
            "memory_gb": memory_gb(self.device),
        }
        self.means.append(row["loss"])
        self._open()
        return row

    def require_learning(self, step: int) -> None:
        """See the function of this name."""
        require_learning(self.means, self.vocabulary, step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done meanwhile does not count as the steps' time."""
        before = time.monotonic()
        yield
        self.clock += time.monotonic() - before


def require_finite(losses: list[float], norms: list[float], first: int, data: RunData, config: SftConfig) -> None:
    """Checks the losses and gradient norms of the steps from `first` on.

    Raises:
        TrainingError: naming the first batch of a loss or gradient that is not finite.
    """
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=first):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            rows = range(config.train.tasks_per_batch)
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
            f"has {chance:.1f} and this run had {best:.2f}. Lower train.learning_rate; --resume goes on from what was "
            "saved last, which may be too late"
        )
