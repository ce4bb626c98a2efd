"""Asks a chat endpoint for further descriptions of tasks, and writes them down task by task.

Knows tasks and one HTTP request. The key comes from the environment and goes nowhere but into that request's header.
"""

import http.client
import ipaddress
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from t2l.encoder import check_description
from t2l.errors import ConfigError, DataError, DescriptionError, DownloadError, OutputError
from t2l.tasks import Task, load_descriptions

KEY_VARIABLE = "OPENAI_API_KEY"
MAX_CHARACTERS = 1000
"""A longer text is no description but an answer that went astray."""
MAX_ANSWER = 2_000_000
SHOWN_DESCRIPTIONS, SHOWN_EXAMPLES, SHOWN_CHARACTERS = 6, 4, 600
ROUNDS = 3
"""How often a task is asked about before too few usable descriptions are an error or are accepted."""
ATTEMPTS = 6
TRANSIENT = (408, 409, 429)

Say = Callable[[str], None]


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another address."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Never."""


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible chat endpoint."""

    url: str
    model: str
    key: str | None = None
    timeout: float = 120.0
    temperature: float = 1.0

    def __repr__(self) -> str:
        return f"Endpoint({self.url}, {self.model})"


def open_endpoint(url: str, model: str, *, timeout: float = 120.0) -> Endpoint:
    """An endpoint with the key of the environment.

    Raises:
        ConfigError: if the address cannot be one, holds a password, or would take the key unencrypted elsewhere.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--endpoint must be an http or https address such as http://localhost:8000, got {url!r}")
    if parts.username or parts.password or parts.query:
        raise ConfigError(f"--endpoint must hold no user name, password or query; put the key into {KEY_VARIABLE}")
    key = os.environ.get(KEY_VARIABLE, "").strip() or None
    if key is not None and re.fullmatch(r"[!-~]+", key) is None:
        raise ConfigError(f"{KEY_VARIABLE} holds spaces or signs that cannot stand in a header")
    if key is not None and parts.scheme == "http" and not _is_here(parts.hostname):
        raise ConfigError(f"{KEY_VARIABLE} would go unencrypted to {parts.hostname}; give an https address")
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path += "/chat/completions" if path.endswith("/v1") else "/v1/chat/completions"
    return Endpoint(f"{parts.scheme}://{parts.netloc}{path}", model, key, timeout)


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# ------------------------------------------------------------------------------------------------ the request


def ask(endpoint: Endpoint, messages: list[dict[str, str]], *, say: Say, sleep: Callable[[float], None]) -> str:
    """The text of the answer, after as many attempts as are worth making.

    Raises:
        DownloadError: if the endpoint refuses, is not there, or answers with something else.
    """
    body = json.dumps({"model": endpoint.model, "messages": messages, "temperature": endpoint.temperature}).encode()
    headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "t2l"}
    if endpoint.key is not None:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    opener = urllib.request.build_opener(_NoRedirects)
    for attempt in range(1, ATTEMPTS + 1):
        request = urllib.request.Request(endpoint.url, data=body, headers=headers, method="POST")
        delay: float | None = None
        try:
            with opener.open(request, timeout=endpoint.timeout) as response:
                answer = response.read(MAX_ANSWER)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(2000).decode("utf-8", errors="replace")
                asked = error.headers.get("Retry-After", "")
            reason, again = f"HTTP {error.code}: {_short(said, endpoint)}", error.code in TRANSIENT or error.code >= 500
            delay = float(asked) if asked.isdecimal() else None
        except (OSError, http.client.HTTPException) as error:  # no connection, reset, time-out, half an answer
            inner = getattr(error, "reason", error)
            reason, again = f"{type(inner).__name__}: {_short(str(inner), endpoint)}", True
        else:
            return _content(answer, endpoint)
        if not again or attempt == ATTEMPTS:
            tries = f" after {attempt} attempts" if attempt > 1 else ""
            raise DownloadError(f"{endpoint.url} gave no answer{tries}: {reason}")
        delay = min(300.0, 2.0**attempt if delay is None else delay)
        say(f"{endpoint.url}: {reason}; trying again in {delay:.0f} s")
        sleep(delay)
    raise AssertionError("unreachable")


def _short(text: str, endpoint: Endpoint) -> str:
    """What a server said, on one line, and never the key, which some servers quote."""
    if endpoint.key is not None:
        text = text.replace(endpoint.key, "[key]")
    return " ".join(text.split())[:300]


def _content(body: bytes, endpoint: Endpoint) -> str:
    try:
        answer = json.loads(body)
        content = answer["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DownloadError(
            f"{endpoint.url} does not answer like a chat endpoint (no choices[0].message.content): "
            f"{_short(body[:200].decode('utf-8', errors='replace'), endpoint)}"
        ) from error
    return content if isinstance(content, str) else ""


