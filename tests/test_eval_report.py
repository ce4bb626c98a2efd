"""Tables from files of answers: nothing that misleads is let through."""

import contextlib
import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from test_serve_page import CHROMIUM, FLAGS
from typer.testing import CliRunner

from t2l.cli import app
from t2l.errors import DataError, EvaluationError, T2LError
from t2l.eval import answers
from t2l.eval.conditions import CONDITIONS, MINIMUM
from t2l.eval.html import as_html
from t2l.eval.report import Options, as_csv, markdown, tables
from t2l.eval.results import below_floor, gather
from t2l.eval.run import _public
from t2l.eval.stats import difference, estimate

EACH = ": each, plain prompt"
RATES = {"base": 0.0, "multitask": 0.35, "t2l": 0.5, "t2l-wrong": 0.05, "t2l-random": 0.02}


def header(**changes: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "format_version": answers.FORMAT_VERSION,
        "base": "tiny",
        "base_revision": "1",
        "backend": "transformers",
        "dtype": "float32",
        "per_task": 5,
        "held_out": 4,
        "max_new_tokens": None,
        "checkpoint": "tiny/t2l",
        "checkpoint_sha256": "c" * 64,
        "multitask_sha256": "m" * 64,
        "hyperdecoders_sha256": None,
        "library_sha256": [],
        "versions": {"t2l": "0"},
        "seeds": [0, 1],
        "conditions": [condition.name for condition in MINIMUM],
        "left_out": {"arrow": "no --library"},
        "suites": {},
        "device": "cpu",
    }
    return facts | changes


def made(
    rows: Iterable[str] = tuple(row.name for row in MINIMUM),
    *,
    suite: str = "test",
    tasks: Iterable[str] = tuple(f"task{n}" for n in range(12)),
    seeds: Iterable[int] = (0, 1),
    scores: Callable[[str, bool], dict[str, Any]] = lambda row, right: {"exact_match": float(right)},
) -> list[dict[str, Any]]:
    """Answers whose right ones are drawn with the rates above."""
    lines = []
    for row in rows:
        draw = np.random.default_rng(len(row))
        for task in tasks:
            for seed in seeds:
                for n in range(5):
                    right = bool(draw.random() < RATES[CONDITIONS[row].adapter])
                    prompt = f"{CONDITIONS[row].prompt}/{task}/{n}/{seed if CONDITIONS[row].description else ''}"
                    line = {"suite": suite, "condition": row, "seed": seed, "task": task, "id": f"{task}-{n}"}
                    lines.append(line | {"prompt": prompt, "answer": "x", "scores": scores(row, right)})
    return lines


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., answers.AnswerFile]:
    def write(lines: list[dict[str, Any]], name: str = "a.jsonl", **facts: Any) -> answers.AnswerFile:
        path = tmp_path / name
        text = answers.to_text(header(**facts), lines)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return answers.read(path)

    return write


def test_the_table_holds_the_means_of_the_lines(save: Any) -> None:
    file = save(made())
    text = markdown([file])
    for row in ("base", "t2l", "t2l-wrong+description"):
        values = [line["scores"]["exact_match"] for line in file.lines if line["condition"] == row]
        assert f"{np.mean(values):.3f} [" in text
    assert "12 tasks, n = 120 answers a condition, seeds 0, 1; exact match" in text
    assert text.startswith("<!-- t2l eval report a.jsonl -->\n\n## tiny/t2l on tiny\n")
    (gap,) = [row for row in text.splitlines() if row.startswith("| t2l | t2l-wrong | plain |")]
    right, wrong = (
        np.mean([line["scores"]["exact_match"] for line in file.lines if line["condition"] == row])
        for row in ("t2l", "t2l-wrong")
    )
    assert f"| {right - wrong:+.3f} [" in gap
    assert "< 0.001" in gap
    assert "| conditions left out | arrow (no --library) |" in text


def test_files_are_merged_in_any_order(save: Any) -> None:
    lines = made()
    whole = save(lines)
    parts = [save(lines[start::2], f"{start}.jsonl.gz") for start in (0, 1)]
    found = [markdown(files).split("### Where the answers came from")[0].split("-->")[1] for files in ([whole], parts)]
    assert found[0] == found[1]


