"""AdapterSpec: order, sizes and paths come from the config alone, and what is ambiguous is refused."""

import json
import time
from dataclasses import replace
from typing import Any

import pytest
from conftest import make_config
from transformers import AutoConfig, AutoModelForCausalLM, BloomConfig, FalconConfig, GPTNeoXConfig

from t2l.config import LoraConfig
from t2l.errors import CheckpointError, ConfigError, SpecMismatchError
from t2l.spec import TRANSPOSED, AdapterSpec, Target, is_transposed


def test_tiny_llama(tiny_config: Any) -> None:
    spec = AdapterSpec.from_config(tiny_config, "tiny/base", LoraConfig(r=4, lora_alpha=8))
    assert spec == AdapterSpec(
        base_model="tiny/base",
        model_type="llama",
        num_layers=3,
        layers=(0, 1, 2),
        targets=(
            Target(name="q_proj", path="model.layers.{layer}.self_attn.q_proj", in_features=32, out_features=32),
            Target(name="v_proj", path="model.layers.{layer}.self_attn.v_proj", in_features=32, out_features=16),
        ),
        rank=4,
        alpha=8,
    )
    assert spec.scaling == 2
    assert spec.num_parameters == 3 * 4 * (32 + 32 + 32 + 16)
    assert replace(spec, use_rslora=True).scaling == 4


def test_order_is_the_settings_order(tiny_config: Any) -> None:
    spec = AdapterSpec.from_config(tiny_config, "tiny", LoraConfig(target_modules=("v_proj", "down_proj", "q_proj")))
    assert [t.name for t in spec.targets] == ["v_proj", "down_proj", "q_proj"]
    assert [(t.in_features, t.out_features) for t in spec.targets] == [(32, 16), (48, 32), (32, 32)]


def test_all_linear_is_sorted_and_leaves_out_the_head(tiny_config: Any) -> None:
    lora = LoraConfig(target_modules=("all-linear",))
    spec = AdapterSpec.from_config(tiny_config, "tiny", lora)
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert [t.name for t in spec.targets] == names
    assert AdapterSpec.from_config(tiny_config, "tiny", lora) == spec


@pytest.mark.parametrize("kind", TRANSPOSED)
def test_gpt2_keeps_its_weights_the_other_way_round(kind: str) -> None:
    config = AutoConfig.for_model(kind, n_layer=2, n_embd=16, n_head=2, vocab_size=32)
    spec = AdapterSpec.from_config(config, kind)
    assert [(t.name, t.in_features, t.out_features) for t in spec.targets] == [("c_attn", 16, 48)]
    assert spec.fan_in_fan_out
    module = AutoModelForCausalLM.from_config(config).get_submodule(spec.targets[0].path.format(layer=1))
    assert is_transposed(module) and module.weight.shape == (16, 48)


TINY: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}


@pytest.mark.parametrize(
    ("config", "longer"),
    [
        (GPTNeoXConfig(**TINY, intermediate_size=24), "attention.dense"),
        (BloomConfig(**TINY), "self_attention.dense"),
        (FalconConfig(**TINY), "self_attention.dense"),
    ],
    ids=["gpt_neox", "bloom", "falcon"],
)
def test_name_that_ends_a_longer_one_is_told_apart(config: Any, longer: str) -> None:
    """`dense` of the attention must not pick up `dense_h_to_4h` or `dense_4h_to_h`."""
    spec = AdapterSpec.from_config(config, "x", LoraConfig(target_modules=("dense", "dense_4h_to_h")))
    assert spec.targets[0].path.endswith("." + longer)
    assert (spec.targets[0].in_features, spec.targets[0].out_features) == (16, 16)
    assert spec.targets[1].in_features > 16


def ambiguous_config() -> Any:
    """GPT-BigCode names two linear modules of a layer `c_proj`: one of the attention, one of the MLP."""
    from transformers import GPTBigCodeConfig

    return GPTBigCodeConfig(n_layer=2, n_embd=16, n_head=2, n_inner=24, vocab_size=32)


def test_ambiguous_name_is_refused_and_the_longer_one_works() -> None:
    config = ambiguous_config()
    with pytest.raises(SpecMismatchError, match=r"'c_proj' names 2 modules .*attn\.c_proj.*mlp\.c_proj.*longer suffix"):
        AdapterSpec.from_config(config, "bigcode", LoraConfig(target_modules=("c_proj",)))
    spec = AdapterSpec.from_config(config, "bigcode", LoraConfig(target_modules=("mlp.c_proj", "attn.c_proj")))
    assert [(t.in_features, t.out_features) for t in spec.targets] == [(24, 16), (16, 16)]
    every = AdapterSpec.from_config(config, "bigcode", LoraConfig(target_modules=("all-linear",)))
    assert {"attn.c_proj", "mlp.c_proj"} <= {t.name for t in every.targets}


def test_unknown_target_names_the_known(tiny_config: Any) -> None:
    with pytest.raises(SpecMismatchError, match=r"tiny/base has no linear module 'query'.*k_proj.*q_proj"):
        AdapterSpec.from_config(tiny_config, "tiny/base", LoraConfig(target_modules=("query",)))


