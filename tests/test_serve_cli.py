"""`t2l serve` as a program: it starts, survives being killed, and ends when it is told to."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from t2l.cli import app
from t2l.errors import ConfigError
from t2l.serve.launch import Settings, is_loopback


@contextmanager
def program(checkpoint: Path, folder: Path) -> Any:
    command = [sys.executable, "-m", "t2l", "serve", "--port", "0", "--checkpoint", str(checkpoint)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("T2L_TOKEN", None)
    with subprocess.Popen(
        [*command, "--folder", str(folder)], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if "running on http" in line:
                break
        else:
            raise AssertionError("".join(said))
        try:
            yield process, line.split("running on ")[1].split()[0]
        finally:
            process.kill()


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


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_other_addresses_demand_a_token(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("T2L_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="T2L_TOKEN"):
        Settings(folder=tmp_path, host=host)
    assert Settings(folder=tmp_path, host=host, token="x").token == "x"
    done = CliRunner().invoke(app, ["serve", "--host", host])
    assert done.exit_code == 1 and "T2L_TOKEN" in done.output


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


def test_without_its_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["serve"])
    assert done.exit_code == 1 and "pip install 'text-to-lora[serve]'" in done.output
