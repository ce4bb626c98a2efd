"""Requests that are wrong in every way, and who may ask at all: each is refused, and the next request is served."""

import errno
import json
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
from conftest import make_base, make_config, make_tokenizer
from serve_helpers import Server, running, wait_for

from t2l.config import PromptConfig
from t2l.errors import CheckpointError, OutputError
from t2l.serve.guard import LOCAL, Guard
from t2l.serve.limits import Limits

USER: Any = [{"role": "user", "content": "What is it?"}]


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    prompt = PromptConfig(description_in_prompt=True)
    return make_checkpoint(tmp_path_factory.mktemp("refusals") / "checkpoint", prompt=prompt)


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = make_base(make_config()), make_tokenizer()
    limits = Limits(description_bytes=90, choices=6, max_tokens=400)
    with running(checkpoint, base, tmp_path_factory.mktemp("refusals-store"), limits=limits) as server:
        yield server


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


CHAT = {"model": "base", "messages": USER}
BAD: list[tuple[str, bytes]] = [
    ("/v1/chat/completions", b""),
    ("/v1/chat/completions", b"{"),
    ("/v1/chat/completions", b"\x80\x04\x95\x10."),
    ("/v1/chat/completions", b'{"model": "\xff"}'),
    ("/v1/chat/completions", b"[" * 100_000),
    ("/v1/chat/completions", b"null"),
    ("/v1/completions", b'{"model": "base", "prompt": "x", "temperature": NaN}'),
    ("/v1/completions", b'{"model": "base", "prompt": "x", "temperature": 1e999}'),
    ("/v1/completions", b'{"model": "base", "prompt": "\\ud800"}'),
    ("/v1/completions", b'{"model": "base", "prompt": "x", "\\ud800": 1}'),
    ("/v1/adapters", b'{"description": "\\ud800"}'),
    *[
        ("/v1/chat/completions", json.dumps({**CHAT, **change}).encode())
        for change in (
            {"messages": []},
            {"messages": [{"role": "robot", "content": "x"}]},
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "http://x"}]}]},
            {"messages": "hello"},
            {"model": 7},
            {"model": ["base"]},
            {"temperature": -1},
            {"temperature": "hot"},
            {"top_p": 0},
            {"n": 0},
            {"n": 7},
            {"n": 10**9},
            {"max_tokens": 0},
            {"max_tokens": 401},
            {"max_tokens": 10**30},
            {"stop": [""]},
            {"stop": ["a", "b", "c", "d", "e"]},
            {"seed": 1.5},
            {"logprobs": True, "top_logprobs": 21},
            {"top_logprobs": 2},
            {"stream": "maybe"},
            {"tools": [{"type": "function"}]},
            {"presence_penalty": 0.5},
            {"path": "/etc/passwd"},
            {"timeout": 0},
            {"model": "t2l:"},
            {"model": "t2l:  \n"},
            {"model": "t2l:" + "x" * 200},
            {"messages": [{"role": "user", "content": "x" * 600}]},
        )
    ],
    *[
        ("/v1/completions", json.dumps({"model": "base", **change}).encode())
        for change in (
            {"prompt": []},
            {"prompt": ""},
            {"prompt": [[]]},
            {"prompt": [1, "x"]},
            {"prompt": [99999]},
            {"prompt": [-1]},
            {"prompt": ["x"] * 7},
            {"prompt": "x", "echo": True},
            {"prompt": "x", "suffix": "y"},
        )
    ],
    *[
        ("/v1/adapters", json.dumps(change).encode())
        for change in (
            {},
            {"description": ""},
            {"description": "x" * 91},
            {"description": ["x"]},
            {"description": "x", "n": 2},
            {"description": "x", "n": 0},
            {"description": "x", "n": True},
            {"description": "x", "strength": -0.1},
            {"description": "x", "strength": 2.5},
            {"description": "x", "strength": "strong"},
            {"description": "x", "strength": None},
            {"description": "x", "base": "http://169.254.169.254/"},
            {"description": "x", "checkpoint": "../../etc"},
        )
    ],
]


