"""Tokens into text, piece by piece, so that the pieces together are the whole text, up to a stop string.

Knows a tokenizer. Knows no models and no requests.
"""

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\ufffd"
"""What a decoder writes for bytes that are no character yet."""


class TextStream:
    """The text of one answer as its tokens come.

    Args:
        tokenizer: The base model's.
        stops: The answer ends before the first of these, which is not part of it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []
        self._from, self._read = 0, 0  # tokens since `_from` give the context, those up to `_read` have been told
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Takes a token and returns the text that is certain now and was not before."""
        self._ids.append(token)
        new = self._decode(self._from, len(self._ids))
        told = self._decode(self._from, self._read)
        # A token may end inside a character: then its text is told with the next one's. Decoding starts a little before
        # the news, as decoders treat the first token of a text differently.
        if len(new) <= len(told) or new.endswith(INCOMPLETE):
            return ""
        self._from, self._read = self._read, len(self._ids)
        return self._until_stop(new[len(told) :])

    def finish(self) -> str:
        """The text held back so far: no more tokens come."""
        new, told = self._decode(self._from, len(self._ids)), self._decode(self._from, self._read)
        self._read = len(self._ids)
        rest = self._until_stop(new[len(told) :])
        held, self._held = self._held, ""
        return rest + held

    def _until_stop(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        # What could be the beginning of a stop string waits until it is one or is not.
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _decode(self, start: int, stop: int) -> str:
        text: str = self._tokenizer.decode(
            self._ids[start:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` starts with."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
