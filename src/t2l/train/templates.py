"""What augmented training rows say: words, sentences that stand in descriptions, layouts of inputs. Only data."""

from typing import Literal

# ----------------------------------------------------------------------------------------- other words as answers

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
"""Pairs of answers as tasks with two answers often have them."""
SERIES = ("a b c d e f g h", "1 2 3 4 5 6 7 8", "i ii iii iv v vi vii viii")
"""Letters and numbers that answers may be replaced by, in order."""
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
"""Words that answers may be replaced by."""

LABEL_SENTENCES = (
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
"""Sentences that name the answers."""
SWAP_SENTENCES = (
    "Write {new} for {old}",
    "Answer {new} where it is {old}",
    "Say {new} in place of {old}",
    "Use {new} to mean {old}",
    "Output {new} if the answer would be {old}",
    "Reply {new} when it is {old}",
    "{new} stands for {old}",
    "{new} means {old}",
)
"""Sentences that name a new answer and the one it stands for."""
SWAP_LISTS = ("Labels: {pairs}.", "Answers: {pairs}.", "Codes: {pairs}.", "Answer with a code. {pairs}.")
"""Sentences that name all new answers with those they stand for."""

# ----------------------------------------------------------------------------------------- other forms of answers

FORMATS: tuple[tuple[str, Literal["", "lower", "upper"], tuple[str, ...]], ...] = (
    ("[{}]", "", ("Put the answer in square brackets.", "Answer in [brackets].", "The reply stands between [ and ].")),
    ("({})", "", ("Put the answer in round brackets.", "Answer (in parentheses).")),
    ('"{}"', "", ("Put the answer in double quotes.", 'Quote your answer "like this".')),
    (
        "Answer: {}",
        "",
        (
            "Start with Answer: and then give it.",
            'Begin the reply with "Answer:".',
            "Output: Answer: ...",
        ),
    ),
    ("Result: {}", "", ('Write "Result:" before the answer.', "Your reply begins with Result:")),
    ("- {}", "", ("Write the answer as a list item after a dash.", "Begin with a dash and a space.")),
    ("{}.", "", ("End the answer with a full stop.", "Finish with a period.")),
    ("{} END", "", ("Write END after the answer.", "The last word of the reply is END.")),
    ("<{}>", "", ("Put the answer between < and >.", "Answer in <angle brackets>.")),
    ("{}", "upper", ("Answer in capital letters.", "WRITE THE ANSWER IN UPPER CASE.", "Use capitals only.")),
    ("{}", "lower", ("Answer in lower case.", "Use small letters only.")),
)
"""For each form of an open answer: what is written around it, its case, and the sentences that ask for it."""

# ----------------------------------------------------------------------------------------- is an answer right?

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
"""Pairs of replies to a right answer and a wrong one."""
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
"""How an input and a proposed answer are laid out."""
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
"""Descriptions of a check, made around the description of the task."""

# ----------------------------------------------------------------------------------------- which answer is right?

MARKS: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    (("A", "B", "C", "D"), ("{mark}. {answer}", "{mark}) {answer}", "{mark}: {answer}", "({mark}) {answer}"), "letter"),
    (("1", "2", "3", "4"), ("{mark}. {answer}", "{mark}) {answer}", "[{mark}] {answer}"), "number"),
    (("a", "b", "c", "d"), ("({mark}) {answer}", "{mark}) {answer}"), "letter"),
    (("(a)", "(b)", "(c)", "(d)"), ("{mark} {answer}",), "letter in brackets"),
    (("Option 1", "Option 2", "Option 3", "Option 4"), ("{mark}: {answer}", "{mark} - {answer}"), "name"),
    (("Choice A", "Choice B", "Choice C", "Choice D"), ("{mark}: {answer}", "{mark}. {answer}"), "name"),
)
"""For each kind of mark: the marks, how they stand before options, and what a mark is called."""
OPTION_LISTS = (
    ("\n\n", "\n"),
    ("\n\nOptions:\n", "\n"),
    ("\n\nAnswers:\n", "\n"),
    ("\n\nPossible answers:\n", "\n"),
    ("\nCandidates:\n", "\n"),
    ("\nOptions: ", "; "),
    ("\n\nAnswers: ", " | "),
)
"""What stands before the options and between them."""
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
"""Descriptions of a choice, made around the description of the task."""
