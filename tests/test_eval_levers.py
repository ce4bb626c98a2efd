"""Rows that make more of T2L without training: each is what it says, reads what it says, keeps its twin's prompt."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from t2l.apply import apply_adapters
from t2l.config import LoraConfig, PromptConfig
from t2l.errors import ConfigError, EvaluationError
from t2l.eval import answers, conditions, decode, metrics, report, retrieval, suites
from t2l.eval.conditions import LEVERS, ROWS, STANDARD, AdapterSource, choose_rows, texts_of
from t2l.eval.run import Settings, run
from t2l.prompt import token_ids
from t2l.spec import AdapterSpec
from t2l.tasks import Splits, Task
from t2l.text_to_lora import TextToLora

TASKS = {
    "reverse": ["Write the word backwards.", "Turn the letters round.", "Last letter first, please."],
    "upper": ["Write the word in capitals.", "SHOUT the word.", "Use upper case for all letters."],
    "double": ["Say the word twice."],
}
WORDS = [f"word{n} and {'x' * n}" for n in range(20)]


@pytest.fixture(scope="module")
def tasks_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks") / "words.jsonl"
    write_tasks(path, answer="right")
    return path


def write_tasks(path: Path, *, answer: str) -> None:
    """Three test inputs and fifteen for training, three of which are asked as well."""
    lines = []
    for task, descriptions in TASKS.items():
        for split, words in (("test", WORDS[:3]), ("train", WORDS[:15])):
            for word in words:
                line = {"task": task, "description": descriptions, "split": split, "input": word}
                lines.append(line | {"output": f"{answer} {word[::-1]}"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def t2l(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> TextToLora:
    return TextToLora.from_pretrained(str(make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "t2l")))


@pytest.fixture
def source(t2l: TextToLora, tiny_base: Any, tiny_tokenizer: Any) -> AdapterSource:
    return AdapterSource((tiny_base, tiny_tokenizer), checkpoint=t2l, log=lambda text: None)


def asked(path: Path, seeds: tuple[int, ...] = (0, 1, 2), *, names: str = "reverse,upper") -> list[suites.Question]:
    """One question of each task and seed."""
    tasks = suites.load_suite(str(path), per_task=None)
    found = suites.questions(tasks, seeds, fits=lambda text: len(text.encode()) < 96)
    return [q for q in found if q.item.text == WORDS[0] and q.task.name in names.split(",")]


def only(source: AdapterSource, row: str, question: suites.Question) -> conditions.UsedAdapter:
    source.prepare([(ROWS[row], question)])
    ((used,),) = source.of(ROWS[row], [question])
    return used


# ------------------------------------------------------------------------------------------------- what is there


def test_levers_are_not_standard_and_keep_their_controls() -> None:
    assert set(choose_rows("standard,levers")) == set(choose_rows("all")) == set(ROWS.values())
    assert not set(choose_rows("levers")) & set(STANDARD)
    for lever in (*LEVERS, "t2l"):
        for end in ("", "-wrong", "-random"):
            assert ROWS[f"{lever}{end}"].way == lever
            assert ROWS[f"{lever}{end}+description"].prompt == "description"
    for name in ("multitask", "t2l", "t2l-wrong", "t2l-random"):
        assert ROWS[f"{name}+shots"].prompt == ROWS["base+shots"].prompt
        assert ROWS[f"{name}+shots+description"].prompt == ROWS["base+shots+description"].prompt


def test_rows_read_texts_of_the_task_of_one_other_task_or_of_none(tasks_file: Path) -> None:
    for question in asked(tasks_file, names="reverse,upper,double"):
        own = TASKS[question.task.name]
        assert sorted(texts_of(ROWS["t2l-average"], question)) == sorted(own)
        assert texts_of(ROWS["t2l-vote"], question)[0] == question.description
        wrong = texts_of(ROWS["t2l-average-wrong"], question)
        assert any(set(wrong) <= set(texts) for name, texts in TASKS.items() if name != question.task.name)
        assert len(set(wrong)) == len(wrong) <= len(own)
        made_up = texts_of(ROWS["t2l-best-of-random"], question)
        assert len(set(made_up)) == len(own)
        assert not set(made_up) & {text for texts in TASKS.values() for text in texts}
    descriptions = {q.description for q in asked(tasks_file, names="upper")}
    assert descriptions == set(TASKS["upper"])  # each seed has its own


def test_each_prompt_has_the_adapters_that_are_for_it(
    make_checkpoint: Callable[..., Path], tasks_file: Path, tiny_base: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Where a checkpoint tells prompts apart, a row's adapter, and that of every lever, is written for its prompt."""
    aware = TextToLora.from_pretrained(str(make_checkpoint(tmp_path / "aware", prompt_aware=True)))
    source = AdapterSource((tiny_base, tiny_tokenizer), checkpoint=aware, log=lambda text: None)
    question = asked(tasks_file)[0]
    names = [f"{lever}{end}" for lever in ("t2l", "t2l-average", "t2l-best-of") for end in ("", "-wrong", "-random")]
    both = [ROWS[name + form] for name in names for form in ("", "+description")]
    source.prepare([(row, question) for row in both])
    for plain, shown in zip(both[::2], both[1::2], strict=True):
        ((one,),), ((other,),) = source.of(plain, [question]), source.of(shown, [question])
        assert one.id != other.id and not torch.equal(one.lora.b[0], other.lora.b[0])
        if plain.way == "t2l":
            for row, used in ((plain, one), (shown, other)):
                (alone,) = aware.generate(
                    [texts_of(row, question)[0]], prompt=PromptConfig(description_in_prompt=row.description)
                )
                torch.testing.assert_close(used.lora.b[0], alone.lora.b[0])


