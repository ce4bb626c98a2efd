"""The program of docs/ecosystem.md under Ray Serve: each request is answered by the adapter that its header names."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import t2l

pytest.importorskip("ray.serve", reason="Ray Serve is not installed (pip install 'ray[serve]')", exc_type=ImportError)
PAGE = Path(__file__).resolve().parents[1] / "docs" / "ecosystem.md"
ASK = """
import json, urllib.request
from app import DESCRIPTIONS, app
from ray import serve

serve.start(http_options={{"host": "127.0.0.1", "port": {port}}})
serve.run(app)
for name in (*DESCRIPTIONS, *DESCRIPTIONS):
    body = json.dumps({{"input": "A dull film; I left early."}}).encode()
    request = urllib.request.Request("http://127.0.0.1:{port}", body, {{"serve_multiplexed_model_id": name}})
    print("answer", json.dumps(urllib.request.urlopen(request).read().decode()))
serve.shutdown()
"""


@pytest.mark.slow
def test_requests_are_answered_by_the_adapter_that_they_name(make_checkpoint: Any, tmp_path: Path) -> None:
    checkpoint = str(make_checkpoint(tmp_path / "checkpoint"))
    (program,) = re.findall(r"^```python\n(import asyncio\n.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (tmp_path / "app.py").write_text(program.replace("t2l:smollm2-135m", checkpoint), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", ASK.format(port=port)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.removeprefix("answer ") for line in done.stdout.splitlines() if line.startswith("answer ")]
    texts = re.findall(r'^    "\w+": "(.*)",$', program, re.MULTILINE)
    expected = [t2l.function(text, checkpoint=checkpoint)("A dull film; I left early.") for text in texts]
    assert len(texts) == 2 and expected[0] != expected[1]
    assert [json.loads(line) for line in lines] == expected * 2
