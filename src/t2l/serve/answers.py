"""What is asked of the engine, and the answer as it comes.

Knows token ids and adapters. Knows no models and no HTTP.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Literal

from t2l.apply import HasLora
from t2l.errors import AnswerError
from t2l.serve.sampling import Choice, Sampling

End = Literal["stop", "length", "cancelled", "deadline", "error"]
"""Why an answer ended: the model or a stop string ended it, `max_tokens` is reached, nobody wants the rest, its time is
up, or it failed."""

log = logging.getLogger("t2l.serve")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one answer is to be."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    max_tokens: int
    adapter: HasLora | None = None
    """None is the plain base model."""
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()
    """The answer ends before the first of these, which is not part of it."""
    timeout: float | None = None
    """Seconds from now until the answer ends as it is; None waits for ever."""


@dataclass(frozen=True)
class Piece:
    """News of an answer."""

    text: str = ""
    choices: tuple[Choice, ...] = ()
    """Tokens that were chosen since; the text of one may come with a later piece."""
    end: End | None = None
    """Why the answer ended; None while it goes on."""
    error: str | None = None
    """What went wrong, where `end` is `error`."""


class Answer:
    """An answer as it comes: iterate over its pieces, or wait for `text()`. Any thread may `cancel()` it.

    Args:
        generation: What was asked for.
        listener: Called with each piece, from the engine's thread, in place of iteration.
    """

    def __init__(self, generation: Generation, listener: Callable[[Piece], None] | None = None) -> None:
        self.generation = generation
        self.prompt_tokens, self.tokens = len(generation.prompt), 0
        self.cancelled = False
        self.submitted, self.first_token = time.monotonic(), 0.0
        self.deadline = None if generation.timeout is None else self.submitted + generation.timeout
        self._pieces: SimpleQueue[Piece] = SimpleQueue()
        self._listener = listener or self._pieces.put

    @property
    def most_tokens(self) -> int:
        """Of prompt and answer together."""
        return self.prompt_tokens + self.generation.max_tokens

    def cancel(self) -> None:
        """Says that nobody wants the rest; the row is free before its next token."""
        self.cancelled = True

    def overdue(self) -> End | None:
        """Why the answer should end before the model ends it, if it should."""
        if self.cancelled:
            return "cancelled"
        return "deadline" if self.deadline is not None and time.monotonic() >= self.deadline else None

    def tell(self, piece: Piece) -> None:
        """Passes news on. The engine's to call."""
        if piece.choices and not self.tokens:
            self.first_token = time.monotonic()
        self.tokens += len(piece.choices)
        try:
            self._listener(piece)
        except Exception:  # a listener that has gone must not take the other rows with it
            log.exception("a listener failed; its answer is cancelled")
            self.cancel()

    def __iter__(self) -> Iterator[Piece]:
        """The pieces, as they come, up to the one that has an `end`."""
        while True:
            piece = self._pieces.get()
            yield piece
            if piece.end is not None:
                return

    def text(self) -> str:
        """Waits for the end and returns the whole text.

        Raises:
            AnswerError: if the answer failed.
        """
        pieces = list(self)
        if pieces[-1].end == "error":
            raise AnswerError(f"The answer failed: {pieces[-1].error}")
        return "".join(piece.text for piece in pieces)