def make_messages(task: Task, known: Sequence[str], number: int) -> list[dict[str, str]]:
    """What is asked. Test examples are never shown."""
    examples = [*task.examples.get("train", ()), *task.examples.get("val", ())][:SHOWN_EXAMPLES]
    parts = ["A task for a language model is described like this:"]
    parts += [f"- {_clip(text)}" for text in known[:SHOWN_DESCRIPTIONS]]
    if examples:
        parts += ["", "Examples of its inputs and right outputs:"]
        parts += [f"Input: {_clip(e.input)}\nOutput: {_clip(e.outputs[0])}" for e in examples]
    parts += [
        "",
        f"Write {number} further descriptions of this same task. Each says what to do and what the answer looks like, "
        "is worded differently from all others, has one to three sentences, and quotes no example. Answer with a JSON "
        f"list of {number} strings and nothing else.",
    ]
    system = "You write clear descriptions of tasks. You answer with valid JSON only."
    return [{"role": "system", "content": system}, {"role": "user", "content": "\n".join(parts)}]


def _clip(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


def read_answer(content: str, known: Sequence[str]) -> list[str]:
    """The usable descriptions of an answer: valid, short enough, and not there already.

    Raises:
        DataError: if the answer holds no JSON list of texts.
    """
    start, end = content.find("["), content.rfind("]")
    try:
        found = json.loads(content[start : end + 1])
    except ValueError as error:
        raise DataError(f"the answer holds no JSON list: “{' '.join(content.split())[:120]}”") from error
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise DataError("the answer is no JSON list of texts")
    seen = {_plain(text) for text in known}
    usable = []
    for text in found:
        try:
            checked = check_description(text)
        except DescriptionError:
            continue
        if len(checked) <= MAX_CHARACTERS and _plain(checked) not in seen:
            seen.add(_plain(checked))
            usable.append(checked)
    return usable


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold())) or text


# ----------------------------------------------------------------------------------------------------- writing


def describe(
    tasks: Sequence[Task],
    out: Path,
    endpoint: Endpoint,
    *,
    number: int = 8,
    resume: bool = False,
    say: Say = lambda text: None,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Writes one line {task, description: [...]} for each task as soon as it is answered.

    Args:
        tasks: What is described.
        out: JSONL file; `t2l.tasks.load_descriptions` reads it.
        endpoint: Whom to ask.
        number: Descriptions for each task.
        resume: Go on with a file that an interrupted run left.
        say: Receives what the user should know.
        sleep: Pauses between attempts.

    Returns:
        How many tasks were written now.

    Raises:
        OutputError: if the file exists and `resume` is off, or cannot be written.
        DownloadError: if the endpoint fails for good; lines written so far stay.
        DataError: if it answers, but never with usable descriptions.
    """
    done = _finished(out, resume)
    written = 0
    todo = [task for task in tasks if task.name not in done]
    for task in todo:
        try:
            texts = _ask_until_enough(task, endpoint, number, say, sleep)
        except (DownloadError, DataError) as error:
            kept = f"{len(done) + written} of {len(tasks)} tasks are in {out}"
            raise type(error)(f"{task.name}: {error}. {kept}; go on with --resume") from error
        if len(texts) < number:
            say(f"{task.name}: only {len(texts)} of {number} descriptions could be used")
        _append(out, {"task": task.name, "description": texts})
        written += 1
        say(f"{task.name}: {len(texts)} descriptions ({len(done) + written} of {len(tasks)} tasks)")
    return written


def _finished(out: Path, resume: bool) -> set[str]:
    if not out.exists():
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"Cannot write to {out.parent}: {error.strerror}") from error
        return set()
    if not resume:
        raise OutputError(f"{out} exists already; pass --resume to go on with it, or choose another file")
    try:
        data = out.read_bytes()
        if not data.endswith(b"\n"):  # a line that an interruption cut
            os.truncate(out, data.rfind(b"\n") + 1)
    except OSError as error:
        raise OutputError(f"Cannot go on with {out}: {error.strerror}") from error
    return set(load_descriptions(out)) if out.stat().st_size else set()


def _append(out: Path, row: dict[str, Any]) -> None:
    """One line in one write, on the disk before the next task is asked about."""
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
    try:
        with out.open("ab", buffering=0) as file:
            file.write(line)
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"Cannot write {out}: {error.strerror}") from error


def _ask_until_enough(
    task: Task, endpoint: Endpoint, number: int, say: Say, sleep: Callable[[float], None]
) -> list[str]:
    known, found = list(task.descriptions), list[str]()
    problem: DataError | None = None
    for _ in range(ROUNDS):
        content = ask(endpoint, make_messages(task, known, number - len(found)), say=say, sleep=sleep)
        try:
            new = read_answer(content, [*known, *found])
        except DataError as error:
            problem = error
            say(f"{task.name}: {_short(str(error), endpoint)}; asking again")
            continue
        found = [*found, *new][:number]
        if len(found) == number:
            return found
    if not found:
        why = _short(str(problem), endpoint) if problem else "all descriptions were blank, too long or there already"
        raise DataError(f"no usable descriptions after {ROUNDS} answers: {why}")
    return found
