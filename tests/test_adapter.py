"""LoraAdapter and the Hub: what is saved is read, PEFT has the same logits, nothing is shared that should not be."""

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from conftest import make_base, make_config, random_lora
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma3Config, LlamaForCausalLM

from t2l import LoraAdapter, TextToLora, apply_adapters
from t2l.apply import hooked
from t2l.cli.inspect import _inspect_adapter
from t2l.config import LoraConfig
from t2l.errors import AdapterNotAppliedError, CheckpointError, ConfigError, SpecMismatchError, UploadError
from t2l.library import AdapterLibrary, save_library
from t2l.lora import LoraTensors
from t2l.shards import Origin, ShardedLibrary
from t2l.spec import AdapterSpec

TOKENS = torch.tensor([[0, 17, 93, 240, 5, 66, 31], [0, 8, 200, 41, 12, 7, 9]])
ODD = "First line\u2028still the first\rand on\nsecond: line  “ü” "


def make_adapter(base: str = "tiny/base", seed: int = 0, **lora: Any) -> LoraAdapter:
    spec = AdapterSpec.from_config(make_config(), base, LoraConfig(**({"r": 4, "lora_alpha": 8} | lora)))
    return LoraAdapter(random_lora(spec, seed), spec, "Add the two numbers.", {"checkpoint": "x"})


def fresh() -> LlamaForCausalLM:
    return make_base(make_config())


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS, use_cache=False).logits


def applied(model: Any, adapters: Any) -> torch.Tensor:
    with apply_adapters(model, adapters):
        return logits(model)


# ------------------------------------------------------------------------------------------------ files and the Hub


@pytest.mark.parametrize("description", [ODD, "plain", ""])
def test_what_is_saved_is_read(description: str, base_folder: Path, tmp_path: Path) -> None:
    """The description comes back letter for letter, whatever a card makes of it."""
    adapter = replace(make_adapter(str(base_folder)), description=description)
    folder = adapter.save_pretrained(tmp_path / "adapter")
    again = LoraAdapter.from_pretrained(folder)
    assert (again.description, again.provenance, again.spec) == (description, adapter.provenance, adapter.spec)
    assert again.state_dict().keys() == adapter.state_dict().keys()
    assert all(torch.equal(x, again.state_dict()[key]) for key, x in adapter.state_dict().items())
    assert again.state_dict().keys() == load_file(folder / "adapter_model.safetensors").keys()


def test_only_settings_that_old_versions_of_peft_read_are_written(tmp_path: Path) -> None:
    folder = make_adapter().save_pretrained(tmp_path / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text()).keys() <= {
        *(
            "peft_type",
            "task_type",
            "base_model_name_or_path",
            "revision",
            "r",
            "lora_alpha",
            "use_rslora",
            "target_modules",
        ),
        *("layers_to_transform", "lora_dropout", "bias", "fan_in_fan_out", "inference_mode"),
    }


class StubHub:
    """What `HfApi` is asked for, in place of a network."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls = root, []

    def __call__(self, token: Any = None) -> "StubHub":
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append(("create", repo_id, options))
        if repo_id.startswith("other/"):
            raise PermissionError("403 Forbidden: you may not write here")
        return type("Repo", (), {"repo_id": repo_id})()

    def create_branch(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("branch", options["branch"]))

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> str:
        self.calls.append(("upload", repo_id, options))
        (self.root / repo_id).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(folder_path, self.root / repo_id)
        return f"https://hub/{repo_id}/commit/1"


@pytest.fixture
def stub_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StubHub:
    stub = StubHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", stub)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: stub.calls.append(options) or stub.root / name
    )
    return stub


def test_an_adapter_goes_to_the_hub_and_back(stub_hub: StubHub, base_folder: Path) -> None:
    adapter = make_adapter(str(base_folder))
    assert adapter.push_to_hub("me/adapter", token="t", private=True, revision="v1").endswith("me/adapter/commit/1")
    assert ("token", "t") in stub_hub.calls and ("branch", "v1") in stub_hub.calls
    again = LoraAdapter.from_pretrained("me/adapter", revision="v1", token="t", local_files_only=True)
    assert {"revision": "v1", "token": "t", "local_files_only": True}.items() <= stub_hub.calls[-1].items()
    assert torch.equal(again.lora.a[0], adapter.lora.a[0]) and again.description == adapter.description
    # The Hub refuses a base that is no Hub id.
    header = (stub_hub.root / "me/adapter" / "README.md").read_text().split("---\n")[1]
    assert "base_model" not in yaml.safe_load(header)
    with pytest.raises(UploadError, match=r"cannot upload to other/adapter .* 403 Forbidden"):
        adapter.push_to_hub("other/adapter")


def test_a_checkpoint_goes_to_the_hub_and_back(
    stub_hub: StubHub, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Strictly, from safetensors, in evaluation mode, with the same adapters."""
    generator = TextToLora.from_pretrained(make_checkpoint(tmp_path / "own"))
    generator.push_to_hub("me/net", dtype=torch.float32)
    again = TextToLora.from_pretrained("me/net", revision="main", device="cpu")
    assert not again.hypernet.training and not any(p.requires_grad for p in again.hypernet.parameters())
    (one,), (other,) = generator.generate("Add."), again.generate("Add.")
    assert all(torch.equal(x, y) for x, y in zip(one.lora.a + one.lora.b, other.lora.a + other.lora.b, strict=True))
    assert (stub_hub.root / "me/net" / "README.md").read_text() == "A tiny checkpoint.\n"
    (stub_hub.root / "me/net" / "hypernet.safetensors").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match=r"is a pickle|damaged"):
        TextToLora.from_pretrained("me/net")


