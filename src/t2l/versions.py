"""The versions that a result depends on. Knows installed packages only."""

from importlib.metadata import PackageNotFoundError, version

PACKAGES = {"t2l": "text-to-lora", "torch": "torch", "transformers": "transformers"}
"""Name in a card or a checkpoint, and name of the distribution."""


def versions() -> dict[str, str]:
    """Returns the installed version of everything that can change a result."""
    found = {}
    for name, distribution in PACKAGES.items():
        try:
            found[name] = version(distribution)
        except PackageNotFoundError:  # t2l itself, run from a source tree that is not installed
            found[name] = "not installed"
    return found
