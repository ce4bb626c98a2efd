"""The HTTP interface: OpenAI's completions with an adapter in the `model` field, adapters by description, and the page.

Knows routes. What they do is in `service`, how answers look in `openai`, and who may ask in `guard`.
"""

import asyncio
import io
import re
import tempfile
import zipfile
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from t2l import __version__
from t2l.adapter import LoraAdapter
from t2l.errors import RequestError, T2LError
from t2l.gguf_export import save_gguf
from t2l.pypi import public_name
from t2l.serve.answers import log
from t2l.serve.guard import Guard, GuardMiddleware
from t2l.serve.metrics import Metrics
from t2l.serve.openai import EventStream, Json, Kind, Reply, Run, error_body, error_headers, error_object, status_of
from t2l.serve.schema import AdapterRequest, ChatRequest, CompletionRequest
from t2l.serve.service import Service
from t2l.serve.snippets import snippets
from t2l.serve.store import Entry

STATIC = Path(__file__).parent / "static"
Value = TypeVar("Value")
Limit = Annotated[int, Query(ge=1, le=1000)]
Format = Literal["peft", "gguf"]
_ALTERNATIVE = re.compile(r"str|int|TextPart|.*\[.*")
"""What Pydantic calls a field's alternatives, which stand in an error's place and not in the request."""


