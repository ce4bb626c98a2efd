"""The versions that a result depends on. Knows installed packages only."""

from importlib import metadata

from t2l import __version__


def versions() -> dict[str, str]:
    """Versions of everything that can change a result."""
    import torch  # its own word: the metadata of its distribution may lack what it was built for

    return {"t2l": __version__, "torch": str(torch.__version__), "transformers": metadata.version("transformers")}
