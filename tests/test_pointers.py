"""Pointers: words of the description in B, and the gate that closes them."""

from typing import Any

import pytest
import torch
from conftest import make_hypernet
from hypernet_helpers import close

from t2l.config import HypernetConfig, LoraConfig
from t2l.errors import ConfigError
from t2l.hypernet import Hypernet
from t2l.spec import AdapterSpec


@pytest.fixture(scope="module")
def residual(tiny_config: Any) -> AdapterSpec:
    """o and down write to the residual stream, whose width is the tokens' own embeddings'."""
    return AdapterSpec.from_config(
        tiny_config, "tiny/base", LoraConfig(target_modules=("q_proj", "o_proj", "down_proj"), r=4, lora_alpha=8)
    )


def pointing(spec: AdapterSpec, **config: Any) -> Hypernet:
    size = spec.targets[1].out_features
    hypernet = make_hypernet(
        spec, kind="tokens", embedding_size=2 * size, pointer=("o_proj", "down_proj"), token_dropout=0.0, **config
    )
    assert {spec.targets[int(m)].name for m in hypernet.pointers} == {"o_proj", "down_proj"}
    return hypernet


@pytest.mark.parametrize("variant", ["L", "M", "S"])
def test_pointers_add_words_of_the_description_to_b(variant: str, residual: AdapterSpec) -> None:
    """Nothing at first; then each rank's column of B moves within the span of the words, padding never among them."""
    hypernet = pointing(residual, variant=variant)
    size = residual.targets[1].out_features
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(2, 5, 2 * size, generator=generator)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    states = states * mask[..., None]
    fresh = hypernet(states, mask)
    with torch.no_grad():
        for pointer in hypernet.pointers.values():
            pointer.gain.bias.fill_(0.5)
    moved = hypernet(states, mask)
    assert all(torch.equal(x, y) for x, y in zip(fresh.a, moved.a, strict=True))
    for m, target in enumerate(residual.targets):
        change = moved.b[m] - fresh.b[m]  # (N, L, O, R)
        if target.name == "q_proj":
            assert not change.any()
            continue
        for n, real in enumerate((5, 3)):
            words = states[n, :real, :size] / size**0.5
            columns = change[n].transpose(1, 2).reshape(-1, size)
            shares = torch.linalg.lstsq(words.T, columns.T).solution.T
            assert (shares @ words - columns).abs().max() <= 1e-5
            assert shares.min() >= -1e-4 and torch.allclose(shares.sum(1), torch.tensor(0.5), atol=1e-4)
    more = torch.cat([states, torch.full((2, 1, 2 * size), 9.0)], dim=1)
    assert close(hypernet(more, torch.cat([mask, torch.zeros(2, 1, dtype=torch.bool)], dim=1)), moved)


def test_pointers_learn_from_the_first_step(residual: AdapterSpec) -> None:
    hypernet = pointing(residual)
    size = residual.targets[1].out_features
    states = torch.randn(1, 3, 2 * size, generator=torch.Generator().manual_seed(2))
    written = hypernet(states, torch.ones(1, 3, dtype=torch.bool))
    sum(x.square().sum() for x in written.b).backward()
    assert all(pointer.gain.weight.grad.abs().max() > 0 for pointer in hypernet.pointers.values())


def test_a_closed_gate_takes_away_what_pointers_add_and_nothing_else(residual: AdapterSpec) -> None:
    hypernet = pointing(residual, pointer_gate=True)
    size = residual.targets[1].out_features
    states = torch.randn(2, 3, 2 * size, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 3, dtype=torch.bool)
    without = hypernet(states, mask)
    with torch.no_grad():
        for pointer in hypernet.pointers.values():
            pointer.gain.bias.fill_(0.5)
    opened = hypernet(states, mask)
    assert not close(opened, without)
    with torch.no_grad():
        hypernet.gate.decide.bias.fill_(-100.0)
    assert close(hypernet(states, mask), without)


def test_a_gate_learns_as_soon_as_pointers_add_something(residual: AdapterSpec) -> None:
    hypernet = pointing(residual, pointer_gate=True)
    with torch.no_grad():
        for pointer in hypernet.pointers.values():
            pointer.gain.bias.fill_(0.5)
    size = residual.targets[1].out_features
    states = torch.randn(1, 3, 2 * size, generator=torch.Generator().manual_seed(2))
    written = hypernet(states, torch.ones(1, 3, dtype=torch.bool))
    sum(x.square().sum() for x in written.b).backward()
    assert hypernet.gate.decide.weight.grad.abs().max() > 0


def test_a_gate_without_pointers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"closes what hypernet\.pointer adds"):
        HypernetConfig(pointer_gate=True)


def test_pointers_that_cannot_be_are_refused(spec: AdapterSpec, residual: AdapterSpec) -> None:
    with pytest.raises(ConfigError, match=r"names o_proj, the targets are q_proj, v_proj"):
        make_hypernet(spec, kind="tokens", pointer=("o_proj",))
    size = residual.targets[1].out_features
    with pytest.raises(ConfigError, match=rf"vectors of {size} numbers .* gives {size + 1} a token"):
        make_hypernet(residual, kind="tokens", embedding_size=size + 1, pointer=("o_proj",))
    with pytest.raises(ConfigError, match="a text"):
        make_hypernet(residual, kind="sentence", embedding_size=size, pointer=("o_proj",))
    with pytest.raises(ConfigError, match="chooses words for each layer"):
        HypernetConfig(variant="basis", pointer=("o_proj",))
    with pytest.raises(ConfigError, match="pointer would do nothing"):
        HypernetConfig(variant="none", pointer=("o_proj",))