def test_libraries_go_to_the_hub_and_back(stub_hub: StubHub, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    adapter = make_adapter("org/model")
    lora = LoraTensors.stack([adapter.lora])
    library = save_library(tmp_path / "library", lora, adapter.spec, {"one": {"descriptions": ["Add."]}})
    assert library.push_to_hub("me/library", private=True).endswith("me/library/commit/1")
    for reference in ("me/library", tmp_path / "library"):
        again = AdapterLibrary.from_pretrained(reference)
        assert again.names == ("one",) and torch.equal(again.stack().b[0], lora.b[0])

    sharded = ShardedLibrary.begin(tmp_path / "shards", adapter.spec, Origin(checkpoint_sha256="0", dtype="float32"))
    parts = (("A", lora.a), ("B", lora.b))
    tensors = {f"{t.name}.{part}": x[m] for m, t in enumerate(adapter.spec.targets) for part, x in parts}
    sharded.write_shard(["Add."], tensors, lora.total_norms().tolist())
    sharded.push_to_hub("me/shards")
    found = ShardedLibrary.from_pretrained("me/shards", revision="main", local_files_only=True)
    assert {"revision": "main", "local_files_only": True}.items() <= stub_hub.calls[-1].items()
    assert "*.parquet" in stub_hub.calls[-1]["allow_patterns"]
    assert torch.equal(found.stack([sharded.origin.id_of("Add.")]).b[0], lora.b[0])
    assert (stub_hub.root / "me/shards" / "README.md").is_file()
    with pytest.raises(UploadError, match="cannot upload to other/shards"):
        sharded.push_to_hub("other/shards")


def test_the_encoders_version_is_checked_for_a_base_in_memory_too(
    make_checkpoint: Callable[..., Path], tiny_base: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "own", revision="sha256:other")
    with pytest.raises(CheckpointError, match=r"was trained with the encoder .* at sha256:other"):
        TextToLora.from_pretrained(folder, base=(tiny_base, tiny_tokenizer))


# --------------------------------------------------------------------------------------------- tensors and PEFT


@pytest.mark.parametrize(
    "lora", [{}, {"target_modules": ("all-linear",), "layers_to_transform": (0, 2)}, {"use_rslora": True}]
)
def test_peft_has_our_logits_without_a_file(lora: dict[str, Any]) -> None:
    """On a bare model, beside another adapter, and in place of one; the others stay as they were."""
    first, second, third = (make_adapter(seed=seed, **lora) for seed in (1, 2, 3))
    expected = [applied(fresh(), adapter) for adapter in (first, second, third)]
    model = first.to_peft(fresh(), "one")
    assert isinstance(model, PeftModel) and model.active_adapter == "one"
    assert torch.allclose(logits(model.eval()), expected[0], atol=1e-5)
    assert second.to_peft(model, "two") is model
    assert torch.allclose(logits(model), expected[0], atol=1e-5)
    model.set_adapter("two")
    assert torch.allclose(logits(model), expected[1], atol=1e-5)
    third.to_peft(model, "two")
    assert torch.allclose(logits(model), expected[2], atol=1e-5)
    model.set_adapter("one")
    assert torch.allclose(logits(model), expected[0], atol=1e-5)


def test_what_does_not_fit_leaves_the_model_as_it_was() -> None:
    model = make_adapter(seed=1).to_peft(fresh(), "one").eval()
    before = logits(model)
    odd = make_adapter()
    target = replace(odd.spec.targets[0], path="model.layers.{layer}.self_attn.nothing")
    with pytest.raises(SpecMismatchError, match=r"no such module.*PeftModel gives back by `unload\(\)`"):
        applied(model, odd)
    with pytest.raises(SpecMismatchError, match="has no such module"):
        replace(odd, spec=replace(odd.spec, targets=(target, odd.spec.targets[1]))).to_peft(model, "two")
    for other, match in (
        (make_adapter(r=2), "has rank 4 and scaling 2.0"),
        (make_adapter(target_modules=("q_proj",)), "changes 6 modules"),
    ):
        with pytest.raises(SpecMismatchError, match=match):
            other.to_peft(model, "one")
    assert list(model.peft_config) == ["one"] and torch.equal(logits(model), before)


def test_peft_and_transformers_load_the_same_folder_alike(base_folder: Path, tmp_path: Path) -> None:
    """PEFT#3110: the two ways name layers differently."""
    adapter = make_adapter(str(base_folder))
    folder = adapter.save_pretrained(tmp_path / "adapter")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), folder).eval()
    plain = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    plain.load_adapter(str(folder))
    assert torch.allclose(logits(peft), logits(plain), atol=1e-6)


