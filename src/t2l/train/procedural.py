"""Procedural tasks: what is asked of a line of text is computed, so there are as many tasks as one likes.

Networks learn a few hundred tasks by heart and are then no better on new ones. Here are thousands more, small and
plain: does the line hold a comma, which of two words is in it, what is the third word. What is asked, its numbers and
words, and the words to answer with are drawn for each task; only the description says them.
Knows words only.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from t2l.tasks import Example, Task
from t2l.train.relabel import OPPOSITES, WORDS, joined

EXAMPLES = 60
"""Of each task."""
TEXTS = 8
"""Descriptions of each task, at most."""
RAREST = 0.2
"""Share of a task's examples that each of its answers has at least, where it has two or three."""
TRIES = 20
"""Draws for a task before another kind is drawn."""
WORDS_OF_LINE = (4, 16)
LONGEST_LINE = 120
"""Characters."""


@dataclass(frozen=True)
class Asked:
    """What a task asks."""

    says: tuple[str, ...]
    """Sentences that say it, each by itself. Where `labels` is not empty they hold {0} for the first, and so on."""
    answer: Callable[[str], str | int | None]
    """Of a line; the place of a label where there are labels; None where the line does not suit."""
    labels: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------------ what is asked


@cache
def _bare(line: str) -> tuple[str, ...]:
    """The line's words in small letters, without what stands around them; all tasks ask of the same lines."""
    words = (re.sub(r"^\W+|\W+$", "", word).casefold() for word in line.split())
    return tuple(word for word in words if word)


COMMON = "the a and to of in is it you that was for on with not but they he she we this are have at his her"
"""Words that many lines hold and many do not."""
ORDINALS = ("first", "second", "third", "fourth")


def _holds_word(draw: random.Random) -> Asked:
    word = draw.choice(COMMON.split())
    says = (
        f'Answer {{0}} if the line has the word "{word}" in it and {{1}} if it does not.',
        f"Look for {word} among the words, in any case of letters: {{0}} when it is there, {{1}} when it is missing.",
        f'Does "{word}" occur as a word? {{0}} if it does, else {{1}}.',
        f"{{0}} = {word} is one of the words; {{1}} = it is not.",
    )
    return Asked(says, lambda line: int(word not in _bare(line)), _pair(draw))


def _holds_sign(draw: random.Random) -> Asked:
    sign, name = draw.choice(((",", "a comma"), ("'", "an apostrophe"), ("-", "a hyphen"), (".", "a full stop")))
    letter = draw.choice("bfgkpvwxyj")
    if draw.random() < 0.4:
        sign, name = letter, f"the letter {letter}"
    says = (
        f"Say {{0}} for a line with {name} anywhere, otherwise {{1}}.",
        f"Check the line for {name}. Found: {{0}}. Not found: {{1}}.",
        f"Is {name} in it? Reply {{0}} if so, {{1}} if not.",
    )
    return Asked(says, lambda line: int(sign not in line.casefold()), _pair(draw))


def _ends(draw: random.Random) -> Asked:
    mark, name = draw.choice((("?", "a question mark"), (".", "a full stop"), ("!", "an exclamation mark")))
    says = (
        f"Write {{0}} if the last character is {name}, and {{1}} if it is anything else.",
        f"Does the line close with {name}? If so {{0}}, if not {{1}}.",
        f"Lines that end in {name} are {{0}}, all others {{1}}.",
    )
    return Asked(says, lambda line: int(not line.endswith(mark)), _pair(draw))


def _longer_than(draw: random.Random) -> Asked:
    number = draw.randint(6, 12)
    says = (
        f"Count the words: {{0}} for more than {number}, {{1}} for {number} or fewer.",
        f"Label lines of over {number} words {{0}} and shorter ones {{1}}.",
        f"Has the line more than {number} words? Give {{0}} if it has, else {{1}}.",
    )
    labels = draw.choice((_pair(draw), ("long", "short")))
    return Asked(says, lambda line: int(len(line.split()) <= number), labels)


