"""Encoders: descriptions in, numbers for the hypernetwork out. Both kinds answer to one protocol.

Knows texts, tokenizers and frozen models (from `models`). Knows no adapters and nothing of the hypernetwork.
Shape letters as in `spec.py`.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from t2l import bert, hub
from t2l.config import EncoderConfig
from t2l.errors import CheckpointError, ConfigError, DescriptionError
from t2l.hub import FetchOptions
from t2l.io import parse_json, read_whole, reading

MAX_BYTES = 32_768
"""A description beyond this is refused before it is tokenised."""


@dataclass(frozen=True)
class Encoded:
    """Descriptions as the hypernetwork reads them."""

    states: Tensor
    """(N, E), or (N, S, E) padded on the right."""
    mask: Tensor | None = None
    """For (N, S, E): True where there is a token, (N, S)."""


class Encoder(Protocol):
    """Turns descriptions into tensors; the same text always gives the same numbers."""

    kind: Literal["sentence", "tokens"]
    embedding_size: int
    max_tokens: int

    def encode(self, descriptions: Sequence[str]) -> Encoded:
        """Encodes N descriptions.

        Raises:
            DescriptionError: if one is empty or longer than `max_tokens`.
        """

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """How many tokens of the window each text takes, whatever the window is.

        Raises:
            DescriptionError: if one cannot be a description at all.
        """


def check_description(text: object, where: str = "") -> str:
    """The description without white space around it, if it can be one at all.

    Args:
        text: What is to be a description.
        where: Which of several it is, for messages.

    Raises:
        DescriptionError: if it is no text, blank, not valid Unicode or too large.
    """
    if not isinstance(text, str):
        raise DescriptionError(f"A description must be text, got {type(text).__name__}{where}")
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise DescriptionError(
            f"The description is not valid UTF-8 (position {error.start}); re-save it as UTF-8{where}"
        ) from error
    if not text.strip():
        what = "empty" if not text else "only white space"
        raise DescriptionError(f"The description is {what}; say in a sentence or two what the task is{where}")
    if size > MAX_BYTES:
        raise DescriptionError(f"The description has {size:,} bytes; at most {MAX_BYTES:,} are read. Shorten it{where}")
    return text.strip()


def _tokenize(tokenizer: Any, texts: Sequence[str], prefix: Sequence[int] = ()) -> list[list[int]]:
    """Token ids of each text, with the tokenizer's own special tokens where there is no prefix."""
    cleaned = [check_description(text) for text in texts]
    if not cleaned:
        return []
    with reading("this encoder", "text with the tokenizer"):
        ids = tokenizer(cleaned, add_special_tokens=not prefix, truncation=False, verbose=False).input_ids
    return [[*prefix, *row] for row in ids]


def _in_window(
    tokenizer: Any, descriptions: Sequence[str], max_tokens: int, prefix: Sequence[int] = ()
) -> list[list[int]]:
    """Token ids of each description, checked against the window.

    Raises:
        DescriptionError: naming the description's length and the window.
    """
    ids = _tokenize(tokenizer, descriptions, prefix)
    if not ids:
        raise DescriptionError("No description given")
    for text, row in zip(descriptions, ids, strict=True):
        if len(row) > max_tokens:
            start = text.strip()[:60] + ("…" if len(text.strip()) > 60 else "")
            raise DescriptionError(
                f"The description has {len(row)} tokens; this checkpoint's encoder reads at most {max_tokens}. "
                f"Shorten it: “{start}”"
            )
    return ids


