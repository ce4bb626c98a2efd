"""One client of OpenAI-compatible servers: JSON there, JSON back, with patience and without giving the key away.

The key comes from the environment and goes nowhere but into a request's header. Knows addresses and HTTP. Knows
nothing of what is asked.
"""

import http.client
import ipaddress
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from t2l.errors import ConfigError, DataError, DownloadError
from t2l.io import parse_json

KEY_VARIABLE = "OPENAI_API_KEY"
MAX_ANSWER = 2_000_000
ATTEMPTS = 6
TRANSIENT = (408, 409, 429)
METHODS = ("/chat/completions", "/completions")

Say = Callable[[str], None]


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another address."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Never."""


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server, and the model that is asked."""

    root: str
    """Where its methods are, usually `https://host/v1`."""
    model: str
    key: str | None = None
    timeout: float = 120.0

    def __repr__(self) -> str:
        return f"Endpoint({self.root}, {self.model})"


def open_endpoint(url: str, model: str, *, timeout: float = 120.0) -> Endpoint:
    """An endpoint with the key of the environment.

    Args:
        url: The server, its `/v1`, or one of its methods.
        model: The server's name of the model.
        timeout: Seconds to wait for an answer.

    Raises:
        ConfigError: if the address cannot be one, holds a password, or would take the key unencrypted elsewhere.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"--endpoint (or --backend) must be an http or https address such as http://localhost:8000, got {url!r}"
        )
    if parts.username or parts.password or parts.query:
        raise ConfigError(
            f"--endpoint (or --backend) must hold no user name, password or query; put the key into {KEY_VARIABLE}"
        )
    key = os.environ.get(KEY_VARIABLE, "").strip() or None
    if key is not None and re.fullmatch(r"[!-~]+", key) is None:
        raise ConfigError(f"{KEY_VARIABLE} holds spaces or signs that cannot stand in a header")
    if key is not None and parts.scheme == "http" and not _is_here(parts.hostname):
        raise ConfigError(f"{KEY_VARIABLE} would go unencrypted to {parts.hostname}; give an https address")
    path = parts.path.rstrip("/")
    method = next((method for method in METHODS if path.endswith(method)), "")
    path = path.removesuffix(method) if method else path.removesuffix("/v1") + "/v1"
    return Endpoint(f"{parts.scheme}://{parts.netloc}{path}", model, key, timeout)


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def call(
    endpoint: Endpoint,
    method: str,
    body: dict[str, Any] | None = None,
    *,
    as_json: bool = True,
    say: Say = lambda text: None,
    sleep: Callable[[float], None] = time.sleep,
) -> Any:
    """What the server answers, after as many attempts as are worth making.

    Args:
        endpoint: Whom to ask.
        method: Path below the endpoint's root, such as `completions`; one that starts with / is below the host.
        body: JSON object to post; without one the method is only got.
        as_json: Whether the answer is JSON; where it is not, it is returned as text.
        say: Receives what the user should know.
        sleep: Pauses between attempts.

    Returns:
        The JSON value of the answer.

    Raises:
        DownloadError: if the server refuses, is not there, or breaks off.
    """
    parts = urlsplit(endpoint.root)
    url = f"{parts.scheme}://{parts.netloc}{method}" if method.startswith("/") else f"{endpoint.root}/{method}"
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "t2l"}
    if endpoint.key is not None:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    opener = urllib.request.build_opener(_NoRedirects)
    for attempt in range(1, ATTEMPTS + 1):
        request = urllib.request.Request(url, data=data, headers=headers, method="GET" if data is None else "POST")
        delay: float | None = None
        try:
            with opener.open(request, timeout=endpoint.timeout) as response:
                answer = _read(response, endpoint.timeout)
            return parse_json(answer, url, DataError) if as_json else answer.decode("utf-8", errors="replace")
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(2000).decode("utf-8", errors="replace")
                asked = error.headers.get("Retry-After", "")
            reason, again = f"HTTP {error.code}: {short(said, endpoint)}", error.code in TRANSIENT or error.code >= 500
            delay = float(asked) if asked.isdecimal() else None
        except DataError:
            said = answer[:200].decode("utf-8", errors="replace")
            reason, again = f"no JSON or not all of it: {short(said, endpoint)}", True
        except (OSError, http.client.HTTPException) as error:  # no connection, reset, time-out, half an answer
            inner = getattr(error, "reason", error)
            reason, again = f"{type(inner).__name__}: {short(str(inner), endpoint)}", True
        if not again or attempt == ATTEMPTS:
            tries = f" after {attempt} attempts" if attempt > 1 else ""
            raise DownloadError(f"{url} gave no answer{tries}: {reason}")
        delay = min(300.0, 2.0**attempt if delay is None else delay)
        say(f"{url}: {reason}; trying again in {delay:.0f} s")
        sleep(delay)
    raise AssertionError("unreachable")


def _read(response: http.client.HTTPResponse, seconds: float) -> bytes:
    """An answer's body, or as much of it as is read of one; the whole of it has as long as each of its parts.

    Raises:
        TimeoutError: if it has not ended by then.
    """
    end, found = time.monotonic() + seconds, bytearray()
    while len(found) < MAX_ANSWER and (part := response.read1(MAX_ANSWER - len(found))):
        found += part
        if time.monotonic() > end:
            raise TimeoutError(f"the answer had not ended after {seconds:g} s")
    return bytes(found)


def choice(answer: Any, endpoint: Endpoint, *path: str) -> str:
    """The text at `path` of the first choice of an answer; empty where the server has null.

    Raises:
        DownloadError: if the answer has another form.
    """
    try:
        found = answer["choices"][0]
        for name in path:
            found = found[name]
    except (KeyError, IndexError, TypeError) as error:
        raise DownloadError(
            f"{endpoint.root} does not answer like a completion endpoint (no choices[0].{'.'.join(path)}): "
            f"{short(json.dumps(answer, ensure_ascii=False), endpoint)}"
        ) from error
    return found if isinstance(found, str) else ""


def short(text: str, endpoint: Endpoint) -> str:
    """What a server said, on one line, and never the key, which some servers quote."""
    if endpoint.key is not None:
        text = text.replace(endpoint.key, "[key]")
    return " ".join(text.split())[:300]
