"""What the tests of the sandbox share: runs, and processes that carry a mark."""

import textwrap

import pytest

from t2l.eval import sandbox

REFUSED = sandbox.available()
isolated = pytest.mark.skipif(REFUSED is not None, reason=f"no sandbox on this system: {REFUSED}")


def run(code: str, *, timeout: float = 10.0, memory_bytes: int = 512 << 20) -> sandbox.Outcome:
    return sandbox.run_python(textwrap.dedent(code), timeout=timeout, memory_bytes=memory_bytes, allow=True)
