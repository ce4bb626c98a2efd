"""Engines other than Transformers: each prompt under its own adapter, or a clear word why not."""

import dataclasses
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_lora
from engines import LLM, Server, greedy, pretend_vllm, send, servers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from vllm_helpers import bench, needs_vllm

from t2l import hub, peft_io
from t2l.config import LoraConfig, PromptConfig
from t2l.endpoint import KEY_VARIABLE, open_endpoint
from t2l.errors import AdapterNotAppliedError, ConfigError, DownloadError, SpecMismatchError
from t2l.eval.backends import Backend, Facts, ServerBackend, VLLMBackend, adapter_name
from t2l.lora import LoraTensors
from t2l.prompt import render, token_ids
from t2l.spec import AdapterSpec
from t2l.text_to_lora import LoraAdapter, TextToLora


@pytest.fixture(scope="module")
def spec(tiny_config: LlamaConfig, base_folder: Path) -> AdapterSpec:
    return AdapterSpec.from_config(tiny_config, str(base_folder), LoraConfig(r=4, lora_alpha=8))


@pytest.fixture(scope="module")
def adapters(spec: AdapterSpec) -> list[LoraAdapter]:
    return [LoraAdapter(random_lora(spec, seed), spec, "a task", {}) for seed in range(3)]


def empty(spec: AdapterSpec) -> LoraAdapter:
    return LoraAdapter(random_lora(spec).map(torch.zeros_like), spec, "nothing", {})


def test_a_name_tells_all_that_an_adapter_does(adapters: list[LoraAdapter], spec: AdapterSpec) -> None:
    first = adapters[0]
    assert adapter_name(first) == adapter_name(LoraAdapter(first.lora.map(torch.clone), spec, "other text", {"a": "b"}))
    stronger = dataclasses.replace(spec, alpha=16.0)
    others = [
        *adapters[1:],
        LoraAdapter(LoraTensors(first.lora.a, first.lora.b, stronger.scaling), stronger, "", {}),
        LoraAdapter(first.lora, dataclasses.replace(spec, base_model="another"), "", {}),
    ]
    names = {adapter_name(adapter) for adapter in (first, *others)}
    assert len(names) == 5
    assert all(len(name) == 20 and name.startswith("t2l-") for name in names)


# --------------------------------------------------------------------------------------------------------- vLLM


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch, tiny_base: Any, tiny_tokenizer: Any, spec: AdapterSpec) -> type[LLM]:
    return pretend_vllm(monkeypatch, tiny_base, tiny_tokenizer, spec)


def test_vllm_answers_each_prompt_under_its_adapter(
    vllm: type[LLM],
    tiny_base: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerBase,
    base_folder: Path,
    adapters: list[LoraAdapter],
) -> None:
    texts = ["one", "two", "three", "four", "five and more"]
    prompts = [render(tiny_tokenizer, "", text, PromptConfig()) for text in texts]
    chosen = [adapters[0], None, adapters[1], adapters[0], adapters[2]]
    with VLLMBackend(str(base_folder), rank=4, engine={"dtype": "float32"}) as backend:
        made: Backend = backend
        found = made.answers(prompts, chosen, 6)
        again = made.answers(prompts[:1], [adapters[2]], 6)
        facts = made.facts()
        folders = {Path(path).parent for path, _ in vllm.made[0].loaded.values()}
        assert len(folders) == 1 and len(list(folders.pop().iterdir())) == 3  # each adapter is written once
        assert backend.answers([], [], 6) == []
    ids = token_ids(tiny_tokenizer, prompts)
    for i, adapter in enumerate(chosen):
        assert found[i] == greedy(tiny_base, tiny_tokenizer, ids[i], adapter, 6)[0]
    assert again == [greedy(tiny_base, tiny_tokenizer, ids[0], adapters[2], 6)[0]]
    assert len(set(found)) == 5
    engine = vllm.made[0]
    assert engine.calls == [3, 3, 1, 4, 1]  # the check with and without, the plain prompt, the others, the second call
    assert facts == Facts(name="vllm", dtype="float32", device=facts.device, versions={"vllm": "0.0"})
    assert engine.engine["max_lora_rank"] == 8 and engine.engine["enable_prefix_caching"] is False
    assert engine.dtype == "float32" and Path(engine.folder) == base_folder
    assert not any(Path(path).exists() for path, _ in engine.loaded.values())


