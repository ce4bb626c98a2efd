"""Stand-ins of engines that answer: vLLM with the published signatures, and OpenAI-compatible servers with adapters."""

import json
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from t2l import peft_io
from t2l.apply import apply_adapters
from t2l.endpoint import KEY_VARIABLE
from t2l.text_to_lora import LoraAdapter


def greedy(model: Any, tokenizer: Any, ids: list[int], adapter: Any, number: int) -> tuple[str, torch.Tensor]:
    """The answer and the log-probabilities of its first token, of one prompt."""
    given = torch.tensor([ids])
    with apply_adapters(model, adapter) if adapter else torch.no_grad(), torch.no_grad():
        out = model.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=number)
        logits = model(given).logits[0, -1]
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True), logits.log_softmax(-1)


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


def pretend_vllm(monkeypatch: pytest.MonkeyPatch, base: Any, tokenizer: Any, spec: Any) -> type[LLM]:
    """Makes `import vllm` find the stand-in, which answers with a base model."""
    module, request = types.ModuleType("vllm"), types.ModuleType("vllm.lora.request")
    vars(module).update(LLM=LLM, SamplingParams=SamplingParams, __version__="0.0")
    vars(request).update(LoRARequest=LoRARequest)
    for name, made in (("vllm", module), ("vllm.lora", types.ModuleType("vllm.lora")), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, made)
    monkeypatch.setattr(LLM, "parts", (base, tokenizer))
    monkeypatch.setattr(LLM, "spec", spec)
    monkeypatch.setattr(LLM, "made", [])
    monkeypatch.setattr(LLM, "deaf", False)
    return LLM


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


@contextmanager
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Server]]:
    """Starts servers for the length of a `with` block; no key is in the environment."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    made: list[Server] = []

    def make(kind: str = "vllm") -> Server:
        made.append(Server(kind))
        return made[-1]

    yield make
    for server in made:
        server.server.shutdown()
        server.server.server_close()