def _begins(draw: random.Random) -> Asked:
    kind, name = draw.choice((("aeiou", "a vowel"), ("abcdefghijkl", "a letter from a to l"), ("istw", "i, s, t or w")))
    says = (
        f"Output {{0}} when the first letter is {name}, {{1}} when it is another.",
        f"Look at the letter that the line begins with. If it is {name}, answer {{0}}; if not, {{1}}.",
        f"Does it start with {name}? {{0}} means that it does, {{1}} that it does not.",
    )

    def answer(line: str) -> int | None:
        return int(line[0].casefold() not in kind) if line[0].isalpha() else None

    return Asked(says, answer, _pair(draw))


def _which_word(draw: random.Random) -> Asked:
    words = draw.sample(COMMON.split(), draw.choice((2, 2, 3)))
    listed = joined(words, "or")
    labels = tuple(words) if draw.random() < 0.6 else tuple(draw.sample(WORDS.split(), len(words)))
    told = ", ".join(f"{{{place}}} for {word}" for place, word in enumerate(words))
    says = (
        f"Exactly one of the words {listed} is in the line. Which? Answer {told}.",
        f"Find out whether the line holds {listed}; it is one of them. Reply: {told}.",
        f"Of {listed}, just one occurs. Write {told}.",
    )

    def answer(line: str) -> int | None:
        found = [place for place, word in enumerate(words) if word in _bare(line)]
        return found[0] if len(found) == 1 else None

    return Asked(says, answer, labels)


def _repeated(draw: random.Random) -> Asked:
    says = (
        "Is any word used twice? {0} if one is, {1} if all words differ, capitals or not.",
        "Answer {0} for a line that repeats a word and {1} for a line in which every word is new.",
        "{0}: some word comes more than once. {1}: none does.",
    )
    return Asked(says, lambda line: int(len(set(_bare(line))) == len(_bare(line))), _pair(draw))


def _ends_longer(draw: random.Random) -> Asked:
    says = (
        "Compare the first word with the last: {0} if the first has more letters, {1} if the last has more.",
        "Which is longer, the word at the beginning ({0}) or the word at the end ({1})?",
        "Say {0} when the opening word is longer than the closing one and {1} when it is shorter.",
    )

    def answer(line: str) -> int | None:
        first, last = len(_bare(line)[0]), len(_bare(line)[-1])
        return None if first == last else int(first < last)

    return Asked(says, answer, draw.choice((_pair(draw), ("first", "last"))))


def _nth(draw: random.Random) -> Asked:
    place = draw.randrange(4)
    name = ORDINALS[place]
    says = (
        f"Give the {name} word of the line, as it stands there.",
        f"What is word number {place + 1}? Copy it.",
        f"Return only the {name} word.",
    )
    return Asked(says, lambda line: line.split()[place])


def _last(draw: random.Random) -> Asked:
    says = ("Copy the last word.", "Repeat the word that the line ends with.", "Only the final word is wanted.")
    return Asked(says, lambda line: line.split()[-1])


def _some(draw: random.Random) -> Asked:
    number, first = draw.randint(2, 4), draw.random() < 0.5
    end = "first" if first else "last"
    says = (
        f"Copy the {end} {number} words and leave the rest out.",
        f"Shorten the line to its {end} {number} words.",
        f"Write down the {number} words at the {'beginning' if first else 'end'}, in their order.",
    )

    def answer(line: str) -> str:
        return " ".join(line.split()[:number] if first else line.split()[-number:])

    return Asked(says, answer)


def _without(draw: random.Random) -> Asked:
    first = draw.random() < 0.5
    end = "first" if first else "last"
    says = (
        f"Repeat the line without its {end} word.",
        f"Delete the {end} word and give back what remains.",
        f"All words but the {end} one, please.",
    )
    return Asked(says, lambda line: " ".join(line.split()[1:] if first else line.split()[:-1]))


