"""Variants of a task whose answers are other words or of another form, which only the description says.

A task with few distinct answers can be told from its inputs alone, answers included: nothing has to be read. Here the
same inputs get different answers, so what the description says decides ("Write maple for Yes and river for No").
After symbol tuning (arXiv 2305.08298), which swaps labels in prompts; here for the text an adapter is written from.
Open answers keep their words and change their form ("Put the answer in square brackets").
Knows words only.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from t2l.tasks import Task

MOST_ANSWERS = 8
"""Distinct answers of a task that has variants."""
LONGEST_ANSWER = 40
"""Characters; longer answers are no labels."""
TEXTS_EACH = 4
"""Descriptions of a variant. What counts is how many variants there are: those of a few are learnt by heart."""
NAMED = 0.35
"""Share of variants that keep the task's own answers and name them."""


@dataclass(frozen=True)
class Words:
    """A new answer for every one that the task has."""

    new: Mapping[str, str]

    def __call__(self, answer: str) -> str:
        """The new answer."""
        return self.new[answer.strip()]


@dataclass(frozen=True)
class Form:
    """The same answer, written otherwise."""

    wrap: str = "{}"
    case: Literal["", "lower", "upper"] = ""

    def __call__(self, answer: str) -> str:
        """The answer in this form."""
        answer = answer.strip()
        return self.wrap.format({"": answer, "lower": answer.lower(), "upper": answer.upper()}[self.case])


FORMS = {
    Form("[{}]"): ("Put the answer in square brackets.", "Answer in [brackets].", "The reply stands between [ and ]."),
    Form("({})"): ("Put the answer in round brackets.", "Answer (in parentheses)."),
    Form('"{}"'): ("Put the answer in double quotes.", 'Quote your answer "like this".'),
    Form("Answer: {}"): (
        "Start with Answer: and then give it.",
        'Begin the reply with "Answer:".',
        "Output: Answer: ...",
    ),
    Form("Result: {}"): ('Write "Result:" before the answer.', "Your reply begins with Result:"),
    Form("- {}"): ("Write the answer as a list item after a dash.", "Begin with a dash and a space."),
    Form("{}."): ("End the answer with a full stop.", "Finish with a period."),
    Form("{} END"): ("Write END after the answer.", "The last word of the reply is END."),
    Form("<{}>"): ("Put the answer between < and >.", "Answer in <angle brackets>."),
    Form(case="upper"): ("Answer in capital letters.", "WRITE THE ANSWER IN UPPER CASE.", "Use capitals only."),
    Form(case="lower"): ("Answer in lower case.", "Use small letters only."),
}
"""Ways to write an open answer, and what says so."""

OPPOSITES = (
    "yes no",
    "true false",
    "correct incorrect",
    "right wrong",
    "positive negative",
    "good bad",
    "valid invalid",
    "agree disagree",
    "same different",
    "accept reject",
    "pass fail",
    "related unrelated",
    "match mismatch",
    "likely unlikely",
    "safe unsafe",
    "1 0",
    "1 2",
    "a b",
    "x y",
    "up down",
    "left right",
    "on off",
)
"""Answers as tasks with two of them like to have."""
SERIES = ("a b c d e f g h", "1 2 3 4 5 6 7 8", "i ii iii iv v vi vii viii")
WORDS = (
    "apple river stone cloud maple tiger candle window garden silver bridge carpet falcon ginger harbor island "
    "jacket kettle lemon meadow needle ocean pepper quartz rabbit saddle temple umbrella velvet walnut yellow zebra "
    "anchor basket copper dragon engine feather guitar hammer iron jungle kitten ladder mirror nectar orange pencil "
    "queen rocket summer ticket valley winter amber bronze castle desert eagle forest grape honey ivory jewel "
    "lantern marble noodle olive parrot ribbon shadow thunder violet whale cotton daisy ember flute glove helmet "
    "ink lotus mango novel onion piano rose sugar tulip wagon north south east west spring autumn first second "
    "third fourth high low middle strong weak open closed early late light heavy formal casual factual fictional "
    "personal public question statement event person place object animal food sport music science history travel "
    "health money family weather"
)

LISTS = (
    "Answer {or_}.",
    "The answer is {or_}.",
    "The possible answers are {and_}.",
    "Reply with {or_} and nothing else.",
    "Labels: {list_}.",
    "Options: {list_}.",
    "Output only {or_}.",
    "Choose between {and_}.",
    "Your reply must be one of: {list_}.",
    "Say {or_}.",
    "Print {or_}.",
)
SWAPS = (
    "Write {new} for {old}",
    "Answer {new} where it is {old}",
    "Say {new} in place of {old}",
    "Use {new} to mean {old}",
    "Output {new} if the answer would be {old}",
    "Reply {new} when it is {old}",
    "{new} stands for {old}",
    "{new} means {old}",
)
SWAP_LISTS = ("Labels: {pairs}.", "Answers: {pairs}.", "Codes: {pairs}.", "Answer with a code. {pairs}.")