def create_app(service: Service, *, guard: Guard | None = None, metrics: Metrics | None = None) -> FastAPI:
    """The application; when it ends, the engine and the store are closed.

    Args:
        service: What it serves.
        guard: Who may ask; this machine's own programs and pages, if absent.
        metrics: What counts; the engine should tell it of answers that end.
    """
    metrics, guard = metrics or Metrics(), guard or Guard()
    metrics.watch(service.engine, service.store)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.engine.close)
        service.store.close()

    app = FastAPI(title="t2l", version=__version__, lifespan=lifespan, openapi_url=None)
    app.state.closing = False
    app.add_middleware(GuardMiddleware, guard=guard, on_request=metrics.request)
    _handle_errors(app)
    _serve_completions(app, service)
    _serve_adapters(app, service, token=guard.token is not None)
    _serve_files(app)

    @app.api_route("/healthz", methods=["GET", "HEAD"])
    async def health() -> Json:
        status = "closing" if app.state.closing else "ok" if service.engine.alive else "down"
        return Json({"status": status, **service.engine.state}, 200 if status == "ok" else 503)

    @app.get("/metrics")
    async def numbers() -> Response:
        return Response(await asyncio.to_thread(metrics.text), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


# ------------------------------------------------------------------------------------------------------- completions


def _serve_completions(app: FastAPI, service: Service) -> None:
    async def reply(kind: Kind, request: Request, body: ChatRequest | CompletionRequest) -> Response:
        chat = isinstance(body, ChatRequest)
        generations, adapter = await (service.chat(body) if chat else service.complete(body))  # type: ignore[arg-type]
        run = Run(service.engine, generations)
        made = Reply(
            kind,
            run,
            model=service.base_model if adapter is None else adapter.entry.id,
            tokenizer=service.engine.tokenizer,
            strip=chat and service.generator.prompt.answer_space,
        )
        if body.stream:
            return EventStream(made, usage=body.streams_usage)
        try:
            return Json(await _unless_gone(request, made.whole()))
        finally:
            run.cancel()

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        return await reply("chat", request, body)

    @app.post("/v1/completions")
    async def complete(request: Request, body: CompletionRequest) -> Response:
        return await reply("text", request, body)

    @app.get("/v1/models")
    async def models() -> Json:
        listed = await asyncio.to_thread(service.store.listed, service.base_model)
        return Json({"object": "list", "data": [_model(service), *(_model(service, *one) for one in listed)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Json:
        if name.startswith("t2l:"):
            raise RequestError("A description is no name until its adapter is made; POST it to /v1/adapters")
        adapter = await service.resolve(name)
        known = None if adapter is None else adapter.entry
        return Json(_model(service, *(() if known is None else (known.id, known.created, known.description))))


def _model(service: Service, name: str = "", created: int = 0, description: str = "") -> dict[str, Any]:
    """An adapter as OpenAI lists models; without a name the base model, whose `root` is its name for everybody."""
    base = service.base_model
    if not name:
        found = {"id": base, "created": service.started, "root": public_name(base), "parent": None}
    else:
        found = {"id": name, "created": created, "root": name, "parent": base, "description": description}
    return found | {"object": "model", "owned_by": "t2l"}


async def _unless_gone(request: Request, work: Awaitable[Value]) -> Value:
    """The work's result; if the client goes before, the work is cancelled."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise HTTPException(499, "The client has gone")
        return await working
    finally:
        working.cancel()
        leaving.cancel()


# ---------------------------------------------------------------------------------------------------------- adapters


def _serve_adapters(app: FastAPI, service: Service, *, token: bool) -> None:
    @app.post("/v1/adapters")
    async def create(body: AdapterRequest) -> Json:
        entry, new = await service.create(body.description, body.strength)
        return Json(_about(entry), 201 if new else 200, headers={"location": f"/v1/adapters/{entry.id}"})

    @app.get("/v1/adapters")
    async def listed(limit: Limit = 100, after: Annotated[str | None, Query(max_length=64)] = None) -> Json:
        entries = await asyncio.to_thread(service.store.entries, limit=limit + 1, after=after)
        data = [_about(entry) for entry in entries[:limit]]
        return Json({"object": "list", "data": data, "has_more": len(entries) > limit})

    @app.get("/v1/adapters/{name}")
    async def about(name: str) -> Json:
        return Json(_about(await asyncio.to_thread(service.store.entry, name), norms=True))

    @app.get("/v1/adapters/{name}/snippets")
    async def programs(name: str, request: Request, text: Annotated[str, Query(max_length=20_000)]) -> Json:
        entry = await asyncio.to_thread(service.store.entry, name)
        found = snippets(
            entry,
            url=str(request.base_url).rstrip("/"),
            text=text,
            in_prompt=service.generator.prompt.description_in_prompt,
            base_model=entry.spec.base_model,
            token=token,
        )
        return Json({"object": "list", "data": [asdict(snippet) for snippet in found]})

    @app.delete("/v1/adapters/{name}")
    async def delete(name: str) -> Json:
        await asyncio.to_thread(service.store.delete, name)
        return Json({"id": name, "object": "adapter.deleted", "deleted": True})

    @app.get("/v1/adapters/{name}/download")
    async def download(name: str, format: Format = "peft") -> Response:
        make, suffix = (_peft_zip, "zip") if format == "peft" else (_gguf, "gguf")
        data = await asyncio.to_thread(make, service, name)
        headers = {"content-disposition": f'attachment; filename="{name}.{suffix}"'}
        return Response(data, media_type="application/octet-stream", headers=headers)


def _about(entry: Entry, *, norms: bool = False) -> dict[str, Any]:
    spec = entry.spec
    return {
        "id": entry.id,
        "object": "adapter",
        "created": entry.created,
        "parent": entry.spec.base_model,
        "description": entry.description,
        "strength": entry.strength,
        "sha256": entry.sha256,
        "seconds": entry.seconds,
        "bytes": entry.bytes,
        "parameters": spec.num_parameters,
        "rank": spec.rank,
        "alpha": spec.alpha,
        "targets": [target.name for target in spec.targets],
        "layers": list(spec.layers),
        **({"norms": entry.norms} if norms else {}),
    }


def _peft_zip(service: Service, name: str) -> bytes:
    """The folder that the library saves, as a zip file: an adapter is the same one wherever it comes from."""
    stored, file = service.store.get(name), io.BytesIO()
    entry = stored.entry
    adapter = LoraAdapter(stored.lora, stored.spec, entry.description, entry.provenance)
    with tempfile.TemporaryDirectory(prefix="t2l-") as place:
        folder = adapter.save_pretrained(Path(place) / name)
        with zipfile.ZipFile(file, "w") as archive:  # weights do not get smaller by compression
            for path in sorted(folder.iterdir()):
                archive.write(path, f"{name}/{path.name}")
    return file.getvalue()


def _gguf(service: Service, name: str) -> bytes:
    stored = service.stored(name)
    with tempfile.TemporaryDirectory(prefix="t2l-") as folder:
        path = Path(folder) / "adapter.gguf"
        save_gguf(path, stored.lora, stored.spec, service.engine.config, description=stored.entry.description)
        return path.read_bytes()


# ----------------------------------------------------------------------------------------------------- files, errors


def _serve_files(app: FastAPI) -> None:
    app.mount("/static", StaticFiles(directory=STATIC), name="static")

    @app.api_route("/", methods=["GET", "HEAD"])
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(T2LError)
    async def refuse(request: Request, error: T2LError) -> Json:
        status = status_of(error)
        if status == 500:  # others are no fault of ours
            log.error("a request failed", exc_info=error, extra={"fields": {"request": request.state.request_id}})
        return Json(error_body(error), status, headers=error_headers(status))

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Json:
        errors = error.errors()
        # A misspelt setting may be the reason why another is missing.
        first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
        unknown, loc = first["type"] == "extra_forbidden", [str(part) for part in first["loc"][1:]]
        named = loc if unknown else [part for part in loc if not _ALTERNATIVE.fullmatch(part)]
        place = ".".join(named)[:200] or None
        message = str(first["msg"]).removeprefix("Value error, ")
        if not loc and "json" not in request.headers.get("content-type", "json"):
            message = "The body is to be JSON, sent with the header Content-Type: application/json"
        elif unknown or first.get("ctx", {}).get("max_length") == 0:
            message = "this server has no such setting"
        elif first["type"] == "json_invalid":
            message, place = f"The body is no JSON: {first['ctx']['error']} (character {place})", None
        elif not loc and first["type"] in ("missing", "model_attributes_type"):
            message = "The body must be a JSON object"
        return Json(
            error_object(f"{place}: {message}" if place else message, "invalid_request_error", param=place), 400
        )

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Json:
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        message = str(error.detail)
        if error.status_code in (404, 405):  # Starlette's own; clients of other servers should see what is missing here
            message = (
                f"{request.method} {request.url.path[:200]}: {message}; docs/serving.md lists this server's routes"
            )
        return Json(error_object(message, kind), error.status_code, headers=error.headers)
