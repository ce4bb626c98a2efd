"""How far a long piece of work is."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Pace:
    """Says now and then how far a piece of work is, how fast it goes and when it will be done.

    Args:
        total: How many things there are to do.
        what: What they are, as the line says it after the numbers: `answers`.
        log: Where lines go.
        work: What all of them cost together, in any unit, if one costs more than another; else each costs the same.
        every: Seconds between two lines; the last one always comes.
    """

    def __init__(
        self, total: int, what: str, log: Callable[[str], None], *, work: float | None = None, every: float = 15.0
    ) -> None:
        self.total, self.what, self.log, self.every = total, what, log, every
        self.work = total if work is None else work
        self.done, self.worked = 0, 0.0
        self.started = self.told = time.monotonic()

    def add(self, number: int, work: float | None = None) -> None:
        """Counts things that were done, and what they cost."""
        self.done += number
        self.worked += number if work is None else work
        now = time.monotonic()
        if now - self.told >= self.every or self.done == self.total:
            self.told = now
            spent = max(now - self.started, 1e-9)
            left = f"{duration(spent * (self.work / self.worked - 1))} left"
            so_far = f"{self.done:,} of {self.total:,} {self.what}, {self.done / spent:.1f}/s"
            self.log(f"{so_far}, {left if self.done < self.total else f'in {duration(spent)}'}")


@contextmanager
def progress(total: int, what: str, log: Callable[[str], None], *, bar: bool) -> Iterator[Callable[[int], None]]:
    """Shows how far a piece of work is: a bar on standard error, or `Pace`'s lines.

    Args:
        total: How many things there are to do.
        what: What they are.
        log: Where lines go.
        bar: Whether there is a bar in their place.

    Yields:
        What is told how many more things are done.
    """
    if not bar:
        yield Pace(total, what, log).add
        return
    with progress_bar(total, what) as shown:
        yield lambda number: shown.advance(shown.task_ids[0], number)


def progress_bar(total: int, what: str, *, done: int = 0) -> Any:
    """A bar of one task on standard error, by `rich`; its field `facts` holds what stands after it.

    Args:
        total: How many things there are to do.
        what: What they are.
        done: How many of them are done already.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    after = TextColumn("{task.fields[facts]}")
    columns = (MofNCompleteColumn(), TextColumn(what), BarColumn(16), TimeRemainingColumn(), after)
    bar = Progress(*columns, console=Console(stderr=True, highlight=False, markup=False))
    bar.add_task(what, total=total, completed=done, facts="")
    return bar


def duration(seconds: float) -> str:
    """A number of seconds, for people."""
    for unit, least in (("days", 2 * 86400), ("h", 7200), ("min", 120)):
        if seconds >= least:
            return f"{seconds / {'days': 86400, 'h': 3600, 'min': 60}[unit]:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
