"""Requests that nobody means well: whatever comes, it is answered or refused, and the server goes on as before."""

import copy
import json
import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import make_base, make_config, make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serve_helpers import Server, running

from t2l.serve.guard import Guard
from t2l.serve.limits import Limits

ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "base",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"}]}],
        "stop": ["x"],
        "n": 2,
        "seed": 1,
        "logprobs": True,
        "top_logprobs": 2,
        "temperature": 0.5,
        "stream_options": {"include_usage": True},
        "max_tokens": 2,
    },
    "/v1/completions": {"model": "base", "prompt": [[5, 6], [7]], "logprobs": 1, "top_p": 0.9, "max_tokens": 2},
    "/v1/adapters": {"description": "Name a fruit.", "strength": 0.5, "n": 1},
}
DEEP = json.loads("[" * 200 + "]" * 200)
HOSTILE: list[Any] = [
    None, True, False, 0, -1, 2**31, 2**63, 10**400, 1.5, 1e308, -1e308, float("nan"), float("inf"), [], [[]], {},
    "", " ", "1", "\x00", "\ud800", "\u202e", "é" * 5000, "../../etc/passwd", "http://127.0.0.1/", "<script>", "t2l:",
    "t2l:\x00", "base:base:", DEEP, {"a": DEEP}, ["x"] * 5000, [0] * 5000, [[0]] * 100, {"": ""}, [None],
    {"type": "text", "text": 1},
]  # fmt: skip


