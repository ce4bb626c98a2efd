"""From text to adapter folder, end to end on tiny models: batching, determinism, and what is needed to do it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from conftest import DESCRIPTIONS, make_config
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from t2l import LoraAdapter, TextToLora, apply_adapters
from t2l.config import LoraConfig
from t2l.errors import CheckpointError, ConfigError, DescriptionError, ModelNotFoundError
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec
from t2l.text_to_lora import checkpoint_folder

MakeCheckpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tokens")


@pytest.fixture(scope="module")
def t2l(checkpoint: Path) -> TextToLora:
    return TextToLora.from_pretrained(str(checkpoint))


def difference(one: LoraTensors, other: LoraTensors) -> float:
    pairs = zip((*one.a, *one.b), (*other.a, *other.b), strict=True)
    return max(float((x - y).abs().max()) for x, y in pairs)


@pytest.mark.parametrize("encoder", ["base", "sentence"])
@pytest.mark.parametrize("variant", ["L", "M", "S", "basis"])
def test_batch_equals_single_calls(
    variant: str, encoder: str, make_checkpoint: MakeCheckpoint, sentence_folder: Path, tmp_path: Path
) -> None:
    """From text to tensors, padding and company leave no trace."""
    reference = "base" if encoder == "base" else str(sentence_folder)
    t2l = TextToLora.from_pretrained(str(make_checkpoint(tmp_path / "c", encoder=reference, variant=variant)))
    together = t2l.generate(DESCRIPTIONS)
    assert [x.description for x in together] == list(DESCRIPTIONS)
    for n, text in enumerate(DESCRIPTIONS):
        (alone,) = t2l.generate([text])
        assert difference(together[n].lora, alone.lora) <= 1e-5
        assert difference(together[n].lora, together[n - 1].lora) > 1e-3


def test_generated_adapter_steers_the_base(t2l: TextToLora, tiny_base: LlamaForCausalLM, tmp_path: Path) -> None:
    """The saved folder, applied by PEFT, acts as the adapter in memory."""
    from peft import PeftModel

    tokens = torch.tensor([[0, 9, 8, 7]])
    (adapter,) = t2l.generate("Add the two numbers.")
    plain = tiny_base(tokens).logits
    with apply_adapters(tiny_base, adapter):
        ours = tiny_base(tokens).logits
    assert (ours - plain).abs().max() > 0.05
    adapter.save_pretrained(tmp_path / "adapter")
    base = LlamaForCausalLM.from_pretrained(adapter.spec.base_model)
    assert (PeftModel.from_pretrained(base, tmp_path / "adapter")(tokens).logits - ours).abs().max() <= 1e-5


def test_base_in_memory_serves_as_encoder(
    checkpoint: Path, t2l: TextToLora, tiny_base: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    given = TextToLora.from_pretrained(str(checkpoint), base=(tiny_base, tiny_tokenizer))
    assert given.encoder.model is tiny_base.base_model
    assert difference(given.generate(DESCRIPTIONS)[1].lora, t2l.generate(DESCRIPTIONS)[1].lora) <= 1e-6


@pytest.mark.parametrize("variant", ["L", "none"])
def test_adapter_is_its_own(variant: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Changing one adapter of a batch must not change its neighbours, nor the hypernetwork's offset."""
    t2l = TextToLora.from_pretrained(str(make_checkpoint(tmp_path / "c", variant=variant)))
    one, other = t2l.generate(DESCRIPTIONS[:2])
    before = one.lora.map(torch.clone), other.lora.map(torch.clone)
    for x in (*one.lora.a, *one.lora.b):
        x.zero_()
    assert difference(other.lora, before[1]) == 0
    assert difference(t2l.generate(DESCRIPTIONS[:2])[0].lora, before[0]) == 0
    assert difference(one.lora, before[0]) > 0.1