def answers_of(task: Task) -> tuple[str, ...]:
    """A task's distinct answers, the most frequent first, if they are few and short; none otherwise."""
    counts: dict[str, int] = {}
    for example in task.examples.get("train", ()):
        for output in example.outputs:
            counts[output.strip()] = counts.get(output.strip(), 0) + 1
            if len(counts) > MOST_ANSWERS or len(output.strip()) > LONGEST_ANSWER:
                return ()
    return tuple(sorted(counts, key=lambda answer: (-counts[answer], answer))) if len(counts) > 1 else ()


def vocabulary(tasks: Iterable[Task]) -> tuple[str, ...]:
    """Words of four to fourteen letters that stand in descriptions of several tasks, in order."""
    counts: Counter[str] = Counter()
    for task in tasks:
        counts.update({word for text in task.descriptions for word in re.findall(r"(?<!\w)[a-z]{4,14}(?!\w)", text)})
    return tuple(sorted(word for word, number in counts.items() if number > 1))


def variants(
    task: Task, number: int, seed: int, *, words: Sequence[str] = ()
) -> list[tuple[Words | Form, tuple[str, ...]]]:
    """Other words for a task's answers, or another form of them, and descriptions that say which.

    Args:
        task: With descriptions and training examples.
        number: Of variants.
        seed: Of the draw; the same task and seed give the same variants.
        words: To draw from in place of a short list of ours; more than there are answers.

    Returns:
        For each variant what makes the new answer of an old one, and some of the descriptions with a sentence that
        says so. Words where the task has a few short answers, otherwise forms.
    """
    answers, found = answers_of(task), list[tuple[Words | Form, tuple[str, ...]]]()
    words = words or WORDS.split()
    for turn in range(number):
        draw = random.Random(f"{seed}/{task.name}/relabel/{turn}")
        if answers:
            named = draw.random() < NAMED
            new = dict(zip(answers, answers, strict=True)) if named else _other_words(answers, draw, words)
            change: Words | Form = Words(new)
        else:
            change = draw.choice(list(FORMS))
        texts = [_with_sentence(text, change, draw) for text in texts_for_variant(task, draw)]
        found.append((change, tuple(dict.fromkeys(texts))))
    return found


def texts_for_variant(task: Task, draw: random.Random) -> list[str]:
    """Some of a task's descriptions, to be reworded; where there are few, the same ones several times."""
    some = draw.sample(task.descriptions, min(TEXTS_EACH, len(task.descriptions)))
    return (some * TEXTS_EACH)[:TEXTS_EACH]


def _other_words(answers: Sequence[str], draw: random.Random, words: Sequence[str]) -> dict[str, str]:
    """As many different words as there are answers, none of them an answer of the task."""
    known, number = {answer.casefold() for answer in answers}, len(answers)
    lists = [draw.sample(words, number) for _ in range(3)]
    link = draw.choice((" ", "_", "-"))
    lists.append([link.join(draw.sample(words, 2)) for _ in range(number)])
    lists.append(draw.choice(SERIES).split()[:number])
    if number == 2:
        lists += [pair.split() for pair in draw.sample(OPPOSITES, 3)]
        lists += [[word, draw.choice(("not ", "non-", "no ")) + word] for word in draw.sample(words, 2)]
    # However many answers are words of ours, some words are left.
    last = draw.sample([word for word in words if word not in known], number)
    fitting = (some for some in draw.sample(lists, len(lists)) if not known & set(some) and len(set(some)) == number)
    chosen = next(fitting, last)
    case = draw.choice((str.lower, str.lower, str.capitalize, str.capitalize, str.upper))
    return {answer: case(word) for answer, word in zip(answers, draw.sample(chosen, number), strict=True)}


def _with_sentence(text: str, change: Words | Form, draw: random.Random) -> str:
    """The description with a sentence that says how to answer after it, or now and then before."""
    sentence = draw.choice(FORMS[change]) if isinstance(change, Form) else _naming(change.new, draw)
    text = text.strip()
    if draw.random() < 0.2:
        return f"{sentence} {text}"
    return f"{text if text[-1:] in '.?!:' else text + '.'} {sentence}"


def _naming(new: Mapping[str, str], draw: random.Random) -> str:
    """A sentence that names the answers."""
    quote = draw.choice(("{}", "{}", '"{}"', "'{}'"))
    pairs = [(quote.format(old), quote.format(word)) for old, word in new.items()]
    draw.shuffle(pairs)
    if all(old == word for old, word in pairs):
        words = [word for _, word in pairs]
        either, both = joined(words, "or"), joined(words, "and")
        return draw.choice(LISTS).format(or_=either, and_=both, list_=", ".join(words))
    if draw.random() < 0.6:
        how = draw.choice(SWAPS)
        first = how.format(old=pairs[0][0], new=pairs[0][1])
        # The verb stands once, as in "Write maple for Yes and river for No".
        link = how[how.index("{new}") :]
        return joined([first, *(link.format(old=old, new=word) for old, word in pairs[1:])], "and") + "."
    form = draw.choice(("{new} ({old})", "{new} = {old}", "{old}: {new}", "{old} -> {new}"))
    listed = ", ".join(form.format(old=old, new=word) for old, word in pairs)
    return draw.choice(SWAP_LISTS).format(pairs=listed)


def joined(parts: Sequence[str], word: str) -> str:
    """`a, b or c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {word} {parts[-1]}"