def _pad(ids: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    length = max(map(len, ids))
    tokens = torch.zeros(len(ids), length, dtype=torch.long)
    mask = torch.zeros(len(ids), length, dtype=torch.bool)
    for n, row in enumerate(ids):
        tokens[n, : len(row)] = torch.tensor(row)
        mask[n, : len(row)] = True
    return tokens.to(device), mask.to(device)


class SentenceEncoder:
    """A sentence-transformers model folder: transformer, pooling and, where the folder says so, normalisation.

    Args:
        model: The folder's transformer.
        tokenizer: Its tokenizer.
        max_tokens: Window.
        pooling: `mean`, `cls` or `lasttoken`.
        normalize: Whether vectors are scaled to length 1.
        full_stop: Whether a text that ends with a letter gets a full stop.
    """

    kind: Literal["sentence", "tokens"] = "sentence"

    def __init__(
        self, model: Any, tokenizer: Any, *, max_tokens: int, pooling: str, normalize: bool, full_stop: bool = False
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_tokens, self.pooling, self.normalize = max_tokens, pooling, normalize
        self.full_stop = full_stop
        self.embedding_size = int(model.config.hidden_size)

    @classmethod
    def from_folder(
        cls, folder: Path, *, max_tokens: int, full_stop: bool = False, device: str | torch.device = "cpu"
    ) -> "SentenceEncoder":
        """Reads a sentence-transformers folder, or a plain encoder folder as mean pooling.

        Raises:
            ConfigError: if the folder asks for a pooling or module this encoder does not have, or if its own
                window is smaller than `max_tokens`.
            CheckpointError: if a file is damaged.
        """
        with reading(folder.name, "sentence encoder"):
            pooling, normalize = _sentence_modules(folder)
            own = _json(folder / "sentence_bert_config.json").get("max_seq_length")
            if own is not None and max_tokens > own:
                raise ConfigError(f"encoder.max_tokens is {max_tokens}, but {folder.name} reads at most {own} tokens")
            loaded: tuple[Any, Any] | None = bert.load(folder, device=device)
            model, tokenizer = loaded or (
                hub.load_backbone(str(folder), device=device),
                hub.load_tokenizer(str(folder)),
            )
            encoder = cls(
                model, tokenizer, max_tokens=max_tokens, pooling=pooling, normalize=normalize, full_stop=full_stop
            )
            # Sizes that do not go together show only in use, and so do weights that are finite but absurd.
            if not torch.isfinite(encoder.encode(["A."]).states).all():
                raise CheckpointError(
                    f"{folder.name} turns a text into NaN or infinite values: its weights are damaged"
                )
        return encoder

    @torch.no_grad()
    def encode(self, descriptions: Sequence[str]) -> Encoded:
        """Pooled vectors, (N, E)."""
        ids = _in_window(self.tokenizer, self._ended(descriptions), self.max_tokens)
        tokens, mask = _pad(ids, next(self.model.parameters()).device)
        states = self.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state.float()
        if self.pooling == "mean":
            weight = mask[..., None].to(states.dtype)
            pooled = (states * weight).sum(1) / weight.sum(1)
        elif self.pooling == "cls":
            pooled = states[:, 0]
        else:
            pooled = states[torch.arange(len(ids)), mask.sum(1) - 1]
        return Encoded(F.normalize(pooled, dim=-1) if self.normalize else pooled)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has, special tokens included."""
        return [len(row) for row in _tokenize(self.tokenizer, self._ended(texts))]

    def _ended(self, texts: Sequence[str]) -> list[str]:
        """The texts, with full stops where they are asked for."""
        if not self.full_stop:
            return list(texts)
        checked = [check_description(text) for text in texts]
        return [f"{text}." if text[-1].isalpha() else text for text in checked]


class TokenEncoder:
    """Hidden states of a frozen model's layers, normalised and concatenated for every token.

    Args:
        model: A causal or bidirectional Transformers model; only its trunk is run.
        tokenizer: Its tokenizer. Its beginning-of-sequence token, if any, comes first: causal models park much
            attention there, and every description should offer the same place for it.
        layers: Blocks whose output is read, counted from 1; 0 stands for the input embeddings.
        max_tokens: Window, that first token included.
    """

    kind: Literal["sentence", "tokens"] = "tokens"

    def __init__(self, model: Any, tokenizer: Any, *, layers: Sequence[int], max_tokens: int) -> None:
        depth = int(model.config.get_text_config().num_hidden_layers)
        if not layers or min(layers) < 0 or max(layers) > depth:
            raise ConfigError(
                f"encoder.layers must lie in 0..{depth} for this encoder, got {list(layers)}. `t2l train sft` chooses "
                "layers of any base with --set encoder.layers=[]"
            )
        self.model = model.base_model
        lists = [x for x in self.model.modules() if isinstance(x, torch.nn.ModuleList) and len(x) == depth]
        if len(lists) != 1:
            raise ConfigError(
                f"encoder.kind 'tokens' cannot tell which modules of a {type(self.model).__name__} are its {depth} "
                f"blocks ({len(lists)} lists have that length); use another encoder"
            )
        (self.blocks,) = lists
        self.tokenizer, self.layers, self.max_tokens = tokenizer, tuple(layers), max_tokens
        self.embedding_size = int(model.config.get_text_config().hidden_size) * len(self.layers)
        bos = tokenizer.bos_token_id
        self.prefix = [] if bos is None else [bos]

    @torch.no_grad()
    def encode(self, descriptions: Sequence[str]) -> Encoded:
        """States (N, S, E) and mask (N, S); S is the longest description's length."""
        ids = _in_window(self.tokenizer, descriptions, self.max_tokens, self.prefix)
        tokens, mask = _pad(ids, next(self.model.parameters()).device)
        states = self._states(tokens, mask)
        # Without affine parameters: it only brings layers whose scales differ by orders of magnitude to one.
        tapped = [F.layer_norm(states[layer].float(), states[layer].shape[-1:]) for layer in self.layers]
        return Encoded(torch.cat(tapped, dim=-1) * mask[..., None], mask)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has, the first token included."""
        return [len(row) for row in _tokenize(self.tokenizer, texts, self.prefix)]

    def _states(self, tokens: Tensor, mask: Tensor) -> dict[int, Tensor]:
        """The tapped blocks' outputs, (N, S, hidden) each; the last block's after the model's own last norm.

        As `output_hidden_states` has them. That leaves its hooks on the model for good, and a base model that also
        serves as encoder could then not be compiled in one piece.
        """
        found: dict[int, Tensor] = {}

        def keep(layer: int) -> Any:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                found[layer] = output[0] if isinstance(output, tuple) else output

            return hook

        places = (self.model.get_input_embeddings(), *self.blocks)
        handles = [places[layer].register_forward_hook(keep(layer)) for layer in self.layers]
        try:
            output = self.model(input_ids=tokens, attention_mask=mask.long(), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        if len(self.blocks) in found:
            found[len(self.blocks)] = output.last_hidden_state
        return found


class OneHotEncoder:
    """Task names as one-hot vectors: a baseline that can look tasks up, and understands none.

    Args:
        names: The tasks, in the order of their numbers.
    """

    kind: Literal["sentence", "tokens"] = "sentence"

    def __init__(self, names: Sequence[str], *, device: str | torch.device = "cpu") -> None:
        if not names:
            raise ConfigError("encoder.kind 'onehot' has no names; training fills encoder.names in")
        self.names = {name: i for i, name in enumerate(names)}
        self.embedding_size, self.max_tokens, self.device = len(self.names), 1, device

    def encode(self, descriptions: Sequence[str]) -> Encoded:
        """One-hot vectors, (N, E).

        Raises:
            DescriptionError: if a text is not the name of a task that was trained on.
        """
        for text in descriptions:
            if text not in self.names:
                near = difflib.get_close_matches(str(text), self.names, n=1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                raise DescriptionError(f"This checkpoint knows tasks by their names only, not '{text[:60]}'{hint}")
        numbers = torch.tensor([self.names[text] for text in descriptions], device=self.device)
        return Encoded(F.one_hot(numbers, self.embedding_size).float())

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """One for each name: it is a number to this encoder."""
        return [1] * len(texts)


def encoder_revision(config: EncoderConfig, base_model: str, **fetch: Unpack[FetchOptions]) -> str:
    """Fingerprint of the files that an encoder reads; empty for one that reads none."""
    if config.kind == "onehot":
        return ""
    return hub.fingerprint(base_model if config.model == "base" else config.model, **fetch)


def load_encoder(
    config: EncoderConfig,
    base_model: str,
    *,
    base: tuple[Any, Any] | None = None,
    device: str = "cpu",
    **fetch: Unpack[FetchOptions],
) -> Encoder:
    """The encoder that a config names.

    Args:
        config: Kind, model, layers and window.
        base_model: Reference of the base model, for `model: base`.
        base: The base model and its tokenizer, if in memory already.
        device: Where a newly loaded encoder runs.
        fetch: See `hub.FetchOptions`.

    Raises:
        ModelNotFoundError, DownloadError: if the model cannot be had.
        ConfigError: if layers or window do not fit it.
    """
    if config.kind == "onehot":
        return OneHotEncoder(config.names, device=device)
    if config.kind == "sentence":
        folder = hub.resolve(config.model, **fetch)
        return SentenceEncoder.from_folder(
            folder, max_tokens=config.max_tokens, full_stop=config.full_stop, device=device
        )
    if config.model != "base":
        model = hub.load_backbone(config.model, device=device, **fetch)
        tokenizer = hub.load_tokenizer(config.model, **fetch)
    elif base is not None:
        model, tokenizer = base
    else:
        model = hub.load_causal_lm(base_model, device=device, **fetch)
        tokenizer = hub.load_tokenizer(base_model, **fetch)
    return TokenEncoder(model, tokenizer, layers=config.layers, max_tokens=config.max_tokens)


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    data = parse_json(read_whole(path), path)
    return data if isinstance(data, dict) else {"modules": data}


def _sentence_modules(folder: Path) -> tuple[str, bool]:
    """(pooling, normalise) from `modules.json`; a folder without one is pooled by the mean."""
    pooling, normalize = "mean", False
    for module in _json(folder / "modules.json").get("modules", []):
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind == "Pooling":
            settings = _json(folder / Path(module["path"]).name / "config.json")
            modes = [
                k.removeprefix("pooling_mode_") for k, v in settings.items() if k.startswith("pooling_mode_") and v
            ]
            names = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "lasttoken"}
            if len(modes) != 1 or modes[0] not in names:
                raise ConfigError(f"{folder.name} pools by {modes}; known are {', '.join(names)}")
            pooling = names[modes[0]]
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise ConfigError(f"{folder.name} has a module '{kind}'; known are Transformer, Pooling and Normalize")
    return pooling, normalize
