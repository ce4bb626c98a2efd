"""Whole runs in which another engine answers: each prompt under its own adapter, and nothing is asked twice."""

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import LLM, Server, pretend_vllm, send, servers
from transformers import LlamaConfig, PreTrainedTokenizerBase
from typer.testing import CliRunner

from t2l import peft_io
from t2l.cli import app
from t2l.config import LoraConfig
from t2l.errors import DataError
from t2l.eval import answers, conditions, suites
from t2l.spec import AdapterSpec
from t2l.text_to_lora import TextToLora


@pytest.fixture(scope="module")
def spec(tiny_config: LlamaConfig, base_folder: Path) -> AdapterSpec:
    return AdapterSpec.from_config(tiny_config, str(base_folder), LoraConfig(r=4, lora_alpha=8))


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch, tiny_base: Any, tiny_tokenizer: Any, spec: AdapterSpec) -> type[LLM]:
    return pretend_vllm(monkeypatch, tiny_base, tiny_tokenizer, spec)


@pytest.fixture
def make_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Server]]:
    with servers(monkeypatch) as make:
        yield make


NAMES = "base,base+description,t2l,t2l+description,t2l-wrong"
WORDS = {"reverse": "Write the word backwards.", "upper": "Write the word in capital letters."}


@pytest.fixture(scope="module")
def tasks_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks") / "words.jsonl"
    lines = [
        {"task": name, "description": text, "input": word, "output": word.upper(), "split": "test"}
        for name, text in WORDS.items()
        for word in ("abc", "ten", "star")
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def eval_run(tasks_file: Path, checkpoint: str) -> Callable[..., Any]:
    def call(out: Path, *more: Any) -> Any:
        common = ("--suite", tasks_file, "--checkpoint", checkpoint, "--out", out, "--device", "cpu", "--seeds", "0")
        return CliRunner().invoke(app, ["eval", "run", *map(str, (*common, "--max-new-tokens", 5, *more))])

    return call


def of_server(server: Server, folder: Path, *more: Any) -> tuple[Any, ...]:
    return "--backend", server.url, "--served-model", "base", "--adapter-folder", folder, "--batch-tokens", 1, *more


def test_a_run_asks_the_server_under_each_conditions_adapter(
    make_server: Callable[[str], Server],
    eval_run: Callable[..., Any],
    tasks_file: Path,
    checkpoint: str,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    server, out = make_server("vllm"), tmp_path / "answers.jsonl"
    result = eval_run(
        out, *of_server(server, tmp_path / "shared", "--conditions", f"{NAMES},arrow", "--batch-tokens", 4096)
    )
    assert result.exit_code == 0, result.output
    file = answers.read(out)
    t2l = TextToLora.from_pretrained(checkpoint)
    loaded = {name: peft_io.load_adapter(tmp_path / "shared" / name, t2l.spec) for name in server.names}
    assert len(loaded) == 2  # the two tasks are each other's wrong ones
    said = {answers.key_of(line): line for line in file.lines}
    instances = suites.instances(suites.load_suite(str(tasks_file), per_task=None), [0])
    assert len(said) == 6 * 5 and len(instances) == 6
    for instance in instances:
        for name in NAMES.split(","):
            condition = conditions.CONDITIONS[name]
            text = {"t2l": instance.description, "t2l-wrong": instance.wrong_description}.get(condition.adapter)
            line = said[instance.task.suite, name, 0, instance.task.name, instance.item.id]
            adapter, _, rest = line["answer"].partition("|")
            assert rest == f"{conditions.prompt_of(condition, instance, tiny_tokenizer)}|5"
            if text is None:
                assert (adapter, line["adapter"]) == ("None", None)
                continue
            (expected,) = t2l.generate([text])
            assert torch.allclose(loaded[adapter].a[0], expected.lora.a[0], atol=1e-6)
            assert torch.allclose(loaded[adapter].b[1], expected.lora.b[1], atol=1e-6)
            assert line["adapter"] == conditions.short_hash(f"{t2l.config.weights_sha256}/text/{text}")
    facts = {name: file.header[name] for name in ("backend", "served_model", "dtype", "device")}
    server_facts = {"backend": "server (vllm)", "served_model": "base", "dtype": "not stated", "device": "server"}
    assert facts == server_facts
    assert file.header["versions"]["vllm"] == "0.9"
    assert "arrow" in file.header["left_out"] and "conditions left out: arrow (it needs the base" in result.output
    assert server.url not in out.read_text()


def test_a_run_that_the_server_broke_off_goes_on(
    make_server: Callable[[str], Server], eval_run: Callable[..., Any], tmp_path: Path
) -> None:
    whole, server, out = tmp_path / "whole.jsonl", make_server("vllm"), tmp_path / "answers.jsonl"
    assert eval_run(whole, *of_server(server, tmp_path / "shared", "--conditions", NAMES)).exit_code == 0
    everything = len(server.completions())

    def refuses(handler: BaseHTTPRequestHandler) -> bool:
        return send(handler, 400, "no more")

    second = make_server("vllm")
    second.trouble = [lambda _: False] * 19 + [refuses]
    result = eval_run(out, *of_server(second, tmp_path / "shared", "--conditions", NAMES))
    assert result.exit_code == 1 and "HTTP 400: no more" in result.output
    kept = out.read_bytes()
    before = len(answers.read(out).lines)
    assert 0 < before < 30
    assert eval_run(out, *of_server(second, tmp_path / "shared", "--conditions", NAMES)).exit_code == 0
    assert out.read_bytes().startswith(kept)
    found = [{answers.key_of(line): line for line in answers.read(path).lines} for path in (out, whole)]
    assert found[0] == found[1]
    # Of the second attempt, what is asked twice is the refused request and the comparisons of two adapters.
    assert len(second.completions()) <= everything + 1 + 2 * 2
    for change, message in (
        (("--backend", "transformers"), "backend 'server (vllm)'; this one has 'transformers'"),
        (of_server(make_server("sglang"), tmp_path / "shared", "--server", "sglang"), "this one has 'server (sglang)'"),
    ):
        done = out.read_bytes()
        result = eval_run(out, "--conditions", NAMES, *change)
        assert result.exit_code == 1 and message in " ".join(result.output.split())
        assert out.read_bytes() == done


def test_a_run_on_a_server_that_ignores_adapters_is_an_error(
    make_server: Callable[[str], Server], eval_run: Callable[..., Any], tmp_path: Path
) -> None:
    server, out = make_server("vllm"), tmp_path / "answers.jsonl"
    server.deaf = True
    result = eval_run(out, *of_server(server, tmp_path / "shared", "--conditions", NAMES))
    assert result.exit_code == 1 and "gives the same log-probabilities with adapter t2l-" in result.output
    assert {line["condition"] for line in answers.read(out).lines} == {"base", "base+description"}


def test_a_run_with_vllm_is_that_with_transformers(
    vllm: type[LLM], eval_run: Callable[..., Any], checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LLM, "spec", TextToLora.from_pretrained(checkpoint).spec)
    files = []
    for name in ("transformers", "vllm"):
        result = eval_run(tmp_path / f"{name}.jsonl", "--conditions", NAMES, "--backend", name)
        assert result.exit_code == 0, result.output
        files.append(answers.read(tmp_path / f"{name}.jsonl"))
    one, other = ({answers.key_of(line): line for line in file.lines} for file in files)
    assert one == other
    assert [file.header["backend"] for file in files] == ["transformers", "vllm"]
    assert [file.header["dtype"] for file in files] == ["float32", "float32"]
    assert files[1].header["versions"]["vllm"] == "0.0"
    assert len(vllm.made) == 1 and vllm.made[0].dtype == "float32"
    with pytest.raises(DataError, match="cannot share a table: backend is 'transformers' in one, 'vllm' in the other"):
        answers.merge(files)


def test_backends_of_a_run_that_cannot_be(
    make_server: Callable[[str], Server], eval_run: Callable[..., Any], tmp_path: Path
) -> None:
    server, out = make_server("vllm"), tmp_path / "answers.jsonl"
    for arguments, message in (
        (("--backend", "llama"), "transformers, vllm or an address such as http://localhost:8000, got 'llama'"),
        (("--backend", server.url), "needs --served-model"),
        (("--backend", "ftp://x", "--served-model", "base"), "must be an http or https address"),
        (("--served-model", "base"), "not for --backend transformers"),
        (("--backend", server.url, "--served-model", "else"), "serves no model else; it has: base"),
        (("--backend", server.url, "--served-model", "base", "--suite", "likelihood"), "needs --backend transformers"),
        (("--backend", server.url, "--served-model", "base", "--conditions", "arrow"), "No condition is left"),
    ):
        result = eval_run(out, *arguments)
        assert (result.exit_code, message in " ".join(result.output.split())) == (1, True), result.output
        assert not out.exists()
    result = eval_run(out, "--backend", server.url, "--served-model", "base", "--conditions", "t2l")
    assert result.exit_code == 1 and "serves no adapter t2l-" in result.output  # and no folder to load it from
