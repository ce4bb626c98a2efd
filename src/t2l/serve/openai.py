"""Answers in OpenAI's format: whole, or as server-sent events; and errors in it.

Knows answers and their format. Knows no adapters and no routes.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any, Literal

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from t2l.errors import (
    AdapterNotFoundError,
    AnswerError,
    BusyError,
    ClosingError,
    ConfigError,
    DeadlineError,
    DescriptionError,
    RequestError,
    SpecMismatchError,
    StoreError,
    T2LError,
)
from t2l.serve.answers import Answer, Generation, Piece, log
from t2l.serve.engine import Engine
from t2l.serve.sampling import Choice
from t2l.serve.text import INCOMPLETE

Kind = Literal["chat", "text"]
RESTART_SECONDS = 10
"""After which clients of a server that is shutting down may find the next one."""
_OBJECTS = {"chat": ("chat.completion", "chat.completion.chunk"), "text": ("text_completion", "text_completion")}


class Run:
    """The answers of one request, on their way from the engine's thread to an event loop.

    Args:
        engine: Where they are submitted.
        generations: One for each choice.

    Raises:
        RequestError, BusyError, ClosingError: if the engine does not take one; then none is under way.
    """

    def __init__(self, engine: Engine, generations: Sequence[Generation]) -> None:
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self.answers: list[Answer] = []
        try:
            for index, generation in enumerate(generations):
                self.answers.append(engine.submit(generation, partial(self._put, index)))
        except T2LError:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Nobody wants what is still to come."""
        for answer in self.answers:
            answer.cancel()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Number of the choice and what is new of it, until all have ended.

        Raises:
            AnswerError: if one of them failed or ran out of time.
            ClosingError: if one was given up, because the server stops.
        """
        going = len(self.answers)
        while going:
            index, piece = await self._pieces.get()
            if piece.end == "deadline":
                raise DeadlineError(f"The answer took more than {self.answers[index].generation.timeout:g} seconds")
            if piece.end == "cancelled":
                raise ClosingError("The answer was cut off: the server is shutting down")
            if piece.end == "error":
                raise AnswerError(f"The answer failed: {piece.error}")
            going -= piece.end is not None
            yield index, piece

    def usage(self) -> dict[str, int]:
        """Tokens read and written. A prompt counts once, however many answers it gets."""
        prompts = {id(answer.generation.prompt): answer.prompt_tokens for answer in self.answers}
        read, written = sum(prompts.values()), sum(answer.tokens for answer in self.answers)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _put(self, index: int, piece: Piece) -> None:
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))


class Reply:
    """One request's reply.

    Args:
        kind: Of a conversation, or plain text.
        run: Its answers.
        model: What the reply says the model is.
        tokenizer: For tokens as text.
        strip: Whether white space before an answer is left out: some checkpoints begin their answers with a space.
    """

    def __init__(self, kind: Kind, run: Run, *, model: str, tokenizer: Any, strip: bool) -> None:
        self.kind, self.run, self._tokenizer, self._strip = kind, run, tokenizer, strip
        name = f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}"
        self._head = {"id": name, "model": model, "created": int(time.time())}
        self._begun = [False] * len(run.answers)
        self._offsets = [0] * len(run.answers)

    async def whole(self) -> dict[str, Any]:
        """The reply when all answers have ended.

        Raises:
            AnswerError, ClosingError: if one of them failed, ran out of time or was given up.
        """
        texts, ends = [""] * len(self._begun), [""] * len(self._begun)
        choices: list[list[Choice]] = [[] for _ in self._begun]
        async for index, piece in self.run.pieces():
            texts[index] += self._stripped(index, piece.text)
            choices[index] += piece.choices
            ends[index] = piece.end or ""
        listed = []
        for index, (text, end, chosen) in enumerate(zip(texts, ends, choices, strict=True)):
            choice: dict[str, Any] = {"index": index, "finish_reason": end, "logprobs": self._logprobs(index, chosen)}
            if self.kind == "chat":
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                choice["text"] = text
            listed.append(choice)
        return {**self._head, "object": _OBJECTS[self.kind][0], "choices": listed, "usage": self.run.usage()}

    async def events(self, *, usage: bool) -> AsyncIterator[str]:
        """The reply as server-sent events, each answer piece by piece; an error becomes the last event."""
        try:
            if self.kind == "chat":
                for index in range(len(self._begun)):
                    yield self._event(index, {"delta": {"role": "assistant", "content": "", "refusal": None}})
            async for index, piece in self.run.pieces():
                text = self._stripped(index, piece.text)
                logprobs = self._logprobs(index, piece.choices)
                if not text and logprobs is None and piece.end is None:
                    continue
                said: dict[str, Any] = {"delta": {"content": text}} if self.kind == "chat" else {"text": text}
                yield self._event(index, {**said, "logprobs": logprobs}, piece.end)
            if usage:
                yield self._data({"choices": [], "usage": self.run.usage()})
        except T2LError as error:
            yield f"data: {json.dumps(error_body(error))}\n\n"
        except Exception as error:  # the reply has begun: its status cannot say it any more
            log.exception("a stream failed")
            yield f"data: {json.dumps(error_body(error))}\n\n"
        yield "data: [DONE]\n\n"

    def _event(self, index: int, said: dict[str, Any], end: str | None = None) -> str:
        return self._data({"choices": [{"index": index, "logprobs": None, **said, "finish_reason": end}]})

    def _data(self, body: dict[str, Any]) -> str:
        return f"data: {json.dumps({**self._head, 'object': _OBJECTS[self.kind][1], **body})}\n\n"

    def _stripped(self, index: int, text: str) -> str:
        if not self._strip or self._begun[index]:
            return text
        text = text.lstrip()
        self._begun[index] = bool(text)
        return text

    def _logprobs(self, index: int, choices: Sequence[Choice]) -> dict[str, Any] | None:
        if self.run.answers[index].generation.sampling.top_logprobs is None or not choices:
            return None
        if self.kind == "chat":
            return {"content": [self._token(choice) for choice in choices], "refusal": None}
        texts = [self._text(choice.token) for choice in choices]
        offsets = []
        for text in texts:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [choice.logprob for choice in choices],
            "top_logprobs": [{self._text(token): logprob for token, logprob in choice.top} for choice in choices],
            "text_offset": offsets,
        }

    def _token(self, choice: Choice) -> dict[str, Any]:
        def one(token: int, logprob: float | None) -> dict[str, Any]:
            text = self._text(token)
            known = None if INCOMPLETE in text else list(text.encode())
            return {"token": text, "logprob": logprob, "bytes": known}

        return one(choice.token, choice.logprob) | {"top_logprobs": [one(*top) for top in choice.top]}

    def _text(self, token: int) -> str:
        text: str = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return text


class EventStream(StreamingResponse):
    """Sends events as they come; when the client has gone, its answers are cancelled."""

    def __init__(self, reply: Reply, *, usage: bool) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(reply.events(usage=usage), media_type="text/event-stream", headers=headers)
        self._run = reply.run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._run.cancel()  # answers that have ended do not mind


class Json(Response):
    """A JSON object. Only ASCII is sent, so that whatever a client wrote can be told back."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The bytes."""
        return json.dumps(content, allow_nan=False).encode()


