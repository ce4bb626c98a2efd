"""What the loops of all three trainers share: the learning rate's schedule and the reasons to stop before the end.

Knows steps and clocks. Knows no models and no files.
"""

import math
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import Any


def schedule(step: int, max_steps: int, warmup_ratio: float) -> float:
    """Returns the share of the peak learning rate at a step: a linear rise, then a linear fall to zero.

    Args:
        step: Number of the step, from 0.
        max_steps: Steps of the whole run.
        warmup_ratio: Share of them over which the learning rate rises.
    """
    rising = max(1, round(warmup_ratio * max_steps))
    if step < rising:
        return (step + 1) / rising
    return max(0.0, (max_steps - step) / max(1, max_steps - rising))


class StopRequest(AbstractContextManager["StopRequest"]):
    """Says when a run has to save its state and stop: when its time is up, or when somebody pressed Ctrl-C.

    While it is entered, the first Ctrl-C only asks: the loop ends its step, saves, and calls `raise_if_interrupted`. A
    second one raises KeyboardInterrupt at once. SIGTERM, by which clusters take a machine away, is the same, but for
    several processes: whose partner died waits for it, and has to end when it is told to. In a thread other than the
    main one, where Python allows no signal handlers, only the time counts.

    Args:
        max_minutes: Wall time after which to stop; None for no limit.
        started: `time.monotonic()` when the run began, if that was before this call.
        agree: With several processes, says for each of some flags whether any of them has raised it. They then stop
            after the same step, the one at which they agreed on it in `settle`.
    """

    def __init__(
        self,
        max_minutes: float | None = None,
        *,
        started: float | None = None,
        agree: Callable[..., tuple[bool, ...]] | None = None,
    ) -> None:
        self.started = time.monotonic() if started is None else started
        self.max_minutes = math.inf if max_minutes is None else max_minutes
        self._agree, self._agreed, self._asked = agree, (False, False), False
        self._before: dict[int, Any] = {}

    @property
    def minutes(self) -> float:
        """Minutes since the run began."""
        return (time.monotonic() - self.started) / 60

    @property
    def interrupted(self) -> bool:
        """Whether somebody pressed Ctrl-C."""
        return self._asked if self._agree is None else self._agreed[0]

    def __bool__(self) -> bool:
        """Whether the run has to stop now."""
        return any(self._agreed) if self._agree is not None else self._asked or self.minutes > self.max_minutes

    def settle(self) -> None:
        """Agrees with the other processes, after a step that all of them took, on whether to stop."""
        if self._agree is not None:
            interrupted, over = self._agree(self._asked, self.minutes > self.max_minutes)
            self._agreed = (interrupted, over)

    def raise_if_interrupted(self, log: Callable[[str], None], saved: str) -> None:
        """Says what was saved and raises KeyboardInterrupt, if that is why the run stopped; called once it is saved.

        Args:
            log: Where the line goes.
            saved: What there is to go on from, as it continues "interrupted: the state".
        """
        if self.interrupted:
            log(f"interrupted: the state {saved}; go on with --resume")
            raise KeyboardInterrupt

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT,) if self._agree is not None else (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
