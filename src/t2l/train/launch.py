"""How the run of any trainer begins and ends: who takes part, whose the folder is, where numbers go, when to stop.

Knows files and processes. Knows no models and no tasks.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from t2l.config import to_plain
from t2l.train.loop import StopRequest
from t2l.train.metrics import MetricLogger, SilentLogger
from t2l.train.processes import join
from t2l.train.resume import begin_run


class Launch:
    """The start of a run, in each of its processes. Only the main one logs and writes.

    Args:
        config: Settings of any trainer.
        run: The run's folder.
        resume: Whether the run goes on.
        max_minutes: Wall time after which it stops.
        device: `cuda` or `cpu`; the GPU if there is one.
        bar: Draw a progress bar in place of most lines.
        log: Where lines go.

    Raises:
        ConfigError, TrainingError: as `t2l.train.processes.join`.
    """

    def __init__(
        self,
        config: Any,
        run: Path,
        *,
        resume: bool,
        max_minutes: float | None,
        device: str | None,
        log: Callable[[str], None],
        bar: bool = False,
    ) -> None:
        self.started = time.monotonic()
        self.run, self.settings, self.resume = run, to_plain(config), resume
        self.report_to, self.max_minutes, self.bar = config.train.report_to, max_minutes, bar
        self.processes = join(device, timeout=config.train.ddp_timeout)
        self.log = log if self.processes.main else lambda line: None

    @contextmanager
    def loop(self, first: int, steps: int, unit: str = "steps") -> Iterator[tuple[MetricLogger, StopRequest]]:
        """Claims the folder of a new run; yields where numbers go and what says when to stop.

        Left, all processes have come to the end of the loop, and its state is saved.

        Args:
            first: Steps done before.
            steps: Steps of the whole run.
            unit: What `steps` counts.

        Raises:
            TrainingError: if another run has begun in the folder.
        """
        logger: MetricLogger = SilentLogger()
        if self.processes.main:
            if not self.resume:
                begin_run(self.run, self.settings)
            logger = MetricLogger(
                self.run,
                self.settings,
                steps=steps,
                first_step=first,
                report_to=self.report_to,
                bar=self.bar,
                log=self.log,
                unit=unit,
            )
        agree = self.processes.any if self.processes.number > 1 else None
        with logger, StopRequest(self.max_minutes, started=self.started, agree=agree) as stop:
            yield logger, stop
            self.processes.wait()
