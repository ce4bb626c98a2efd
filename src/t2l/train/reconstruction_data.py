"""What reconstruction reads: the library's adapters, their descriptions, and the order in which steps see them.

Knows libraries and tasks. Knows no encoder, no hypernetwork and no losses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from t2l.config import NaturalNumber, check_ranges
from t2l.errors import DataError
from t2l.library import AdapterLibrary
from t2l.tasks import Task, held_out_descriptions, require_trainable


@dataclass(frozen=True, kw_only=True)
class ReconstructionDataConfig:
    """What is reconstructed, and from what."""

    library: str
    """Folder of an adapter library."""
    adapters: tuple[str, ...] = ()
    """Only these of it; empty means all."""
    held_out_descriptions: NaturalNumber = 4
    """Descriptions of each task that are kept for evaluation, where it has enough of them."""

    def __post_init__(self) -> None:
        check_ranges(self, "data")


@dataclass(frozen=True)
class Descriptions:
    """Texts of a run, and which belong to which adapter."""

    texts: list[str]
    trained: list[tuple[int, ...]]
    """For each adapter the positions of the descriptions it is trained on."""
    held_out: list[int]
    """For each adapter the position of one it is evaluated on: a held-out one, or the first where none is held out."""
    dropped: int
    """Descriptions left out because they exceed the encoder's window."""


def choose_descriptions(
    library: AdapterLibrary,
    names: Sequence[str],
    config: ReconstructionDataConfig,
    *,
    max_tokens: int,
    count_tokens: Callable[[list[str]], list[int]],
) -> Descriptions:
    """Picks the descriptions of every adapter.

    Args:
        library: The adapters' library, whose index has their descriptions.
        names: The adapters.
        config: How many descriptions are held out.
        max_tokens: The encoder's window; longer descriptions are left out.
        count_tokens: Counts each text's tokens as the encoder does.

    Raises:
        DataError: naming the adapters without one that the encoder can read.
    """
    listed = {name: _texts(library, name) for name in names}
    bare = [name for name, texts in listed.items() if not texts]
    if bare:
        raise DataError(
            f"{library.folder} has no description of {', '.join(bare[:5])} ({len(bare)} of {len(names)} adapters); "
            "import the library again with --descriptions, or condition on names (encoder.kind onehot)"
        )
    unique = sorted({text for texts in listed.values() for text in texts})
    fits = {t: n <= max_tokens for t, n in zip(unique, count_tokens(unique), strict=True)}
    kept = {name: tuple(text for text in texts if fits[text]) for name, texts in listed.items()}
    lost = [name for name, texts in kept.items() if not texts]
    if lost:
        raise DataError(
            f"No description of {', '.join(lost[:5])} fits into encoder.max_tokens ({max_tokens}); "
            "shorten them or raise it"
        )
    texts = sorted({text for found in kept.values() for text in found})
    place = {text: i for i, text in enumerate(texts)}
    trained, held_out = [], []
    for name, found in kept.items():
        mine, others = held_out_descriptions(Task(name, found, {}), config.held_out_descriptions)
        trained.append(tuple(place[text] for text in mine))
        held_out.append(place[(others or mine)[0]])
    dropped = sum(len(listed[name]) - len(kept[name]) for name in names)
    return Descriptions(texts, trained, held_out, dropped)


def names_as_texts(names: Sequence[str]) -> Descriptions:
    """Lets each adapter's name stand for its description, for networks that are conditioned on the task's number."""
    places = range(len(names))
    return Descriptions(list(names), [(i,) for i in places], list(places), 0)


def _texts(library: AdapterLibrary, name: str) -> list[str]:
    found = library.index[name].get("descriptions", [])
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise DataError(f"{library.folder}: descriptions of {name} must be a list of texts")
    return found


def open_library(config: ReconstructionDataConfig) -> tuple[AdapterLibrary, tuple[str, ...]]:
    """The library, and the adapters of it that are to be reconstructed.

    Raises:
        CheckpointError: if it is damaged or lacks one of them.
        DataError: if it may not be trained on.
    """
    library = AdapterLibrary.open(Path(config.library))
    if library.purpose == "evaluation":
        raise DataError(
            f"{library.folder} was trained for evaluation only, on tasks that no hypernetwork may see; reconstruct "
            "another"
        )
    names = config.adapters or library.names
    require_trainable(names)
    return library, names


class AdapterSampler:
    """Says which adapters, and which of their descriptions, each step sees: a function of seed and step alone.

    Args:
        descriptions: Positions of each adapter's descriptions.
        per_batch: n; adapters come in shuffled order, each once before any comes again.
        seed: Seed of the run.
    """

    def __init__(self, descriptions: Sequence[tuple[int, ...]], *, per_batch: int, seed: int) -> None:
        self.descriptions, self.seed = descriptions, seed
        self.per_batch = min(per_batch, len(descriptions))
        self.epoch, self.order = -1, np.empty(0, np.int64)

    def steps(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Positions of adapters and of descriptions, (steps, n) each."""
        adapters, texts = np.empty((2, stop - start, self.per_batch), np.int64)
        for step in range(start, stop):
            rng = np.random.default_rng((self.seed, 0, step))
            for i in range(self.per_batch):
                epoch, place = divmod(step * self.per_batch + i, len(self.descriptions))
                if epoch != self.epoch:
                    self.epoch = epoch
                    self.order = np.random.default_rng((self.seed, 1, epoch)).permutation(len(self.descriptions))
                adapters[step - start, i] = self.order[place]
            shares = rng.random(self.per_batch)
            own = [self.descriptions[n] for n in adapters[step - start]]
            texts[step - start] = [mine[int(share * len(mine))] for mine, share in zip(own, shares, strict=True)]
        return torch.from_numpy(adapters), torch.from_numpy(texts)
