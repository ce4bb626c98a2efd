"""HumanEval and MBPP: from a model's answer to the program whose end says whether the answer is right.

Pure functions of strings: they parse Python and never run it; `t2l.eval.sandbox` does. Conventions are those of the
benchmarks: HumanEval (arXiv 2107.03374) continues a function's head, MBPP (arXiv 2108.07732) writes a whole function.
"""

import ast
import re
import textwrap
import warnings
from collections.abc import Sequence

_FENCE = re.compile(r"^[ \t]*(?P<mark>`{3,}|~{3,})[ \t]*(?P<language>[\w+.-]*)[^\n`]*$", re.MULTILINE)
_PYTHON = ("", "py", "python", "python3", "python2", "py3", "pycon")
_CODE_START = re.compile(r"^(?:def|class|import|from|async def|@)(?=[\s\w])", re.MULTILINE)
_MAX_PARSES = 400


def extract_code(answer: str, names: Sequence[str] = ()) -> str:
    """The code in an answer: a fenced block, or the answer itself without what stands around the code.

    Args:
        answer: What the model said.
        names: Functions that are asked for. Of several blocks, the first that defines one of them is taken, otherwise
            the first Python block. A block that is cut off by the end of the answer counts.

    Returns:
        Code with line feeds only; whether it is valid Python is another question.
    """
    answer = answer.replace("\r\n", "\n").replace("\r", "\n")
    blocks = _blocks(answer)
    if blocks:
        return next((block for block in blocks if _defines(block, names)), blocks[0])
    if parses(answer):
        return answer
    start = _CODE_START.search(answer)
    if start is None:
        return answer
    return _longest_that_parses(answer[start.start() :]) or answer


def humaneval_program(prompt: str, completion: str, test: str, entry_point: str) -> str:
    """A program that ends well if and only if the completion passes the item's tests.

    Args:
        prompt: The item's imports, helpers, function head and docstring.
        completion: The model's answer: the function's body, or the whole function, fenced or not.
        test: The item's tests, which define `check`.
        entry_point: Name of the function.
    """
    prompt = prompt.replace("\r\n", "\n")
    code = extract_code(completion, (entry_point,))
    if not _defines(code, (entry_point,)):
        # The head is the prompt's, so the answer is a body; code after it (another function, prints) is not wanted.
        raw = completion.replace("\r\n", "\n").replace("\r", "\n") if not _blocks(completion) else code
        code = _body(prompt, raw)
    # A whole function comes after the prompt too: it may use the prompt's imports and helpers.
    return f"{prompt.rstrip()}\n{code}\n\n{test}\n\ncheck({entry_point})\n"


def mbpp_program(code: str, tests: Sequence[str], setup: str = "") -> str:
    """A program that ends well if and only if the code passes the item's tests.

    Args:
        code: The model's answer, fenced or not.
        tests: Assertions.
        setup: What the assertions need; it may use what the code defines.
    """
    names = [name for test in tests for name in re.findall(r"\b([A-Za-z_]\w*)\s*\(", test)]
    parts = [extract_code(code, tuple(dict.fromkeys(names))), setup, *tests]
    return "\n".join(part.replace("\r\n", "\n") for part in parts) + "\n"


def parses(code: str) -> bool:
    """Whether the text is valid Python with anything in it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like are the model's affair
            return bool(ast.parse(code).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _blocks(answer: str) -> list[str]:
    """Contents of fenced Python blocks, in order; the last may lack its end."""
    found, position = [], 0
    while (start := _FENCE.search(answer, position)) is not None:
        closing = re.compile(rf"^[ \t]*{re.escape(start['mark'])}[ \t]*$", re.MULTILINE)
        end = closing.search(answer, start.end())
        stop = len(answer) if end is None else end.start()
        position = stop if end is None else end.end()
        if start["language"].lower() in _PYTHON:
            found.append(textwrap.dedent(answer[start.end() : stop].removeprefix("\n")))
    return [block for block in found if block.strip()]


def _defines(code: str, names: Sequence[str]) -> bool:
    """Whether the code's outermost level defines one of the functions; a name in a comment or string is none."""
    return any(re.search(rf"^(?:async )?def {re.escape(name)}\b", code, re.MULTILINE) for name in names)


def _longest_that_parses(code: str, head: str = "") -> str:
    """The longest run of whole lines from the start that is valid Python after `head`; empty if there is none."""
    lines = code.split("\n")
    for end in range(len(lines), max(0, len(lines) - _MAX_PARSES), -1):
        candidate = "\n".join(lines[:end])
        if candidate.strip() and parses(head + candidate):
            return candidate
    return ""


def _body(prompt: str, answer: str) -> str:
    """A function's body that continues the prompt: of the ways to read the answer, the one that uses most of it."""
    head = prompt.rstrip() + "\n"
    answer = answer.strip("\n")
    # As it is; with the indentation of the first line, which stripping took; written at the margin.
    first, indented = f"    {answer.lstrip()}", textwrap.indent(answer, "    ")
    readings = [_inside(text, head) for text in (answer, first)] + [_longest_that_parses(indented, head)]
    best = max(readings, key=lambda text: sum(bool(line.strip()) for line in text.split("\n")))
    return best or answer


def _inside(text: str, head: str) -> str:
    """What comes before the first line at the margin, if that is valid Python; else as much as is, at any margin."""
    if not text[:1].isspace():
        return ""
    outside = re.search(r"^\S", text, re.MULTILINE)
    body = text if outside is None else text[: outside.start()]
    return body if body.strip() and parses(head + body) else _longest_that_parses(text, head)
