"""`t2l serve` as a program: it starts, survives being killed, and ends when it is told to."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serve_helpers import program
from typer.testing import CliRunner

from t2l.cli import app
from t2l.errors import ConfigError
from t2l.serve.launch import Settings, is_loopback, spoken


def test_killed_and_started_again_it_serves_every_acknowledged_adapter(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 8, "temperature": 0}
    with program(checkpoint, tmp_path / "store") as (process, url):
        made = [httpx.post(f"{url}/v1/adapters", json={"description": f"Task {n}."}).json() for n in range(3)]
        asked = [body | {"model": one["id"]} for one in made]
        before = [httpx.post(f"{url}/v1/chat/completions", json=one).json()["choices"] for one in asked]
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    with program(checkpoint, tmp_path / "store") as (process, url):
        assert [httpx.post(f"{url}/v1/chat/completions", json=one).json()["choices"] for one in asked] == before
        assert [one["sha256"] for one in httpx.get(f"{url}/v1/adapters").json()["data"]] == [
            one["sha256"] for one in reversed(made)
        ]
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) in (0, -signal.SIGTERM)
        assert process.stderr is not None
        lines = [json.loads(line) for line in process.stderr]
    asked_of_it = [line for line in lines if line["message"] == "request"]
    assert [line["status"] for line in asked_of_it] == [200] * 4
    assert {line["path"] for line in asked_of_it} == {"/v1/chat/completions", "/v1/adapters"}


STREAM: Any = {"model": "base", "prompt": "Once", "temperature": 0, "stream": True, "max_tokens": 400}


class Stream(threading.Thread):
    """Reads an answer as it comes."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__()
        self.url, self.options, self.lines, self.begun = url, options, [""], threading.Event()
        self.start()
        assert self.begun.wait(20)

    def run(self) -> None:
        body = STREAM | self.options
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=60) as lines:
            for line in filter(None, lines.iter_lines()):
                self.lines.append(line)
                self.begun.set()


def test_told_to_stop_it_lets_streams_end_and_refuses_new_requests(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    with program(checkpoint, tmp_path / "store", "--rows", "1") as (process, url):
        stream = Stream(url, n=3, max_tokens=200)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert stream.is_alive() and process.poll() is None
        for refused in (
            httpx.post(f"{url}/v1/completions", json=STREAM),
            httpx.post(f"{url}/v1/adapters", json={"description": "Too late."}),
            httpx.get(f"{url}/"),
        ):
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
            assert refused.json()["error"]["code"] == "shutting_down"
        health = httpx.get(f"{url}/healthz")
        assert (health.status_code, health.json()["status"]) == (503, "closing")
        assert httpx.get(f"{url}/metrics").status_code == 200
        stream.join(60)
        told = [json.loads(line.removeprefix("data: ")) for line in stream.lines[1:-1]]
        ends = [choice["finish_reason"] for event in told for choice in event["choices"] if choice["finish_reason"]]
        assert ends == ["length"] * 3 and stream.lines[-1] == "data: [DONE]"
        assert process.wait(10) in (0, -signal.SIGTERM)


@pytest.mark.parametrize("signals", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_takes_too_long_is_told_so(signals: int, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """A stream ends with an error and [DONE], which OpenAI's client raises; a whole answer is 503. A second signal
    does not wait for the time to be up."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    grace = "1" if signals == 1 else "60"
    with program(checkpoint, tmp_path / "store", "--rows", "1", "--grace", grace) as (process, url):
        stream, statuses = Stream(url, n=16), []

        def whole() -> None:
            body = STREAM | {"stream": False, "n": 16}
            statuses.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code)

        def by_the_client() -> None:
            with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
                try:
                    list(client.completions.create(**STREAM | {"n": 16}))
                except openai.APIError as error:
                    statuses.append(error.message)

        others = [threading.Thread(target=target) for target in (whole, by_the_client)]
        for other in others:
            other.start()
        while httpx.get(f"{url}/healthz").json()["waiting"] < 40:
            time.sleep(0.02)
        told = time.monotonic()
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
        assert process.wait(20) in (0, -signal.SIGTERM) and time.monotonic() - told < 10
        for thread in (stream, *others):
            thread.join(20)
    error = json.loads(stream.lines[-2].removeprefix("data: "))["error"]
    assert "shutting down" in error["message"] and stream.lines[-1] == "data: [DONE]"
    assert set(map(str, statuses)) == {"503", error["message"]}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_other_addresses_demand_a_token(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("T2L_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="T2L_TOKEN"):
        Settings(folder=tmp_path, host=host)
    assert Settings(folder=tmp_path, host=host, token="x").token == "x"
    done = CliRunner().invoke(app, ["serve", "--host", host])
    assert done.exit_code == 1 and "T2L_TOKEN" in done.output


@pytest.mark.parametrize(
    "origin", ["*", "null", "app.example", "https://*.example", "https://app.example/chat", "https://App.example",
               "http://localhost:80", "https://app.example:443", "https://a.example,https://b.example", "", "a://b c"],
)  # fmt: skip
def test_only_an_origin_that_a_browser_names_is_allowed(origin: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no origin as browsers name one"):
        Settings(folder=tmp_path, allow_origins=("https://app.example", origin))


def test_origins_are_taken(tmp_path: Path) -> None:
    named = ("https://app.example", "http://localhost:3000", "http://[::1]:8080", "chrome-extension://abc", "tauri://x")
    assert Settings(folder=tmp_path, allow_origins=named).allow_origins == named


def test_a_port_in_use_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = ["serve", "--port", port, "--folder", str(tmp_path / "store"), "--checkpoint", "t2l:no-such-one"]
        done = CliRunner().invoke(app, command)
    assert done.exit_code == 1 and f"port {port}: Address already in use; give it another --port" in done.output
    assert not (tmp_path / "store").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir(mode=0o500)
    done = CliRunner().invoke(app, ["serve", "--port", "0", "--folder", str(tmp_path / "store")])
    assert done.exit_code == 1 and "cannot hold adapters" in done.output


def test_own_addresses_do_not(tmp_path: Path) -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3"))
    hosts = ("0.0.0.0", "::", "::1", "My-Machine", "192.168.1.5")
    assert [spoken(host) for host in hosts] == ["127.0.0.1", "127.0.0.1", "[::1]", "my-machine", "192.168.1.5"]


def test_without_its_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["serve"])
    assert done.exit_code == 1 and "pip install 'text-to-lora[serve]'" in done.output