def _case(draw: random.Random) -> Asked:
    change, name = draw.choice(((str.upper, "capital letters"), (str.lower, "small letters")))
    number = draw.randint(1, 4)
    what = "word" if number == 1 else f"{number} words"
    says = (
        f"Write the first {what} in {name}.",
        f"Take the first {what} of the line and turn all letters into {name}.",
        f"Output: first {what}, {name} only.",
    )
    return Asked(says, lambda line: change(" ".join(line.split()[:number])))


def _longest(draw: random.Random) -> Asked:
    says = (
        "Write the longest word, in small letters throughout.",
        "Which word has the most letters? In lower case.",
        "Return the line's longest word, lower-cased, without signs around it.",
    )

    def answer(line: str) -> str | None:
        most = max(map(len, _bare(line)))
        longest = {word for word in _bare(line) if len(word) == most}
        return longest.pop() if len(longest) == 1 else None

    return Asked(says, answer)


def _number(draw: random.Random) -> Asked:
    says = (
        "How many words does the line have? Write the number in digits.",
        "Count the words and give their number.",
        "The number of words is the answer.",
    )
    return Asked(says, lambda line: str(len(line.split())) if len(line.split()) <= 9 else None)


def _initials(draw: random.Random) -> Asked:
    number = draw.randint(3, 5)
    says = (
        f"Put the first letters of the first {number} words together, in capitals.",
        f"Make an abbreviation of the first {number} words: their initials, upper case, nothing between.",
        f"Initials of words one to {number} as one word in capital letters.",
    )

    def answer(line: str) -> str | None:
        words = line.split()[:number]
        fits = len(words) == number and all(word[0].isalpha() for word in words)
        return "".join(word[0].upper() for word in words) if fits else None

    return Asked(says, answer)


def _joined(draw: random.Random) -> Asked:
    sign, name = draw.choice((("-", "hyphens"), ("_", "underscores"), ("/", "slashes"), ("+", "plus signs")))
    number = draw.randint(3, 4)
    says = (
        f"Join the first {number} words with {name} in place of spaces.",
        f"Write the first {number} words with {name} between them and no spaces.",
        f"First {number} words, linked by {name}.",
    )
    return Asked(says, lambda line: sign.join(line.split()[:number]))


def _starting(draw: random.Random) -> Asked:
    letter, none = draw.choice("abcdhilmopstw"), draw.choice(("none", "nothing", "-", "no such word"))
    says = (
        f"Write the first word that starts with {letter}, in small letters, or {none} if no word does.",
        f"Which word begins with the letter {letter}? The first such one, lower case; {none} where there is none.",
        f"Search for a word starting with {letter} (case does not matter) and print it lower-cased. Otherwise {none}.",
    )
    return Asked(says, lambda line: next((word for word in _bare(line) if word.startswith(letter)), none))


def _swapped(draw: random.Random) -> Asked:
    says = (
        "Exchange the first word and the last one; the others stay where they are.",
        "Swap the words at both ends of the line.",
        "Write the line with its first and last words in each other's place.",
    )

    def answer(line: str) -> str:
        first, *middle, last = line.split()
        return " ".join((last, *middle, first))

    return Asked(says, answer)


LABELLED = (_holds_word, _holds_sign, _ends, _longer_than, _begins, _which_word, _repeated, _ends_longer)
OPEN = (_nth, _last, _some, _without, _case, _longest, _number, _initials, _joined, _starting, _swapped)
LABELLED_SHARE = 0.6
"""Of the tasks."""

PLAIN = (("Yes", "No"), ("yes", "no"), ("True", "False"), ("true", "false"))
PLAIN_SHARE = 0.4
"""Share of the tasks of two labels whose labels are one of these."""


