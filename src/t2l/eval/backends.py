"""Who answers prompts under adapters: Transformers or vLLM in this process, or an OpenAI-compatible server.

Adapters leave as PEFT folders and are addressed by their content, so that no engine can mistake one for another. vLLM
is imported only where it is chosen. Knows adapters, engines and one HTTP client. Knows no tasks, conditions or scores.
"""

import hashlib
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

import torch

from t2l import hub, peft_io
from t2l.apply import HasLora
from t2l.endpoint import Endpoint, Say, call, choice, open_endpoint
from t2l.errors import AdapterNotAppliedError, ConfigError, DownloadError
from t2l.eval import decode
from t2l.prompt import token_ids
from t2l.ranks import next_rank

SAME = 1e-3
"""Log-probabilities closer than this come from one distribution; engines repeat themselves to about 1e-5."""
Server = Literal["vllm", "sglang", "llama.cpp"]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is recorded of a backend, because it can change an answer."""

    name: str
    """`transformers`, `vllm`, or `server (CONVENTION)`."""
    dtype: str
    """Type of the base's weights; `not stated` where a server keeps it to itself."""
    device: str
    model: str | None = None
    """A server's name of the base model."""
    versions: dict[str, str] = field(default_factory=dict)


NOT_STATED = "not stated"


class Backend(Protocol):
    """Answers prompts greedily, each under its own adapter or none."""

    def facts(self) -> Facts:
        """Says what it is, for the file of answers."""

    def answers(self, prompts: Sequence[str], adapters: Sequence[HasLora | None], max_new_tokens: int) -> list[str]:
        """Answers prompts; the answers come in their order, without special tokens, with white space as it came.

        Args:
            prompts: As `t2l.prompt.render` writes them, special tokens spelt out.
            adapters: One for each prompt; None is the plain base.
            max_new_tokens: Limit of an answer.
        """


def adapter_name(adapter: HasLora) -> str:
    """Names an adapter by all that it does (tensors, scaling, places, base): `t2l-` and 16 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(peft_io.adapter_config(adapter.spec), sort_keys=True).encode())
    for tensor in (*adapter.lora.a, *adapter.lora.b):
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return f"t2l-{digest.hexdigest()[:16]}"


@contextmanager
def open_backend(
    which: str,
    base: tuple[Any, Any],
    *,
    reference: str,
    device: str,
    rank: int,
    server: Server = "vllm",
    served_model: str | None = None,
    folder: Path | None = None,
    log: Say = print,
) -> Iterator[Backend]:
    """Opens the backend that settings name.

    Args:
        which: `transformers`, `vllm`, or a server's address.
        base: The base model, used by Transformers alone, and its tokenizer.
        reference: Model reference of the base.
        device: Where vLLM runs; as here, in bfloat16 on a GPU and in float32 elsewhere.
        rank: Largest rank of the adapters.
        server: A server's convention.
        served_model: A server's name of the base model.
        folder: See `ServerBackend`.
        log: Receives what the user should know.

    Raises:
        ConfigError: if settings do not go together, vLLM is absent, or the server does not serve the model.
        DownloadError: if the server is not there.
    """
    if "://" in which:
        if served_model is None:
            raise ConfigError(f"--backend {which} needs --served-model, the server's name of the base model")
        yield ServerBackend(open_endpoint(which, served_model), server=server, folder=folder, say=log)
        return
    if served_model is not None or folder is not None:
        raise ConfigError(f"--served-model and --adapter-folder are for a server's address, not for --backend {which}")
    if which == "transformers":
        yield TransformersBackend(*base)
    elif which == "vllm":
        # Not all of the GPU's memory: the hypernetwork and its encoder are there too.
        engine = {"dtype": "bfloat16" if device.startswith("cuda") else "float32", "gpu_memory_utilization": 0.8}
        with VLLMBackend(reference, rank=rank, engine=engine) as backend:
            yield backend
    else:
        raise ConfigError(f"--backend is transformers, vllm or an address such as http://localhost:8000, got {which!r}")


class _Folders:
    """Adapters written as PEFT folders, each once, under their names."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()  # engines want absolute paths

    def path(self, name: str, adapter: HasLora) -> Path:
        folder = self.root / name
        if not folder.exists():
            card = f"---\nbase_model: {adapter.spec.base_model}\nlibrary_name: peft\n---\n\nWritten for evaluation.\n"
            peft_io.save_adapter(folder, adapter.lora, adapter.spec, card=card)
        return folder


