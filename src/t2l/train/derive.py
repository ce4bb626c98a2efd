"""Derived tasks: the same examples, asked about otherwise.

An example of a task with its input, right answers and those of other examples makes examples of other tasks: is this
answer right, and which of these is? One input is then met by several tasks, and the description says which. Training
has a few hundred tasks only, and what is trained on them is soon better on these and worse on others.
Knows words only.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from t2l.tasks import Example, Task
from t2l.train.relabel import WORDS, joined, texts_for_variant

LONGEST_ANSWER = 200
"""Characters; examples with a longer answer are left out."""
FEWEST_SHORT = 0.1
"""Share of a task's examples with short answers below which nothing is derived from it."""


@dataclass(frozen=True)
class Check:
    """Whether a proposed answer is right."""

    right: str
    wrong: str
    layout: str = field(compare=False)
    """Of input and answer. Not compared, like the examples: checks that differ in it alone have the same replies."""
    examples: tuple[Example, ...] = field(compare=False, repr=False)
    """Whose answers are proposed."""

    def __call__(self, example: Example, answer: str, rng: np.random.Generator) -> tuple[str, str]:
        """Input and reply; half the time `answer`, which is right, is what is proposed."""
        right = bool(rng.random() < 0.5)
        proposed = answer.strip() if right else wrong_answers(example, self.examples, 1, rng)[0]
        return self.layout.format(input=example.input.strip(), answer=proposed), self.right if right else self.wrong


@dataclass(frozen=True)
class Choose:
    """Which of several answers is right."""

    marks: tuple[str, ...]
    """As they are replied; there are as many options at most, and two at least."""
    before: str = field(compare=False)
    """Between the input and the options."""
    option: str = field(compare=False)
    """Of mark and answer."""
    between: str = field(compare=False)
    examples: tuple[Example, ...] = field(compare=False, repr=False)

    def __call__(self, example: Example, answer: str, rng: np.random.Generator) -> tuple[str, str]:
        """Input and reply; `answer` is the right one."""
        others = wrong_answers(example, self.examples, int(rng.integers(1, len(self.marks))), rng)
        place = int(rng.integers(len(others) + 1))
        options = [*others[:place], answer.strip(), *others[place:]]
        laid = [self.option.format(mark=mark, answer=options[n]) for n, mark in enumerate(self.marks[: len(options)])]
        return f"{example.input.strip()}{self.before}{self.between.join(laid)}", self.marks[place]


REPLIES = (
    ("Yes", "No"),
    ("yes", "no"),
    ("True", "False"),
    ("Correct", "Incorrect"),
    ("right", "wrong"),
    ("valid", "invalid"),
    ("1", "0"),
    ("accept", "reject"),
)
"""For a right answer and a wrong one."""
YES_AND_NO = 0.45
"""Share of checks whose replies are the first of these."""
OTHER_WORDS = 0.15
"""Share of checks whose replies are words that have nothing to do with it."""

LAYOUTS = (
    "{input}\n\nProposed answer: {answer}",
    "{input}\nProposed answer: {answer}",
    "{input}\n\nAnswer: {answer}",
    "{input}\nAnswer: {answer}\nIs it right?",
    "{input}\n\nAnswer given: {answer}",
    "{input}\n\nCandidate: {answer}",
    "{input}\n\nSomebody's answer: {answer}",
    "{input}\n\nReply to check: {answer}",
    "{input} -> {answer}",
    "Input: {input}\nOutput: {answer}",
    "Input: {input}\n\nOutput: {answer}\n\nVerdict?",
    "[input] {input} [answer] {answer}",
)

MARKS: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    (("A", "B", "C", "D"), ("{mark}. {answer}", "{mark}) {answer}", "{mark}: {answer}", "({mark}) {answer}"), "letter"),
    (("1", "2", "3", "4"), ("{mark}. {answer}", "{mark}) {answer}", "[{mark}] {answer}"), "number"),
    (("a", "b", "c", "d"), ("({mark}) {answer}", "{mark}) {answer}"), "letter"),
    (("(a)", "(b)", "(c)", "(d)"), ("{mark} {answer}",), "letter in brackets"),
    (("Option 1", "Option 2", "Option 3", "Option 4"), ("{mark}: {answer}", "{mark} - {answer}"), "name"),
    (("Choice A", "Choice B", "Choice C", "Choice D"), ("{mark}: {answer}", "{mark}. {answer}"), "name"),
)
"""Marks of options, how they stand before them, and what they are called."""
LISTS = (
    ("\n\n", "\n"),
    ("\n\nOptions:\n", "\n"),
    ("\n\nAnswers:\n", "\n"),
    ("\n\nPossible answers:\n", "\n"),
    ("\nCandidates:\n", "\n"),
    ("\nOptions: ", "; "),
    ("\n\nAnswers: ", " | "),
)
"""What stands before the options and between them."""

