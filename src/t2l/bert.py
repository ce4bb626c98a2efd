"""A small BERT encoder read straight from its folder, without Transformers, whose import takes seconds.

Most sentence encoders are BERTs (arXiv 1810.04805), and generating an adapter takes milliseconds. What is not exactly
the plain kind, weights, tokenizer or settings, is left to Transformers; a test holds both to the same numbers.
Knows tensors and a model's folder. Shape letters as in `spec.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2l.io import read_json, read_tensors
from t2l.shapes import only_shapes

PLAIN = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
}
"""Settings of `config.json` that this module computes; a setting that is absent has this value."""
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
TOKENIZERS = ("BertTokenizer", "BertTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes of tokenizers that `tokenizer.json` describes whole."""


class Bert(nn.Module):
    """The encoder; its parameters have the names that `model.safetensors` has."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, positions = config["hidden_size"], config.get("max_position_embeddings", 512)
        self.config = SimpleNamespace(**config)
        norm = config.get("layer_norm_eps", 1e-12)
        self.embeddings = nn.Module()  # these containers only give parameters their names
        self.embeddings.word_embeddings = nn.Embedding(config["vocab_size"], width)
        self.embeddings.position_embeddings = nn.Embedding(positions, width)
        self.embeddings.token_type_embeddings = nn.Embedding(config.get("type_vocab_size", 2), width)
        self.embeddings.LayerNorm = nn.LayerNorm(width, eps=norm)
        layers = [
            Layer(width, config["num_attention_heads"], config["intermediate_size"], norm)
            for _ in range(config["num_hidden_layers"])
        ]
        self.layers = layers
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def forward(self, *, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        """Token ids and mask (N, S) to `last_hidden_state` (N, S, E); there is one kind of token, the first."""
        part: Any = self.embeddings
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = part.word_embeddings(input_ids) + part.token_type_embeddings.weight[0]
        x = part.LayerNorm(x + part.position_embeddings(place))
        mask = None if bool(attention_mask.all()) else attention_mask.bool()[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask)
        return SimpleNamespace(last_hidden_state=x)


class Layer(nn.Module):
    """Self-attention and MLP, each normalised after it is added."""

    def __init__(self, width: int, heads: int, inner: int, norm: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention: Any = nn.ModuleDict(
            {
                "self": nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")}),
                "output": _dense_and_norm(width, width, norm),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = _dense_and_norm(inner, width, norm)

    def forward(self, x_NSE: Tensor, mask: Tensor | None) -> Tensor:
        """(N, S, E) to the same; the mask is (N, 1, 1, S), True where there is a token."""
        query, key, value = (
            self.attention["self"][name](x_NSE).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(-2)
        out = self.attention["output"]
        x_NSE = out["LayerNorm"](out["dense"](seen) + x_NSE)
        inner = F.gelu(self.intermediate["dense"](x_NSE))
        normed: Tensor = self.output["LayerNorm"](self.output["dense"](inner) + x_NSE)
        return normed


def _dense_and_norm(inputs: int, width: int, norm: float) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(inputs, width), "LayerNorm": nn.LayerNorm(width, eps=norm)})


class Tokenizer:
    """A `tokenizer.json`, called as Transformers' tokenizers are.

    Args:
        path: The file. What it says of cutting and padding is for other programs.
    """

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Fast

        self.fast = Fast.from_file(str(path))
        self.fast.no_truncation()
        self.fast.no_padding()

    def __call__(self, texts: Sequence[str], *, add_special_tokens: bool = True, **_: Any) -> SimpleNamespace:
        """Token ids of each text, as `input_ids`."""
        encoded = self.fast.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return SimpleNamespace(input_ids=[row.ids for row in encoded])

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False, **_: Any) -> str:
        """The text of token ids."""
        return str(self.fast.decode(list(ids), skip_special_tokens=skip_special_tokens))


def load(folder: Path, *, device: str | torch.device = "cpu") -> tuple[Bert, Tokenizer] | None:
    """Reads a folder, if it is of the plain kind.

    Args:
        folder: A model's folder.
        device: Where the weights go, in float32.

    Returns:
        The encoder in evaluation mode and its tokenizer, or None where Transformers has to read the folder.

    Raises:
        CheckpointError: if a file is damaged.
    """
    config = read_json(folder / "config.json")
    files = [folder / name for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json")]
    plain = all(config.get(key, value) in (value, None) for key, value in PLAIN.items()) and "model_type" in config
    if not plain or not all(isinstance(config.get(name), int) for name in SIZES) or not all(f.is_file() for f in files):
        return None
    if read_json(files[2]).get("tokenizer_class") not in TOKENIZERS:
        return None
    state = {name.removeprefix("bert."): value for name, value in read_tensors(files[0]).items()}
    with only_shapes():
        model = Bert(config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: value.float() for name, value in state.items() if name in expected}
    if {name: tuple(value.shape) for name, value in found.items()} != expected:
        return None  # Transformers says what is wrong with it
    model.load_state_dict(found, strict=True, assign=True)
    return model.to(device).eval().requires_grad_(False), Tokenizer(files[1])
