"""What runs of any kind share: the schedule, and the versions that a result depends on. Knows no tasks."""


def schedule(step: int, max_steps: int, warmup_ratio: float) -> float:
    """Share of the peak learning rate at a step: a linear rise over the first part, then a linear fall to zero."""
    rising = max(1, round(warmup_ratio * max_steps))
    if step < rising:
        return (step + 1) / rising
    return max(0.0, (max_steps - step) / max(1, max_steps - rising))


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