def _pair(draw: random.Random) -> tuple[str, str]:
    """What stands for yes and for no."""
    sort = draw.random()
    if sort < PLAIN_SHARE:
        return draw.choice(PLAIN)
    case = draw.choice((str.lower, str.capitalize, str.upper))
    pair = draw.choice(OPPOSITES).split() if sort < 0.7 else draw.sample(WORDS.split(), 2)
    return case(pair[0]), case(pair[1])


# ------------------------------------------------------------------------------------------------------ how it is said

FRAMES = (
    "{say}",
    "{say}",
    "The input is a line of text. {say}",
    "You are given one line. {say}",
    "{say} Nothing else is printed.",
    "{say} Words are what spaces keep apart.",
    "A line of text comes in; its meaning does not matter. {say}",
    "I will send you a line. {say} Please write only that.",
    "Rule for every line: {say}",
    "Mechanical task, no understanding needed. {say}",
)


def lines(tasks: Iterable[Task], seed: int, number: int = 20_000) -> list[str]:
    """Lines of training inputs that are short and hold a few words, no two alike.

    Args:
        tasks: Tasks with training examples.
        seed: Of the draw.
        number: How many at most.
    """
    least, most = WORDS_OF_LINE
    found = {
        line.strip()
        for task in tasks
        for example in task.examples.get("train", ())
        for line in example.input.split("\n")
        if len(line) <= LONGEST_LINE
    }
    fitting = sorted(line for line in found if least <= len(line.split()) <= most and len(_bare(line)) >= least)
    return random.Random(f"{seed}/lines").sample(fitting, min(number, len(fitting)))


def procedural(number: int, among: Sequence[str], seed: int) -> list[Task]:
    """Tasks whose answers are computed.

    Args:
        number: Of tasks.
        among: Lines that inputs are drawn from, as `lines` gives them.
        seed: Of the draw; the same seed and lines give the same tasks, and more of them begin with the fewer.

    Returns:
        Tasks named `procedural-0` and so on, with training examples alone; fewer only where too few lines suit.
    """
    found = []
    for place in range(number):
        draw = random.Random(f"{seed}/procedural/{place}")
        for _ in range(TRIES):
            ask = draw.choice(LABELLED if draw.random() < LABELLED_SHARE else OPEN)(draw)
            examples = _examples(ask, among, draw)
            if examples:
                found.append(Task(f"procedural-{place}", _texts(ask, draw), {"train": examples}, category="procedural"))
                break
    return found


def _examples(ask: Asked, among: Sequence[str], draw: random.Random) -> tuple[Example, ...]:
    """Examples whose answers are not all alike, none too rare among few; nothing where the lines do not allow it."""
    answered: dict[str, list[str]] = {}
    for line in draw.sample(among, min(len(among), 20 * EXAMPLES)):
        answer = ask.answer(line)
        if answer is not None:
            answered.setdefault(ask.labels[answer] if isinstance(answer, int) else answer, []).append(line)
    if ask.labels:
        share = EXAMPLES // len(ask.labels)
        if set(answered) != set(ask.labels) or min(map(len, answered.values())) < RAREST * EXAMPLES:
            return ()
        answered = {answer: some[:share] for answer, some in answered.items()}
    both = [(line, answer) for answer, some in answered.items() for line in some]
    chosen = draw.sample(both, min(EXAMPLES, len(both)))
    if len(chosen) < EXAMPLES // 2 or Counter(answer for _, answer in chosen).most_common(1)[0][1] > 0.8 * len(chosen):
        return ()
    return tuple(Example(str(n), line, (answer,)) for n, (line, answer) in enumerate(chosen))


def _texts(ask: Asked, draw: random.Random) -> tuple[str, ...]:
    """Descriptions, no two alike."""
    quote = draw.choice(("{}", "{}", '"{}"'))
    names = [quote.format(label) for label in ask.labels]
    both = [frame.format(say=say.format(*names)) for say in ask.says for frame in FRAMES]
    return tuple(draw.sample(list(dict.fromkeys(both)), TEXTS))
