"""Engines other than Transformers: each prompt under its own adapter, or a clear word why not."""

import dataclasses
import importlib.util
import inspect
import json
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_lora
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from typer.testing import CliRunner

from t2l import peft_io
from t2l.apply import apply_adapters
from t2l.cli import app
from t2l.config import LoraConfig, PromptConfig
from t2l.endpoint import KEY_VARIABLE, open_endpoint
from t2l.errors import AdapterNotAppliedError, ConfigError, DataError, DownloadError
from t2l.eval import answers, conditions, suites
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


def greedy(model: Any, tokenizer: Any, ids: list[int], adapter: Any, number: int) -> tuple[str, torch.Tensor]:
    """The answer and the log-probabilities of its first token, of one prompt."""
    given = torch.tensor([ids])
    with apply_adapters(model, adapter) if adapter else torch.no_grad(), torch.no_grad():
        out = model.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=number)
        logits = model(given).logits[0, -1]
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True), logits.log_softmax(-1)


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


@dataclass
class LoRARequest:
    """As published: name, number and path."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""

    def __post_init__(self) -> None:
        assert self.lora_int_id >= 1 and Path(self.lora_path).is_absolute()


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    max_tokens: int | None = 16
    logprobs: int | None = None
    stop: list[str] = field(default_factory=list)


class LLM:
    """The published signatures, answered by the tiny base under adapters read from their folders."""

    made: "list[LLM]" = []  # noqa: RUF012
    deaf = False

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        seed: int = 0,
        gpu_memory_utilization: float = 0.9,
        enforce_eager: bool = False,
        **engine: Any,
    ) -> None:
        known = {"enable_lora", "max_lora_rank", "max_loras", "enable_prefix_caching", "max_model_len"}
        assert engine.keys() <= known, "EngineArgs has no such field"
        assert engine["enable_lora"] and engine["max_lora_rank"] in (8, 16, 32, 64, 128, 256, 320, 512)
        self.engine, self.dtype, self.folder = engine, dtype, model
        self.base, self.tokenizer = LLM.parts
        self.loaded: dict[int, tuple[str, LoraAdapter]] = {}
        self.calls: list[int] = []
        LLM.made.append(self)

    parts: Any = None
    spec: Any = None

    def get_tokenizer(self) -> Any:
        return self.tokenizer

    def generate(
        self,
        prompts: list[dict[str, Any]],
        /,
        sampling_params: SamplingParams | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: list[LoRARequest] | LoRARequest | None = None,
    ) -> list[Any]:
        assert isinstance(sampling_params, SamplingParams) and sampling_params.temperature == 0
        requests: list[Any] = lora_request if isinstance(lora_request, list) else [lora_request] * len(prompts)
        assert len(requests) == len(prompts)
        assert lora_request is None or all(isinstance(request, LoRARequest) for request in requests)
        self.calls.append(len(prompts))
        outputs = []
        for prompt, request in zip(prompts, requests, strict=True):
            adapter = None if request is None or LLM.deaf else self._load(request)
            ids = prompt["prompt_token_ids"]
            text, scores = greedy(self.base, self.tokenizer, ids, adapter, sampling_params.max_tokens or 16)
            top = scores.topk(sampling_params.logprobs or 1)
            pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            logprobs = [{token: types.SimpleNamespace(logprob=value) for token, value in pairs}]
            outputs.append(types.SimpleNamespace(outputs=[types.SimpleNamespace(text=text, logprobs=logprobs)]))
        return outputs

    def _load(self, request: LoRARequest) -> LoraAdapter:
        path, adapter = self.loaded.setdefault(
            request.lora_int_id,
            (request.lora_path, LoraAdapter(peft_io.load_adapter(Path(request.lora_path), LLM.spec), LLM.spec, "", {})),
        )
        assert path == request.lora_path, "one number for two adapters: vLLM would answer with the first"
        return adapter


@pytest.fixture
def vllm(
    monkeypatch: pytest.MonkeyPatch,
    tiny_base: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerBase,
    spec: AdapterSpec,
) -> type[LLM]:
    module, request = types.ModuleType("vllm"), types.ModuleType("vllm.lora.request")
    vars(module).update(LLM=LLM, SamplingParams=SamplingParams, __version__="0.0")
    vars(request).update(LoRARequest=LoRARequest)
    for name, made in (("vllm", module), ("vllm.lora", types.ModuleType("vllm.lora")), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, made)
    monkeypatch.setattr(LLM, "parts", (tiny_base, tiny_tokenizer))
    monkeypatch.setattr(LLM, "spec", spec)
    monkeypatch.setattr(LLM, "made", [])
    monkeypatch.setattr(LLM, "deaf", False)
    return LLM


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
    with pytest.raises(ConfigError, match="up to rank 512, these have 513"):
        VLLMBackend(str(base_folder), rank=513)
    with VLLMBackend(str(base_folder), rank=4) as backend:
        with pytest.raises(ConfigError, match="2 prompts for 1 adapters"):
            backend.answers(["a", "b"], [None], 3)
        with pytest.raises(ConfigError, match="max_new_tokens must be at least 1, got 0"):
            backend.answers(["a"], [None], 0)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match="pip install vllm"):
        VLLMBackend(str(base_folder), rank=4)


def test_the_real_vllm_answers_as_transformers_does(
    tiny_base: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase, base_folder: Path, adapters: list[LoraAdapter]
) -> None:
    if importlib.util.find_spec("vllm") is None or not torch.cuda.is_available():
        pytest.skip("parity with vLLM is not tested here: vLLM is not installed, or there is no GPU")
    import vllm as real
    from vllm.lora.request import LoRARequest as RealRequest

    assert {"lora_name", "lora_int_id", "lora_path"} <= set(inspect.signature(RealRequest).parameters)
    assert {"use_tqdm", "lora_request"} <= set(inspect.signature(real.LLM.generate).parameters)
    prompts = [render(tiny_tokenizer, "", text, PromptConfig()) for text in ("one", "two", "three")]
    chosen = [adapters[0], None, adapters[1]]
    engine = {"dtype": "float32", "enforce_eager": True, "gpu_memory_utilization": 0.2}
    with VLLMBackend(str(base_folder), rank=4, engine=engine) as backend:
        found = backend.answers(prompts, chosen, 4)
    for text, ids, adapter in zip(found, token_ids(tiny_tokenizer, prompts), chosen, strict=True):
        assert text == greedy(tiny_base, tiny_tokenizer, ids, adapter, 4)[0]


# ------------------------------------------------------------------------------------------------------- servers

KEY = "sk-very-secret-0123456789"


class Server:
    """A server on this machine that knows adapters by name, as vLLM, SGLang or llama.cpp would."""

    def __init__(self, kind: str) -> None:
        self.kind, self.names, self.deaf = kind, list[str](), False
        self.requests: list[tuple[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.trouble: list[Callable[[BaseHTTPRequestHandler], bool]] = []
        """What happens to the next completions in place of an answer."""
        self.open, self.most, self.delay, self.lock = 0, 0, 0.0, threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stub.answer(self, None)

            def do_POST(self) -> None:
                stub.answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *_: Any) -> None:
                """Quiet."""

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                """Clients may hang up."""

        self.server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler, body: Any) -> None:
        with self.lock:
            self.requests.append((handler.path, body))
            self.headers.append(dict(handler.headers))
            self.open += 1
            self.most = max(self.most, self.open)
            trouble = self.trouble.pop(0) if self.trouble and handler.path == "/v1/completions" else None
        time.sleep(self.delay)
        with self.lock:  # before the answer, which the client's next request may overtake
            self.open -= 1
        if trouble is None or not trouble(handler):
            send(handler, *self.content(handler.path, body))

    def content(self, path: str, body: Any) -> tuple[int, Any]:
        if path == "/v1/models":
            spelt = [f"base:{name}" if self.kind == "sglang" else name for name in self.names]
            return 200, {"object": "list", "data": [{"id": name} for name in ["base", *spelt]]}
        if path == "/version" and self.kind == "vllm":
            return 200, {"version": "0.9"}
        if path == "/lora-adapters" and self.kind == "llama.cpp":
            return 200, [{"id": i, "path": f"/x/{name}.gguf", "scale": 1.0} for i, name in enumerate(self.names)]
        if path == {"vllm": "/v1/load_lora_adapter", "sglang": "/load_lora_adapter"}.get(self.kind):
            if not (Path(body["lora_path"]) / "adapter_config.json").is_file():
                return 400, {"error": {"message": "no adapter there"}}
            self.names.append(body["lora_name"])
            return 200, f"Success: LoRA adapter '{body['lora_name']}' added successfully."
        if path != "/v1/completions":
            return 404, {"error": {"message": f"no {path}"}}
        name = self.adapter_of(body)
        if name is not None and name not in self.names:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        effect = 0.0 if name is None or self.deaf else 1.0 + self.names.index(name)
        text = f"{None if self.deaf else name}|{body['prompt']}|{body['max_tokens']}"
        scores = {"top_logprobs": [{" a": -0.5 - effect, " b": -1.5}]} if "logprobs" in body else None
        return 200, {"choices": [{"index": 0, "text": text, "logprobs": scores, "finish_reason": "stop"}]}

    def adapter_of(self, body: Any) -> str | None:
        if self.kind == "llama.cpp":
            assert body["model"] == "base" and body["cache_prompt"] is False
            (number, *_) = [entry["id"] for entry in body["lora"]] or [None]
            return None if number is None else self.names[number]
        assert body["add_special_tokens"] is False and "lora" not in body
        prefix = "base:" if self.kind == "sglang" else ""
        return None if body["model"] == "base" else body["model"].removeprefix(prefix)

    def completions(self) -> list[Any]:
        return [body for path, body in self.requests if path == "/v1/completions"]


def send(handler: BaseHTTPRequestHandler, status: int, content: Any, headers: tuple[tuple[str, str], ...] = ()) -> bool:
    data = (content if isinstance(content, str) else json.dumps(content)).encode()
    handler.send_response(status)
    for name, value in (*headers, ("Content-Length", str(len(data)))):
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(data)
    return True


@pytest.fixture
def make_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Server]]:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    made: list[Server] = []

    def make(kind: str = "vllm") -> Server:
        made.append(Server(kind))
        return made[-1]

    yield make
    for server in made:
        server.server.shutdown()
        server.server.server_close()


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


# ----------------------------------------------------------------------------------------------------- a whole run

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


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "t2l"))


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
    assert "arrow" in file.header["left_out"] and "condition arrow is left out: it needs the base" in result.output
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