def test_half_precision_is_kept_where_peft_is_told_so(base_folder: Path, tmp_path: Path) -> None:
    """PEFT#2421."""
    folder = make_adapter(str(base_folder)).save_pretrained(tmp_path / "adapter", dtype=torch.bfloat16)
    assert {x.dtype for x in load_file(folder / "adapter_model.safetensors").values()} == {torch.bfloat16}
    for cast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = PeftModel.from_pretrained(fresh().bfloat16(), folder, autocast_adapter_dtype=cast)
        assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {dtype}


def test_adapters_are_found_in_lists_and_sets() -> None:
    """Each is itself; comparing their numbers was an error of torch's."""
    one, other = make_adapter(), make_adapter()
    assert one in [other, one] and one != other and len({one, other, one}) == 2
    assert one.lora == one.lora != other.lora


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "float16"])
def test_types_that_are_not_read_back_are_not_written(dtype: Any, make_checkpoint: Any, tmp_path: Path) -> None:
    """Whole numbers were, without a word."""
    adapter, folder = make_adapter(), make_checkpoint(tmp_path / "checkpoint")
    generator = TextToLora.from_pretrained(folder)
    for save in (
        partial(adapter.save_pretrained, tmp_path / "out", dtype=dtype),
        partial(generator.save_pretrained, tmp_path / "out", dtype=dtype),
        partial(
            save_library, tmp_path / "out", LoraTensors.stack([adapter.lora]), adapter.spec, {"a": {}}, dtype=dtype
        ),
        partial(TextToLora.from_pretrained, folder, dtype=dtype),
    ):
        with pytest.raises(ConfigError, match="Tensors are not kept as"):
            save()
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="base is a loaded model and its tokenizer, a pair, got 'tiny/base'"):
        TextToLora.from_pretrained(folder, base="tiny/base")  # type: ignore[arg-type]


def test_norms_and_short_words() -> None:
    adapter = make_adapter()
    for m, norm in enumerate(adapter.norms().values()):
        assert torch.allclose(norm, adapter.lora.delta(m).flatten(1).norm(dim=1), rtol=1e-5)
    assert len(repr(adapter)) < 200 and "q_proj" in repr(adapter)


# ------------------------------------------------------------------------------------------------------- merging


def test_merged_weights_compute_what_the_adapter_does() -> None:
    adapter, model = make_adapter(target_modules=("all-linear",)), fresh()
    expected = applied(model, adapter)
    assert adapter.merge_into(model) == 7 * 3
    assert torch.allclose(logits(model), expected, atol=1e-4)
    empty = replace(adapter, lora=adapter.lora.map(torch.zeros_like))
    with pytest.raises(AdapterNotAppliedError, match="changes no weight"):
        empty.merge_into(model)