@pytest.mark.parametrize(("path", "body"), BAD, ids=lambda value: str(value)[:60])
def test_malformed_bodies_get_400_and_the_next_request_is_served(path: str, body: bytes, http: httpx.Client) -> None:
    answer = http.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and error["message"]
    fine = http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 2, "temperature": 0})
    assert fine.status_code == 200


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "valid string"),
        ({"stop": [1]}, "stop", "valid string"),
        ({"tools": [{}]}, "tools", "no such setting"),
        ({"top_k": 20}, "top_k", "no such setting"),
        ({"TextPart": 1}, "TextPart", "no such setting"),
        ({"mesages": [], "messages": 5}, "mesages", "no such setting"),
        ({"top_logprobs": 2}, None, "top_logprobs needs logprobs to be true"),
    ],
)
def test_what_is_wrong_is_named_as_the_request_had_it(
    change: dict[str, Any], param: str | None, message: str, http: httpx.Client
) -> None:
    error = http.post("/v1/chat/completions", json=CHAT | change).json()["error"]
    assert error["param"] == param and error["message"].startswith(f"{param}: " if param else message)
    assert message in error["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"no", "The body is no JSON: "),
        (b"[1]", "The body must be a JSON object"),
        (b"", "The body must be a JSON obj"),
    ],
)
def test_a_body_that_is_no_object_is_called_so(body: bytes, message: str, http: httpx.Client) -> None:
    answer = http.post("/v1/adapters", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(message), answer.text


def test_settings_that_change_nothing_are_taken(http: httpx.Client) -> None:
    nothing: dict[str, Any] = {
        "tools": [], "tool_choice": "none", "parallel_tool_calls": True, "modalities": ["text"], "service_tier": "auto",
        "frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "response_format": {"type": "text"},
    }  # fmt: skip
    for change in (nothing, dict.fromkeys(nothing)):
        answer = http.post("/v1/chat/completions", json=CHAT | {"max_tokens": 2} | change)
        assert answer.status_code == 200, answer.text


def test_common_mistakes_are_told_apart(http: httpx.Client) -> None:
    untyped = http.post("/v1/chat/completions", content=json.dumps(CHAT), headers={"content-type": "text/plain"})
    assert untyped.status_code == 400 and "Content-Type: application/json" in untyped.json()["error"]["message"]
    unknown = http.post("/v1/embeddings", json={})
    assert unknown.status_code == 404 and "POST /v1/embeddings" in unknown.json()["error"]["message"]
    wrong = http.get("/v1/chat/completions")
    assert wrong.status_code == 405 and "GET /v1/chat/completions" in wrong.json()["error"]["message"]
    assert [http.head(path).status_code for path in ("/", "/healthz")] == [200, 200]


@pytest.mark.parametrize(
    "name",
    [
        "gpt-4",
        "../x",
        "/etc/passwd",
        "%2e%2e%2f",
        "t2l-0000000000000000",
        "a\x00b",
        "http://127.0.0.1/x",
        "org/model",
        "",
    ],
)
def test_an_unknown_model_is_404_and_leads_nowhere(name: str, http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json={"model": name, "messages": USER})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    "path", ["/v1/adapters/..%2f..%2fx", "/v1/adapters/%2e%2e", "/v1/adapters/A%00", "/static/../app.py"]
)
def test_paths_in_addresses_lead_nowhere(path: str, server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        reply = b"".join(iter(lambda: connection.recv(65536), b""))
    assert reply.split(b" ", 2)[1] in (b"404", b"400"), reply
    assert b"import" not in reply


def test_a_description_is_data(http: httpx.Client) -> None:
    """Whatever it looks like, it is read as a text."""
    for text in (
        "/etc/passwd",
        "http://169.254.169.254/",
        "t2l:smollm2-135m",
        "org/model@main",
        "../../x",
        "{{ 7*7 }}",
    ):
        made = http.post("/v1/adapters", json={"description": text})
        assert made.status_code in (200, 201) and made.json()["description"] == text


def test_a_description_is_answered_though_another_client_deletes_its_adapter(
    http: httpx.Client, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = server.service.store
    body = {"model": "t2l:Gone at once.", "messages": USER, "max_tokens": 12, "temperature": 0}
    expected = http.post("/v1/chat/completions", json=body).json()
    add, count = store.add, len(store)
    store.delete(expected["model"])

    def added_and_deleted(*args: Any, **options: Any) -> Any:
        found = add(*args, **options)
        store.delete(found[0].id)
        return found

    monkeypatch.setattr(store, "add", added_and_deleted)
    for _ in range(2):
        answer = http.post("/v1/chat/completions", json=body).json()
        assert (answer["choices"], answer["model"]) == (expected["choices"], expected["model"])
    assert len(store) == count - 1


def test_an_adapter_of_another_base_is_kept_and_not_served(http: httpx.Client, server: Server) -> None:
    """A server may be started with another checkpoint and the folder of the last: shapes that fit prove nothing."""
    (adapter,) = server.service.generator.generate(["Of another base."])
    other = replace(adapter, spec=replace(adapter.spec, base_model="another/base"))
    name = server.service.store.add(other)[0].id
    body = {"model": name, "prompt": "x", "max_tokens": 1}
    for answer in (
        http.post("/v1/completions", json=body),
        http.get(f"/v1/adapters/{name}/download?format=gguf"),
        http.get(f"/v1/models/{name}"),
    ):
        assert answer.status_code == 400 and "is for the base another/base" in answer.json()["error"]["message"]
    assert name not in [model["id"] for model in http.get("/v1/models").json()["data"]]
    assert http.get(f"/v1/adapters/{name}").json()["parent"] == "another/base"
    snippets = http.get(f"/v1/adapters/{name}/snippets", params={"text": "x"}).json()["data"]
    assert "another/base" in next(snippet["code"] for snippet in snippets if snippet["title"] == "vLLM")
    assert http.get(f"/v1/adapters/{name}/download").status_code == 200
    assert http.delete(f"/v1/adapters/{name}").status_code == 200


def test_the_log_has_a_failure_under_the_requests_own_id(
    http: httpx.Client, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A fault of ours with its traceback; a client's own deadline without one."""

    for error in (RuntimeError("our fault"), CheckpointError("our file's fault")):
        caplog.clear()
        monkeypatch.setattr(server.service.generator, "generate", Mock(side_effect=error))
        failed = http.post("/v1/adapters", json={"description": "fails"})
        monkeypatch.undo()
        assert failed.status_code == 500
        (told,) = (record for record in caplog.records if record.exc_info)
        assert told.__dict__["fields"] == {"request": failed.headers["x-request-id"]}
    caplog.clear()
    late = http.post("/v1/completions", json={"model": "base", "prompt": "x", "max_tokens": 400, "timeout": 0.001})
    assert late.status_code == 504 and not any(record.exc_info for record in caplog.records)


def test_clients_hear_of_no_place_on_the_servers_machine(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever of its files fails, and the log says which."""

    def failing(make: Callable[..., httpx.Response], place: str, error: Exception, *parts: str) -> None:
        caplog.clear()
        with monkeypatch.context() as broken:
            broken.setattr(place, Mock(side_effect=error))
            answer = make()
        told = answer.json()["error"]["message"]
        assert answer.status_code == 500 and answer.headers["x-should-retry"] == "false"
        assert str(tmp_path) not in answer.text and "/" not in told and all(part in told for part in parts), told
        assert any(str(tmp_path) in caplog.handler.formatter.format(record) for record in caplog.records)  # type: ignore[union-attr]

    base, folder = (make_base(make_config()), make_tokenizer()), tmp_path / "store"
    full = OSError(errno.ENOSPC, "No space left on device", str(folder))
    written = OutputError(f"Cannot write {tmp_path / 'x'}: No space left on device")
    damaged = CheckpointError(f"{folder / 'x.safetensors'} is damaged")
    with running(checkpoint, base, folder) as server, httpx.Client(base_url=server.url, timeout=30) as http:
        create = partial(http.post, "/v1/adapters", json={"description": "Name the colour."})
        failing(create, "t2l.serve.store._write_durably", full, "could not be stored: No space left on device")
        failing(create, "t2l.serve.store.AdapterStore.add", written, "its log says more")
        name = create().json()["id"]
        get = partial(http.get, f"/v1/adapters/{name}/download")
        failing(get, "t2l.adapter.LoraAdapter.save_pretrained", written, "its log says more")
        failing(get, "tempfile.mkdtemp", full, "its log says more")
        server.service.store._cached.clear()
        ask = partial(http.post, "/v1/completions", json={"model": name, "prompt": "x", "max_tokens": 1})
        failing(ask, "t2l.serve.store.read_tensors", damaged, f"file of adapter {name} is damaged; delete the adapter")
        (folder / f"{name}.safetensors").write_bytes(b"half")
        assert str(tmp_path) not in ask().text
        connection = server.service.store._database
        server.service.store._database = Mock(execute=Mock(side_effect=sqlite3.OperationalError("disk I/O error")))
        assert str(tmp_path) not in ask().text and "disk I/O error" in ask().text
        server.service.store._database = connection
        assert http.delete(f"/v1/adapters/{name}").status_code == 200


# --------------------------------------------------------------------------------------------------------- the guard


def test_foreign_hosts_and_origins_are_refused(http: httpx.Client) -> None:
    assert http.get("/v1/models", headers={"host": "evil.example"}).status_code == 421
    assert http.get("/v1/models", headers={"host": "evil.example:80"}).status_code == 421
    for name in LOCAL:
        assert http.get("/v1/models", headers={"host": f"{name}:8000"}).status_code == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
        assert http.post("/v1/chat/completions", json=CHAT, headers={"origin": origin}).status_code == 403
    asked = {"origin": "http://localhost:3000", "access-control-request-method": "POST"}
    preflight = http.request("OPTIONS", "/v1/chat/completions", headers=asked)
    assert preflight.status_code == 403 and "access-control-allow-origin" not in preflight.headers
    assert "Pages of http://localhost:3000 may not use this server" in preflight.json()["error"]["message"]
    own = str(http.base_url).rstrip("/")
    assert http.get("/v1/models", headers={"origin": own}).status_code == 200


def test_pages_of_named_sites_may_ask(checkpoint: Path, tmp_path: Path) -> None:
    """What browsers ask first is answered without a token, and refusals can be read; other sites stay outside."""
    base, site = (make_base(make_config()), make_tokenizer()), "https://app.example"
    guard = Guard(origins=(site, "http://localhost:3000"), token="s3cret")
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-stainless-os"}
    with running(checkpoint, base, tmp_path, guard=guard) as server, httpx.Client(base_url=server.url) as http:
        before = http.options("/v1/completions", headers=asked | {"origin": site})
        allowed = before.headers["access-control-allow-headers"]
        assert before.status_code == 200 and allowed == asked["access-control-request-headers"]
        assert before.headers["access-control-allow-origin"] == site
        assert "access-control-allow-credentials" not in before.headers
        body, bearer = {"model": "base", "prompt": "x", "max_tokens": 1}, {"authorization": "Bearer s3cret"}
        for headers, status in ((bearer, 200), ({}, 401)):
            answer = http.post("/v1/completions", json=body, headers=headers | {"origin": site})
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, site)
            assert "x-request-id" in answer.headers["access-control-expose-headers"]
        for other in ("https://evil.example", "http://app.example", f"{site}:8443", "null", "http://localhost:300"):
            for answer in (
                http.options("/v1/completions", headers=asked | {"origin": other}),
                http.get("/v1/models", headers=bearer | {"origin": other}),
            ):
                assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
        own = http.post("/v1/completions", json=body, headers=bearer | {"origin": server.url})
        assert own.status_code == 200 and "access-control-allow-origin" not in own.headers
        assert http.get("/v1/models", headers={"host": "evil.example", "origin": site}).status_code == 421


def test_bodies_have_an_end(server: Server, http: httpx.Client) -> None:
    huge = b'{"model": "' + b"x" * 2**20 + b'"}'
    assert http.post("/v1/chat/completions", content=huge).status_code == 413
    chunked = http.post("/v1/chat/completions", content=(huge[i : i + 4096] for i in range(0, len(huge), 4096)))
    assert chunked.status_code == 413
    assert http.get("/healthz").status_code == 200


def test_every_answer_carries_the_policy(http: httpx.Client) -> None:
    for answer in (http.get("/"), http.get("/v1/models"), http.get("/nowhere"), http.get("/v1/adapters/x")):
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["x-request-id"]
    assert http.get("/nowhere").json()["error"]["type"] == "invalid_request_error"


def test_token_rate_and_queue(checkpoint: Path, tmp_path: Path) -> None:
    base = make_base(make_config()), make_tokenizer()
    guard = Guard(token="s3cret", requests_per_minute=8)
    with (
        running(checkpoint, base, tmp_path, limits=Limits(rows=1, waiting=1), guard=guard) as server,
        httpx.Client(base_url=server.url, timeout=30) as http,
    ):
        assert http.get("/healthz").status_code == 200 and http.get("/").status_code == 200
        for given in ("", "Bearer wrong", "Bearer s3cret!", "s3cret", "Basic s3cret", "Bearer", "Bearer  s3cret"):
            headers = {"authorization": given} if given else {}
            refused = http.get("/v1/models", headers=headers)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
            assert http.get("/metrics", headers=headers).status_code == 401
        for scheme in ("bearer", "Bearer"):  # its case does not matter, see RFC 9110
            http.headers["authorization"] = f"{scheme} s3cret"
            assert http.get("/v1/models").status_code == 200
        gate = threading.Event()
        server.service.engine.run(gate.wait)
        body = {"model": "base", "prompt": "x", "max_tokens": 2, "n": 2}
        full = http.post("/v1/completions", json=body)
        assert full.status_code == 429 and "1 requests wait" in full.json()["error"]["message"]
        assert full.headers["retry-after"]
        gate.set()
        wait_for(lambda: not any(server.service.engine.state.values()))
        codes = [http.post("/v1/completions", json={**body, "n": 1}).status_code for _ in range(10)]
        assert codes[0] == 200 and codes[-1] == 429