def test_missing_controls_are_refused_unless_asked_for(save: Any) -> None:
    file = save(made(rows=("base", "t2l", "t2l+description")))
    with pytest.raises(EvaluationError, match=r"suite test lacks base\+description, t2l-wrong, t2l-random\. Run"):
        markdown([file])
    with pytest.raises(DataError, match=r"empty\.jsonl holds no answer yet; the same `t2l eval run` goes on"):
        markdown([file, save([], "empty.jsonl")])
    text = markdown([file], Options(without_controls=True))
    assert "Controls are missing" in text
    assert "T2L with another task's description (t2l-wrong)" in text


def test_a_table_without_a_multitask_lora_says_what_it_cannot_show(save: Any) -> None:
    """The controls that need nothing but a checkpoint are there; a multi-task LoRA has to be trained first."""
    names = [condition.name for condition in MINIMUM if condition.adapter != "multitask"]
    text = markdown([save(made(names))])
    assert "**There is no multi-task LoRA here.**" in text and "Controls are missing" not in text
    assert "There is no multi-task LoRA" not in markdown([save(made(), "b.jsonl")])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dtype": "bfloat16"}, "dtype is 'float32' in one, 'bfloat16' in the other"),
        ({"checkpoint_sha256": "d" * 64}, "both hold seed 0, with different checkpoint_sha256"),
        ({}, "both hold the answer of"),
    ],
)
def test_files_that_do_not_go_together_are_refused(change: dict[str, Any], match: str, save: Any) -> None:
    with pytest.raises(DataError, match=match):
        markdown([save(made()), save(made(), "b.jsonl", **change)])


def test_other_weights_under_other_seeds_share_a_table(save: Any) -> None:
    other = save(made(seeds=(2, 3)), "b.jsonl", checkpoint_sha256="d" * 64)
    assert "seeds 0, 1, 2, 3" in markdown([save(made()), other])


def test_an_unfinished_file_is_refused(save: Any) -> None:
    with pytest.raises(DataError, match=r"t2l-random\+description: 7 answers are missing.*run the same command"):
        markdown([save(made()[:-7])])


def test_compared_rows_must_have_seen_the_same_prompt(save: Any) -> None:
    lines = made()
    one = next(i for i, line in enumerate(lines) if line["condition"] == "t2l-wrong")
    changed = [line | {"prompt": "other"} if i == one else line for i, line in enumerate(lines)]
    with pytest.raises(DataError, match="t2l and t2l-wrong saw different prompts"):
        markdown([save(changed)])
    text = markdown([save(lines)], Options(compare=(("t2l+description", "base"),)))
    assert "| t2l+description | base | **different prompts** |" in text
    with pytest.raises(DataError, match="no condition 'best'"):
        markdown([save(lines)], Options(compare=(("t2l", "best"),)))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is empty"),
        ('{"run": {"format_version": 1}}\n', "format_version is 1"),
        ("[1, 2]\n", ":1 is not a line"),
        ("nothing\n", ":1 is not a line"),
    ],
)
def test_damaged_files_are_named(text: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=match):
        answers.read(path)
    whole = answers.to_text(header(), made())
    head, first, *rest = whole.splitlines(keepends=True)
    for name, wrong in (
        ("scores", None),
        ("scores", "x"),
        ("seed", [1]),
        ("task", {}),
        ("condition", 1),
        ("prompt", None),
    ):
        path.write_text("".join([head, json.dumps(json.loads(first) | {name: wrong}) + "\n", *rest]))
        with pytest.raises(DataError, match=":2 is not a line of a file of answers"):
            answers.read(path)
    for score in (-5, 1e308, "1", [0.5]):
        path.write_text(
            "".join([head, json.dumps(json.loads(first) | {"scores": {"exact_match": score}}) + "\n", *rest])
        )
        with pytest.raises(DataError, match=":2 is not a line of a file of answers"):
            answers.read(path)
    path.write_text(head + first.replace('"seed": 0', '"seed": NaN') + "".join(rest))
    with pytest.raises(DataError, match=r":2 is not a line.*it holds NaN"):
        answers.read(path)
    path.write_text('{"task": "one", "input": "a", "output": "b"}')  # of tasks, whose last line needs no end
    with pytest.raises(DataError, match="is not a line of a file of answers, which `t2l eval run` writes"):
        answers.read(path)
    path.write_text(whole[:-20])
    with pytest.raises(DataError, match="last line is cut off"):
        answers.read(path)
    path.write_text(whole + whole.splitlines()[5] + "\n")
    with pytest.raises(DataError, match="two answers of"):
        answers.read(path)
    (tmp_path / "bad.jsonl.gz").write_bytes(b"\x1f\x8bnot really")
    with pytest.raises(DataError, match="Cannot read answers"):
        answers.read(tmp_path / "bad.jsonl.gz")


