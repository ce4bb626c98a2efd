"""Networks against the adapters that they were trained to write: sizes, errors, and scores beside their controls.

Knows libraries, checkpoints and scores. Writes no files. Shape letters as in `spec.py`.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from t2l import checkpoint
from t2l.compress.scores import Scorer, Scores
from t2l.config import build
from t2l.errors import DataError
from t2l.library import AdapterLibrary
from t2l.lora import LoraTensors
from t2l.text_to_lora import TextToLora
from t2l.train.dataset import short_random_text
from t2l.train.reconstruction import ReconstructionConfig
from t2l.train.reconstruction_data import Descriptions, choose_descriptions, names_as_texts
from t2l.train.reconstruction_losses import compare, principal_directions

Kind = Literal["trained", "held-out", "random", "other"]
KINDS: tuple[Kind, ...] = ("trained", "held-out", "random", "other")
"""What a network reads for a task: a description it was trained on, one that was held out, made-up words, or another
task's description (the paper's table 5)."""


@dataclass(frozen=True)
class Network:
    """A trained network in the report."""

    label: str
    adapters: list[str]
    """What it was trained to write."""
    head_size: int
    parameters: int
    size: int
    """Bytes of its weights on disk, in fp16."""
    library_size: int
    """Bytes of those adapters in fp16."""
    library_size_one_a: int
    """The same with A counted once where all of them have one A."""
    errors: dict[str, dict[str, float]]
    """By what it reads: relative error, cosine and element L1, each the mean over the adapters."""


def texts_for(kind: Kind, known: Descriptions, names: Sequence[str], fits: Callable[[str], bool]) -> list[str]:
    """Returns what a network reads for each adapter.

    Args:
        kind: Which of `KINDS`.
        known: The descriptions it was trained on and those that were held out, adapter by adapter.
        names: The adapters.
        fits: Whether its encoder's window holds a text; made-up words are shortened until it does.
    """
    trained = [known.texts[mine[0]] for mine in known.trained]
    if kind == "trained":
        return trained
    if kind == "held-out":
        return [known.texts[i] for i in known.held_out]
    if kind == "other":
        # A half turn: neighbours in alphabetical order are often alike.
        turn = max(1, len(trained) // 2)
        return trained[turn:] + trained[:turn]
    made_up = []
    for name in names:
        text = short_random_text(random.Random(name))
        while not fits(text) and " " in text:
            text = text.rpartition(" ")[0]
        made_up.append(text)
    return made_up


def own_parameters(lora: LoraTensors) -> int:
    """Counts the numbers of each adapter that are its own: those of B alone, where all have one A."""
    own = lora.b if lora.shares_a else (*lora.a, *lora.b)
    return sum(x[0].numel() for x in own)


def library_sizes(lora: LoraTensors) -> tuple[int, int]:
    """Returns the bytes of a batch of adapters in fp16, and those with A counted once where all have one A."""
    number, each = lora.a[0].shape[0], sum(x[0].numel() for x in (*lora.a, *lora.b))
    return 2 * number * each, 2 * (each + (number - 1) * own_parameters(lora))


def principal(lora: LoraTensors, number: int) -> LoraTensors:
    """Replaces each adapter by the mean of all plus its projection on their first principal components.

    With 0 components every adapter becomes the mean.

    Args:
        lora: A batch of N adapters.
        number: Number of components, at most N.
    """
    n = lora.a[0].shape[0]
    mixture = torch.full((n, n), 1 / n, dtype=torch.double, device=lora.a[0].device)
    if number:
        kept = principal_directions(lora, number)
        mixture += kept @ kept.mT @ (torch.eye(n, dtype=torch.double, device=kept.device) - mixture)
    return lora.map(lambda x: torch.einsum("nm,m...->n...", mixture.to(x.dtype), x))


def score_controls(scorer: Scorer, library: AdapterLibrary, parameters: int) -> list[Scores]:
    """Scores what a network is compared with: the base, the task LoRAs, their mean, their principal components.

    Args:
        scorer: Examples and base model.
        library: The adapters.
        parameters: Size of the network; there are as many components as it has room for.
    """
    names, everything = library.names, library.stack()
    number = min(parameters // own_parameters(everything), len(names) - 1)
    scores = scorer.score("base", None, names) + scorer.score("task-lora", everything, names)
    scores += scorer.score("mean of all", principal(everything, 0), names)
    if number:
        scores += scorer.score(f"{number} components", principal(everything, number), names)
    return scores


def write_adapters(generator: TextToLora, texts: Sequence[str]) -> LoraTensors:
    """Writes adapters for texts as one batch, on the CPU."""
    parts = [generator.generate(texts[i : i + 32]) for i in range(0, len(texts), 32)]
    return LoraTensors.stack([adapter.lora.map(lambda x: x.cpu()) for part in parts for adapter in part])


def evaluate_network(
    label: str,
    folder: Path,
    library: AdapterLibrary,
    scorer: Scorer | None,
    *,
    kinds: Sequence[Kind] = ("trained", "held-out"),
    device: str = "cpu",
) -> tuple[Network, list[Scores]]:
    """Computes errors and scores of one checkpoint on the adapters that it was trained to write.

    Args:
        label: What the network is called in the report.
        folder: The checkpoint.
        library: The library whose adapters it was trained to write.
        scorer: Examples and base model; None computes errors only.
        kinds: What it is given to read.
        device: Where it runs.

    Raises:
        DataError: if the checkpoint was not trained to reconstruct adapters of this library.
    """
    generator = TextToLora.from_pretrained(str(folder), device=device)
    training = generator.config.training
    names = training.get("adapters")
    if training.get("library_sha256") != library.checksum or not isinstance(names, list):
        raise DataError(f"{folder} was not trained to reconstruct {library.folder}; its training names another library")
    wanted = library.stack(names)
    config = build(ReconstructionConfig, training["settings"], where=f"settings of {folder}")
    encoder, window = generator.encoder, config.encoder.max_tokens
    if config.conditioning == "task":
        kinds = [kind for kind in kinds if kind in ("trained", "other")]
        known = names_as_texts(names)
    else:
        known = choose_descriptions(library, names, config.data, max_tokens=window, count_tokens=encoder.count_tokens)

    def fits(text: str) -> bool:
        return encoder.count_tokens([text])[0] <= window

    errors: dict[str, dict[str, float]] = {}
    scores: list[Scores] = []
    for kind in kinds:
        written = write_adapters(generator, texts_for(kind, known, names, fits))
        errors[kind] = compare(written, wanted).means()
        if scorer is not None:
            scores += scorer.score(f"{label}, {kind}", written, names)
    network = Network(
        label,
        list(names),
        config.hypernet.head_size,
        sum(p.numel() for p in generator.hypernet.parameters()),
        (folder / checkpoint.WEIGHTS).stat().st_size,
        *library_sizes(wanted),
        errors,
    )
    return network, scores


def evaluate_networks(
    folders: Sequence[tuple[str, Path]],
    library: AdapterLibrary,
    scorer: Scorer | None,
    *,
    kinds: Sequence[Kind],
    device: str,
    log: Callable[[str], None],
) -> tuple[list[Network], list[Scores]]:
    """Evaluates each (label, checkpoint) as `evaluate_network` does; the scores of their controls come first."""
    networks, scores = [], list[Scores]()
    for label, folder in folders:
        network, found = evaluate_network(label, folder, library, scorer, kinds=kinds, device=device)
        networks.append(network)
        scores += found
        log(f"network “{label}” evaluated")
    if scorer is not None:
        scores = score_controls(scorer, library, networks[0].parameters) + scores
    return networks, scores