def test_sums_that_the_type_cannot_hold_are_not_merged() -> None:
    """Otherwise the folder would be a model of its own that says nothing but NaN."""
    adapter = make_adapter()
    huge = replace(adapter, lora=adapter.lora.map(lambda x: x * 1e4))
    with pytest.raises(AdapterNotAppliedError, match=r"q_proj.weight in torch.float16 .*too large for this type"):
        huge.merge_into(fresh().half())
    broken = fresh()
    broken.model.layers[1].self_attn.v_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(AdapterNotAppliedError, match=r"layers.1.self_attn.v_proj.weight .*the base's own were not"):
        adapter.merge_into(broken)
    for size, said in ((0.0, "changes nothing"), (1e30, "its numbers are too large")):
        with pytest.raises(AdapterNotAppliedError, match=said):
            replace(adapter, lora=adapter.lora.map(lambda x, size=size: x * size)).require_effect()


def test_weights_that_two_modules_share_are_not_merged_into() -> None:
    """PEFT#2018: the other module would change too; nothing is changed before this is known."""
    adapter, model = make_adapter(), fresh()
    last = model.model.layers[2].self_attn
    last.q_proj.weight = model.model.layers[0].self_attn.o_proj.weight
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(SpecMismatchError, match=r"layers.0.self_attn.o_proj.weight and .* are one tensor"):
        adapter.merge_into(model)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


# ------------------------------------------------------------------------------------- one model, several users


def test_threads_have_adapters_of_their_own() -> None:
    """Two threads under two adapters and one under none, all at once: each gets its own logits."""
    model, adapters = fresh(), [make_adapter(seed=seed) for seed in (1, 2)]
    expected = [applied(model, x) for x in adapters] + [logits(model)]
    inside, found = threading.Barrier(3, timeout=30), {}

    def use(n: int) -> None:
        if n == 2:
            inside.wait()
            found[n] = logits(model)
            inside.wait()
            return
        with apply_adapters(model, adapters[n]):
            inside.wait()
            found[n] = logits(model)
            inside.wait()

    threads = [threading.Thread(target=use, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[n], expected[n]) for n in range(3))
    assert torch.equal(logits(model), expected[2])


def test_a_backward_pass_runs_checkpointed_layers_under_the_adapter() -> None:
    model = fresh().train()
    named = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # its name before
    getattr(model, f"{named}_checkpointing_enable")()
    adapter = make_adapter()
    lora = adapter.lora.map(lambda x: x.clone().requires_grad_())
    grads = []
    for checkpointed in (True, False):
        if not checkpointed:
            getattr(model, f"{named}_checkpointing_disable")()
        with apply_adapters(model, replace(adapter, lora=lora)):
            loss = model(TOKENS, use_cache=False).logits.square().mean()
            grads.append(torch.autograd.grad(loss, lora.b))
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(*grads, strict=True))


@pytest.mark.parametrize("how", ["model", "method", "layer"])
def test_a_compiled_model_sees_adapters_come_and_go(how: str) -> None:
    """Whatever was compiled before; with the compiler's own tracing, but no code generation."""
    torch._dynamo.reset()
    config = make_config(num_hidden_layers=2 if how == "layer" else 1)
    spec = AdapterSpec.from_config(config, "tiny/base", LoraConfig(r=4, lora_alpha=8))
    model, adapter = make_base(config), LoraAdapter(random_lora(spec), spec, "Add the two numbers.")
    plain, expected = logits(model), applied(model, adapter)
    used: Any = model
    if how == "model":
        used = torch.compile(model, backend="eager")
    elif how == "method":
        model.compile(backend="eager")
    else:
        model.model.layers[1].compile(backend="eager")
    for _ in range(2):
        assert torch.allclose(logits(used), plain, atol=1e-5)
        with apply_adapters(model, adapter):
            assert torch.allclose(logits(used), expected, atol=1e-5)
    assert torch.allclose(logits(used), plain, atol=1e-5)


def test_a_recorded_graph_is_refused() -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = fresh().model
            self.graph = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(2, 2)))

    with pytest.raises(AdapterNotAppliedError, match="graph is a Sequential, a recorded graph"):
        hooked(Wrapped(), make_adapter().spec).__enter__()


# --------------------------------------------------------------------------------------------------- generating