JSON = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | strategies.text(),
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(strategies.text(), inner, max_size=3),
    max_leaves=5,
)


@hypothesis.given(data=strategies.data())
@hypothesis.settings(max_examples=60)
def test_files_with_anything_in_them_are_reported_or_refused(
    data: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One fact or part of an answer replaced or left out: a table, or an error of ours."""
    suites = {"likelihood": {"chance": {"task0": 0.25}, "floor": {"task0": 0.25}}}
    lines = made(("base", "t2l"), suite="likelihood", tasks=("task0", "task1"), seeds=(0,))
    parts = json.loads(json.dumps([{"run": header(suites=suites)}, *lines]))
    place = data.draw(strategies.sampled_from([0, 0, 0, 1, 12]))
    holder = parts[place]
    while True:
        key = data.draw(strategies.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
        inner = holder[key]
        if not inner or not isinstance(inner, dict | list) or data.draw(strategies.integers(0, 3)) == 0:
            break
        holder = inner
    if data.draw(strategies.booleans()):
        holder[key] = data.draw(JSON)
    else:
        del holder[key]
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in parts))
    with contextlib.suppress(T2LError):
        file = answers.read(path)
        for make in (markdown, as_csv):
            make([file], Options(without_controls=True))


@pytest.mark.parametrize("row", ["[" * 10**5, "9" * 5000, '{"a": NaN}', "{}", "null", '"run"'])
def test_lines_that_are_no_answers_are_named(row: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    for number in (1, 2):
        path.write_text(answers.to_text(header(), ()) * (number - 1) + row + "\n")
        with pytest.raises(DataError, match=f":{number} is not a line of a file of answers"):
            answers.read(path)


def test_benchmarks_flag_what_could_not_be_read_and_leave_out_what_is_at_chance(save: Any) -> None:
    def scores(row: str, right: bool) -> dict[str, Any]:
        return {"correct": float(right), "parsed": float(row != "base")}

    lines = made(suite="benchmarks", tasks=("piqa", "gsm8k"), seeds=range(8), scores=scores)
    lines += [
        line | {"scores": {"correct": None, "parsed": 1.0}, "task": "humaneval"}
        for line in lines
        if line["task"] == "piqa"
    ]
    facts = {"kind": ["option"], "chance": {"piqa": 0.9}, "floor": {"piqa": 0.9}}
    text = markdown([save(lines, suites={"benchmarks": facts})])
    assert "base on gsm8k (0%)" in text
    assert "leaves out benchmarks on which no condition's interval lies above chance: piqa." in text
    assert "Not scored, because code was not run: humaneval (400)" in text
    tables = {part.split("\n")[0]: part.splitlines() for part in text.split("### ")[1:]}
    mean, above, each = (tables[f"Benchmarks, answered in words{x}"] for x in ("", ": average above chance", EACH))
    by_task = {
        task: 100 * np.mean([x["scores"]["correct"] for x in lines if (x["condition"], x["task"]) == ("t2l", task)])
        for task in ("piqa", "gsm8k")
    }

    def cell(lines: list[str], row: str, column: str) -> str:
        head, *body = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|"))
        return next(cells for cells in body if cells[0] == row)[head.index(column)].split(" ±")[0]

    right = "T2L, the task's description"
    assert cell(mean, right, "plain prompt") == f"{np.mean([*by_task.values()]):.1f}"
    assert cell(above, right, "plain prompt") == cell(each, "gsm8k", right) == f"{by_task['gsm8k']:.1f}"
    assert cell(each, "piqa", right) == f"{by_task['piqa']:.1f}"
    assert (cell(each, "piqa", "chance"), cell(each, "answers read", right)) == ("90.0", "100%")


def test_above_chance_means_the_interval_not_the_mean(save: Any) -> None:
    lines = made(("t2l",), suite="likelihood", tasks=("piqa",))
    mean = float(np.mean([line["scores"]["exact_match"] for line in lines]))
    for chance, above in ((mean - 0.01, []), (0.0, ["piqa"])):
        facts = {"likelihood": {"chance": {"piqa": chance}, "floor": {}}}
        (suite,) = gather([save(lines, suites=facts)], partial=True)
        assert suite.above_chance() == above


def test_floor_check_is_the_exact_binomial_one(save: Any) -> None:
    def lines(right: int) -> list[dict[str, Any]]:
        found = made(("base",), suite="likelihood", tasks=("arc_easy",), seeds=range(20))
        return [
            line | {"id": str(n), "seed": 0, "scores": {"correct": float(n < right)}} for n, line in enumerate(found)
        ]

    facts = {"likelihood": {"kind": ["likelihood"], "chance": {"arc_easy": 0.25}, "floor": {"arc_easy": 0.25}}}
    # Of 100 at 0.25, at most 16 come by chance in 2.1 % of the cases, at most 17 in 3.8 %.
    for right, low in ((0, True), (16, True), (17, False), (60, False)):
        (suite,) = gather([save(lines(right), suites=facts)], partial=True)
        assert bool(below_floor(suite)) == low


def test_another_score_can_be_shown(save: Any) -> None:
    lines = made(scores=lambda row, right: {"exact_match": float(right), "rouge_l": 0.25})
    text = markdown([save(lines)], Options(score="rouge_l"))
    assert "rouge l of the greedy answer" in text
    assert text.count("0.250 [0.250, 0.250]") == len(MINIMUM)
    with pytest.raises(DataError, match=r"no score 'bleu'; it has: exact_match, rouge_l"):
        markdown([save(lines)], Options(score="bleu"))


def test_csv_has_every_row_task_and_difference(save: Any) -> None:
    file = save(made())
    rows = list(csv.DictReader(io.StringIO(as_csv([file]))))
    overall = {row["condition"]: row for row in rows if row["task"] == "all" and not row["minus"]}
    assert overall.keys() == {row.name for row in MINIMUM}
    assert len(rows) == len(MINIMUM) * 13 + 2 * 5
    values = [line["scores"]["exact_match"] for line in file.lines if line["condition"] == "t2l"]
    assert float(overall["t2l"]["mean"]) == pytest.approx(np.mean(values), abs=1e-4)
    assert all(row["p"] and row["one_sided_low"] for row in rows if row["minus"])


def asked(**changes: str) -> dict[str, Any]:
    """Facts of a suite with one question in its file."""
    one = {"task": "task0", "id": "task0-0", "description": "Do <i>it</i>.", "input": "Is it?", "expected": "yes"}
    return {"own <script>": {"questions": [one | changes]}}


def test_html_needs_no_other_file_and_escapes(save: Any) -> None:
    page = as_html([save(made(suite="own <script>"), checkpoint="a<b", suites=asked())])
    assert "<script" not in page and "<i>it" not in page
    assert "<title>a&lt;b on tiny</title>" in page
    assert all(mark not in page for mark in ("<img", "<link", "src=", "@import", "url("))
    assert page.count("<table>") == 5
    assert page.count('class="span"') + page.count("class=span") == len(MINIMUM) + 2 * 5


def test_html_shows_questions_with_the_answers_of_one_seed(save: Any) -> None:
    lines = made(suite="own <script>")
    page = as_html([save(lines, suites=asked())])
    first = {line["condition"]: line for line in lines if (line["id"], line["seed"]) == ("task0-0", 0)}
    right = first["t2l+description"]["scores"]["exact_match"] == 1
    assert "Is it?" in page and "Expected: <strong>yes</strong>" in page
    shown = f'T2L, the task&#x27;s description, description in prompt</dt><dd class="{"right" if right else "wrong"}">'
    assert page.count(shown) == 1
    assert "do not stand in its file" in as_html([save(lines, "b.jsonl")])
    assert "t2l-random: T2L, random text; +description: description in the prompt.</p>" in page
    with pytest.raises(DataError, match="questions of suite own <script> that are no lists of texts"):
        save(lines, "c.jsonl", suites={"own <script>": {"questions": [{"task": 1}]}})


def test_html_fits_a_telephone(save: Any, tmp_path: Path) -> None:
    """390 pixels wide: nothing beyond the edge, nothing smaller than 12 pixels, colours of the reader's choice."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    lines = made(suite="own <script>")
    (tmp_path / "r.html").write_text(as_html([save(lines, checkpoint="x" * 100, suites=asked(input="y" * 300))]))
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
            page.goto((tmp_path / "r.html").as_uri())
            widest = page.evaluate(
                "Math.max(...[...document.querySelectorAll('*')].map(e => e.getBoundingClientRect().right))"
            )
            smallest = page.evaluate(
                "Math.min(...[...document.body.querySelectorAll('*')].map(e => "
                "parseFloat(getComputedStyle(e).fontSize)))"
            )
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert widest <= 390 and smallest >= 12
            assert (background == "rgb(23, 24, 27)") == (scheme == "dark")
        browser.close()


def test_few_tasks_of_ones_own_are_shown_each_by_itself(save: Any) -> None:
    lines = made(suite="own", tasks=("mood", "city"))
    text = markdown([save(lines)])
    assert "**2 tasks are too few to speak of others**" in text
    *_, table = text.split("### Suite own: each task, plain prompt")[1].split("###")[0].strip().split("\n\n")
    head, _, *rows = table.splitlines()
    assert head == (
        "|  | items | base model | multi-task LoRA | T2L, the task's description | T2L, another task's description "
        "| T2L, random text |"
    )
    for row, task in zip(rows, ("city", "mood"), strict=True):
        means = [
            np.mean([line["scores"]["exact_match"] for line in lines if (line["task"], line["condition"]) == (task, c)])
            for c in RATES
        ]
        assert row == f"| {task} | 5 | {' | '.join(f'{mean:.2f}' for mean in means)} |"
    assert "each task" not in markdown([save(made())]), "tasks of the packed data stand for others of their kind"
    many = made(suite="own", tasks=[f"task{n}" for n in range(31)])
    assert "each task" not in markdown([save(many)]) and "too few" not in markdown([save(many)])


def test_a_report_is_named_for_what_it_is_about(save: Any, tmp_path: Path) -> None:
    """Two reports on the same tasks are told apart by their first line."""
    file, run = save(made()), tmp_path / "my-run" / "checkpoint"
    options = Options(title="More tasks, seed 1")
    assert "\n## More tasks, seed 1\n" in markdown([file], options)
    assert "--title 'More tasks, seed 1'" in markdown([file], options).split("\n")[0]
    assert "<h1>More tasks, seed 1</h1>" in as_html([file], options)
    run.mkdir(parents=True)
    assert (_public(str(run)), _public(str(run.parent)), _public("hub/name")) == (
        "my-run/checkpoint", "my-run", "hub/name"
    )  # fmt: skip


def test_command_writes_what_the_suffix_says(save: Any, tmp_path: Path) -> None:
    runner, file = CliRunner(), save(made())
    table, numbers = tmp_path / "out" / "r.md", tmp_path / "out" / "r.csv"
    result = runner.invoke(
        app, ["eval", "report", str(file.path), "--out", str(table), "--out", str(numbers), "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"reports": [str(table), str(numbers)]}
    assert table.read_text() == markdown([file])
    result = runner.invoke(app, ["eval", "report", str(file.path)])
    assert result.stdout == markdown([file])
    for arguments, code, message in (
        (["--out", "r.pdf"], 1, "written as .md, .csv, .html"),
        (["--compare", "t2l"], 2, "takes two conditions"),
        ([str(tmp_path / "no.jsonl")], 1, "no.jsonl is missing"),
    ):
        result = runner.invoke(app, ["eval", "report", str(file.path), *arguments])
        assert (result.exit_code, message in result.output) == (code, True), result.output


def test_written_reports_are_as_readable_as_any_new_file(save: Any, tmp_path: Path) -> None:
    """They are made under a temporary name, which starts out private."""
    file, plain = save(made()), tmp_path / "plain"
    plain.touch()
    assert CliRunner().invoke(app, ["eval", "report", str(file.path), "--out", str(tmp_path / "r.md")]).exit_code == 0
    assert (tmp_path / "r.md").stat().st_mode == plain.stat().st_mode


def test_several_checkpoints_are_also_shown_apart(save: Callable[..., answers.AnswerFile]) -> None:
    """Their means are those of each one's own report, and their mean that of the table."""
    files = [save(made(seeds=(n,)), f"{n}.jsonl", checkpoint_sha256=str(n) * 64, suites={"test": {}}) for n in range(3)]
    _, found = tables(files)
    (apart,) = (table for table in found if table.title.endswith("by checkpoint"))
    head, *cells = apart.cells
    assert head == ["condition", "`00000000`", "`11111111`", "`22222222`", "standard deviation"]
    rows = {row[0]: row[1:] for row in cells}
    alone = [gather([file])[0].conditions for file in files]
    assert rows["t2l"][:3] == [f"{estimate(x['t2l']).mean:.3f}" for x in alone]
    gaps = [difference(x["t2l"], x["t2l-wrong"]).mean for x in alone]
    assert rows["t2l − t2l-wrong"] == [*(f"{gap:.3f}" for gap in gaps), f"{np.std(gaps, ddof=1):.3f}"]
    _, found = tables(files[:1])
    assert not any(table.title.endswith("by checkpoint") for table in found)
