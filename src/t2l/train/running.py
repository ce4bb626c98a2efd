"""What runs of any kind share: the schedule, and the versions that a result depends on. Knows no tasks."""

from typing import Protocol


class Scheduled(Protocol):
    """Settings with a schedule."""

    @property
    def steps(self) -> int:
        """Of the whole run."""

    @property
    def warmup(self) -> float:
        """Share of them over which the learning rate rises."""


def schedule(step: int, train: Scheduled) -> float:
    """Share of the peak learning rate at a step: linear rise, then linear fall to zero."""
    rising = max(1, round(train.warmup * train.steps))
    if step < rising:
        return (step + 1) / rising
    return max(0.0, (train.steps - step) / max(1, train.steps - rising))


def versions() -> dict[str, str]:
    """Versions that can change a result."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name, distribution in (("t2l", "text-to-lora"), ("torch", "torch"), ("transformers", "transformers")):
        try:
            found[name] = version(distribution)
        except PackageNotFoundError:  # t2l itself, run from a source tree that is not installed
            found[name] = "not installed"
    return found