def test_repeated_target_is_refused(tiny_config: Any) -> None:
    with pytest.raises(ConfigError, match="repeat"):
        AdapterSpec.from_config(tiny_config, "tiny", LoraConfig(target_modules=("q_proj", "self_attn.q_proj")))


def test_layer_subset(tiny_config: Any) -> None:
    spec = AdapterSpec.from_config(tiny_config, "tiny", LoraConfig(layers_to_transform=(0, 2), r=4))
    assert (spec.layers, spec.num_layers) == ((0, 2), 3)
    assert spec.num_parameters == 2 * 4 * (32 + 32 + 32 + 16)


def test_layers_are_counted_from_the_end_too(tiny_config: Any) -> None:
    found, same = (
        AdapterSpec.from_config(tiny_config, "tiny", LoraConfig(layers_to_transform=x)) for x in ((-2, -1), (1, 2))
    )
    assert found == same and found.layers == (1, 2)


def test_targets_follow_the_base(tiny_config: Any) -> None:
    """Queries and values by the base's own name for them; where it has none that is known, all linear modules."""
    from transformers import BloomConfig, GPTNeoXConfig, Phi3Config

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    for config, names in (
        (tiny_config, ("q_proj", "v_proj")),
        (GPTNeoXConfig(**sizes, intermediate_size=48), ("query_key_value",)),
        (Phi3Config(**sizes, intermediate_size=48, pad_token_id=0), ("qkv_proj",)),
        (BloomConfig(**sizes), ("query_key_value",)),
    ):
        assert tuple(t.name for t in AdapterSpec.from_config(config, "own").targets) == names


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ((2, 0), "ascending"),
        ((1, 1), "ascending"),
        ((), "ascending"),
        ((-1, 0), "ascending"),
        ((-4,), r"0\.\.2"),
        ((0, 3), r"0\.\.2"),
    ],
)
def test_bad_layers_are_refused(layers: tuple[int, ...], match: str, tiny_config: Any) -> None:
    with pytest.raises(ConfigError, match=match):
        AdapterSpec.from_config(tiny_config, "tiny", LoraConfig(layers_to_transform=layers))


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(),
        LoraConfig(target_modules=("all-linear",), layers_to_transform=(1,), r=3, lora_alpha=2.5, use_rslora=True),
    ],
    ids=["default", "all set"],
)
def test_json_round_trip(lora: LoraConfig, tiny_config: Any) -> None:
    spec = AdapterSpec.from_config(tiny_config, "tiny", lora)
    again = AdapterSpec.from_json(spec.to_json())
    assert again == spec
    assert again.to_json() == spec.to_json()


def test_json_is_read_strictly(tiny_config: Any) -> None:
    plain = json.loads(AdapterSpec.from_config(tiny_config, "tiny").to_json())
    for change, error, match in (
        ({"rang": 3}, ConfigError, "rang: unknown key; did you mean 'rank'"),
        ({"rank": "8"}, ConfigError, "rank: expected int, got '8'"),
        ({"rank": True}, ConfigError, "rank: expected int"),
        ({"rank": 0}, ConfigError, "at least 1"),
        ({"targets": []}, ConfigError, "at least one target"),
        ({"layers": [0, 7]}, ConfigError, r"0\.\.2"),
    ):
        with pytest.raises(error, match=match):
            AdapterSpec.from_json(json.dumps(plain | change))
    with pytest.raises(CheckpointError, match="here cannot be read as JSON"):
        AdapterSpec.from_json("{", where="here")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rank": 2, "alpha": 4}, "rank 8; .* with 2"),
        ({"alpha": 32}, r"scaling 2\.0; .* with 4\.0"),
        ({"layers": (0, 1)}, r"adapted layers \[0, 1, 2\]; .* with \[0, 1\]"),
        ({"num_layers": 4}, "number of layers 3; .* with 4"),
    ],
)
def test_different_shapes_are_named_on_both_sides(change: dict[str, Any], match: str, tiny_config: Any) -> None:
    spec = AdapterSpec.from_config(tiny_config, "tiny")
    spec.require_same_shape(replace(spec, base_model="renamed"), this="One", that="the other")
    with pytest.raises(SpecMismatchError, match=match):
        spec.require_same_shape(replace(spec, **change), this="One", that="the other")


def test_large_shape_is_read_without_its_weights() -> None:
    """An 8-billion-parameter config must not cost 32 GB: everything stays on the meta device."""
    import resource

    config = make_config(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    spec = AdapterSpec.from_config(config, "llama", LoraConfig(target_modules=("all-linear",)))
    assert time.monotonic() - started < 5
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000, f"{grown} KiB"
    assert spec.num_parameters == 20_971_520  # rank 8 on all linear modules of Llama-3.1-8B
    assert {t.name: (t.in_features, t.out_features) for t in spec.targets}["v_proj"] == (4096, 1024)
