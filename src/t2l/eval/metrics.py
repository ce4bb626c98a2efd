"""Scores of one answer. Pure functions of strings; whoever runs code, loads data or asks models does it elsewhere.

An answer that cannot be read as one of the options, or as a number, is wrong and counts as not parsed: nothing here
guesses.
"""

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

LETTERS = "ABCDEFGHIJ"
"""How options are marked in prompts."""
PREFIX = r"(?:(?:the )?(?:correct |right |best )?(?:answer|option|choice)(?: is)?:?\s*)+"
"""What may stand before the option that an answer names."""


def exact_match(answer: str, outputs: Sequence[str]) -> bool:
    """Whether the whole answer is one of the right ones; only white space around it is forgiven."""
    return answer.strip() in {output.strip() for output in outputs}


def rouge_l(answer: str, outputs: Sequence[str]) -> float:
    """ROUGE-L F1 (Lin 2004) of lower-cased words without stemming, the best over the right answers."""
    return max((_rouge_l(_words(answer), _words(output)) for output in outputs), default=0.0)


def _rouge_l(one: list[str], other: list[str]) -> float:
    if not one or not other:
        return 0.0
    # Length of the longest common subsequence, one row of the table at a time.
    row = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for j, candidate in enumerate(other, start=1):
            above = row[j]
            row[j] = diagonal + 1 if word == candidate else max(above, row[j - 1])
            diagonal = above
    return 2 * row[-1] / (len(one) + len(other))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def parse_option(answer: str, choices: Sequence[str]) -> int | None:
    """Which option an answer names, by letter, number or text; None if none or several.

    Args:
        answer: What the model said.
        choices: The options' texts; marked A, B, C, … in the prompt.
    """
    said = _plain(answer)
    texts = [_plain(choice) for choice in choices]
    for text in (said, _plain(re.sub(rf"^\s*{PREFIX}", "", answer, flags=re.IGNORECASE))):
        if text in texts:
            return texts.index(text) if texts.count(text) == 1 else None
    if (marked := _marked_option(answer, len(choices))) is not None:
        return marked
    # The option's text somewhere in the answer, as whole words; one inside a longer option that is there is not said.
    spans: dict[int, list[tuple[int, int]]] = {}
    for i, text in enumerate(texts):
        if text:
            found = re.finditer(rf"(?<!\w){re.escape(text)}(?!\w)", said)
            spans[i] = [match.span() for match in found]
    named = {
        i
        for i, mine in spans.items()
        for start, end in mine
        if not any(s <= start and end <= e and (s, e) != (start, end) for other in spans.values() for s, e in other)
    }
    return named.pop() if len(named) == 1 else None


def _marked_option(answer: str, number: int) -> int | None:
    """`B`, `(b)`, `B) text`, `2.`, `Option 2`, `The answer is B`; never the article in `A dog …`."""
    letters = LETTERS[:number]
    # After words a small letter counts only with a mark behind it: `the answer is a dog` names no option A.
    patterns = (
        rf"\(?(?:([{letters}{letters.lower()}])|(\d+))(?:[).:](?!\w)|$)",
        rf"(?i:{PREFIX})\(?(?:([{letters}](?!\w)|[{letters.lower()}](?=[).:]|\s*$))|(\d+)(?![\w.,]*\d))",
    )
    for pattern in patterns:
        if match := re.match(pattern, answer.strip()):
            letter, digits = match.groups()
            if letter:
                return LETTERS.index(letter.upper())
            if 1 <= int(digits) <= number:
                return int(digits) - 1
    return None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'`*()[]")


def parse_number(answer: str) -> Decimal | None:
    """The number an answer ends with: after `####`, else after the last `answer is`, else the last one there is."""
    text = answer.replace("−", "-")
    for marker in (r"####", r"answer is:?|answer:"):
        parts = re.split(marker, text, flags=re.IGNORECASE)
        if len(parts) > 1 and (found := _numbers(parts[-1])):
            return found[0]
    found = _numbers(text)
    return found[-1] if found else None


def _numbers(text: str) -> list[Decimal]:
    numbers = []
    for match in re.findall(r"(?<![\w.])-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?!\d)", text):
        try:
            numbers.append(Decimal(re.sub(r"[$,]", "", match)))
        except InvalidOperation:  # digits of other scripts that Decimal does not take
            continue
    return numbers
