"""Tasks whose answers are computed: what their descriptions ask is what their answers are."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from t2l.errors import ConfigError, DataError
from t2l.tasks import Example, Task, written_descriptions
from t2l.train import procedural
from t2l.train.data import load_tasks
from t2l.train.procedural import EXAMPLES, LABELLED, OPEN, RAREST, TEXTS, lines
from t2l.train.settings import DataConfig

WORDS = (
    "The a of to and in is it you that was for on with not but they he she we Rome's gate, opened late again however "
    "quickly people ran out; nobody saw Anna-Maria leave! Why? Because trains stop here twice."
)


def made_lines(number: int = 3000) -> list[str]:
    """Sentences without sense, of 4 to 14 words."""
    draw = random.Random(3)
    return [
        " ".join(draw.choices(WORDS.split(), k=draw.randint(4, 14))) + draw.choice(("", ".", "?", "!"))
        for _ in range(number)
    ]


LINES = sorted(set(made_lines()))
TASKS = procedural.procedural(200, LINES, 0)


def bare(line: str) -> list[str]:
    return [word.strip(".,;!?'-").lower() for word in line.split()]


def number_in(text: str) -> int:
    return int(re.findall(r"\d+", text)[0])


def words_of(line: str, text: str) -> list[str]:
    """The first or last so many words, as the text says."""
    number = number_in(text) if re.search(r"\d", text) else 1
    return line.split()[:number] if "first" in text else line.split()[-number:]


CHECKS: dict[str, Callable[[str, str], bool]] = {
    "_holds_word": lambda line, text: re.findall('"(.*?)"', text)[0] in bare(line),
    "_holds_sign": lambda line, text: (
        (
            {"a comma": ",", "an apostrophe": "'", "a hyphen": "-", "a full stop": "."}
            | {f"the letter {x}": x for x in "bfgkpvwxyj"}
        )[text.split("with ")[1].split(" anywhere")[0]]
        in line.lower()
    ),
    "_ends": lambda line, text: line[-1] == {"question": "?", "full": ".", "exclamation": "!"}[text.split()[8]],
    "_longer_than": lambda line, text: len(line.split()) > int(text.split("more than ")[1].split(",")[0]),
    "_begins": lambda line, text: (
        line[0].lower()
        in {"vow": "aeiou", "fro": "abcdefghijkl", "i, ": "istw"}[
            re.findall("letter is (?:a )?(?:letter )?(...)", text)[0]
        ]
    ),
    "_repeated": lambda line, text: max(Counter(bare(line)).values()) > 1,
    "_ends_longer": lambda line, text: len(bare(line)[0]) > len(bare(line)[-1]),
}
"""Whether the first label is right, from the first sentence of what is asked; written apart from the code."""
RIGHT: dict[str, Callable[[str, str], str]] = {
    "_nth": lambda line, text: line.split()[["first", "second", "third", "fourth"].index(text.split()[2])],
    "_last": lambda line, text: line.split()[-1],
    "_some": lambda line, text: " ".join(words_of(line, text)),
    "_without": lambda line, text: line.split(" ", 1)[1] if "first" in text else line.rsplit(" ", 1)[0],
    "_case": lambda line, text: (str.upper if "capital" in text else str.lower)(" ".join(words_of(line, text))),
    "_longest": lambda line, text: sorted(bare(line), key=len)[-1],
    "_number": lambda line, text: str(line.count(" ") + 1),
    "_initials": lambda line, text: "".join(word[0] for word in words_of(line, text)).upper(),
    "_joined": lambda line, text: {"hyph": "-", "unde": "_", "slas": "/", "plus": "+"}[text.split("with ")[1][:4]].join(
        words_of(line, text)
    ),
    "_starting": lambda line, text: (
        [word for word in bare(line) if word[:1] == text.split("starts with ")[1][0]]
        or [text.split(" or ")[1].split(" if no")[0]]
    )[0],
    "_swapped": lambda line, text: " ".join([line.split()[-1], *line.split()[1:-1], line.split()[0]]),
}


@pytest.mark.parametrize("kind", [*LABELLED, *OPEN], ids=lambda kind: kind.__name__)
def test_answers_are_what_is_asked(kind: Callable[[random.Random], procedural.Asked]) -> None:
    answered = 0
    for seed in range(12):
        ask = kind(random.Random(seed))
        assert len(set(ask.says)) == len(ask.says)
        for line in LINES[::40]:
            answer = ask.answer(line)
            if answer is None:
                continue
            answered += 1
            if kind.__name__ == "_which_word":
                assert isinstance(answer, int)
                listed = re.findall(r"\{\d\} for (\w+)", ask.says[0])
                assert [word for word in listed if word in bare(line)] == [listed[answer]]
            elif ask.labels:
                assert (answer == 0) is CHECKS[kind.__name__](line, ask.says[0]), (line, ask.says[0])
            else:
                assert answer == RIGHT[kind.__name__](line, ask.says[0]), (line, ask.says[0])
    assert answered > 100


def test_a_line_of_one_word_has_a_longest() -> None:
    assert procedural._longest(random.Random(0)).answer("ha ha Ha! ha") == "ha"


def test_tasks_name_their_labels_and_are_balanced() -> None:
    assert len(TASKS) == 200
    labelled = 0
    for task in TASKS:
        examples = task.examples["train"]
        assert EXAMPLES // 2 <= len(examples) <= EXAMPLES
        assert len({e.input for e in examples}) == len(examples)
        assert all(e.input in LINES and e.outputs[0].strip() for e in examples)
        assert len(set(task.descriptions)) == TEXTS
        counts = Counter(e.outputs[0] for e in examples)
        if len(counts) <= 3 and all(label in text for label in counts for text in task.descriptions):
            labelled += 1
            assert min(counts.values()) >= RAREST * len(examples)
    assert 0.4 * len(TASKS) <= labelled <= 0.8 * len(TASKS)
    assert len({task.descriptions for task in TASKS}) > 190


def test_the_draw_is_of_seed_and_place() -> None:
    assert procedural.procedural(20, LINES, 0) == TASKS[:20]
    assert procedural.procedural(20, LINES, 1) != TASKS[:20]
    assert procedural.procedural(0, [], 0) == []
    assert procedural.procedural(5, LINES[:3], 0) == [], "three lines allow no task"


def test_lines_are_short_and_of_training_inputs() -> None:
    task = Task("t", ("d",), {"train": (Example("0", "One two three four.\nToo short\n" + "long " * 40, ("x",)),)})
    other = replace(task, examples={"val": (Example("1", "Five six seven eight nine", ("x",)),)})
    assert lines([task, task, other], 0) == ["One two three four."]


def test_no_words_of_judged_descriptions() -> None:
    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + 6]) for i in range(len(words) - 5)}

    judged = {
        run
        for which in ("test", "choosing", "benchmarks")
        for texts in written_descriptions(which).values()
        for text in texts
        for run in runs(text)
    }
    assert len(judged) > 1000
    assert not judged & {run for task in TASKS for text in task.descriptions for run in runs(text)}


def test_they_stand_behind_the_tasks_whose_lines_they_ask_about(tmp_path: Path) -> None:
    rows = [
        {"task": name, "description": f"{name} it.", "input": line, "output": name, "split": "train"}
        for name, some in (("one", LINES[:500]), ("two", LINES[500:1000]))
        for line in some
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(tasks=str(tmp_path / "own.jsonl"), procedural=5, max_tasks=1)
    train, held_out = load_tasks(config)
    assert [task.name for task in train[1:]] == [f"procedural-{n}" for n in range(5)]
    inputs = {example.input for example in train[0].examples["train"]}
    assert all(example.input in inputs for task in train[1:] for example in task.examples["train"])
    assert held_out == [] and load_tasks(replace(config, procedural=0))[0] == train[:1]


def test_too_few_lines_are_an_error(tmp_path: Path) -> None:
    row = {"task": "one", "description": "One.", "input": "too short", "output": "x", "split": "train"}
    (tmp_path / "own.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"of 2 tasks 0 can be made; the training inputs hold too few"):
        load_tasks(DataConfig(tasks=str(tmp_path / "own.jsonl"), procedural=2))


def test_setting_must_not_be_negative() -> None:
    with pytest.raises(ConfigError, match=r"data\.procedural must not be negative, got -1"):
        DataConfig(procedural=-1)