def test_adapters_of_a_batch_are_views_and_copies_are_not(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """What all adapters share is nobody's own memory; batches of any size give the same adapters."""
    generator = TextToLora.from_pretrained(make_checkpoint(tmp_path / "own"), device="cpu")
    texts = [f"Do thing number {n}." for n in range(5)]
    one, other = generator.generate(texts), generator.generate(texts, batch_size=2)
    for x, y in zip(one, other, strict=True):
        assert x.description == y.description
        assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(x.lora.b, y.lora.b, strict=True))
    storage = [{t.untyped_storage().data_ptr() for t in x.lora.a} for x in (one[0], one[1], one[0].copy())]
    assert storage[0] == storage[1] and not storage[0] & storage[2]
    parameters = {p.untyped_storage().data_ptr() for p in generator.hypernet.parameters()}
    assert not storage[0] & parameters
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        generator.generate(texts, batch_size=0)


def test_what_all_adapters_share_is_copied(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "own", variant="none")
    generator = TextToLora.from_pretrained(folder, device="cpu")
    one, other = generator.generate(["One.", "Two."])
    one.lora.a[0].zero_()
    assert other.lora.a[0].any() and generator.hypernet.shared_lora.a[0].any()


# ------------------------------------------------------------------------------------------- other people's folders


@pytest.mark.parametrize(
    "change",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"lora_bias": True},
        {"use_qalora": True},
        {"alora_invocation_tokens": [1]},
        {"target_parameters": ["x"]},
        {"bias": "all"},
        {"from_the_future": {"a": 1}},
    ],
    ids=str,
)
def test_settings_that_change_what_tensors_mean_are_refused(
    change: dict[str, Any], base_folder: Path, tmp_path: Path
) -> None:
    folder = make_adapter(str(base_folder)).save_pretrained(tmp_path / "adapter")
    path = folder / "adapter_config.json"
    plain = json.loads(path.read_text())
    path.write_text(json.dumps(plain | dict.fromkeys(change) | {"init_lora_weights": True, "lora_bias": False}))
    LoraAdapter.from_pretrained(folder)  # the same settings, but off
    path.write_text(json.dumps(plain | change))
    with pytest.raises(CheckpointError, match=f"{next(iter(change))} is .*no plain LoRA"):
        LoraAdapter.from_pretrained(folder)


def test_a_pickled_adapter_is_called_so(base_folder: Path, tmp_path: Path) -> None:
    folder = make_adapter(str(base_folder)).save_pretrained(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"holds its weights as a pickle \(adapter_model.bin\)"):
        LoraAdapter.from_pretrained(folder)


def test_inspect_reads_folders_that_leave_modules_out(base_folder: Path, tmp_path: Path) -> None:
    """It needs no base, and a folder with gaps is sound."""
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    left_out = r".*\.1\.self_attn\.q_proj"
    settings = PeftLoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], exclude_modules=left_out)
    peft = get_peft_model(model, settings)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    peft.save_pretrained(tmp_path / "odd")
    report = _inspect_adapter(tmp_path / "odd")
    assert (report["modules"], report["layers"], report["scaling"]) == (5, 3, 3.0)
    adapted = [peft.base_model.model.model.layers[n].self_attn.q_proj for n in (0, 2)]
    mean = float(sum(module.get_delta_weight("default").detach().norm() for module in adapted)) / 2
    assert report["norm_of_update_over_layers"]["q_proj"]["mean"] == pytest.approx(mean, rel=1e-4)


def test_an_adapter_of_a_multimodal_base_is_the_language_models(tmp_path: Path) -> None:
    """Also in PEFT, which matches names by their ends and would find the vision tower's."""
    text = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8}
    heads = {"num_attention_heads": 4}
    special = {"mm_tokens_per_image": 1, "boi_token_index": 260, "eoi_token_index": 261, "image_token_index": 262}
    config = Gemma3Config(
        text_config=text | heads | {"num_key_value_heads": 2}, vision_config=vision | heads, **special
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    spec = AdapterSpec.from_config(config, "tiny/gemma", LoraConfig(r=2, lora_alpha=4))
    assert all("vision" not in target.path for target in spec.targets)
    adapter = LoraAdapter(random_lora(spec), spec, "x")
    expected = applied(model, adapter)
    assert (expected - logits(model)).abs().max() > 1e-4
    peft = adapter.to_peft(model)
    assert torch.allclose(logits(peft.eval()), expected, atol=1e-5)
    assert not [name for name, _ in peft.named_parameters() if "lora_" in name and "vision" in name]
    alone = AdapterSpec.from_config(config.get_text_config(), "tiny/gemma-text", LoraConfig(r=2, lora_alpha=4))
    with pytest.raises(SpecMismatchError, match="has no such module"):
        applied(model, LoraAdapter(random_lora(alone), alone, "x"))
