"""What the server's tests share: adapters of any shape, prompts, and the answer that Transformers alone would give."""

import ctypes
import gc
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import uvicorn
from conftest import random_lora
from programs import Program
from torch import nn

from t2l.apply import apply_adapters
from t2l.lora import LoraTensors
from t2l.serve.app import create_app
from t2l.serve.engine import Engine
from t2l.serve.guard import Guard
from t2l.serve.limits import Limits
from t2l.serve.metrics import Metrics
from t2l.serve.service import Service
from t2l.serve.store import AdapterStore
from t2l.spec import AdapterSpec, Target
from t2l.text_to_lora import TextToLora


@dataclass(frozen=True)
class TinyAdapter:
    """The least that the engine asks of an adapter."""

    lora: LoraTensors
    spec: AdapterSpec


def make_adapter(
    model: Any,
    seed: int = 0,
    *,
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
    rank: int = 4,
    alpha: float = 8.0,
    layers: tuple[int, ...] | None = None,
    use_rslora: bool = False,
) -> TinyAdapter:
    """A random adapter of a Llama-like model; no targets are all of its linear modules."""
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.layers.0.")
    }
    chosen = {name.rpartition(".")[2]: name for name in linears}
    spec = AdapterSpec(
        base_model="tiny/base",
        model_type=model.config.model_type,
        num_layers=model.config.num_hidden_layers,
        layers=layers or tuple(range(model.config.num_hidden_layers)),
        targets=tuple(
            Target(
                name=name,
                path=chosen[name].replace(".0.", ".{layer}."),
                in_features=linears[chosen[name]].in_features,
                out_features=linears[chosen[name]].out_features,
            )
            for name in targets or chosen
        ),
        rank=rank,
        alpha=alpha,
        use_rslora=use_rslora,
    )
    return TinyAdapter(random_lora(spec, seed), spec)


SHAPES: tuple[dict[str, Any], ...] = (
    {},
    {"targets": ("q_proj", "k_proj", "v_proj", "o_proj"), "rank": 2},
    {"targets": ("down_proj",), "rank": 7, "layers": (1,)},
    {"targets": (), "rank": 1, "use_rslora": True},
)
"""Adapters that have hardly anything in common."""


def make_prompt(seed: int, length: int | None = None) -> list[int]:
    draw = random.Random(seed)
    return [0, *(draw.randrange(3, 263) for _ in range((length or draw.randrange(2, 40)) - 1))]


@torch.no_grad()
def reference(model: Any, tokenizer: Any, ids: list[int], adapter: Any, max_tokens: int) -> str:
    """By Transformers alone, one request at a time, the whole text read anew for each token."""
    tokens = torch.tensor([ids])
    for _ in range(max_tokens):
        if adapter is None:
            logits = model(tokens, use_cache=False).logits
        else:
            with apply_adapters(model, adapter):
                logits = model(tokens, use_cache=False).logits
        token = logits[:, -1].argmax(-1)
        tokens = torch.cat([tokens, token[:, None]], dim=1)
        if int(token) == 1:
            break
    return str(tokenizer.decode(tokens[0, len(ids) :], skip_special_tokens=True))


@dataclass(frozen=True)
class Server:
    """A server that runs in a thread of this process."""

    url: str
    service: Service
    model: Any
    tokenizer: Any


@contextmanager
def running(
    checkpoint: Path,
    base: tuple[Any, Any],
    folder: Path,
    *,
    limits: Limits | None = None,
    guard: Guard | None = None,
) -> Iterator[Server]:
    """A real server on a free port of 127.0.0.1."""
    metrics = Metrics()
    engine = Engine(*base, limits, on_end=metrics.answer)
    generator = TextToLora.from_pretrained(str(checkpoint), base=base)
    service = Service(engine, AdapterStore(folder), generator)
    app = create_app(service, guard=guard, metrics=metrics)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, access_log=False, server_header=False)
    config.timeout_graceful_shutdown = 5
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_for(lambda: server.started or not thread.is_alive())
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Server(f"http://127.0.0.1:{port}", service, *base)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server must stop when it is told to"


@contextmanager
def program(checkpoint: str | Path, folder: Path, *options: str) -> Iterator[tuple[Program, str]]:
    """`t2l serve` as a process of its own, and its address."""
    command = ["-m", "t2l", "serve", "--port", "0", "--checkpoint", str(checkpoint), "--folder", str(folder), *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("T2L_TOKEN", None)
    with Program(command, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if "open http" in line:
                break
        else:
            raise AssertionError("".join(said))
        try:
            assert line == said[-1] and ":0/" not in "".join(said), "only the port that it has is told"
            yield process, line.split("open ")[1].strip().rstrip("/")
        finally:
            process.kill()


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits until something is so, and fails if it is not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


class _MallInfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def in_use() -> int:
    """Bytes that this process has allocated and not freed, by Python or anybody else; 0 where nobody can tell."""
    gc.collect()
    mallinfo2: Any = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
    if mallinfo2 is None:  # glibc has it since 2.33
        return 0
    mallinfo2.restype = _MallInfo2
    found = mallinfo2()
    return int(found.uordblks + found.hblkhd)


def memory() -> int:
    """Bytes of this process that lie in memory."""
    gc.collect()
    fields: Any = Path("/proc/self/statm").read_text().split() if Path("/proc/self/statm").exists() else [0, 0]
    return int(fields[1]) * 4096
