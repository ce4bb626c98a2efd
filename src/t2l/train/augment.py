"""Augmentations of training rows: the same examples are asked about otherwise, and only the description says how.

A task can often be told from its inputs alone, answers included; then no description has to be read. An augmentation
makes other inputs or answers of a task's examples, and descriptions that say so, so that the description decides:

- `LabelRemap`: other words stand for a few short answers ("Write maple for Yes and river for No"), after symbol tuning
  (arXiv 2305.08298), which swaps labels in prompts;
- `FormatVariation`: open answers keep their words and change their form ("Put the answer in square brackets");
- `AnswerCheck` and `AnswerChoice`: auxiliary tasks, which ask whether an answer is right, or which of several is.

Knows tasks and words. The sentences stand in `templates`.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol

import numpy as np

from t2l.tasks import Example, Task
from t2l.train import templates

LABEL_REMAPS = 12
"""Variants of a task with other words or another form. Descriptions of a few variants would be learnt by heart."""
AUXILIARY_TASKS = 4
"""Auxiliary tasks of a task, checks and choices in turn."""
TEXTS_EACH = 4
"""Descriptions of a variant."""
MOST_LABELS = 8
"""A task with more distinct answers than this has open answers."""
LONGEST_LABEL = 40
"""Characters; a task with a longer answer has open answers."""
NAMED = 0.35
"""Share of label remaps that keep the task's own answers, and only name them."""
YES_AND_NO = 0.45
"""Share of answer checks whose replies are Yes and No."""
OTHER_WORDS = 0.15
"""Share of answer checks whose replies are words that have nothing to do with right and wrong."""
LONGEST_ANSWER = 200
"""Characters; examples with a longer answer are left out of auxiliary tasks."""
FEWEST_SHORT = 0.1
"""Share of a task's examples with such short answers below which it has no auxiliary tasks."""
WORDS = tuple(templates.WORDS.split())
"""Words for label remaps where the tasks' own vocabulary is small."""


class Augmentation(Protocol):
    """Makes another example of an example. Two that are equal ask the same thing, in whichever layout."""

    def __call__(self, example: Example, answer: str, rng: np.random.Generator) -> tuple[str, str]:
        """The new input and its right answer, made of an example and one of its right answers."""


class Variant(NamedTuple):
    """A task as an augmentation changes it."""

    augmentation: Augmentation
    examples: tuple[Example, ...]
    """The task's examples that the augmentation can be used on."""
    descriptions: tuple[str, ...]
    """Texts that say what is to be answered now."""


@dataclass(frozen=True)
class LabelRemap:
    """Other words stand for a task's few answers."""

    new: Mapping[str, str]
    """The new answer for each answer of the task."""

    def __call__(self, example: Example, answer: str, rng: np.random.Generator) -> tuple[str, str]:
        """The same input, the new answer."""
        return example.input, self.new[answer.strip()]


@dataclass(frozen=True)
class FormatVariation:
    """The same answer, written in another form."""

    wrap: str = "{}"
    case: Literal["", "lower", "upper"] = ""

    def __call__(self, example: Example, answer: str, rng: np.random.Generator) -> tuple[str, str]:
        """The same input, the answer in this form."""
        answer = answer.strip()
        return example.input, self.wrap.format(
            {"": answer, "lower": answer.lower(), "upper": answer.upper()}[self.case]
        )


@dataclass(frozen=True)
class AnswerCheck:
    """An auxiliary task: is a proposed answer right?"""

    right: str
    wrong: str
    layout: str = field(compare=False)
    """How input and proposed answer are laid out. It is not compared, and neither are the examples: two checks that
    differ in nothing else have the same replies."""
    examples: tuple[Example, ...] = field(compare=False, repr=False)
    """Whose answers are proposed."""

    def __call__(self, example: Example, answer: str, rng: np.random.Generator) -> tuple[str, str]:
        """Half the time `answer`, which is right, is proposed, otherwise another example's."""
        right = bool(rng.random() < 0.5)
        proposed = answer.strip() if right else wrong_answers(example, self.examples, 1, rng)[0]
        return self.layout.format(input=example.input.strip(), answer=proposed), self.right if right else self.wrong


@dataclass(frozen=True)
class AnswerChoice:
    """An auxiliary task: which of several answers is right?"""

    marks: tuple[str, ...]
    """The possible replies. There are at least two options, and at most as many as marks."""
    before: str = field(compare=False)
    """What stands between the input and the options."""
    option: str = field(compare=False)
    """How a mark and its answer are laid out."""
    between: str = field(compare=False)
    """What stands between two options."""
    examples: tuple[Example, ...] = field(compare=False, repr=False)
    """Whose answers are the other options."""

    def __call__(self, example: Example, answer: str, rng: np.random.Generator) -> tuple[str, str]:
        """The options after the input, and the mark of `answer`, which is the right one."""
        others = wrong_answers(example, self.examples, int(rng.integers(1, len(self.marks))), rng)
        place = int(rng.integers(len(others) + 1))
        options = [*others[:place], answer.strip(), *others[place:]]
        laid = [self.option.format(mark=mark, answer=options[n]) for n, mark in enumerate(self.marks[: len(options)])]
        return f"{example.input.strip()}{self.before}{self.between.join(laid)}", self.marks[place]


