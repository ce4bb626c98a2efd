"""The script of the protocol's short runs: jobs wait for each other, levers are settings, S is the protocol's."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_eval_report import header, made

from t2l.config import build, load_yaml, override
from t2l.eval import answers
from t2l.eval.report import gather
from t2l.train.config import SftConfig

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def script(import_script: Callable[[str], ModuleType]) -> ModuleType:
    return import_script("levers")


@pytest.fixture
def job(script: ModuleType, tmp_path: Path) -> Callable[..., Any]:
    """A job that notes when it ran and on which GPU."""

    def make(name: str, *after: str, code: str = "", **options: Any) -> Any:
        note = "import os, time; start = time.time()\n" + code + "\n"
        note += "line = f\"{start} {time.time()} {os.environ['CUDA_VISIBLE_DEVICES']}\"\n"
        note += f"open({str(tmp_path / name)!r}, 'w').write(line)"
        return script.Job(name, (sys.executable, "-c", note), after, **options)

    return make


def ran(folder: Path, name: str) -> tuple[float, float, int]:
    start, end, gpu = (folder / name).read_text().split()
    return float(start), float(end), int(gpu)


def test_jobs_wait_share_gpus_and_fail_with_what_they_wait_for(
    script: ModuleType, job: Callable[..., Any], tmp_path: Path
) -> None:
    nap = "time.sleep(0.5)"
    jobs = [
        job("a", code=nap),
        job("b", code=nap),
        job("broken", code="raise SystemExit(3)"),
        job("c", "a", "b"),
        job("never", "broken"),
        job("known", done=lambda: True),
        job("d", "known"),
    ]
    assert script.run_jobs(jobs, tmp_path / "logs", gpus=2, at_once=1) == ["broken", "never"]
    assert {ran(tmp_path, "a")[2], ran(tmp_path, "b")[2]} == {0, 1}
    assert ran(tmp_path, "c")[0] > max(ran(tmp_path, name)[1] for name in "ab")
    assert (tmp_path / "d").exists()
    assert not (tmp_path / "never").exists() and not (tmp_path / "known").exists()


def test_time_ends_what_runs(script: ModuleType, job: Callable[..., Any], tmp_path: Path) -> None:
    jobs = [job("long", code="time.sleep(600)"), job("later", "long")]
    started = time.monotonic()
    left = script.run_jobs(jobs, tmp_path / "logs", gpus=1, at_once=1, until=started + 0.5)
    assert left == ["later", "long"]
    assert time.monotonic() - started < 60


def test_every_lever_is_a_setting_that_differs_from_the_recipe(script: ModuleType, monkeypatch: Any) -> None:
    monkeypatch.chdir(REPOSITORY)
    plain = load_yaml(script.RECIPE)
    recipe = build(SftConfig, override(plain, []))
    for name, lever in script.LEVERS.items():
        t2l = build(SftConfig, override(plain, [*lever.both, *lever.own]))
        multitask = build(SftConfig, override(plain, [*lever.both, *script.MULTITASK]))
        assert multitask.blind and not t2l.blind
        assert (t2l == recipe) == (name == "base" or lever == script.Lever(pretrained=True)), name
        assert t2l.data.tasks == multitask.data.tasks == "sni"


def test_a_row_needs_two_trainings_and_goes_on_where_it_was(script: ModuleType, tmp_path: Path) -> None:
    first, second, *judged = script.jobs_of(
        "contrast-0.1", 3, tmp_path, common=["train.steps=9"], own=["hypernet.centre=true"]
    )
    assert (first.name, second.name) == ("contrast-0.1-3", "base-3-multitask")
    *mine, base = judged
    assert [(job.name, job.after) for job in mine] == [(f"{x.name}-judged", (x.name,)) for x in (first, second)]
    assert (base.name, base.after) == ("base-model-judged", ())
    assert all("train.steps=9" in job.command for job in (first, second))
    assert "hypernet.centre=true" in first.command and "hypernet.centre=true" not in second.command
    assert all("t2l-wrong" not in ",".join(job.command).split(",") for job in judged)
    plain = script.jobs_of("prompt-50", 3, tmp_path)[2]
    assert {"t2l", "t2l-wrong", "t2l-random", "t2l+description"} <= set(",".join(plain.command).split(","))
    assert script.jobs_of("relabel-0", 3, tmp_path)[1].name == "relabel-0-3-multitask"
    late = script.jobs_of("offset-frozen", 3, tmp_path)[0]
    assert late.after == ("base-3-multitask",)
    assert f"train.start_from={tmp_path / 'base-3-multitask' / 'checkpoint'}" in late.command
    assert "--resume" not in first.command and not first.done()
    run = tmp_path / first.name
    (run / "checkpoint").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    assert "--resume" in script.jobs_of("contrast-0.1", 3, tmp_path)[0].command
    for steps, done in ((1200, False), (2400, True)):
        (run / "checkpoint" / "config.json").write_text(f'{{"training": {{"steps": {steps}, "planned_steps": 2400}}}}')
        assert first.done() is done


def test_what_runs_saw_as_they_trained_is_a_table_too(script: ModuleType, tmp_path: Path) -> None:
    assert [job.name for job in script.jobs_of("gate", 0, tmp_path, judge=False)] == ["gate-0", "base-0-multitask"]

    def saw(name: str, *rows: dict[str, float]) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def row(step: int, **values: float) -> dict[str, float]:
        return {
            "step": step,
            **{f"validation/{k.replace('__', '/').replace('_and_', '+')}": v for k, v in values.items()},
        }

    saw("base-0-multitask", row(9, adapter_and_prompt__exact_match=0.25, adapter__exact_match=0.125))
    late = row(9, adapter_and_prompt__exact_match=0.5, adapter_and_prompt__wrong_exact_match=0.375)
    saw("gate-0", row(4, adapter_and_prompt__exact_match=0.9), late, {"step": 10, "loss": 1.0})
    saw("gate-1", {"step": 1, "loss": 1.0})
    saw("head-64-0", row(9, adapter_and_prompt__exact_match=0.75))
    lines = script.training_table(tmp_path).splitlines()
    assert lines[2] == "| head-64-0 | 9 | 0.250 | 0.750 | – | +50.0 | – | 0.125 | – | – | – | – |"
    assert lines[3] == "| gate-0 | 9 | 0.250 | 0.500 | 0.375 | +25.0 | +12.5 | 0.125 | – | – | – | – |"
    assert lines[4] == "| gate-1 | 0 |" + " – |" * 10
    assert all(line.count("|") == lines[1].count("|") for line in lines)


def test_s_is_the_worse_of_both_rules_over_all_choosing_tasks(script: ModuleType, tmp_path: Path) -> None:
    lines = made(suite="validation", tasks=("a", "b"), seeds=(0,)) + made(suite="held-back", tasks=("c",), seeds=(0,))
    mine, other, base = (
        [line for line in lines if line["row"].startswith(start)] for start in ("t2l", "multitask", "base")
    )
    for name, some in (("prompt-50-0", mine), ("prompt-50-0-multitask", other), ("base-model", base)):
        (tmp_path / f"{name}.jsonl").write_text(answers.to_text(header(), some))

    def mean(row: str) -> float:
        scores = [line["scores"]["exact_match"] for line in lines if line["row"] == row]
        return sum(scores) / len(scores)

    rows = script.together(*(tmp_path / f"prompt-50-0{end}.jsonl" for end in ("", "-multitask")))
    assert set(rows["t2l"]) == {"a", "b", "c"} and len(gather([answers.read(tmp_path / "prompt-50-0.jsonl")])) == 2
    for form, end in (("plain", ""), ("description", "+description")):
        gain = 100 * (mean(f"t2l{end}") - mean("multitask+description"))
        steering = 100 * (mean(f"t2l{end}") - mean(f"t2l-wrong{end}"))
        assert script.points(rows)[form] == pytest.approx((min(gain - 4, steering - 8), gain, steering))
    text = script.table(tmp_path)
    best = max(value[0] for value in script.points(rows).values())
    assert text.splitlines()[2].startswith("| prompt-50-0 |") and text.endswith(f"| {best:+.1f} |")
    assert sorted(os.listdir(tmp_path)) == ["base-model.jsonl", "prompt-50-0-multitask.jsonl", "prompt-50-0.jsonl"]
    told = [line for line in mine if line["row"].endswith("+description")]
    (tmp_path / "base-0.jsonl").write_text(answers.to_text(header(), told))
    assert script.table(tmp_path).endswith("Not judged to the end: base-0"), "its multi-task LoRA was not judged"
    (tmp_path / "prompt-50-0-multitask.jsonl").rename(tmp_path / "base-0-multitask.jsonl")
    shown = script.table(tmp_path)
    assert shown.splitlines()[2].startswith("| base-0 | description |")
    assert shown.endswith("Not judged to the end: prompt-50-0")
    for name, some in (("gate-0", []), ("kl-0", told[:-7])):
        (tmp_path / f"{name}.jsonl").write_text(answers.to_text(header(), some))
    judged = shown.partition("\n\n")[0]
    assert script.table(tmp_path) == f"{judged}\n\nNot judged to the end: gate-0, kl-0, prompt-50-0"