def test_card_says_where_the_adapter_came_from(t2l: TextToLora, checkpoint: Path, tmp_path: Path) -> None:
    (adapter,) = t2l.generate(["Write a poem.\nTwo lines."])
    card = (adapter.save_pretrained(tmp_path / "adapter") / "README.md").read_text(encoding="utf-8")
    sha256 = json.loads((checkpoint / "config.json").read_text())["weights_sha256"]
    for fact in ("> Write a poem.\n> Two lines.", sha256, str(checkpoint), "| training seed | 7 |", "rank 4, alpha 8"):
        assert fact in card


def test_strength_goes_from_the_shared_lora_to_what_was_trained(t2l: TextToLora) -> None:
    """What a description changes is added in proportion, so three strengths lie on one line."""
    none, half, full, plain = (
        t2l.generate(DESCRIPTIONS, **({} if strength is None else {"strength": strength}))
        for strength in (0.0, 0.5, 1.0, None)
    )
    shared = t2l.hypernet.shared_adapter().map(torch.Tensor.detach)
    for at_none, at_half, at_full, usual in zip(none, half, full, plain, strict=True):
        assert difference(at_none.lora, shared) == 0
        assert difference(at_full.lora, usual.lora) == 0
        assert difference(at_full.lora, shared) > 1e-3
        for low, middle, high in zip(at_none.lora.b, at_half.lora.b, at_full.lora.b, strict=True):
            assert torch.allclose(middle, (low + high) / 2, atol=1e-6)
    assert "| strength | 0.5 |" in half[0].card()
    assert "strength" not in full[0].card()


@pytest.mark.parametrize("strength", [-0.1, 2.5, float("nan")])
def test_strength_out_of_range_is_refused(t2l: TextToLora, strength: float) -> None:
    with pytest.raises(ConfigError, match=f"between 0, the shared LoRA alone, and 2, got {strength:g}"):
        t2l.generate(DESCRIPTIONS, strength=strength)


