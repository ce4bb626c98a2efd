"""What the tests of evaluations ask: three tasks on words, and settings that keep a run short."""

from typing import Any

TASKS = {
    "reverse": ("Write the word backwards.", [("abc", "cba"), ("ten", "net"), ("star", "rats")]),
    "upper": ("Write the word in capital letters.", [("abc", "ABC"), ("ten", "TEN"), ("it", "IT")]),
    "first": ("Answer with the first letter.", [("abc", "a"), ("ten", "t"), ("star", "s")]),
}
SETTINGS: dict[str, Any] = {"seeds": (0, 1), "max_new_tokens": 5, "device": "cpu"}