CHECKS = (
    'Somebody was given this task: "{task}" Their answer follows the input. Reply {yes} if it is right, {no} if not.',
    "A task: {task} Do not do it. Judge the answer that stands after the input: {yes} if it is right, {no} if wrong.",
    "{task} This was done already, and the answer stands after the input. Say {yes} if it is right or {no} if wrong.",
    "{task} The last thing in the input is an answer to that. Your job is to say {yes} if it is correct, else {no}.",
    'Check the answer, which stands after the input: {yes} if right, {no} if wrong. The task was: "{task}"',
    'You are given an input and an answer to this task: "{task}" Write {yes} when the answer is right, {no} when not.',
    "Mark a pupil's work. The exercise: \"{task}\" The pupil's answer is last. Print {yes} if it is right, else {no}.",
    'I asked for this: "{task}" After each input you see what I got. Tell me {yes} if it is correct, {no} if not.',
    'Verify, do not solve: "{task}" {yes} = the answer shown is right. {no} = it is wrong.',
    'Each input ends with an answer to the task "{task}" Is it right? Reply only {yes} (it is) or {no} (it is not).',
    'Does the answer at the end fit the task "{task}"? Output {yes} if it does and {no} if it does not.',
    'Right answer: {yes}. Wrong answer: {no}. Judge what others answered to "{task}"',
    'After the input stands a suggested answer to "{task}" Do not answer yourself: {yes} if it is right, else {no}.',
    'Review of answers. Task under review: "{task}" Verdicts: {yes} for right answers, {no} for wrong ones.',
    'Given an input with an answer to "{task}", return {yes} for an answer that is right and {no} for any other.',
)
"""What says that an answer is judged, around a description of the task."""

CHOICES = (
    'Somebody was given this task: "{task}" Answers follow the input; one is right. Reply with its {kind}: {marks}.',
    "A task: {task} Do not write the answer: choose it from the options after the input and give its {kind}, {marks}.",
    "{task} Here the answer is among the options that follow the input; reply with nothing but its {kind}: {marks}.",
    "{task} Possible answers are given below the input. Your job is to point out the right one by its {kind}, {marks}.",
    'Choose the right answer and reply with {marks}. The task was: "{task}"',
    'You are given an input and several answers to this task: "{task}" One is right: write its {kind}, {marks}.',
    'Multiple choice. The exercise: "{task}" The reply is the {kind} before the right option, nothing else: {marks}.',
    'I asked for this: "{task}" I got the answers that are listed after the input. Tell me which is correct: {marks}.',
    'Which option solves "{task}"? Only its {kind} is wanted: {marks}.',
    'Pick, do not write: "{task}" Your reply is {marks}, whichever stands before the right answer.',
    'Each input ends with answers to the task "{task}" Find the right one and output its {kind} alone, {marks}.',
    'The {kind} of the right answer, please: {marks}. What the answers are to: "{task}"',
    'The input is followed by options, one of which does what "{task}" asks. Print {marks} to point at it.',
    'Quiz. Question type: "{task}" Reply: {marks}, for the one option that is right.',
    'Given an input with options for "{task}", return the {kind} in front of the right one: {marks}.',
)
"""What says that an answer is chosen."""


def examples_of(task: Task) -> tuple[Example, ...]:
    """The training examples that a right and a wrong short answer can be shown of, an input once with all its answers.

    None if hardly any is.
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

    The frequent ones are drawn more often, as they are more often right, too.
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
    """An answer without what makes no difference."""
    return " ".join(answer.casefold().split()).rstrip(".")


def derived(task: Task, number: int, seed: int) -> list[tuple[Check | Choose, tuple[str, ...]]]:
    """Tasks made of a task's examples, checks and choices in turn, and descriptions that say what is asked.

    Args:
        task: With descriptions and training examples.
        number: Of derived tasks; there are none if the task's answers are all alike, or long.
        seed: Of the draw; the same task and seed give the same ones.
    """
    examples, found = examples_of(task), list[tuple[Check | Choose, tuple[str, ...]]]()
    for turn in range(number if examples else 0):
        draw = random.Random(f"{seed}/{task.name}/derive/{turn}")
        ask, templates, names = (_choose if turn % 2 else _check)(examples, draw)
        texts = texts_for_variant(task, draw)
        said = [draw.choice(templates).format(task=_ended(text.strip()), **names) for text in texts]
        found.append((ask, tuple(dict.fromkeys(said))))
    return found


def _check(examples: tuple[Example, ...], draw: random.Random) -> tuple[Check, Sequence[str], dict[str, str]]:
    """A check, the sentences for it and what they name."""
    known = {_plain(output) for example in examples for output in example.outputs}
    sort = draw.random()
    right, wrong = REPLIES[0] if sort < YES_AND_NO else draw.choice(REPLIES[1:])
    if sort > 1 - OTHER_WORDS:
        free = [word for word in WORDS.split() if word not in known]
        right, wrong = draw.sample(free if len(free) > 1 else WORDS.split(), 2)
    quote = draw.choice(("{}", "{}", '"{}"', "'{}'"))
    names = {"yes": quote.format(right), "no": quote.format(wrong)}
    return Check(right, wrong, draw.choice(LAYOUTS), examples), CHECKS, names


def _choose(examples: tuple[Example, ...], draw: random.Random) -> tuple[Choose, Sequence[str], dict[str, str]]:
    """A choice, the sentences for it and what they name."""
    known = {_plain(output) for example in examples for output in example.outputs}
    bare = {answer.strip("()") for answer in known}
    # A mark that is an answer too would say two things; the last two kinds hardly ever are.
    fitting = [kind for kind in MARKS if not bare & {mark.strip("()").casefold() for mark in kind[0]}]
    marks, options, called = draw.choice(fitting or MARKS[-2:])
    marks = marks[: len(known)]
    before, between = draw.choice(LISTS)
    ask = Choose(marks, before, draw.choice(options), between, examples)
    return ask, CHOICES, {"kind": called, "marks": joined(marks, "or")}


def _ended(text: str) -> str:
    return text if text[-1:] in ".?!:" else text + "."