def test_two_processes_write_the_same_bytes(t2l: TextToLora, checkpoint: Path, tmp_path: Path) -> None:
    """Nothing may depend on a process's hash seed, on its clock or on earlier calls.

    Nor may what `all-linear` means: in a set's order it would change from process to process, and so would checkpoints.
    """
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from t2l import TextToLora\n"
        f"t2l = TextToLora.from_pretrained({str(checkpoint)!r})\n"
        f"for n, adapter in enumerate(t2l.generate({list(DESCRIPTIONS)!r})):\n"
        f"    adapter.save_pretrained({str(tmp_path / 'there')!r} + f'/{{n}}')\n"
        "from transformers import AutoConfig; from t2l.spec import AdapterSpec; from t2l.config import LoraConfig\n"
        "config, lora = AutoConfig.from_pretrained(t2l.spec.base_model), LoraConfig(target_modules=('all-linear',))\n"
        "print(AdapterSpec.from_config(config, 'x', lora).to_json())\n"
    )
    there = subprocess.check_output([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": "1"}, text=True)
    here = AdapterSpec.from_config(make_config(), "x", LoraConfig(target_modules=("all-linear",))).to_json()
    assert there == here + "\n" and "down_proj" in here
    t2l.generate(["Something else.", "And more."])
    for n, adapter in enumerate(t2l.generate(DESCRIPTIONS)):
        adapter.save_pretrained(tmp_path / "here" / str(n))
    files = sorted(path.relative_to(tmp_path / "here") for path in (tmp_path / "here").rglob("*") if path.is_file())
    assert len(files) == 4 * len(DESCRIPTIONS)
    for file in files:
        assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "there" / file).read_bytes(), file


@pytest.mark.parametrize("encoder", ["base", "sentence"])
def test_another_encoder_than_in_training_is_refused(
    encoder: str, make_checkpoint: MakeCheckpoint, sentence_folder: Path, tmp_path: Path
) -> None:
    """Another revision would give embeddings that mean something else, without any error in shapes."""
    reference = "base" if encoder == "base" else str(sentence_folder)
    folder = make_checkpoint(tmp_path / "c", encoder=reference, revision="sha256:another")
    with pytest.raises(CheckpointError, match=r"at sha256:another, found is sha256:[0-9a-f]{64}"):
        TextToLora.from_pretrained(str(folder))


def test_encoder_of_another_size_is_refused(
    make_checkpoint: MakeCheckpoint, checkpoint: Path, sentence_folder: Path, tmp_path: Path
) -> None:
    from t2l.checkpoint import load_checkpoint
    from t2l.encoder import SentenceEncoder

    encoder = SentenceEncoder.from_folder(sentence_folder, max_tokens=96)
    with pytest.raises(CheckpointError, match="reads embeddings of size 64, this encoder writes 32"):
        TextToLora(load_checkpoint(checkpoint), encoder, reference="x")


def test_bad_description_in_a_batch_is_refused(t2l: TextToLora) -> None:
    with pytest.raises(DescriptionError, match="is empty"):
        t2l.generate(["Add the two numbers.", ""])
    with pytest.raises(DescriptionError, match="No description"):
        t2l.generate([])


@pytest.mark.parametrize("name", ["t2l:absent", "t2l:../absent", "t2l:", "t2l:.."])
def test_unknown_shipped_checkpoint_names_the_known(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="ships with this version; there is: "):
        checkpoint_folder(name)


def test_large_shape_needs_neither_base_nor_gpu(sentence_folder: Path, tmp_path: Path) -> None:
    """With a sentence encoder, an adapter for an 8-billion-parameter base is written from its config alone."""
    code = f"""
import resource
import torch
torch.set_num_threads(1)
from pathlib import Path
from safetensors import safe_open
from transformers import LlamaConfig
from t2l import TextToLora
from t2l.checkpoint import CheckpointConfig, save_checkpoint
from t2l.config import EncoderConfig, HypernetConfig, LoraConfig, PromptConfig
from t2l.hypernet import Hypernet
from t2l.hub import fingerprint
from t2l.spec import AdapterSpec

config = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                     num_key_value_heads=8, vocab_size=128256)
spec = AdapterSpec.from_config(config, "nowhere/llama-8b", LoraConfig(target_modules=("q_proj", "v_proj"), r=8))
shape = HypernetConfig(variant="S")
hypernet = Hypernet(spec, embedding_size=32, kind="sentence", config=shape)
encoder = {str(sentence_folder)!r}
out = Path({str(tmp_path)!r})
save_checkpoint(out / "checkpoint", hypernet, spec, CheckpointConfig.current(
    {{}}, embedding_size=32, encoder=EncoderConfig(kind="sentence", model=encoder, max_tokens=64),
    encoder_revision=fingerprint(encoder), hypernet=shape, prompt=PromptConfig()))
del hypernet
(adapter,) = TextToLora.from_pretrained(str(out / "checkpoint")).generate(["Translate into French."])
adapter.save_pretrained(out / "adapter", dtype=torch.bfloat16)
with safe_open(out / "adapter" / "adapter_model.safetensors", "pt") as file:
    shapes = {{name: file.get_slice(name).get_shape() for name in file.keys()}}
assert len(shapes) == 32 * 2 * 2
for layer in range(32):
    for name, o in (("q_proj", 4096), ("v_proj", 1024)):
        path = f"base_model.model.model.layers.{{layer}}.self_attn.{{name}}"
        assert shapes[path + ".lora_A.weight"] == [8, 4096]
        assert shapes[path + ".lora_B.weight"] == [o, 8]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    done = programs.run(["-c", code])
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[-1])
    print(f"peak resident memory for a Llama-3.1-8B shape: {peak} MiB")
    assert peak < 2500


def test_public_names() -> None:
    import t2l as package

    names = {"AdapterSpec", "LoraAdapter", "TextToLora", "apply_adapters", "function", "render_prompt", "ConfigError"}
    assert names <= set(package.__all__) and set(package.__all__) <= set(dir(package))
    assert all(getattr(package, name) is not None for name in package.__all__)
    assert package.LoraAdapter is LoraAdapter
    name: Any = "nothing"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(package, name)
