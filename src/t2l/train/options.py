"""Where the labels stand: options listed in the input, in the description, in both or in neither; and texts that say
next to nothing of a task.

A training set whose descriptions always name the labels teaches an adapter to answer with words of its description,
also where the input lists the options and the description is a title. Here options are listed in the input, in the
many ways in which people do it, and some rows get a description that does not say what to answer.
Knows words only.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from t2l.tasks import Example, Task
from t2l.train.derive import examples_of, wrong_answers
from t2l.train.relabel import texts_for_variant

MOST_OPTIONS = 6
"""Options that a choice among open answers lists at most."""
LAYOUTS: tuple[tuple[str, str, str, str], ...] = (
    ("\nOptions:\n", "- {}", "\n", ""),
    ("\n\nOptions:\n", "- {}", "\n", ""),
    ("\n\nChoices:\n", "- {}", "\n", ""),
    ("\n", "- {}", "\n", ""),
    ("\n\n", "- {}", "\n", ""),
    ("\n", "* {}", "\n", ""),
    ("\n\nPossible answers:\n", "{}", "\n", ""),
    ("\n", "{}", "\n", ""),
    ("\nOptions: ", "{}", ", ", ""),
    ("\n\nOptions: ", "{}", ", ", "."),
    ("\nChoose from: ", "{}", ", ", ""),
    ("\nAnswer choices: ", "{}", "; ", ""),
    ("\nOne of: ", "{}", " / ", ""),
    (" (", "{}", ", ", ")"),
    (" (", "{}", "/", ")"),
    (" [", "{}", " | ", "]"),
    ("\n\nThe answer is one of these: ", "{}", ", ", "."),
    ("\nIs it ", "{}", " or ", "?"),
    ("\nWhich is right: ", "{}", " or ", "?"),
    ("\nLabels: ", "{}", ", ", ""),
    ("\n\nPick one: ", '"{}"', ", ", ""),
)
"""What stands before the options, how each is written, what stands between them and after them."""
FIRST: tuple[tuple[str, str, str, str], ...] = (
    ("Options: ", "{}", ", ", "\n\n"),
    ("Choose one of: ", "{}", ", ", "\n"),
    ("Possible answers:\n", "- {}", "\n", "\n\n"),
    ("[", "{}", " | ", "] "),
)
"""The same for lists that stand before the input."""
OPTIONS_FIRST = 0.12
"""Share of lists that stand before the input."""
SAID = (
    "{task} The options follow the input; repeat the right one.",
    "{task} Answer with one of the options in the input.",
    "{task} The possible answers are listed; copy the one that fits.",
    "Choose the right option. {task}",
    "{task} Choose among what is offered.",
    "{task} (multiple choice)",
)
"""What says that the options stand in the input, around a description of the task."""
UNSAID = 0.6
"""Share of the descriptions of a choice that do not say so: the input shows it."""

TERSE = (
    "Answer the question.",
    "Do the task.",
    "Complete the task.",
    "A language understanding task.",
    "A test of reading.",
    "Reply to the input.",
    "Respond correctly.",
    "A benchmark for language models.",
    "Measures the ability of models to understand text.",
    "Give the answer.",
    "Questions and answers.",
    "Short texts with a right answer each.",
    "Natural language task",
    "Evaluation of reasoning",
    "See the input.",
    "Task",
    "Text in, text out.",
    "A data set for testing language models",
    "Tests common knowledge.",
    "Solve it.",
    "A collection of exercises",
    "What is the answer?",
    "Helpful answers wanted.",
    "Understanding of everyday language",
    "Linguistic ability",
    "A simple exercise.",
    "Follow what the input asks.",
    "Do what the text says.",
    "Produce the expected output.",
    "Work out the right reply.",
)
"""Descriptions that say nothing of the task or its answers."""
TITLES = (
    "{kind}",
    "{kind}.",
    "{kind} task",
    "A {kind} task.",
    "Test of {kind}",
    "Evaluates {kind}.",
    "A benchmark of {kind}.",
    "Measure the quality of {kind}",
    "{kind} for language models",
)
"""Titles that name the kind of task and no more."""


@dataclass(frozen=True)
class Listing:
    """How options are listed in an input."""

    layout: tuple[str, str, str, str]
    first: bool

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> "Listing":
        """One of the layouts."""
        first = bool(rng.random() < OPTIONS_FIRST)
        layouts = FIRST if first else LAYOUTS
        return cls(layouts[int(rng.integers(len(layouts)))], first)

    def put(self, text: str, options: Sequence[str]) -> str:
        """The input with the options, in the order given."""
        before, each, between, after = self.layout
        listed = f"{before}{between.join(each.format(option) for option in options)}{after}"
        return f"{listed}{text.strip()}" if self.first else f"{text.strip()}{listed}"


def placed(text: str, options: Sequence[str], rng: np.random.Generator, listing: Listing) -> str:
    """The input with its task's options in random order; an input that lists them itself stays as it is."""
    folded = text.casefold()
    if all(option.casefold() in folded for option in options):
        return text
    return listing.put(text, [options[n] for n in rng.permutation(len(options))])


@dataclass(frozen=True)
class Pick:
    """Which of several answers is right: the options stand in the input, and the right one's text is the answer."""

    most: int
    """Options at most; two at least."""
    listing: Listing = field(compare=False)
    examples: tuple[Example, ...] = field(compare=False, repr=False)
    """Whose answers are the other options."""

    def __call__(self, example: Example, answer: str, rng: np.random.Generator) -> tuple[str, str]:
        """Input and reply; `answer` is the right one."""
        others = wrong_answers(example, self.examples, int(rng.integers(1, self.most)), rng)
        options = [answer.strip(), *others]
        return self.listing.put(example.input, [options[n] for n in rng.permutation(len(options))]), answer.strip()


def picks(task: Task, number: int, seed: int) -> list[tuple[Pick, tuple[str, ...]]]:
    """Choices among a task's answers, and descriptions, most of which do not say that the options are listed.

    Args:
        task: With descriptions and training examples.
        number: Of choices; there are none if the task's answers are all alike, or long.
        seed: Of the draw; the same task and seed give the same ones.
    """
    examples, found = examples_of(task), list[tuple[Pick, tuple[str, ...]]]()
    for turn in range(number if examples else 0):
        draw = random.Random(f"{seed}/{task.name}/pick/{turn}")
        listing = Listing.drawn(np.random.default_rng(draw.getrandbits(32)))
        texts = texts_for_variant(task, draw)
        said = [text if draw.random() < UNSAID else draw.choice(SAID).format(task=_ended(text)) for text in texts]
        found.append((Pick(draw.randint(2, MOST_OPTIONS), listing, examples), tuple(dict.fromkeys(said))))
    return found


def terse_descriptions(task: Task) -> tuple[str, ...]:
    """Texts that say next to nothing of a task: general ones, and titles that name its category where it has one."""
    kind = (task.category or "").strip().lower()
    return (*TERSE, *(dict.fromkeys(_capital(title.format(kind=kind)) for title in TITLES) if kind else ()))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _ended(text: str) -> str:
    text = text.strip()
    return text if text[-1:] in ".?!:" else text + "."
