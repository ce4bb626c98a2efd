"""What a run shows while it runs: metrics.jsonl, TensorBoard or a tracker, a progress bar on a terminal.

Knows rows of numbers. Knows no models; trackers are imported only where the settings name one.
"""

import importlib
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch

from t2l.errors import ConfigError, OutputError
from t2l.io import write_text
from t2l.pace import duration, progress_bar

METRICS = "metrics.jsonl"
ReportTo = Literal["none", "tensorboard", "wandb", "trackio"]
"""Where a run's numbers also go; metrics.jsonl always has them."""


class MetricLogger(AbstractContextManager["MetricLogger"]):
    """Takes a run's rows of numbers and passes them on.

    Args:
        run: The run's folder; `metrics.jsonl` and `tensorboard/` go there.
        settings: The run's settings, for the tracker.
        steps: Steps of the whole run.
        first_step: Steps done before; later rows of an interrupted run are dropped, for they come again.
        report_to: TensorBoard (event files, if it is installed), or the tracker to report to as well.
        bar: Whether to draw a progress bar on standard error in place of a line for each row of numbers.
        log: Where lines go.
        unit: What `steps` counts and `step` is told.

    Raises:
        ConfigError: if the tracker is not installed.
    """

    def __init__(
        self,
        run: Path,
        settings: dict[str, Any],
        *,
        steps: int,
        first_step: int,
        report_to: ReportTo,
        bar: bool,
        log: Callable[[str], None],
        unit: str = "steps",
    ) -> None:
        self.path, self.log = run / METRICS, log
        self.of = f" of {steps:,}" if unit == "steps" else ""
        kept = [row for row in read_metrics(run) if row["step"] <= first_step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.tracker = _tracker(report_to) if report_to in ("wandb", "trackio") else None
        if self.tracker is not None:
            self.tracker.init(project="t2l", name=run.name, config=settings)
        self.events = _tensorboard(run / "tensorboard", first_step, log) if report_to == "tensorboard" else None
        self.facts: dict[str, str] = {}
        self.bar = progress_bar(steps, unit, done=first_step) if bar else None

    def __enter__(self) -> "MetricLogger":
        if self.bar is not None:
            self.bar.start()
            self.log = self.bar.console.print
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.events is not None:
            self.events.close()
        if self.tracker is not None:
            self.tracker.finish()

    def record(self, row: dict[str, Any]) -> None:
        """One row of numbers, its `step` among them."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise OutputError(f"Cannot write {self.path}: {error.strerror or error}") from error
        numbers = {key: value for key, value in row.items() if key != "step"}
        if self.events is not None:
            for key, value in numbers.items():
                self.events.add_scalar(key, value, row["step"])
        if self.tracker is not None:
            self.tracker.log(numbers, step=row["step"])
        found = shown(row)
        if self.bar is not None:
            self.facts |= found
            self.bar.update(self.bar.task_ids[0], facts=_words(self.facts))
            return
        if not found:
            return
        left = f"  {duration(60 * row['minutes_left'])} left" if row.get("minutes_left") else ""
        self.log(f"step {row['step']:,}{self.of}  {_words(found)}{left}")

    def step(self, done: int) -> None:
        """So many steps are done."""
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=done)


def shown(row: dict[str, Any]) -> dict[str, str]:
    """The numbers of a row that say how a run goes, as words: metrics.jsonl has all others too.

    Of an evaluation, the share of answers that are right, and the same with another task's description in the adapter:
    of tasks that were never trained on, where there are some, and without the description in the prompt.
    """
    found = {"loss": f"{row['loss']:.3g}"} if "loss" in row else {}
    modes = [f"{suite}/{mode}" for suite in ("validation", "seen") for mode in ("adapter", "adapter+prompt")]
    evaluated = next((mode for mode in modes if f"{mode}/exact_match" in row), "")
    names = {
        "right answers": f"{evaluated}/exact_match",
        "another's": f"{evaluated}/wrong_exact_match",
        "relative error": "trained/relative",
        "held-out descriptions": "held_out/relative",
    }
    found |= {name: f"{row[key]:.0%}" for name, key in names.items() if key in row}
    return found | ({"tasks done": str(row["done"])} if "done" in row else {})


def _words(facts: dict[str, str]) -> str:
    return "  ".join(f"{name} {value}" for name, value in facts.items())


class SilentLogger(MetricLogger):
    """Takes rows and passes nothing on: of several processes that train together, one does."""

    def __init__(self) -> None:
        self.bar = self.events = self.tracker = None
        self.log = lambda line: None

    def record(self, row: dict[str, Any]) -> None:
        """Does nothing."""


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run so far; a last line that was cut off in writing is left out."""
    path = run / METRICS
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def memory_gb(device: torch.device) -> float:
    """`peak_bytes` in GB."""
    return peak_bytes(device) / 1e9


def peak_bytes(device: torch.device) -> int:
    """Most memory used so far: the GPU's, or the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _tensorboard(folder: Path, first_step: int, log: Callable[[str], None]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log(
            "TensorBoard is not installed (pip install 'text-to-lora[train]'); "
            "metrics.jsonl has everything it would show"
        )
        return None
    return SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)


def _tracker(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"train.report_to is {name}, which is not installed: pip install {name}") from error
