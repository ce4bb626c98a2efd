"""Who may ask, how much and how often; and a line in the log for each request.

A browser on this machine runs other people's pages, and any of them can send requests to 127.0.0.1: so the Host header
must be one that this server goes by (else a foreign name that leads here could read the answers), and a request with
an Origin must come from the server's own page, or from a site that whoever started the server has named. Knows HTTP's
envelope only, and no bodies.
"""

import hmac
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from t2l.errors import ClosingError
from t2l.serve.answers import log
from t2l.serve.openai import Json, error_body, error_headers, error_object

LOCAL = ("127.0.0.1", "localhost", "[::1]")
CLIENTS = 1024
"""Addresses whose rate is remembered; beyond, the one that was quiet longest is forgotten."""
WATCHED = ("/healthz", "/metrics")
"""Paths that are answered while the server shuts down."""
OPEN = ("/", "/healthz")
"""Paths that need no token, besides the page's own files."""
HEADERS = {
    b"content-security-policy": b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    b"img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
}


@dataclass(frozen=True, kw_only=True)
class Guard:
    """What is let through."""

    hosts: tuple[str, ...] = LOCAL
    """Names in the Host header, without ports."""
    origins: tuple[str, ...] = ()
    """Other sites whose pages may use the server, as browsers name them, such as `https://app.example`."""
    token: str | None = None
    """What clients send as `Authorization: Bearer`; None asks for nothing."""
    body_bytes: int = 2**20
    requests_per_minute: int = 600
    """Of one address; those that only read are not counted."""


class GuardMiddleware:
    """Refuses before anything is read, and logs what was done.

    Args:
        app: The application.
        guard: What is let through.
        on_request: Called with method, route, status and seconds of each request.
    """

    def __init__(self, app: ASGIApp, guard: Guard, on_request: Callable[[str, str, int, float], None]) -> None:
        self._app, self._guard, self._on_request = app, guard, on_request
        self._spent: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._within: ASGIApp = self._guarded
        if guard.origins:  # around the refusals too, as a page hears nothing of an answer that does not name its origin
            self._within = CORSMiddleware(
                self._guarded,
                allow_origins=guard.origins,
                allow_methods=("GET", "POST", "DELETE"),
                allow_headers=("*",),  # OpenAI's client for browsers sends many of its own
                expose_headers=("content-disposition", "location", "retry-after", "x-request-id"),
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name, started, status = uuid.uuid4().hex[:12], time.perf_counter(), 499  # nobody waited for an answer

        scope.setdefault("state", {})["request_id"] = name

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [*HEADERS.items(), (b"x-request-id", name.encode())]
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        try:
            await (self._stranger(scope) or self._within)(scope, receive, noted)
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "other")
            self._on_request(scope["method"], route, status, seconds)
            fields = {"request": name, "method": scope["method"], "path": scope["path"][:200], "status": status}
            fields |= {"ms": round(1000 * seconds, 1), "client": _address(scope)}
            log.info("request", extra={"fields": fields})

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self._refusal(scope) or self._limited)(scope, receive, send)

    def _stranger(self, scope: Scope) -> Json | None:
        """The refusal of a request under a foreign name, or from another site's page."""
        headers: dict[bytes, bytes] = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if name not in self._guard.hosts:
            message = f"This server does not go by the name {name[:100]!r}; see --allow-host"
            return Json(error_object(message, "invalid_request_error", code="host_not_allowed"), 421)
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if b"origin" in headers and origin not in (f"http://{host}", f"https://{host}", *self._guard.origins):
            message = (
                f"Pages of {origin[:100]} may not use this server; see --allow-origin, or ask from a program instead, "
                "such as that site's server"
            )
            return Json(error_object(message, "invalid_request_error", code="origin_not_allowed"), 403)
        return None

    def _refusal(self, scope: Scope) -> Json | None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        free = scope["path"] in OPEN or scope["path"].startswith("/static/")
        if self._guard.token is not None and not free:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given, self._guard.token.encode()):
                message = "The token is missing or wrong; send it as Authorization: Bearer TOKEN"
                refusal = error_object(message, "authentication_error", code="invalid_api_key")
                return Json(refusal, 401, headers={"www-authenticate": "Bearer"})
        if scope["app"].state.closing and scope["path"] not in WATCHED:
            closing = ClosingError("The server is shutting down; try again later")
            return Json(error_body(closing), 503, headers=error_headers(503) | {"connection": "close"})
        if scope["method"] not in ("GET", "HEAD") and not self._may(_address(scope)):
            message = f"More than {self._guard.requests_per_minute} requests in a minute; wait a little"
            refusal = error_object(message, "rate_limit_error", code="rate_limit_exceeded")
            return Json(refusal, 429, headers={"retry-after": "5"})
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._guard.body_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> Json:
        message = f"The request's body is larger than {self._guard.body_bytes:,} bytes"
        return Json(error_object(message, "invalid_request_error", code="body_too_large"), 413)

    def _may(self, address: str) -> bool:
        """Takes one of the address's requests, which come back evenly over a minute."""
        now, most = time.monotonic(), float(self._guard.requests_per_minute)
        left, last = self._spent.pop(address, (most, now))
        left = min(most, left + (now - last) * most / 60)
        allowed = left >= 1
        self._spent[address] = (left - allowed, now)
        if len(self._spent) > CLIENTS:
            self._spent.popitem(last=False)
        return allowed

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the application on a body that is never larger than allowed, whatever its header said."""
        read, begun, refused = 0, False, False

        async def counted() -> Message:
            nonlocal read, refused
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._guard.body_bytes and not begun:
                refused = True
                await self._too_large()(scope, receive, send)
                return {"type": "http.disconnect"}
            return message

        async def sent(message: Message) -> None:
            nonlocal begun
            if not refused:
                begun = True
                await send(message)

        try:
            await self._app(scope, counted, sent)
        except Exception as error:  # a fault of ours: the log has it whole, the client hears that it was one
            log.exception("a request failed", extra={"fields": {"request": scope["state"]["request_id"]}})
            if not begun:
                await Json(error_body(error), 500, headers=error_headers(500))(scope, receive, sent)


def _address(scope: Scope) -> str:
    return str((scope.get("client") or ("unknown",))[0])
