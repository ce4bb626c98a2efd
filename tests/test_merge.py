"""Merged models and adapters read from any PEFT folder: what Transformers and PEFT make of them is what we say."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_base, make_config, random_lora
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from t2l import peft_io
from t2l.apply import apply_adapters
from t2l.cli import app
from t2l.config import LoraConfig
from t2l.errors import AdapterNotAppliedError, SpecMismatchError
from t2l.merge import merge_into_folder
from t2l.peft_folder import open_adapter
from t2l.spec import AdapterSpec
from t2l.text_to_lora import LoraAdapter

TOKENS = torch.tensor([[0, 17, 200, 33, 4, 90, 121]])


@pytest.fixture
def make_model(tmp_path: Path, tiny_tokenizer: Any) -> Callable[..., Path]:
    """Writes a tiny base as a model folder."""

    def make(*, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
        folder = tmp_path / "base"
        model = make_base(make_config(**config)).to(dtype)
        model.generation_config.temperature = 0.25
        model.generation_config.do_sample = True
        model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return make


def make_adapter(base: Path, seed: int = 0, size: float = 0.1, **lora: Any) -> LoraAdapter:
    config = make_config()
    spec = AdapterSpec.from_config(config, str(base), LoraConfig(**({"r": 4, "lora_alpha": 8} | lora)))
    return LoraAdapter(random_lora(spec, seed, size), spec, "Add the two numbers.", {})


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits.float()


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_model_computes_what_the_adapter_does(tied: bool, make_model: Any, tmp_path: Path) -> None:
    base = make_model(tie_word_embeddings=tied)
    adapter = make_adapter(base, target_modules=("all-linear",))
    assert merge_into_folder(adapter, tmp_path / "merged", card="A model.\n") == 3 * 7
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    plain = AutoModelForCausalLM.from_pretrained(base)
    with apply_adapters(plain, adapter):
        expected = logits(plain)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert (logits(plain) - expected).abs().max() > 0.1
    assert torch.equal(merged.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    assert torch.equal(merged.lm_head.weight, plain.lm_head.weight)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    (merged_again := tmp_path / "again").mkdir()
    merged.save_pretrained(merged_again)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(merged_again)), logits(merged))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_base_keeps_its_type_and_sums_are_rounded_once(dtype: torch.dtype, make_model: Any, tmp_path: Path) -> None:
    base = make_model(dtype=dtype)
    adapter = make_adapter(base)
    merge_into_folder(adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    assert {p.dtype for p in merged.parameters()} == {dtype}
    weight = plain.model.layers[2].self_attn.v_proj.weight
    expected = (weight.float() + adapter.lora.delta(1)[2]).to(dtype)
    assert torch.equal(merged.model.layers[2].self_attn.v_proj.weight, expected)
    assert torch.equal(merged.model.layers[2].mlp.up_proj.weight, plain.model.layers[2].mlp.up_proj.weight)
    merge_into_folder(adapter, tmp_path / "exact", dtype=torch.float32)
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "exact", dtype="auto")
    assert torch.equal(
        exact.model.layers[2].self_attn.v_proj.weight,
        plain.float().model.layers[2].self_attn.v_proj.weight + adapter.lora.delta(1)[2],
    )


def test_tokenizer_and_generation_settings_come_along(make_model: Any, tmp_path: Path) -> None:
    base = make_model()
    merge_into_folder(make_adapter(base), tmp_path / "merged", card="A model.\n")
    one, other = (AutoTokenizer.from_pretrained(folder) for folder in (base, tmp_path / "merged"))
    assert one("Müsli <s>").input_ids == other("Müsli <s>").input_ids
    assert one.chat_template == other.chat_template
    settings = [(folder / "generation_config.json").read_bytes() for folder in (base, tmp_path / "merged")]
    assert settings[0] == settings[1]
    assert json.loads(settings[1])["temperature"] == 0.25
    assert (tmp_path / "merged" / "README.md").read_text() == "A model.\n"


@pytest.mark.parametrize(("size", "dtype"), [(0.0, torch.float32), (1e-6, torch.bfloat16)])
def test_a_merge_that_changes_nothing_is_refused(size: float, dtype: Any, make_model: Any, tmp_path: Path) -> None:
    base = make_model(dtype=dtype)
    with pytest.raises(AdapterNotAppliedError, match=r"changes no weight of .*base in (float32|bfloat16): the adapter"):
        merge_into_folder(make_adapter(base, size=size), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_merging_for_another_base_is_refused(make_model: Any, tmp_path: Path) -> None:
    base = make_model(intermediate_size=40)
    with pytest.raises(SpecMismatchError, match="is 32 x 48"):
        merge_into_folder(make_adapter(base, target_modules=("up_proj",)), tmp_path / "merged")


# ------------------------------------------------------------------------------------------- any PEFT folder


@pytest.mark.parametrize("rslora", [False, True])
def test_folders_that_peft_wrote_are_read_as_peft_reads_them(rslora: bool, make_model: Any, tmp_path: Path) -> None:
    import peft

    base = make_model()
    model = AutoModelForCausalLM.from_pretrained(base)
    wrapped = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=3, lora_alpha=5, use_rslora=rslora, target_modules=["down_proj", "k_proj"], layers_to_transform=[0, 2]
        ),
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = logits(wrapped)
    lora, spec = open_adapter(tmp_path / "adapter", str(base))
    assert {t.name for t in spec.targets} == {"down_proj", "k_proj"}
    assert (spec.layers, spec.rank, spec.use_rslora) == ((0, 2), 3, rslora)
    plain = AutoModelForCausalLM.from_pretrained(base)
    with apply_adapters(plain, LoraAdapter(lora, spec, "", {})):
        torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)


def test_what_is_written_is_read_again(make_model: Any, tmp_path: Path) -> None:
    base = make_model()
    adapter = make_adapter(base, target_modules=("v_proj", "q_proj"))
    adapter.save_pretrained(tmp_path / "adapter")
    lora, spec = open_adapter(tmp_path / "adapter")
    order = [t.name for t in spec.targets]
    for name in ("q_proj", "v_proj"):
        ours = [t.name for t in adapter.spec.targets].index(name)
        assert torch.equal(lora.a[order.index(name)], adapter.lora.a[ours])
    plain = AutoModelForCausalLM.from_pretrained(base)
    with apply_adapters(plain, LoraAdapter(lora, spec, "", {})):
        found = logits(plain)
    torch.testing.assert_close(found, logits(PeftModel.from_pretrained(plain, tmp_path / "adapter")))


def test_folders_with_gaps_are_refused(make_model: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = make_model()
    make_adapter(base).save_pretrained(tmp_path / "adapter")
    state = load_file(tmp_path / "adapter" / peft_io.WEIGHTS)
    for part in "AB":
        del state[f"base_model.model.model.layers.1.self_attn.v_proj.lora_{part}.weight"]
    save_file(state, tmp_path / "adapter" / peft_io.WEIGHTS)
    with pytest.raises(SpecMismatchError, match=r"in layers 0 to 2, but not v_proj of layer 1 \(1 of 6 are missing\)"):
        open_adapter(tmp_path / "adapter")


# ------------------------------------------------------------------------------------------------ the commands


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_merge_and_export_take_folders_and_descriptions(
    make_checkpoint: Any, base_folder: Path, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    checkpoint = str(make_checkpoint(tmp_path / "checkpoint"))
    text = "Add the two numbers."
    assert run("generate", text, "-o", str(tmp_path / "adapter"), "--checkpoint", checkpoint).exit_code == 0
    for number, source in enumerate((text, str(tmp_path / "adapter"))):
        arguments = (source, "--checkpoint", checkpoint, "--json")
        done = run("merge", *arguments, "-o", str(tmp_path / f"model{number}"))
        assert done.exit_code == 0, done.output
        half = run("merge", *arguments, "--dtype", "bfloat16", "-o", str(tmp_path / f"half{number}"))
        assert half.exit_code == 0, half.output
        assert json.loads(done.stdout)["changed_matrices"] == 6
        done = run("export", "gguf", *arguments, "-o", str(tmp_path / f"{number}.gguf"))
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["description"] == text
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / f"model{n}") for n in range(2)]
    assert torch.equal(logits(models[0]), logits(models[1]))
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half0", dtype="auto")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    readers = [gguf.GGUFReader(tmp_path / f"{n}.gguf") for n in range(2)]
    for one, other in zip(readers[0].tensors, readers[1].tensors, strict=True):
        assert one.name == other.name and bool((one.data == other.data).all())
    card = (tmp_path / "model0" / "README.md").read_text()
    assert "library_name: transformers" in card and f"> {text}" in card


def test_export_peft_pads_and_renames(make_checkpoint: Any, tmp_path: Path) -> None:
    checkpoint = str(make_checkpoint(tmp_path / "checkpoint"))
    arguments = ("export", "peft", "Add the two numbers.", "--checkpoint", checkpoint)
    done = run(*arguments, "-o", str(tmp_path / "plain"))
    assert done.exit_code == 0, done.output
    done = run(*arguments, "-o", str(tmp_path / "padded"), "--vllm", "--base-name", "me/base")
    assert done.exit_code == 0, done.output
    plain, padded = (peft_io.read_facts(tmp_path / name) for name in ("plain", "padded"))
    assert (plain.rank, padded.rank, padded.base_model) == (4, 8, "me/base")
    one, other = open_adapter(tmp_path / "plain"), open_adapter(tmp_path / "padded", plain.base_model)
    for m in range(len(one[1].targets)):
        torch.testing.assert_close(one[0].delta(m), other[0].delta(m))
    assert "give one of them" in run(*arguments, "-o", str(tmp_path / "x"), "--vllm", "--rank", "16").output


def test_overwriting_spares_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert "exists already" in run("merge", "Add.", "-o", str(tmp_path / "out")).output
    done = run("merge", "Add.", "-o", str(tmp_path / "out"), "--overwrite")
    assert "holds no model; --overwrite would delete" in done.output
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
