"""Answers become the programs that they mean."""

import json
import os
from pathlib import Path

import pytest
from sandbox_helpers import isolated

from t2l.eval import sandbox
from t2l.eval.code import extract_code, humaneval_program, mbpp_program

PROMPT = (
    "from typing import List\n\n\n"
    'def add(a: int, b: int) -> int:\n    """Add two numbers.\n    >>> add(1, 2)\n    3\n    """\n'
)
TEST = "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n"
WHOLE = "def add(a, b):\n    return a + b"


def verdict(program: str) -> bool:
    """What the sandbox would say; these programs are ours, so they may run here."""
    try:
        exec(compile(program, "program.py", "exec", dont_inherit=True), {"__name__": "program"})
    except Exception:
        return False
    return True


RIGHT = {
    "body": "    return a + b",
    "body, stripped": "return a + b",
    "body of two lines, stripped": "total = a + b\n    return total",
    "body without indentation": "total = a + b\nif total:\n    return total\nreturn 0",
    "body, then another function cut off": "    return a + b\n\n\ndef main():\n    print(add(1,",
    "body, then prose": "    return a + b\n\nThis function adds its arguments.",
    "body, then a wrong assertion": "    return a + b\n\nassert add(1, 1) == 3",
    "body without indentation, then prose": "c = a + b\nreturn c\n\nThis adds the numbers.",
    "body with branches, stripped, then prose": "if a:\n        return a + b\n    return b + a\n\nThis adds.",
    "body with a line at the margin inside a string": '    text = """\nx\n"""\n    return a + b',
    "body with Windows line ends": "    c = a + b\r\n    return c\r\n",
    "whole function": WHOLE,
    "the prompt again": PROMPT + "    return a + b\n",
    "prose around the function": f"Here is the function:\n\n{WHOLE}\n\nIt adds: `add(1, 2)`.",
    "fenced": f"Sure!\n\n```python\n{WHOLE}\n```\n\nDone.",
    "fenced without a language": f"```\n{WHOLE}\n```",
    "fenced with tildes and py": f"~~~py\n{WHOLE}\n~~~",
    "fenced body": "```python\n    return a + b\n```",
    "fenced body at the margin": "```python\nc = a + b\nreturn c\n```",
    "fence never closed": f"```python\n{WHOLE}\n",
    "fence in a list": "1. Code:\n   ```python\n   def add(a, b):\n       return a + b\n   ```",
    "shell block first": f"```bash\npip install add\n```\n```python\n{WHOLE}\n```",
    "usage block first": f"```python\nprint(add(1, 2))\n```\nwith\n```python\n{WHOLE}\n```",
    "usage block last": f"```python\n{WHOLE}\n```\n```python\nassert add(1, 2) == 4\n```",
    "imports and a helper": f"```python\nimport math\n\ndef helper(x):\n    return x\n\n{WHOLE}\n```",
    "main guard that would fail": f"```python\n{WHOLE}\n\nif __name__ == '__main__':\n    raise SystemExit(1)\n```",
    "backticks inside the code": '```python\ndef add(a, b):\n    """Use `add`."""\n    return a + b\n```',
    "own check": "```python\ndef add(a, b):\n    return a + b\n\ndef check(f):\n    raise ValueError\n```",
}
WRONG = {
    "nothing": "",
    "blank": " \n\n",
    "prose": "The function adds the numbers.",
    "only a mention": "    # def add(a, b): return a + b\n    pass",
    "wrong sum": "    return a - b",
    "own check that passes": "    return a - b\n\ndef check(f):\n    pass",
    "cut off": "    return (a +",
    "another function": "```python\ndef plus(a, b):\n    return a + b\n```",
    "right in prose, wrong in code": f"{WHOLE}\n\n```python\ndef add(a, b):\n    return a\n```",
}


@pytest.mark.parametrize("name", [*RIGHT, *WRONG])
def test_humaneval_program(name: str) -> None:
    answer = (RIGHT | WRONG)[name]
    assert verdict(humaneval_program(PROMPT, answer, TEST, "add")) is (name in RIGHT)


def test_humaneval_prompts_keep_imports_and_helpers() -> None:
    prompt = "import math\n\ndef helper(x):\n    return math.floor(x)\n\ndef down(x: float):\n    '''Round down.'''\n"
    test = "def check(candidate):\n    assert candidate(1.5) == 1\n"
    for answer in ("    return helper(x)", "```python\ndef down(x):\n    return helper(math.fabs(x))\n```"):
        assert verdict(humaneval_program(prompt, answer, test, "down"))


def test_mbpp_program() -> None:
    tests = ["assert add(1, 2) == 3", "assert set([add(1, 1)]) == {2}"]
    for name, answer in RIGHT.items():
        if "body" not in name and "check" not in name:
            assert verdict(mbpp_program(answer, tests)), name
    for name, answer in WRONG.items():
        assert not verdict(mbpp_program(answer, tests)), name
    node = "class Node:\r\n    def __init__(self, x):\r\n        self.x = x\r\ndef get(n):\r\n    return n.x"
    assert verdict(mbpp_program(node, ["assert get(root) == 5"], "root = Node(5)"))


def test_code_that_warns_or_is_no_code_is_only_text() -> None:
    assert extract_code("x = '\\d'\n") == "x = '\\d'\n"
    assert extract_code("```json\n{}\n```\nNo code.") == "```json\n{}\n```\nNo code."
    assert extract_code("def f():\n    return 1\nand that is all\x00") == "def f():\n    return 1"
    assert extract_code("(" * 5000) == "(" * 5000


@isolated
def test_reference_solutions_pass_and_spoilt_ones_fail() -> None:
    folder = os.environ.get("T2L_DATA")
    if folder is None:
        pytest.skip("T2L_DATA is not set")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(Path(folder) / "benchmarks.parquet").to_pylist()
    human = [row for row in rows if row["benchmark"] == "humaneval"][::12]
    mbpp = [row for row in rows if row["benchmark"] == "mbpp" and row["split"] == "test"][::40]
    programs = []
    for row in human:
        code = json.loads(row["code"])
        for answer in (row["answer"], "    return NotImplemented"):
            programs.append(humaneval_program(row["input"], answer, code["test"], code["entry_point"]))
    for row in mbpp:
        code = json.loads(row["code"])
        for answer in (f"```python\n{row['answer']}\n```", "pass"):
            programs.append(mbpp_program(answer, code["test_list"], code["test_setup_code"]))
    outcomes = [outcome.ok for outcome in sandbox.run_many(programs, allow=True)]
    assert outcomes == [True, False] * (len(human) + len(mbpp))
