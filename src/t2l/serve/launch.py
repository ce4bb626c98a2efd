"""From a checkpoint's name to a server that runs. Knows every part of the server and puts them together."""

import ipaddress
import json
import logging
import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI

from t2l import hub
from t2l.checkpoint import read_config
from t2l.errors import ConfigError
from t2l.serve.app import create_app
from t2l.serve.engine import Engine
from t2l.serve.guard import LOCAL, Guard
from t2l.serve.limits import Limits
from t2l.serve.metrics import Metrics
from t2l.serve.service import Service
from t2l.serve.stopping import PatientServer
from t2l.serve.store import AdapterStore
from t2l.text_to_lora import DEFAULT, TextToLora, checkpoint_folder

_ORIGIN = re.compile(r"(?!http://.*:80$|https://.*:443$)[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:]+\])(:[0-9]+)?")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a server is started."""

    folder: Path
    """Where adapters are kept."""
    checkpoint: str = DEFAULT
    base: str | None = None
    """Where the base model is, if not where the checkpoint says."""
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    """What clients must send; without one the server is for this machine alone."""
    allow_hosts: tuple[str, ...] = ()
    """Names that it goes by besides this machine's own."""
    allow_origins: tuple[str, ...] = ()
    """Other sites whose pages may use it."""
    device: str = "cpu"
    dtype: str = "float32"
    memory: int = 2**28
    """Bytes of adapters that are kept ready."""
    most: int = 10_000
    """Adapters that are stored."""
    grace: int = 25
    """Seconds that requests under way have to end when the server is stopped: less than the 30 after which
    Kubernetes kills."""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and not self.token:
            raise ConfigError(
                f"{self.host} can be reached from other machines, and whoever reaches this server can use it: set "
                "T2L_TOKEN to what clients must send, or listen on 127.0.0.1"
            )
        for origin in self.allow_origins:
            if not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"{origin[:200]!r} is no origin as browsers name one: scheme, host and any port but the usual one, "
                    "in small letters, such as https://app.example or http://localhost:3000. Name each site; with "
                    "'*' every page that somebody opens could use the server"
                )


class JsonLines(logging.Formatter):
    """One JSON object a line, for programs that read logs."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def spoken(host: str) -> str:
    """A host as addresses of pages say it; one that stands for every address of this machine is spoken to here."""
    if host in ("0.0.0.0", "::"):
        return LOCAL[0]
    return f"[{host}]" if ":" in host else host.lower()


def build(settings: Settings) -> tuple[FastAPI, Engine]:
    """Loads the models and opens the store.

    Returns:
        The application, and the engine in it.

    Raises:
        T2LError: as `TextToLora.from_pretrained`, `Engine` and `AdapterStore` do.
    """
    store = AdapterStore(settings.folder, memory=settings.memory, most=settings.most)
    try:
        generator, model, tokenizer = _load(settings)
        metrics = Metrics()
        engine = Engine(model, tokenizer, settings.limits, on_end=metrics.answer)
    except BaseException:
        store.close()
        raise
    hosts = (*LOCAL, spoken(settings.host), *settings.allow_hosts)
    guard = Guard(hosts=hosts, origins=settings.allow_origins, token=settings.token)
    return create_app(Service(engine, store, generator), guard=guard, metrics=metrics), engine


def listen(host: str, port: int) -> socket.socket:
    """Takes an address, so that what is wrong with it is said before models are loaded; nobody can connect yet.

    Raises:
        ConfigError: if the address is taken, or is none of this machine's.
    """
    door = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        if os.name == "posix":  # elsewhere it would let two programs have one port
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind((host, port))
    except OSError as error:
        door.close()
        raise ConfigError(
            f"The server cannot listen on {host}, port {port}: {error.strerror or error}; give it another --port, "
            "such as 0 for a free one, or another --host"
        ) from error
    return door


def run(settings: Settings, say: Callable[[str], None]) -> None:
    """Runs a server until it is told to stop; see `PatientServer`.

    Args:
        settings: How it is started.
        say: Called with lines for people: where it is to be found.

    Raises:
        ConfigError: if the address cannot be listened on.
        T2LError: as `build` does.
    """
    with listen(settings.host, settings.port) as door:
        url = f"http://{spoken(settings.host)}:{door.getsockname()[1]}/"
        say(f"t2l serve: loading {settings.checkpoint}")
        app, engine = build(settings)
        handler = logging.StreamHandler()
        handler.setFormatter(JsonLines())
        logging.basicConfig(handlers=[handler], level=logging.INFO)
        server = PatientServer(
            app,
            engine,
            grace=settings.grace,
            on_start=lambda: say(f"t2l serve: open {url}"),
            access_log=False,  # the guard writes its own
            log_config=None,
            server_header=False,
            proxy_headers=False,  # anybody could claim another address
            limit_concurrency=512,
        )
        server.run(sockets=[door])


def _load(settings: Settings) -> tuple[TextToLora, Any, Any]:
    spec, _ = read_config(checkpoint_folder(settings.checkpoint))
    dtype: torch.dtype = getattr(torch, settings.dtype)
    base = settings.base or spec.base_model
    model: Any = hub.load_causal_lm(base, device=settings.device, dtype=dtype)
    tokenizer: Any = hub.load_tokenizer(base)
    # Checkpoints that read the base's own states were trained on them in float32.
    shared = (model, tokenizer) if dtype == torch.float32 else None
    generator = TextToLora.from_pretrained(
        settings.checkpoint, base=shared, base_reference=settings.base, device=settings.device
    )
    return generator, model, tokenizer