def test_vllm_that_does_not_apply_adapters_is_found_out(
    vllm: type[LLM], base_folder: Path, adapters: list[LoraAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LLM, "deaf", True)
    with (
        VLLMBackend(str(base_folder), rank=4) as backend,
        pytest.raises(AdapterNotAppliedError, match=r"vLLM gives the same .* t2l-[0-9a-f]{16}"),
    ):
        backend.answers(["a"], [adapters[0]], 3)


def test_an_adapter_without_effect_is_found_out(vllm: type[LLM], base_folder: Path, spec: AdapterSpec) -> None:
    with VLLMBackend(str(base_folder), rank=4) as backend, pytest.raises(AdapterNotAppliedError, match="is empty"):
        backend.answers(["a"], [empty(spec)], 3)


def test_what_vllm_cannot_do_is_said(vllm: type[LLM], base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecMismatchError, match="rank 513; vLLM takes ranks up to 512"):
        VLLMBackend(str(base_folder), rank=513)
    with VLLMBackend(str(base_folder), rank=4) as backend:
        with pytest.raises(ConfigError, match="2 prompts for 1 adapters"):
            backend.answers(["a", "b"], [None], 3)
        with pytest.raises(ConfigError, match="max_new_tokens must be at least 1, got 0"):
            backend.answers(["a"], [None], 0)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match="pip install vllm"):
        VLLMBackend(str(base_folder), rank=4)


@needs_vllm
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_real_vllm_answers_as_transformers_does(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm as real
    from vllm.lora.request import LoRARequest as RealRequest

    assert {"lora_name", "lora_int_id", "lora_path"} <= set(inspect.signature(RealRequest).parameters)
    assert {"use_tqdm", "lora_request"} <= set(inspect.signature(real.LLM.generate).parameters)
    for name, value in bench.LITTLE_MEMORY.items():
        monkeypatch.setenv(name, value)
    generator = TextToLora.from_pretrained("t2l:smollm2-135m")
    tokenizer: Any = hub.load_tokenizer(generator.spec.base_model)
    base: Any = hub.load_causal_lm(generator.spec.base_model, device="cpu", dtype=torch.float32)
    adapters = generator.generate(bench.DESCRIPTIONS[:2])
    prompts = [render(tokenizer, bench.DESCRIPTIONS[0], text, generator.prompt) for text in bench.INPUTS]
    chosen = [adapters[0], None, adapters[1], adapters[0]]
    # vLLM's kernels for GPUs apply adapters in half precision only.
    dtype = "float32" if bench.on_cpu() else "bfloat16"
    engine = {"dtype": dtype, "enforce_eager": True, "gpu_memory_utilization": 0.2}
    with VLLMBackend(generator.spec.base_model, rank=generator.spec.rank, engine=engine) as backend:
        found = backend.answers(prompts, chosen, 8)
    ids = token_ids(tokenizer, prompts)
    wanted = [greedy(base, tokenizer, row, adapter, 8)[0] for row, adapter in zip(ids, chosen, strict=True)]
    equal = sum(one == other for one, other in zip(found, wanted, strict=True))
    assert equal >= bench.AGREEMENT[dtype] * len(wanted), (found, wanted)


# ------------------------------------------------------------------------------------------------------- servers

KEY = "sk-very-secret-0123456789"


@pytest.fixture
def make_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Server]]:
    with servers(monkeypatch) as make:
        yield make


