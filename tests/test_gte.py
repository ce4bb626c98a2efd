"""GTE encoders by Transformers' own class: names, frequencies and pooling against a computation written here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_tokenizer
from safetensors.torch import save_file
from torch.nn.functional import gelu, layer_norm, normalize
from typer.testing import CliRunner

from t2l.cli import app
from t2l.encoder import SentenceEncoder
from t2l.errors import CheckpointError, ConfigError
from t2l.gte import convert_gte, native_config

CONFIG: dict[str, Any] = {
    "model_type": "new",
    "architectures": ["NewModel"],
    "auto_map": {"AutoModel": "somebody/else--modeling.NewModel"},
    "vocab_size": 264,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "hidden_act": "gelu",
    "max_position_embeddings": 128,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "layer_norm_type": "layer_norm",
    "position_embedding_type": "rope",
    "logn_attention_scale": False,
    "pack_qkv": True,
    "pad_token_id": 2,
    "rope_theta": 160000,
    "rope_scaling": {"factor": 2.0, "type": "ntk"},
}


def make_state() -> dict[str, torch.Tensor]:
    """Weights under the names that the authors publish."""
    state: dict[str, torch.Tensor] = {}

    def linear(name: str, inputs: int, outputs: int, *, bias: bool = True) -> None:
        state[f"{name}.weight"] = torch.randn(outputs, inputs) * inputs**-0.5
        if bias:
            state[f"{name}.bias"] = torch.randn(outputs) * 0.1

    def norm(name: str) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + 0.2 * torch.randn(32), 0.1 * torch.randn(32)

    state["embeddings.word_embeddings.weight"] = torch.randn(264, 32)
    state["embeddings.token_type_embeddings.weight"] = torch.randn(2, 32)
    norm("embeddings.LayerNorm")
    for layer in range(2):
        place = f"encoder.layer.{layer}"
        linear(f"{place}.attention.qkv_proj", 32, 96)
        linear(f"{place}.attention.o_proj", 32, 32)
        linear(f"{place}.mlp.up_gate_proj", 32, 48, bias=False)
        linear(f"{place}.mlp.down_proj", 24, 32)
        norm(f"{place}.attn_ln")
        norm(f"{place}.mlp_ln")
    return state


def embed(state: dict[str, torch.Tensor], tokens: list[int]) -> torch.Tensor:
    """The first token's last state, of length 1, one position and head at a time."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        out = x @ state[f"{name}.weight"].T
        return out + state[f"{name}.bias"] if f"{name}.bias" in state else out

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, (32,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-12)

    def turned(x: torch.Tensor) -> torch.Tensor:  # (T, 8)
        frequency = torch.tensor([(2 * 160000.0) ** (-2 * i / 8) / 2 ** (2 / 8) for i in range(4)])
        angle = torch.arange(len(x))[:, None] * frequency
        first, second = x[:, :4], x[:, 4:]
        return torch.cat(
            [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=1
        )

    x = state["embeddings.word_embeddings.weight"][tokens] + state["embeddings.token_type_embeddings.weight"][0]
    x = norm("embeddings.LayerNorm", x)
    for layer in range(2):
        place = f"encoder.layer.{layer}"
        query, key, value = linear(f"{place}.attention.qkv_proj", x).chunk(3, dim=1)
        heads = []
        for h in range(4):
            q, k, v = (part[:, 8 * h : 8 * h + 8] for part in (query, key, value))
            heads.append((turned(q) @ turned(k).T * 8**-0.5).softmax(-1) @ v)
        x = norm(f"{place}.attn_ln", x + linear(f"{place}.attention.o_proj", torch.cat(heads, dim=1)))
        up, gate = linear(f"{place}.mlp.up_gate_proj", x).chunk(2, dim=1)
        x = norm(f"{place}.mlp_ln", x + linear(f"{place}.mlp.down_proj", up * gelu(gate)))
    return normalize(x[0], dim=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "gte"
    make_tokenizer(("[CLS]", "[SEP]", "[PAD]")).save_pretrained(path)
    (path / "config.json").write_text(json.dumps(CONFIG))
    save_file(make_state(), path / "model.safetensors", metadata={"format": "pt"})
    (path / "modeling.py").write_text("raise SystemExit('code of the repository ran')")
    return path


@pytest.mark.skipif(not hasattr(transformers, "GteModel"), reason="Transformers has GTE since 5.18")
def test_embeddings_are_those_of_the_published_network(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    done = CliRunner().invoke(app, ["import", "gte", str(folder), "-o", str(tmp_path / "native")])
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "native" / "modeling.py").exists()
    encoder = SentenceEncoder.from_folder(tmp_path / "native", max_tokens=96)
    texts = ["Add the two numbers.", "A longer description, which makes the shorter one be padded: Müsli."]
    found = encoder.encode(texts).states
    state = load_file(folder / "model.safetensors")
    for text, vector in zip(texts, found, strict=True):
        expected = embed(state, encoder.tokenizer(text).input_ids)
        torch.testing.assert_close(vector, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "model_type is 'bert'; only GTE models where it is 'new' are read"),
        ({"layer_norm_type": "rms_norm"}, "layer_norm_type is 'rms_norm'"),
        ({"logn_attention_scale": True}, "logn_attention_scale is True"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "only type 'ntk' with a factor is read"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0, "mixed_b": 0.6}}, "only type 'ntk'"),
    ],
)
def test_other_models_are_refused(change: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        native_config(CONFIG | change)


def test_missing_parts_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lacks vocab_size, rope_theta, which every GTE model has"):
        native_config({k: v for k, v in CONFIG.items() if k not in ("vocab_size", "rope_theta")})
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        convert_gte(folder, tmp_path / "native")
    assert not (tmp_path / "native").exists()