# ------------------------------------------------------------------------------------------------------ the mean

# ------------------------------------------------------------------------------------------------------ the mean


@pytest.mark.parametrize("rslora", [False, True])
def test_the_average_is_the_mean_of_the_dense_updates(
    rslora: bool,
    tasks_file: Path,
    make_checkpoint: Callable[..., Path],
    base_folder: Path,
    tiny_base: Any,
    tiny_tokenizer: Any,
    tmp_path: Path,
) -> None:
    """In the weights and on the model: as a base whose own weights have the mean of the three updates added."""
    spec = AdapterSpec.from_config(tiny_base.config, str(base_folder), LoraConfig(rank=4, alpha=8, use_rslora=rslora))
    t2l = TextToLora.from_pretrained(str(make_checkpoint(tmp_path / "checkpoint", spec=spec)))
    source = AdapterSource((tiny_base, tiny_tokenizer), checkpoint=t2l, log=lambda text: None)
    (question,) = asked(tasks_file, (1,), names="upper")
    used = only(source, "t2l-average+description", question)
    assert used.spec.scaling == pytest.approx(spec.scaling) == used.lora.scaling
    each = t2l.generate(TASKS["upper"])
    dense = copy.deepcopy(tiny_base)
    for m, target in enumerate(spec.targets):
        mean = torch.stack([x.lora.delta(m) for x in each]).mean(0)
        torch.testing.assert_close(used.lora.delta(m), mean, atol=1e-5, rtol=1e-5)
        for position, layer in enumerate(spec.layers):
            with torch.no_grad():
                dense.get_submodule(target.path.format(layer=layer)).weight += mean[position]
    tokens = torch.tensor([[0, 40, 7, 99, 120]])
    with apply_adapters(tiny_base, used):
        found = tiny_base(tokens).logits
    torch.testing.assert_close(found, dense(tokens).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, tiny_base(tokens).logits, atol=1e-2)