@pytest.mark.parametrize("kind", ["vllm", "sglang", "llama.cpp"])
def test_each_request_names_its_adapter(
    kind: Any, make_server: Callable[[str], Server], adapters: list[LoraAdapter], spec: AdapterSpec
) -> None:
    server = make_server(kind)
    server.names = ["other", *(adapter_name(adapter) for adapter in adapters)]
    backend: Backend = ServerBackend(open_endpoint(server.url, "base"), server=kind, concurrency=3)
    chosen = [adapters[1], None, adapters[0], adapters[2], adapters[1]] * 4
    prompts = [f"prompt {i}" for i in range(20)]
    found = backend.answers(prompts, chosen, 7)
    names = [None if adapter is None else adapter_name(adapter) for adapter in chosen]
    assert found == [f"{name}|{prompt}|7" for name, prompt in zip(names, prompts, strict=True)]
    assert all(body["temperature"] == 0 and body["stream"] is False for body in server.completions())
    assert backend.answers([], [], 7) == []
    gets = [path for path, body in server.requests if body is None]
    assert gets == ["/lora-adapters" if kind == "llama.cpp" else "/v1/models"]
    assert len(server.completions()) == 20 + 3 * 2  # each adapter was compared with the base, once
    assert backend.answers(["z"], adapters[2:], 1) == [f"{adapter_name(adapters[2])}|z|1"]
    assert len(server.completions()) == 27
    with pytest.raises(ConfigError, match=rf"serves no adapter {adapter_name(empty(spec))}; .* it has: .*other"):
        backend.answers(["a"], [empty(spec)], 7)