@pytest.fixture(scope="module")
def server(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("fuzz")
    base = make_base(make_config()), make_tokenizer()
    limits = Limits(max_tokens=4, choices=4)
    guard = Guard(requests_per_minute=10**6)
    checkpoint = make_checkpoint(folder / "checkpoint")
    with running(checkpoint, base, folder / "store", limits=limits, guard=guard) as server:
        yield server


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


@pytest.fixture(autouse=True)
def goes_on(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """After each test the base answers to the bit as before, nothing is left running and no fault was logged."""

    def answer() -> Any:
        body = {"model": "base", "prompt": "The base", "max_tokens": 4, "temperature": 0, "logprobs": 5}
        return http.post("/v1/completions", json=body).json()["choices"]

    before = answer()
    with caplog.at_level(logging.ERROR, "t2l"):
        yield
    assert answer() == before
    state = http.get("/healthz").json()
    assert (state["status"], state["running"], state["waiting"]) == ("ok", 0, 0)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("t2l")] == []


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a JSON value."""
    found = [path] if path else []
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [place for key, part in inside for place in places(part, (*path, key))]


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, bytes]:
    """A good body with something wrong in one or two places, and sometimes with broken bytes."""
    route = draw(st.sampled_from(sorted(ROUTES)))
    body = copy.deepcopy(ROUTES[route])
    for _ in range(draw(st.integers(1, 2))):
        *way, last = draw(st.sampled_from(places(body)))
        inner = body
        for key in way:
            inner = inner[key]
        how = draw(st.sampled_from(["value", "value", "value", "gone", "key"]))
        if how == "value":
            inner[last] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
        elif how == "gone":
            del inner[last]
        elif isinstance(inner, dict):
            inner[draw(st.sampled_from(["path", "", "\ud800", "__proto__", "x" * 3000]))] = 1
    data = json.dumps(body).encode()
    at = draw(st.integers(0, len(data)))
    broken = draw(st.sampled_from(["whole"] * 4 + ["cut", "byte", "twice"]))
    if broken == "cut":
        return route, data[:at]
    if broken == "byte":
        return route, data[:at] + draw(st.sampled_from([b"\xff", b"\x00", b'"', b"{", b"\xed\xa0\x80"])) + data[at:]
    return route, data * 2 if broken == "twice" else data


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made=bodies())
def test_a_body_is_answered_or_refused_with_the_reason(made: tuple[str, bytes], http: httpx.Client) -> None:
    route, data = made
    answer = http.post(route, content=data, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 201, 400, 404), (answer.status_code, data[:300], answer.text[:300])
    if "event-stream" not in answer.headers["content-type"]:
        body = answer.json()
        assert answer.status_code < 400 or (body["error"]["message"] and body["error"]["type"])
    assert len(answer.content) < 20_000, "what was sent is not sent back"


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
GOOD = b'{"model": "base", "prompt": "x", "max_tokens": 1}'
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
WHOLE = HEAD + b"Content-Length: %d\r\n" % len(GOOD)
RAW: dict[str, bytes] = {
    "nothing": b"",
    "no http": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200,
    "http/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no version": b"GET /\r\n\r\n",
    "two hosts": WHOLE + b"Host: evil.example\r\n\r\n" + GOOD,
    "no host": b"GET /v1/models HTTP/1.1\r\n\r\n",
    "long target": b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "long header": HEAD + b"X: " + b"a" * 200_000 + b"\r\n\r\n",
    "many headers": HEAD + b"X: y\r\n" * 20_000 + b"\r\n",
    "header bytes": HEAD + b"X: \xff\xfe\x00\r\nContent-Length: 2\r\n\r\n{}",
    "chunk size is no number": CHUNKED + b"zz\r\n" + GOOD + b"\r\n0\r\n\r\n",
    "chunk size is negative": CHUNKED + b"-5\r\n" + GOOD + b"\r\n0\r\n\r\n",
    "chunk size is huge": CHUNKED + b"f" * 40 + b"\r\n" + GOOD,
    "chunk larger than said": CHUNKED + b"3\r\n" + GOOD + b"\r\n0\r\n\r\n",
    "chunks do not end": CHUNKED + b"%x\r\n" % len(GOOD) + GOOD + b"\r\n",
    "chunk extension": CHUNKED + b"%x;a=b\r\n" % len(GOOD) + GOOD + b"\r\n0\r\nTrailer: x\r\n\r\n",
    "no chunk at all": CHUNKED + b"0\r\n\r\n",
    "chunked and a length": WHOLE + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + GOOD,
    "unknown coding": HEAD + b"Transfer-Encoding: gzip\r\n\r\n" + GOOD,
    "two lengths": WHOLE + b"Content-Length: 3\r\n\r\n" + GOOD,
    "length is negative": HEAD + b"Content-Length: -1\r\n\r\n" + GOOD,
    "length is no number": HEAD + b"Content-Length: ten\r\n\r\n" + GOOD,
    "length of Unicode digits": HEAD + "Content-Length: ²\r\n\r\n".encode("latin-1") + GOOD,
    "length is huge": HEAD + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n" + GOOD,
    "body shorter than said": HEAD + b"Content-Length: 500\r\n\r\n" + GOOD,
    "packed body": WHOLE + b"Content-Encoding: gzip\r\n\r\n" + GOOD,
    "another type": WHOLE.replace(b"application/json", b"multipart/form-data; boundary=x") + b"\r\n" + GOOD,
    "upgrade": HEAD + b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\n\r\n",
    "expects": WHOLE + b"Expect: 100-continue\r\n\r\n" + GOOD,
}


@pytest.mark.parametrize("sent", RAW.values(), ids=RAW.keys())
def test_odd_bytes_get_an_answer_or_the_door(sent: bytes, server: Server) -> None:
    """A client that then says no more: the server answers with a status of its own or hangs up, and soon."""
    host, port = server.url.removeprefix("http://").split(":")
    reply = b""
    with socket.create_connection((host, int(port)), timeout=15) as connection:
        try:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(65536):
                reply += piece
        except OSError:
            pass  # hung up while we were still talking
    statuses = [int(line.split()[1]) for line in reply.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
    assert all(status in (100, 200, 400, 404, 405, 411, 413, 421, 426, 431, 501) for status in statuses), reply[:500]
    assert b"Traceback" not in reply


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("/v1/adapters", {"limit": limit}) for limit in ("0", "-1", "1e9", "NaN", "x", "9" * 400, "")
    ] + [
        ("/v1/adapters", {"after": after}) for after in ("..", "\x00", "x" * 65, "'; drop table adapters; --", "é")
    ] + [
        ("/v1/adapters/t2l-0000000000000000/snippets", {"text": "x" * 20_001}),
        ("/v1/adapters/t2l-0000000000000000/snippets", {}),
        ("/v1/adapters/t2l-0000000000000000/download", {"format": "../../etc/passwd"}),
        ("/v1/models/" + "a/" * 2000, {}),
        ("/v1/models/t2l:x", {}),
    ],
)  # fmt: skip
def test_odd_questions_are_refused(path: str, query: dict[str, str], http: httpx.Client) -> None:
    answer = http.get(path, params=query)
    assert answer.status_code in (400, 404) and answer.json()["error"]["message"]
