"""Descriptions that come with a few worked examples: one longer text.

Knows words only.
"""

from collections.abc import Callable, Iterator, Sequence

INPUT_CHARACTERS = (240, 120, 60)
"""Of an example's input, at most; the smaller numbers where a text is too long otherwise."""
OUTPUT_CHARACTERS = 80
"""Of an example's output, at most."""


def with_examples(
    description: str, examples: Sequence[tuple[str, str]], *, fits: Callable[[str], bool] = lambda text: True
) -> str:
    """A description and as much of its examples as fits; by itself if nothing does.

    Args:
        description: The task's.
        examples: Pairs of input and output.
        fits: Whether a text is short enough, such as for an encoder's window.
    """
    return next((text for text, _ in candidates(description, examples) if fits(text)), description)


def candidates(description: str, examples: Sequence[tuple[str, str]]) -> Iterator[tuple[str, int]]:
    """(text, how many examples it shows), the longest first: inputs are cut before an example is left out."""
    for number in range(len(examples), 0, -1):
        for most in INPUT_CHARACTERS:
            shown = (
                f"Example input: {_cut(text, most)}\nExample output: {_shortened(answer)}"
                for text, answer in examples[:number]
            )
            yield "\n\n".join((description, *shown)), number


def _cut(text: str, most: int) -> str:
    """One line of the text's beginning and end: what is asked stands at either."""
    text = " ".join(text.split())
    if len(text) <= most:
        return text
    link = " … "
    last = (most - len(link)) // 3
    return f"{text[: most - len(link) - last].rstrip()}{link}{text[-last:].lstrip()}"


def _shortened(text: str) -> str:
    """One line of the text's beginning."""
    text, link = " ".join(text.split()), " …"
    return text if len(text) <= OUTPUT_CHARACTERS else text[: OUTPUT_CHARACTERS - len(link)].rstrip() + link