def status_of(error: BaseException) -> int:
    """The HTTP status that says what kind of error it is."""
    if isinstance(error, AdapterNotFoundError):
        return 404
    if isinstance(error, RequestError | DescriptionError | ConfigError | SpecMismatchError):
        return 400  # the last two: another program has no place for such an adapter
    if isinstance(error, BusyError):
        return 429
    if isinstance(error, ClosingError):
        return 503
    return 504 if isinstance(error, DeadlineError) else 500


def error_headers(status: int) -> dict[str, str]:
    """Whether and when asking again makes sense; OpenAI's clients ask again after a 5xx unless told not to."""
    waits = {429: "1", 503: str(RESTART_SECONDS)}
    return {"retry-after": waits[status]} if status in waits else {"x-should-retry": "false"}


def error_body(error: BaseException, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error object. What went wrong inside is not told to clients: it may name folders of the server's machine."""
    kinds = {400: "invalid_request_error", 404: "not_found_error", 429: "rate_limit_error"}
    status = status_of(error)
    told = isinstance(error, AnswerError | StoreError) or (isinstance(error, T2LError) and status != 500)
    message = str(error) if told else "The server failed; its log says more"
    code = code or {404: "model_not_found", 503: "shutting_down"}.get(status)
    return error_object(message, kinds.get(status, "server_error"), param=param, code=code)


def error_object(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