FORMATS = {FormatVariation(wrap, case): sentences for wrap, case, sentences in templates.FORMATS}
"""Each form of an open answer with the sentences that ask for it."""

# ------------------------------------------------------------------------------------- other words and other forms


def answers_of(task: Task) -> tuple[str, ...]:
    """A task's distinct answers, the most frequent first, if they are few and short; none otherwise."""
    counts: dict[str, int] = {}
    for example in task.examples.get("train", ()):
        for output in example.outputs:
            counts[output.strip()] = counts.get(output.strip(), 0) + 1
            if len(counts) > MOST_LABELS or len(output.strip()) > LONGEST_LABEL:
                return ()
    return tuple(sorted(counts, key=lambda answer: (-counts[answer], answer))) if len(counts) > 1 else ()


def vocabulary(tasks: Iterable[Task]) -> tuple[str, ...]:
    """Words of four to fourteen letters that stand in descriptions of several tasks, in order."""
    counts: Counter[str] = Counter()
    for task in tasks:
        counts.update({word for text in task.descriptions for word in re.findall(r"(?<!\w)[a-z]{4,14}(?!\w)", text)})
    return tuple(sorted(word for word, number in counts.items() if number > 1))


def answer_variants(
    task: Task, seed: int, *, number: int = LABEL_REMAPS, words: Sequence[str] = WORDS
) -> list[Variant]:
    """Label remaps of a task that has a few short answers, format variations of one with open answers.

    Args:
        task: A task with descriptions and training examples.
        seed: Seed of the draw; the same task and seed give the same variants.
        number: How many variants are made.
        words: Words that new answers are drawn from; there must be more than the task has answers.
    """
    answers, found = answers_of(task), list[Variant]()
    for turn in range(number):
        draw = random.Random(f"{seed}/{task.name}/relabel/{turn}")
        change: LabelRemap | FormatVariation
        if answers:
            named = draw.random() < NAMED
            new = dict(zip(answers, answers, strict=True)) if named else _other_words(answers, draw, words)
            change = LabelRemap(new)
        else:
            change = draw.choice(list(FORMATS))
        texts = [_with_sentence(text, change, draw) for text in texts_for_variant(task, draw)]
        found.append(Variant(change, task.examples.get("train", ()), tuple(dict.fromkeys(texts))))
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
    lists.append(draw.choice(templates.SERIES).split()[:number])
    if number == 2:
        lists += [pair.split() for pair in draw.sample(templates.OPPOSITES, 3)]
        lists += [[word, draw.choice(("not ", "non-", "no ")) + word] for word in draw.sample(words, 2)]
    # However many of the task's answers are among the words, enough others are left.
    last = draw.sample([word for word in words if word not in known], number)
    fitting = (some for some in draw.sample(lists, len(lists)) if not known & set(some) and len(set(some)) == number)
    chosen = next(fitting, last)
    case = draw.choice((str.lower, str.lower, str.capitalize, str.capitalize, str.upper))
    return {answer: case(word) for answer, word in zip(answers, draw.sample(chosen, number), strict=True)}


def _with_sentence(text: str, change: LabelRemap | FormatVariation, draw: random.Random) -> str:
    """The description with a sentence that says how to answer after it, or now and then before it."""
    sentence = draw.choice(FORMATS[change]) if isinstance(change, FormatVariation) else _naming(change.new, draw)
    text = text.strip()
    if draw.random() < 0.2:
        return f"{sentence} {text}"
    return f"{ended(text)} {sentence}"


def _naming(new: Mapping[str, str], draw: random.Random) -> str:
    """A sentence that names the answers."""
    quote = draw.choice(("{}", "{}", '"{}"', "'{}'"))
    pairs = [(quote.format(old), quote.format(word)) for old, word in new.items()]
    draw.shuffle(pairs)
    if all(old == word for old, word in pairs):
        words = [word for _, word in pairs]
        either, both = _joined(words, "or"), _joined(words, "and")
        return draw.choice(templates.LABEL_SENTENCES).format(or_=either, and_=both, list_=", ".join(words))
    if draw.random() < 0.6:
        how = draw.choice(templates.SWAP_SENTENCES)
        first = how.format(old=pairs[0][0], new=pairs[0][1])
        # The verb stands once, as in "Write maple for Yes and river for No".
        link = how[how.index("{new}") :]
        return _joined([first, *(link.format(old=old, new=word) for old, word in pairs[1:])], "and") + "."
    form = draw.choice(("{new} ({old})", "{new} = {old}", "{old}: {new}", "{old} -> {new}"))
    listed = ", ".join(form.format(old=old, new=word) for old, word in pairs)
    return draw.choice(templates.SWAP_LISTS).format(pairs=listed)