def _named(adapters: Sequence[HasLora | None], name: Callable[[HasLora], str]) -> list[str | None]:
    """The name of each prompt's adapter; one that stands there often is hashed once."""
    distinct = {id(adapter): adapter for adapter in adapters if adapter is not None}
    names = {key: name(adapter) for key, adapter in distinct.items()}
    return [None if adapter is None else names[id(adapter)] for adapter in adapters]


def _check(prompts: Sequence[str], adapters: Sequence[HasLora | None], max_new_tokens: int) -> None:
    if len(prompts) != len(adapters):
        raise ConfigError(f"{len(prompts)} prompts for {len(adapters)} adapters: give one, or None, for each prompt")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens}")


def _require_effect(with_adapter: Any, without: Any, name: str, engine: str) -> None:
    """Compares log-probabilities of a next token, in whatever form an engine gives them.

    Raises:
        AdapterNotAppliedError: if none differs: the engine answers from the base, which its texts need not show.
    """
    one, other = dict(_numbers(with_adapter)), dict(_numbers(without))
    if one and one.keys() == other.keys() and all(abs(one[key] - other[key]) < SAME for key in one):
        raise AdapterNotAppliedError(
            f"{engine} gives the same log-probabilities with adapter {name} as without (all within {SAME:g}): "
            "it does not apply adapters, or this one is empty"
        )