def test_a_server_without_adapters_needs_none(make_server: Callable[[str], Server]) -> None:
    server = make_server("vllm")
    assert ServerBackend(open_endpoint(server.url, "base")).answers(["a"], [None], 3) == ["None|a|3"]
    assert [path for path, _ in server.requests] == ["/v1/completions"]


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_adapters_that_are_missing_are_loaded(
    kind: Any,
    make_server: Callable[[str], Server],
    adapters: list[LoraAdapter],
    tmp_path: Path,
    spec: AdapterSpec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    server = make_server(kind)
    server.names = [adapter_name(adapters[0])]
    backend = ServerBackend(open_endpoint(server.url, "base"), server=kind, folder=Path("shared"))
    found = backend.answers(["a", "b", "c"], [adapters[0], adapters[1], adapters[1]], 2)
    names = [adapter_name(adapter) for adapter in adapters]
    assert found == [f"{names[0]}|a|2", f"{names[1]}|b|2", f"{names[1]}|c|2"]
    (loaded,) = [body for path, body in server.requests if path.endswith("load_lora_adapter")]
    assert loaded == {"lora_name": names[1], "lora_path": str(tmp_path / "shared" / names[1])}
    saved = peft_io.load_adapter(tmp_path / "shared" / names[1], spec)
    assert torch.equal(saved.a[0], adapters[1].lora.a[0])


def test_names_of_the_user(make_server: Callable[[str], Server], adapters: list[LoraAdapter]) -> None:
    server = make_server("vllm")
    server.names = ["sentiment"]
    backend = ServerBackend(open_endpoint(server.url, "base"), name=lambda _: "sentiment")
    assert backend.answers(["a"], [adapters[0]], 1) == ["sentiment|a|1"]


def test_a_server_that_does_not_apply_adapters_is_found_out(
    make_server: Callable[[str], Server], adapters: list[LoraAdapter]
) -> None:
    server = make_server("vllm")
    server.names, server.deaf = [adapter_name(adapters[0])], True
    with pytest.raises(AdapterNotAppliedError, match="gives the same log-probabilities with adapter t2l-"):
        ServerBackend(open_endpoint(server.url, "base")).answers(["a"], [adapters[0]], 3)


def broken_off(handler: BaseHTTPRequestHandler) -> bool:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"te')
    handler.close_connection = True
    return True


TROUBLES: dict[str, tuple[Callable[[BaseHTTPRequestHandler], bool], str]] = {
    "429": (lambda h: send(h, 429, "slow down", (("Retry-After", "3"),)), "HTTP 429: slow down; trying again in 3 s"),
    "500": (lambda h: send(h, 500, {"error": "broken"}), "HTTP 500: "),
    "truncated JSON": (lambda h: send(h, 200, '{"choices": [{"te'), "no JSON or not all of it"),
    "half a body": (broken_off, "no JSON or not all of it"),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_troubles_are_waited_out_or_named(name: str, make_server: Callable[[str], Server]) -> None:
    trouble, message = TROUBLES[name]
    server = make_server("vllm")
    said, pauses = list[str](), list[float]()
    endpoint = open_endpoint(server.url, "base")
    backend = ServerBackend(endpoint, concurrency=1, say=said.append, sleep=pauses.append)
    server.trouble = [trouble, trouble]
    assert backend.answers(["a"], [None], 3) == ["None|a|3"]
    assert len(pauses) == 2 and message in said[0]
    server.trouble = [trouble] * 6
    before = len(server.requests)
    with pytest.raises(DownloadError, match="gave no answer after 6 attempts"):
        backend.answers(["a", "b", "c"], [None] * 3, 3)
    assert len(server.requests) == before + 6  # the other prompts were not sent any more


def test_a_slow_server_times_out(make_server: Callable[[str], Server]) -> None:
    server = make_server("vllm")
    server.delay = 0.3
    endpoint = open_endpoint(server.url, "base", timeout=0.05)
    with pytest.raises(DownloadError, match="after 6 attempts: TimeoutError"):
        ServerBackend(endpoint, sleep=lambda _: None).answers(["a"], [None], 3)


def test_requests_run_side_by_side_up_to_the_limit(make_server: Callable[[str], Server]) -> None:
    server = make_server("vllm")
    server.delay = 0.05
    ServerBackend(open_endpoint(server.url, "base"), concurrency=4).answers(["a"] * 16, [None] * 16, 3)
    assert server.most == 4


def test_another_form_of_answer_is_no_answer(
    make_server: Callable[[str], Server], adapters: list[LoraAdapter], tmp_path: Path
) -> None:
    server = make_server("vllm")
    backend = ServerBackend(open_endpoint(server.url, "base"), sleep=lambda _: None)
    server.trouble = [lambda h: send(h, 200, {"choices": []})]
    with pytest.raises(DownloadError, match=r"does not answer like a completion endpoint .*text"):
        backend.answers(["a"], [None], 3)
    server.trouble = [lambda h: send(h, 404, {"error": {"message": "The model `base` does not exist."}})]
    with pytest.raises(DownloadError, match=r"no answer: HTTP 404: .*does not exist"):
        backend.answers(["a"], [None], 3)
    server.kind = "one that loads nothing"
    loads = ServerBackend(open_endpoint(server.url, "base"), folder=tmp_path, sleep=lambda _: None)
    with pytest.raises(DownloadError, match=r"Adapter t2l-\w+ cannot be loaded into the server: .*HTTP 404"):
        loads.answers(["a"], [adapters[0]], 3)
    llama = ServerBackend(open_endpoint(server.url, "base"), server="llama.cpp", sleep=lambda _: None)
    with pytest.raises(DownloadError, match="HTTP 404"):  # it has no list of adapters
        llama.answers(["a"], [adapters[0]], 3)


def test_the_key_goes_into_the_header_only(
    make_server: Callable[[str], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make_server("vllm")
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    backend = ServerBackend(open_endpoint(server.url, "base"))
    backend.answers(["a"], [None], 3)
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in json.dumps(server.requests)
    server.trouble = [lambda h: send(h, 401, f"bad key {KEY}")]
    with pytest.raises(DownloadError, match=r"HTTP 401: bad key \[key\]"):
        backend.answers(["a"], [None], 3)


def test_settings_that_cannot_be() -> None:
    endpoint = open_endpoint("http://localhost:1", "base")
    with pytest.raises(ConfigError, match="concurrency must be at least 1, got 0"):
        ServerBackend(endpoint, concurrency=0)
    with pytest.raises(ConfigError, match=r"llama\.cpp loads adapters when it starts"):
        ServerBackend(endpoint, server="llama.cpp", folder=Path("x"))


def test_each_adapter_is_compared_not_the_first_alone(
    make_server: Callable[[str], Server], adapters: list[LoraAdapter]
) -> None:
    server = make_server("vllm")
    server.names = [adapter_name(adapter) for adapter in adapters]
    backend = ServerBackend(open_endpoint(server.url, "base"))
    backend.answers(["a"], [adapters[0]], 1)
    server.deaf = True
    assert backend.answers(["a"], [adapters[0]], 1) == ["None|a|1"]  # known to work
    with pytest.raises(AdapterNotAppliedError, match=adapter_name(adapters[1])):
        backend.answers(["a", "a"], [adapters[0], adapters[1]], 1)
