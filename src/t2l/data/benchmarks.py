"""The ten benchmarks: where each lies on the Hub, how its rows are laid out, and what a row becomes when it is packed.

Benchmarks without public test labels (BoolQ, HellaSwag, PIQA, WinoGrande) are scored on their validation set, which
becomes `test` here. `ybisk/piqa` is a loading script on its main branch, which `datasets` from version 4 on refuses to
run; the Hub's own conversion to Parquet is read instead.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark lies, which of its splits are read and how a row becomes a packed one."""

    dataset: str
    config: str | None
    columns: tuple[str, ...]
    convert: Callable[[Row], dict[str, Any]]
    """Row to input, choices, answer and, for code, what tests it; may add `id`."""
    splits: tuple[tuple[str, str], ...]
    """(packed split, the dataset's)."""
    license: str
    revision: str | None = None
    train_limit: int | None = 3000


def _lettered(question: str) -> Callable[[Row], dict[str, Any]]:
    def convert(row: Row) -> dict[str, Any]:
        texts, labels = list(row["choices"]["text"]), list(row["choices"]["label"])
        return {"input": row[question], "choices": texts, "answer": texts[labels.index(row["answerKey"])]}

    return convert


def _boolq(row: Row) -> dict[str, Any]:
    question = str(row["question"]).strip().rstrip("?")
    text = f"Passage: {row['passage']}\nQuestion: {question}?"
    return {"input": text, "choices": ["no", "yes"], "answer": "yes" if row["answer"] else "no"}


def _gsm8k(row: Row) -> dict[str, Any]:
    return {"input": row["question"], "choices": [], "answer": row["answer"]}


def _hellaswag(row: Row) -> dict[str, Any]:
    endings = list(row["endings"])
    text = f"{row['activity_label']}: {row['ctx']}"
    return {"input": text, "choices": endings, "answer": endings[int(row["label"])]}


def _piqa(row: Row) -> dict[str, Any]:
    choices = [row["sol1"], row["sol2"]]
    return {"input": row["goal"], "choices": choices, "answer": choices[int(row["label"])]}


def _winogrande(row: Row) -> dict[str, Any]:
    choices = [row["option1"], row["option2"]]
    return {"input": row["sentence"], "choices": choices, "answer": choices[int(row["answer"]) - 1]}


def _humaneval(row: Row) -> dict[str, Any]:
    code = {"task_id": row["task_id"], "entry_point": row["entry_point"], "test": row["test"]}
    return {"input": row["prompt"], "choices": [], "answer": row["canonical_solution"], "code": code}


def _mbpp(row: Row) -> dict[str, Any]:
    code = {
        "test_list": list(row["test_list"]),
        "test_setup_code": row["test_setup_code"],
        "challenge_test_list": list(row["challenge_test_list"]),
    }
    return {"id": str(row["task_id"]), "input": row["text"], "choices": [], "answer": row["code"], "code": code}


_ALL = (("train", "train"), ("validation", "validation"), ("test", "test"))
_LABELLED = (("train", "train"), ("test", "validation"))
BENCHMARKS = {
    "arc_challenge": Benchmark(
        "allenai/ai2_arc",
        "ARC-Challenge",
        ("question", "choices", "answerKey"),
        _lettered("question"),
        _ALL,
        "CC BY-SA 4.0",
    ),
    "arc_easy": Benchmark(
        "allenai/ai2_arc", "ARC-Easy", ("question", "choices", "answerKey"), _lettered("question"), _ALL, "CC BY-SA 4.0"
    ),
    "boolq": Benchmark("google/boolq", None, ("question", "answer", "passage"), _boolq, _LABELLED, "CC BY-SA 3.0"),
    "gsm8k": Benchmark(
        "openai/gsm8k",
        "main",
        ("question", "answer"),
        _gsm8k,
        (("train", "train"), ("test", "test")),
        "MIT",
        train_limit=None,
    ),
    "hellaswag": Benchmark(
        "Rowan/hellaswag", None, ("activity_label", "ctx", "endings", "label"), _hellaswag, _LABELLED, "MIT"
    ),
    "humaneval": Benchmark(
        "openai/openai_humaneval",
        None,
        ("task_id", "prompt", "canonical_solution", "test", "entry_point"),
        _humaneval,
        (("test", "test"),),
        "MIT",
    ),
    "mbpp": Benchmark(
        "google-research-datasets/mbpp",
        "full",
        ("task_id", "text", "code", "test_list", "test_setup_code", "challenge_test_list"),
        _mbpp,
        (*_ALL, ("prompt", "prompt")),
        "CC BY 4.0",
    ),
    "openbookqa": Benchmark(
        "allenai/openbookqa",
        "main",
        ("question_stem", "choices", "answerKey"),
        _lettered("question_stem"),
        _ALL,
        "Apache-2.0",
    ),
    "piqa": Benchmark(
        "ybisk/piqa",
        None,
        ("goal", "sol1", "sol2", "label"),
        _piqa,
        _LABELLED,
        "AFL-3.0",
        revision="refs/convert/parquet",
    ),
    "winogrande": Benchmark(
        "allenai/winogrande",
        "winogrande_xl",
        ("sentence", "option1", "option2", "answer"),
        _winogrande,
        _LABELLED,
        "Apache-2.0",
    ),
}