def _joined(parts: Sequence[str], word: str) -> str:
    """`a, b or c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {word} {parts[-1]}"


def ended(text: str) -> str:
    """The text with a full stop if nothing ends it."""
    return text if text[-1:] in ".?!:" else text + "."


# ----------------------------------------------------------------------------------------------- auxiliary tasks


def auxiliary_tasks(task: Task, seed: int, *, number: int = AUXILIARY_TASKS) -> list[Variant]:
    """Tasks made of a task's examples, checks and choices in turn, with descriptions that say what is asked.

    Args:
        task: A task with descriptions and training examples.
        seed: Seed of the draw; the same task and seed give the same auxiliary tasks.
        number: How many there are; none if the task's answers are all alike, or long.
    """
    examples, found = checkable_examples(task), list[Variant]()
    for turn in range(number if examples else 0):
        draw = random.Random(f"{seed}/{task.name}/derive/{turn}")
        change, sentences, names = (_choice if turn % 2 else _check)(examples, draw)
        texts = texts_for_variant(task, draw)
        said = [draw.choice(sentences).format(task=ended(text.strip()), **names) for text in texts]
        found.append(Variant(change, examples, tuple(dict.fromkeys(said))))
    return found


def checkable_examples(task: Task) -> tuple[Example, ...]:
    """The training examples for which a right and a wrong short answer can be shown, each input once with all answers.

    There are none if hardly any of the task's examples is such.
    """
    answers: dict[str, dict[str, None]] = {}
    given = task.examples.get("train", ())
    for example in given:
        answers.setdefault(example.input.strip(), {}).update(dict.fromkeys(map(str.strip, example.outputs)))
    merged = [replace(e, outputs=tuple(answers.pop(e.input.strip()))) for e in given if e.input.strip() in answers]
    short = [e for e in merged if all(0 < len(output) <= LONGEST_ANSWER for output in e.outputs)]
    if len(short) < FEWEST_SHORT * len(merged):
        return ()
    while True:  # again, as an answer may have gone with the last example that had it
        known = {_plain(output) for example in short for output in example.outputs}
        kept = [e for e in short if len({_plain(output) for output in e.outputs}) < len(known)]
        if len(kept) == len(short):
            return tuple(kept)
        short = kept


def wrong_answers(example: Example, examples: Sequence[Example], number: int, rng: np.random.Generator) -> list[str]:
    """Answers of other examples that are none of this one's, no two alike; fewer where there are no more.

    Frequent answers are drawn more often, because they are right more often too.
    """
    known, found = set(map(_plain, example.outputs)), list[str]()
    for place in rng.permutation(len(examples)):
        for output in examples[place].outputs:
            if len(found) < number and _plain(output) not in known:
                known.add(_plain(output))
                found.append(output)
        if len(found) == number:
            break
    return found


def _plain(answer: str) -> str:
    """An answer without the differences that do not matter: case, spaces, a last full stop."""
    return " ".join(answer.casefold().split()).rstrip(".")


def _check(examples: tuple[Example, ...], draw: random.Random) -> tuple[AnswerCheck, Sequence[str], dict[str, str]]:
    """A check, the sentences for it and what they name."""
    known = {_plain(output) for example in examples for output in example.outputs}
    sort = draw.random()
    right, wrong = templates.REPLIES[0] if sort < YES_AND_NO else draw.choice(templates.REPLIES[1:])
    if sort > 1 - OTHER_WORDS:
        free = [word for word in WORDS if word not in known]
        right, wrong = draw.sample(free if len(free) > 1 else WORDS, 2)
    quote = draw.choice(("{}", "{}", '"{}"', "'{}'"))
    names = {"yes": quote.format(right), "no": quote.format(wrong)}
    return AnswerCheck(right, wrong, draw.choice(templates.LAYOUTS), examples), templates.CHECKS, names


def _choice(examples: tuple[Example, ...], draw: random.Random) -> tuple[AnswerChoice, Sequence[str], dict[str, str]]:
    """A choice, the sentences for it and what they name."""
    known = {_plain(output) for example in examples for output in example.outputs}
    bare = {answer.strip("()") for answer in known}
    # A mark that is also an answer would mean two things; the last two kinds of marks hardly ever are answers.
    fitting = [kind for kind in templates.MARKS if not bare & {mark.strip("()").casefold() for mark in kind[0]}]
    marks, options, called = draw.choice(fitting or templates.MARKS[-2:])
    marks = marks[: len(known)]
    before, between = draw.choice(templates.OPTION_LISTS)
    choice = AnswerChoice(marks, before, draw.choice(options), between, examples)
    return choice, templates.CHOICES, {"kind": called, "marks": _joined(marks, "or")}