def test_means_of_fewer_adapters_share_a_batch_and_seeds_share_the_mean(
    tasks_file: Path, source: AdapterSource
) -> None:
    row = ROWS["t2l-average"]
    questions = asked(tasks_file, names="upper,double")
    source.prepare([(row, q) for q in questions])
    used = [adapter for (adapter,) in source.of(row, questions)]
    assert len({adapter.id for adapter in used}) == 2
    with apply_adapters(source.model, used):
        source.model(torch.zeros(len(used), 3, dtype=torch.long))
    assert source.shape(row)[2:] == (used[0].spec.rank, used[0].lora.scaling) == (12, used[0].spec.scaling)
    single = only(source, "t2l", next(q for q in questions if q.task.name == "double"))
    alone = next(x for x, q in zip(used, questions, strict=True) if q.task.name == "double")
    torch.testing.assert_close(alone.lora.delta(0), single.lora.delta(0), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------- best of


def loss(source: AdapterSource, adapter: Any, text: str) -> float:
    """Of a text where the user's words stand, without batching."""
    start, ids = token_ids(source.tokenizer, ["<s><user>", text])
    with apply_adapters(source.model, adapter), torch.no_grad():
        logits = source.model(torch.tensor([start + ids])).logits[0].log_softmax(-1)
    return -sum(float(logits[len(start) + i - 1, token]) for i, token in enumerate(ids))


def test_best_of_is_the_adapter_that_finds_the_inputs_likeliest(tasks_file: Path, source: AdapterSource) -> None:
    chosen = set()
    for question in asked(tasks_file, (0,)):
        for row in ("t2l-best-of", "t2l-best-of-wrong+description", "t2l-best-of-random"):
            texts = texts_of(ROWS[row], question)
            assert source.checkpoint is not None
            each = source.checkpoint.generate(texts)
            losses = [sum(loss(source, adapter, text) for text in question.task.inputs) for adapter in each]
            used = only(source, row, question)
            best = texts[losses.index(min(losses))]
            assert used.description == best
            plain = dataclasses.replace(question, descriptions=(best,))
            assert used.id == only(source, "t2l", plain).id
            chosen.add(texts.index(best))
    assert len(chosen) > 1  # or a constant would pass


def test_best_of_the_same_texts_is_another_tasks_own_choice(tasks_file: Path, source: AdapterSource) -> None:
    one, other = asked(tasks_file, (0,))
    other = dataclasses.replace(other, descriptions=one.descriptions)
    assert source.identity(ROWS["t2l-best-of"], one) != source.identity(ROWS["t2l-best-of"], other)
    assert source.identity(ROWS["t2l-average"], one) == source.identity(ROWS["t2l-average"], other)


def test_best_of_reads_neither_answers_nor_what_is_asked(tasks_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "words.jsonl"
    write_tasks(other, answer="something else " * 120)  # long enough to be no few-shot example
    for one, two in zip(asked(tasks_file), asked(other), strict=True):
        assert one.task.inputs == two.task.inputs
        assert len(set(one.task.inputs)) == suites.INPUTS
        assert set(one.task.inputs) <= set(WORDS[3:15])
        assert one.shots
        assert not two.shots


def test_best_of_and_vote_are_asked_where_they_can_be(tasks_file: Path, source: AdapterSource) -> None:
    (question,) = asked(tasks_file, (0,), names="upper")
    assert all(source.has(row, question) for row in choose_rows("levers"))
    bare = dataclasses.replace(question, task=dataclasses.replace(question.task, inputs=()))
    assert {row.way for row in choose_rows("levers") if not source.has(row, bare)} == {"t2l-best-of"}
    likely = dataclasses.replace(question, task=dataclasses.replace(question.task, kind="likelihood"))
    assert {row.way for row in choose_rows("levers") if not source.has(row, likely)} == {"t2l-vote"}


# ---------------------------------------------------------------------------------------------------------- vote


def test_the_most_frequent_answer_wins_and_ties_go_to_the_first() -> None:
    assert metrics.vote(["a"]) == 0
    assert metrics.vote(["a", "b", "c"]) == 0
    assert metrics.vote(["a", "b", "b"]) == 1
    assert metrics.vote(["c", " Two  words ", "two words"]) == 1
    assert metrics.vote(["b", "a", "a", "b"]) == 0


def test_a_vote_is_of_the_three_adapters_answers(
    tasks_file: Path, make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: Any
) -> None:
    """Each adapter says what its text makes it say; the vote is counted question by question, in any batch."""
    checkpoint = str(make_checkpoint(tmp_path / "checkpoint"))
    said = {"Write the word in capitals.": "A", "SHOUT the word.": "B", "Use upper case for all letters.": "b "}
    greedy = decode.greedy

    def saying(model: Any, tokenizer: Any, prompts: Any, adapters: Any, **options: Any) -> list[str]:
        real = greedy(model, tokenizer, prompts, adapters, **options)
        assert len(real) == len(prompts) == len(adapters)
        return [said.get(x.description, x.description) for x in adapters]

    monkeypatch.setattr(decode, "greedy", saying)
    out = tmp_path / "answers.jsonl"
    names = "t2l,t2l-vote,t2l-vote+description,t2l-vote-wrong"
    values = {"seeds": (0, 1, 2), "max_new_tokens": 3, "device": "cpu", "batch_tokens": 2000, "rows": names}
    settings = Settings(suites=(str(tasks_file),), checkpoint=checkpoint, **values)
    run(settings, out, log=lambda text: None)
    lines = answers.read(out).lines
    assert len(lines) == 4 * 3 * 3 * 3
    by_key = {answers.key_of(line): line for line in lines}
    for line in lines:
        suite, row, *rest = answers.key_of(line)
        if row.startswith("t2l-vote") and line["task"] == "upper" and row != "t2l-vote-wrong":
            assert line["answer"] in ("B", "b")
            assert line["description"] in {conditions.short_hash(text) for text in list(TASKS["upper"])[1:]}
        elif row == "t2l-vote":  # three different answers, or one
            single = by_key[suite, "t2l", *rest]
            assert {**line, "row": "t2l"} == single
    done = out.read_bytes()
    out.write_bytes(done[: len(done) * 2 // 3])
    run(settings, out, log=lambda text: None)
    again = {answers.key_of(line): line for line in answers.read(out).lines}
    assert again == by_key


def test_a_vote_is_among_the_answers_of_each_question_alone(
    tasks_file: Path,
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    tiny_base: Any,
    tiny_tokenizer: Any,
) -> None:
    t2l = TextToLora.from_pretrained(str(make_checkpoint(tmp_path / "checkpoint")))
    out = tmp_path / "answers.jsonl"
    values: dict[str, Any] = {"checkpoint": t2l.reference, "max_new_tokens": 4, "device": "cpu", "rows": "t2l-vote"}
    run(Settings(suites=(str(tasks_file),), **values), out, log=lambda text: None)
    said = {(line["task"], line["id"]): line["answer"] for line in answers.read(out).lines}
    tasks = suites.load_suite(str(tasks_file), per_task=None)
    for question in suites.questions(tasks, (0,)):
        (ids,) = token_ids(tiny_tokenizer, [conditions.prompt_of(ROWS["t2l-vote"], question, tiny_tokenizer)])
        each = [
            decode.greedy(tiny_base, tiny_tokenizer, [ids], [adapter], max_new_tokens=4)[0]
            for adapter in t2l.generate(question.descriptions)
        ]
        assert said[question.task.name, question.item.id] == each[metrics.vote(each)].strip()


# ------------------------------------------------------------------------------------------------------- abstain


@pytest.fixture
def packed(tmp_path: Path, sentence_folder: Path, monkeypatch: Any) -> dict[str, list[str]]:
    """Training and choosing tasks for the bounds; the descriptions of the latter are those of the former."""
    texts = {"trained": [f"known {n}: " + "abcdefgh "[n % 7 :] * 3 for n in range(7)]}
    texts["chosen"] = texts["trained"][:3]
    splits = Splits(frozenset({"trained"}), frozenset(), frozenset(), frozenset(), {}, frozenset())
    monkeypatch.setattr(retrieval, "load_splits", lambda: splits)
    monkeypatch.setattr(
        retrieval, "load_sni", lambda names, splits: [Task(name, tuple(texts[name]), {}) for name in sorted(names)]
    )
    monkeypatch.setattr(retrieval, "written_descriptions", lambda what: {what: tuple(texts["chosen"])})
    monkeypatch.setattr(retrieval, "WINDOW", 100)
    monkeypatch.setattr(retrieval, "RETRIEVER", str(sentence_folder))
    (tmp_path / "sni_tasks.parquet").touch()
    monkeypatch.setenv("T2L_DATA", str(tmp_path))
    return texts


def test_abstention_goes_from_the_offset_to_the_adapter(
    packed: dict[str, list[str]], tasks_file: Path, source: AdapterSource
) -> None:
    (question,) = asked(tasks_file, (0,), names="upper")
    familiar = dataclasses.replace(question, descriptions=(packed["trained"][0],))
    followed = only(source, "t2l-abstain", familiar)
    plain = only(source, "t2l", familiar)
    assert source.checkpoint is not None
    a, b = source.checkpoint.hypernet.offset()
    seen = set()
    for text in ("q!", "The opposite of known 3, in German?", *packed["trained"], *question.random_texts):
        asked_with = dataclasses.replace(question, descriptions=(text,))
        one, full = only(source, "t2l-abstain", asked_with), only(source, "t2l", asked_with)
        weight = float(source.familiarity([text]))
        seen.add(weight)
        for m in range(len(a)):
            torch.testing.assert_close(one.lora.a[m], a[m] + weight * (full.lora.a[m] - a[m]))
            torch.testing.assert_close(one.lora.b[m], b[m] + weight * (full.lora.b[m] - b[m]))
        assert one.id != full.id
    assert 0.0 in seen
    assert 1.0 in seen
    torch.testing.assert_close(followed.lora.b[0], plain.lora.b[0])


def test_embeddings_stay_in_order(packed: dict[str, list[str]]) -> None:
    encode = retrieval.Sentences()
    texts = ["A text in the middle.", "Short.", "The longest of all three texts, by far.", "Of four."]
    torch.testing.assert_close(encode(texts), torch.cat([encode([text]) for text in texts]))


def test_bounds_are_read_off_random_texts_and_descriptions(packed: dict[str, list[str]]) -> None:
    found = retrieval.Familiarity(held_out=0)
    assert found.high == 1.0  # the choosing tasks' descriptions are known word for word
    made_up = [suites.random_text(retrieval.random.Random(f"bounds/{n}")) for n in range(retrieval.MADE_UP)]
    assert 0.9 <= float((found(made_up) == 0).float().mean()) <= 0.96
    assert found(packed["chosen"]).tolist() == pytest.approx([1.0] * 3, abs=1e-4)
    fewer = retrieval.Familiarity(held_out=2)
    assert fewer.known_KE.shape[0] == 5  # what training has not read does not make a text familiar
    packed["chosen"] = made_up[:50]
    with pytest.raises(EvaluationError, match="does not tell random texts from descriptions"):
        retrieval.Familiarity(held_out=0)


def test_bounds_are_recorded_and_stay(
    packed: dict[str, list[str]],
    tasks_file: Path,
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    out, checkpoint = tmp_path / "answers.jsonl", str(make_checkpoint(tmp_path / "checkpoint"))
    values: dict[str, Any] = {
        "suites": (str(tasks_file),),
        "checkpoint": checkpoint,
        "max_new_tokens": 2,
        "per_task": 1,
        "held_out": 2,
    }
    told: list[int] = []

    def familiarity(*, held_out: int, device: str) -> retrieval.Familiarity:
        told.append(held_out)
        return retrieval.Familiarity(held_out=held_out, device=device)

    monkeypatch.setattr(conditions, "Familiarity", familiarity)
    run(Settings(rows="t2l", **values), out, log=lambda text: None)
    assert answers.read(out).header["abstain_bounds"] is None
    assert not told
    run(Settings(rows="t2l-abstain,t2l-abstain-random", **values), out, log=lambda text: None)
    low, high = answers.read(out).header["abstain_bounds"]
    assert told == [2]
    assert low < high == 1.0
    assert {line["row"] for line in answers.read(out).lines} == {"t2l", "t2l-abstain", "t2l-abstain-random"}
    run(Settings(rows="base", **values), out, log=lambda text: None)
    assert answers.read(out).header["abstain_bounds"] == [low, high]
    monkeypatch.setattr(retrieval, "MADE_UP", 5)
    with pytest.raises(ConfigError, match=rf"abstain_bounds \[{low}, {high}\]"):
        run(Settings(rows="t2l-abstain+description", **values), out, log=lambda text: None)


def test_abstention_is_left_out_where_it_has_nothing_to_go_by(
    packed: dict[str, list[str]], t2l: TextToLora, source: AdapterSource, tiny_base: Any, monkeypatch: Any
) -> None:
    names = choose_rows("t2l,t2l-abstain,t2l-abstain-random+description")
    assert source.left_out(names) == {}
    monkeypatch.setitem(t2l.config.training, "settings", {"data": {"tasks": "mine.jsonl"}})
    left_out = source.left_out(names)
    assert left_out.keys() == {"t2l-abstain", "t2l-abstain-random+description"}
    assert "trained on mine.jsonl" in left_out["t2l-abstain"]
    monkeypatch.delitem(t2l.config.training, "settings")
    monkeypatch.delenv("T2L_DATA")
    assert "T2L_DATA is not set" in source.left_out(names)["t2l-abstain"]
    empty = copy.copy(t2l)
    empty.hypernet = copy.deepcopy(t2l.hypernet)
    for b in empty.hypernet.offset.b:
        b.zero_()
    idle = AdapterSource((tiny_base, source.tokenizer), checkpoint=empty)
    assert "offset is empty" in idle.left_out(names)["t2l-abstain"]


# -------------------------------------------------------------------------------------------------------- report


def test_levers_are_compared_under_their_twins_prompt(tmp_path: Path) -> None:
    names = ["t2l", "multitask", *(f"t2l-average{end}" for end in ("", "-wrong", "-random"))]
    names += ["base+shots", "t2l+shots", "t2l-wrong+shots"]
    lines = []
    for row in names:
        for task in ("one", "two", "three"):
            prompt = f"{ROWS[row].prompt}/{task}"
            line = {"suite": "test", "row": row, "seed": 0, "task": task, "id": task, "prompt": prompt, "answer": ""}
            lines.append(line | {"scores": {"exact_match": float(len(row + task) % 2)}})
    file = answers.AnswerFile(tmp_path / "a.jsonl", {"suites": {}}, lines)
    (suite,) = report.gather([file])
    pairs = {(one, other) for one, other, _ in report.compared(suite)}
    assert pairs == {
        ("t2l", "multitask"),
        ("t2l-average", "t2l"),
        ("t2l-average", "t2l-average-wrong"),
        ("t2l-average", "t2l-average-random"),
        ("t2l-average", "multitask"),
        ("t2l-average-random", "multitask"),
        ("t2l+shots", "base+shots"),
        ("t2l+shots", "t2l-wrong+shots"),
    }
