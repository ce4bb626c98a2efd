"""Scores of one answer. Pure functions of strings."""

from collections.abc import Sequence


def exact_match(answer: str, outputs: Sequence[str]) -> bool:
    """Whether the whole answer is one of the right ones; only white space around it is forgiven."""
    return answer.strip() in {output.strip() for output in outputs}
