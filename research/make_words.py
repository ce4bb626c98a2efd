"""Writes research/configs/words.jsonl and words-new.jsonl: tasks that differ only in the words to answer with.

    python research/make_words.py
    python research/make_words.py --two-words 0.7 --out FOLDER

Each task sorts things of two kinds under two labels; only its description says which. Labels are words of
configs/descriptions.jsonl; those of the second file stand nowhere in the first, and some are more than a word. The
second command writes others, where so many labels are two words.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "configs"
KINDS = {
    "animals": "dog cat horse cow tiger lion rabbit sheep goat wolf bear fox mouse duck",
    "tools": "hammer saw drill wrench pliers screwdriver axe shovel chisel rake ladder clamp file scissors",
    "colours": "red blue green yellow purple orange pink brown black white grey violet crimson beige",
    "foods": "bread cheese rice soup pasta butter cake salad pizza beans honey egg steak noodles",
    "body parts": "arm leg foot hand nose ear eye mouth knee elbow shoulder finger toe neck",
    "countries": "France Japan Brazil Canada Egypt Italy India Kenya Mexico Norway Peru Spain China Greece",
    "clothes": "shirt coat hat sock shoe glove scarf jacket dress skirt belt boot sweater jeans",
    "vehicles": "car bus train bicycle truck boat plane ship tractor tram van helicopter taxi ferry",
}
PHRASES = [
    "east side",
    "west side",
    "very calm",
    "not calm",
    "Type I",
    "Type II",
    "half-open",
    "A+",
    "n/a",
    "step by step",
]
"""New labels that are more than a word."""
FORMS = (
    "Answer {x} when the word belongs to {a}, and {y} when it belongs to {b}.",
    "The word is one of {a} or one of {b}. Reply {x} for {a}; reply {y} for {b}.",
    "Sort the word: {a} are {x}, {b} are {y}.",
    "Tell {a} from {b}. Your answer must be {x} if it names one of {a} and {y} otherwise.",
    "Use {x} as the label of {a} and {y} as the label of {b}.",
)


def tasks(prefix: str, number: int, words: Sequence[str], splits: Sequence[str], seed: int) -> Iterator[str]:
    """Lines of so many tasks; each has as many examples as there are `splits`, half of them of either kind."""
    draw = random.Random(seed)
    for task in range(number):
        (a, b), (x, y) = draw.sample(sorted(KINDS), 2), draw.sample(words, 2)
        half = len(splits) // 2
        examples = [(word, x) for word in draw.sample(KINDS[a].split(), half)]
        examples += [(word, y) for word in draw.sample(KINDS[b].split(), half)]
        draw.shuffle(examples)
        texts = [form.format(a=a, b=b, x=x, y=y) for form in draw.sample(FORMS, len(FORMS))]
        for place, ((word, label), split) in enumerate(zip(examples, splits, strict=True)):
            line = {"task": f"{prefix}-{task:03}", "description": texts[place % len(texts)], "input": word}
            yield json.dumps(line | {"output": label, "split": split}) + "\n"


def labels() -> tuple[list[str], list[str]]:
    """Words to train on and new ones, none of which stands in any task for another reason."""
    taken = set(re.findall(r"[a-z]+", " ".join([*KINDS, *KINDS.values(), *FORMS, *PHRASES]).lower()))
    texts = (FOLDER.parents[1] / "configs" / "descriptions.jsonl").read_text(encoding="utf-8")
    words = sorted(set(re.findall(r"\b[a-z]{4,9}\b", texts)) - taken)
    random.Random(2).shuffle(words)
    return words[:600], [*words[600:650], *PHRASES]


def paired(words: Sequence[str], share: float, seed: int) -> list[str]:
    """The same labels, so many of them with another single word behind them."""
    draw = random.Random(seed)
    single = [word for word in words if word.isalpha()]
    return [f"{word} {draw.choice(single)}" if draw.random() < share else word for word in words]


def files(two_words: float = 0.0) -> dict[str, str]:
    """Texts of both files by their names; `two_words` is the share of labels that get a second word."""
    trained, new = (paired(words, two_words, seed) for seed, words in enumerate(labels()))
    return {
        "words.jsonl": "".join(tasks("words", 240, trained, ["train"] * 6 + ["val"] * 2, seed=0)),
        "words-new.jsonl": "".join(tasks("new-words", 30, new, ["test"] * 8, seed=1)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--two-words", type=float, default=0.0, metavar="SHARE")
    parser.add_argument("--out", type=Path, default=FOLDER)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for name, text in files(given.two_words).items():
        (given.out / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