def _numbers(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield place, value
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(inner, f"{place}/{inner.get('token', key) if isinstance(inner, dict) else key}")


# -------------------------------------------------------------------------------------------------- Transformers


class TransformersBackend:
    """A model in this process, all adapters of a call in one batch.

    That each adapter changes something is checked where they are made, see `t2l.eval.conditions.require_effect`.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer

    def facts(self) -> Facts:
        """As `Backend.facts`."""
        parameter = next(self._model.parameters())
        device = torch.cuda.get_device_name() if parameter.device.type == "cuda" else str(parameter.device)
        return Facts(name="transformers", dtype=str(parameter.dtype).removeprefix("torch."), device=device)

    def answers(self, prompts: Sequence[str], adapters: Sequence[HasLora | None], max_new_tokens: int) -> list[str]:
        """As `Backend.answers`.

        Raises:
            ConfigError: if there are not as many adapters as prompts.
        """
        _check(prompts, adapters, max_new_tokens)
        ids = token_ids(self._tokenizer, list(prompts)) if prompts else []
        answers = [""] * len(prompts)
        for plain in (True, False):
            chosen = [i for i, adapter in enumerate(adapters) if (adapter is None) is plain]
            present = [adapter for adapter in adapters if adapter is not None]
            if chosen:
                said = decode.greedy(
                    self._model,
                    self._tokenizer,
                    [ids[i] for i in chosen],
                    None if plain else present,
                    max_new_tokens=max_new_tokens,
                )
                for i, text in zip(chosen, said, strict=True):
                    answers[i] = text
        return answers


# --------------------------------------------------------------------------------------------------------- vLLM


class VLLMBackend:
    """vLLM in this process (`vllm.LLM`, offline inference), one `LoRARequest` for each adapter.

    Use it in a `with` block, or call `close`: the folders of its adapters go then. Its answers need not equal those
    of Transformers token for token: kernels and batches differ.

    Args:
        base: Model reference of the base.
        rank: Largest rank of the adapters.
        adapters_at_once: Adapters of one batch; more cost memory, fewer cost time.
        engine: Further arguments of `vllm.LLM`, such as `dtype` or `gpu_memory_utilization`.

    Raises:
        ConfigError: if vLLM is not installed.
        SpecMismatchError: if vLLM takes no adapters of this rank.
    """

    def __init__(
        self, base: str, *, rank: int, adapters_at_once: int = 16, engine: dict[str, Any] | None = None
    ) -> None:
        legal_rank = next_rank(rank)
        try:
            import vllm
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise ConfigError(
                f"This backend needs vLLM, which cannot be imported ({error}): pip install vllm"
            ) from error
        self._sampling, self._request, self._version = vllm.SamplingParams, LoRARequest, str(vllm.__version__)
        settings: dict[str, Any] = {
            "model": str(hub.resolve(base)),
            "enable_lora": True,
            "max_lora_rank": legal_rank,
            "max_loras": adapters_at_once,
            # Blocks of one adapter have been served to another; what is shared here is not worth that.
            "enable_prefix_caching": False,
            "seed": 0,
        }
        settings |= engine or {}
        self._dtype = str(settings.get("dtype", "auto"))
        self._engine: Any = vllm.LLM(**settings)
        self._temporary = tempfile.TemporaryDirectory(prefix="t2l-vllm-")
        self._folders = _Folders(Path(self._temporary.name))
        self._requests: dict[str, Any] = {}
        self._checked: set[str] = set()

    def __enter__(self) -> "VLLMBackend":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends vLLM's processes and removes the adapters' folders."""
        self._engine = None  # vLLM ends them when nothing refers to it
        self._temporary.cleanup()

    def facts(self) -> Facts:
        """As `Backend.facts`."""
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        return Facts(name="vllm", dtype=self._dtype, device=device, versions={"vllm": self._version})

    def answers(self, prompts: Sequence[str], adapters: Sequence[HasLora | None], max_new_tokens: int) -> list[str]:
        """As `Backend.answers`.

        Raises:
            ConfigError: if there are not as many adapters as prompts.
            AdapterNotAppliedError: if an adapter that comes for the first time changes no log-probability.
        """
        _check(prompts, adapters, max_new_tokens)
        # As tokens: the prompt has its special tokens, and vLLM would add one to a text.
        ids = token_ids(self._engine.get_tokenizer(), list(prompts)) if prompts else []
        names = _named(adapters, adapter_name)
        plain = [i for i, name in enumerate(names) if name is None]
        adapted = [(i, self._request_for(name, adapters[i])) for i, name in enumerate(names) if name is not None]
        new = {request.lora_name: (i, request) for i, request in adapted if request.lora_name not in self._checked}
        if new:
            sampling = self._sampling(temperature=0.0, max_tokens=1, logprobs=5)
            first = [ids[i] for i, _ in new.values()]
            found = [
                [{str(token): one.logprobs[0][token].logprob for token in one.logprobs[0]} for one in outputs]
                for lora in ([request for _, request in new.values()], None)
                for outputs in (self._generate(first, sampling, lora),)
            ]
            for name, one, other in zip(new, *found, strict=True):
                _require_effect(one, other, name, "vLLM")
            self._checked |= new.keys()
        sampling = self._sampling(temperature=0.0, max_tokens=max_new_tokens)
        answers = [""] * len(prompts)
        # Two calls, because by the published signature a list of requests may not hold None.
        for chosen, lora in ((plain, None), ([i for i, _ in adapted], [request for _, request in adapted])):
            if chosen:
                outputs = self._generate([ids[i] for i in chosen], sampling, lora)
                for i, output in zip(chosen, outputs, strict=True):
                    answers[i] = output.text
        return answers

    def _generate(self, ids: Sequence[Sequence[int]], sampling: Any, requests: list[Any] | None) -> list[Any]:
        prompts = [{"prompt_token_ids": list(row)} for row in ids]
        return [o.outputs[0] for o in self._engine.generate(prompts, sampling, use_tqdm=False, lora_request=requests)]

    def _request_for(self, name: str, adapter: HasLora | None) -> Any:
        if name not in self._requests and adapter is not None:
            folder = self._folders.path(name, adapter)
            number = len(self._requests) + 1  # vLLM caches adapters by this number, for as long as the engine lives
            self._requests[name] = self._request(lora_name=name, lora_int_id=number, lora_path=str(folder))
        return self._requests[name]


# ------------------------------------------------------------------------------------------------------- a server


class ServerBackend:
    """An OpenAI-compatible server: `completions` with the rendered prompt, several requests at a time.

    How an adapter is addressed: vLLM by its name as `model`; SGLang by `base:name`; llama.cpp by its number in
    `GET /lora-adapters`, where the file of the adapter is called by the name. A server that lacks an adapter is given
    it through `folder` (vLLM, SGLang); llama.cpp loads adapters when it starts.

    Args:
        endpoint: The server and its name of the base model, see `t2l.endpoint.open_endpoint`.
        server: Which of the conventions it follows.
        folder: A folder that the server sees under the same path; adapters that it lacks are written there and loaded
            into it, which vLLM allows with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 only.
        name: An adapter's name on the server, `adapter_name` by default.
        concurrency: Requests at a time.
        say: Receives what the user should know, such as waiting times.
        sleep: Pauses between attempts.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        server: Server = "vllm",
        folder: Path | None = None,
        name: Callable[[HasLora], str] | None = None,
        concurrency: int = 8,
        say: Say = lambda text: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if concurrency < 1:
            raise ConfigError(f"concurrency must be at least 1, got {concurrency}")
        if server == "llama.cpp" and folder is not None:
            raise ConfigError("llama.cpp loads adapters when it starts (--lora), so it cannot be given a folder")
        self._endpoint, self._server, self._concurrency = endpoint, server, concurrency
        self._folders = None if folder is None else _Folders(folder)
        self._name, self._checked = name or adapter_name, set[str]()
        self._say, self._sleep = say, sleep
        self._fields: dict[str, dict[str, Any]] | None = None
        """What a request must hold to be answered under an adapter, by its name."""

    def facts(self) -> Facts:
        """As `Backend.facts`; what the server does not say of itself is `not stated`.

        Raises:
            ConfigError: if it does not serve the model.
            DownloadError: if it is not there.
        """
        self._fields = dict(self._served())
        model = self._endpoint.model
        if self._server != "llama.cpp" and model not in self._fields:  # llama.cpp serves one, whatever it is called
            has = ", ".join(sorted(self._fields)[:5]) or "none"
            raise ConfigError(f"{self._endpoint.root} serves no model {model}; it has: {has}")
        where = {"vllm": "/version", "sglang": "/get_server_info", "llama.cpp": "/props"}[self._server]
        try:
            said = self._call(where)
        except DownloadError:
            said = {}
        said = said if isinstance(said, dict) else {}
        version = str(said.get("build_info" if self._server == "llama.cpp" else "version", NOT_STATED))
        return Facts(
            name=f"server ({self._server})",
            dtype=str(said.get("dtype", NOT_STATED)),
            device="server",
            model=model,
            versions={self._server: version},
        )

    def answers(self, prompts: Sequence[str], adapters: Sequence[HasLora | None], max_new_tokens: int) -> list[str]:
        """As `Backend.answers`. The first request that fails for good ends the others.

        Raises:
            ConfigError: if there are not as many adapters as prompts, or the server lacks an adapter.
            DownloadError: if it refuses, is not there, or answers with something else.
            AdapterNotAppliedError: if an adapter that comes for the first time changes no log-probability.
        """
        _check(prompts, adapters, max_new_tokens)
        names = _named(adapters, self._name)
        by_name = {name: adapter for name, adapter in zip(names, adapters, strict=True) if name and adapter}
        self._require(by_name)
        new = {name: prompt for name, prompt in zip(names, prompts, strict=True) if name and name not in self._checked}
        failed = threading.Event()

        def compare(name: str, prompt: str) -> None:
            if failed.is_set():
                return
            try:
                given = [self._complete(prompt, name, 1, logprobs=5), self._complete(prompt, None, 1, logprobs=5)]
                one, other = (answer["choices"][0].get("logprobs") for answer in given)
                _require_effect(one, other, name, self._endpoint.root)
            except BaseException:
                failed.set()
                raise

        def ask(prompt: str, name: str | None) -> str:
            if failed.is_set():
                return ""
            try:
                return choice(self._complete(prompt, name, max_new_tokens), self._endpoint, "text")
            except BaseException:
                failed.set()
                raise

        with ThreadPoolExecutor(self._concurrency) as pool:
            list(pool.map(compare, new.keys(), new.values()))
            self._checked |= new.keys()
            return list(pool.map(ask, prompts, names))

    def _complete(self, prompt: str, name: str | None, max_tokens: int, **more: Any) -> Any:
        fields = self._plain() if name is None or self._fields is None else self._fields[name]
        body = {"model": self._endpoint.model, "prompt": prompt, "max_tokens": max_tokens, **fields, **more}
        answer = self._call("completions", body | {"temperature": 0, "stream": False})
        choice(answer, self._endpoint, "text")
        return answer

    def _call(self, method: str, body: dict[str, Any] | None = None, *, as_json: bool = True) -> Any:
        return call(self._endpoint, method, body, as_json=as_json, say=self._say, sleep=self._sleep)

    def _plain(self) -> dict[str, Any]:
        """Fields that keep a request off all adapters, and the server from adding special tokens to the prompt's."""
        if self._server == "llama.cpp":
            return {"lora": [], "cache_prompt": False}  # its prompt cache does not tell adapters apart
        return {"add_special_tokens": False}

    def _require(self, adapters: dict[str, HasLora]) -> None:
        """Loads the adapters that the server lacks, or says how it gets them."""
        if adapters and self._fields is None:
            self._fields = dict(self._served())
        known = self._fields or {}
        for name in [name for name in adapters if name not in known]:
            if self._folders is None:
                raise ConfigError(f"{self._endpoint.root} serves no adapter {name}; {self._way_out(known)}")
            path = self._folders.path(name, adapters[name])
            root = "load_lora_adapter" if self._server == "vllm" else "/load_lora_adapter"
            try:
                self._call(root, {"lora_name": name, "lora_path": str(path)}, as_json=False)
            except DownloadError as error:
                raise DownloadError(f"Adapter {name} cannot be loaded into the server: {error}") from error
            known[name] = self._address(name)

    def _served(self) -> Iterable[tuple[str, dict[str, Any]]]:
        """Yields the adapters that the server has by now, with what a request must hold to be answered under each."""
        if self._server == "llama.cpp":
            for entry in self._items(self._call("/lora-adapters"), "id", "path"):
                fields = {"lora": [{"id": entry["id"], "scale": 1.0}]}
                yield PurePosixPath(str(entry["path"]).replace("\\", "/")).stem, self._plain() | fields
            return
        listed = self._call("models")
        for entry in self._items(listed.get("data") if isinstance(listed, dict) else listed, "id"):
            name = str(entry["id"]).removeprefix(f"{self._endpoint.model}:")
            yield name, self._address(name)

    def _items(self, listed: Any, *keys: str) -> list[dict[str, Any]]:
        if not isinstance(listed, list) or not all(isinstance(x, dict) and x.keys() >= set(keys) for x in listed):
            raise DownloadError(
                f"{self._endpoint.root} does not list its adapters as {self._server} does: {listed!r:.200}"
            )
        return listed

    def _address(self, name: str) -> dict[str, Any]:
        return self._plain() | {"model": name if self._server == "vllm" else f"{self._endpoint.model}:{name}"}

    def _way_out(self, known: Iterable[str]) -> str:
        has = ", ".join(sorted(known)[:5]) or "none"
        if self._server == "llama.cpp":
            return f"start it with --lora {{name}}.gguf, which names the file; it has: {has}"
        return f"give a folder that it sees, or serve the adapter under that name; it has: {has}"
