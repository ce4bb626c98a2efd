"""Candidates for the default checkpoint: jobs that can be run in order, a runner that keeps to memory, the rule."""

import json
import re
import shlex
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import default_jobs
import default_rule
import pytest
from run_jobs import SKIPPED, Runner

from t2l.config import build, load_yaml, override
from t2l.eval.stats import difference
from t2l.train.config import SftConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("short", [None, 1500])
def test_every_job_comes_after_jobs_of_the_list_and_every_training_has_settings_that_are_accepted(
    short: int | None,
) -> None:
    made = default_jobs.jobs("far.jsonl", (0, 1), 6000, short)
    names = [job["name"] for job in made]
    assert len(set(names)) == len(names)
    for job in made:
        assert set(job["after"]) <= set(names)
        if "train sft" not in job["command"]:
            continue
        words = shlex.split(job["command"])
        plain = load_yaml(ROOT / words[words.index("--config") + 1])
        sets = [word for before, word in pairwise(words) if before == "--set"]
        config = build(SftConfig, override(plain, sets))
        frozen = job["name"].startswith("frozen")
        assert config.hypernet.train_shared_lora is not frozen
        shared = f"runs/multitask{short or ''}-{config.seed}/checkpoint"
        assert config.train.init_from == (shared if frozen else None)
        assert config.seed == int(job["name"][-1])
        assert config.train.max_steps == (1500 if job["name"].startswith("multitask1500") else 6000)


def runner(tmp_path: Path, jobs: list[dict[str, Any]], memory: list[float]) -> Runner:
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    return Runner(tmp_path / "jobs.json", tmp_path, memory)


def finish(running: Runner) -> None:
    end = time.monotonic() + 20
    while running.turn():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_jobs_run_after_others_and_not_after_failed_ones(tmp_path: Path) -> None:
    jobs = [
        {"name": "second", "command": "cat first.txt > second.txt", "memory": 1, "after": ["first"]},
        {"name": "first", "command": "echo done > first.txt", "memory": 1},
        {"name": "bad", "command": "exit 3", "memory": 1},
        {"name": "never", "command": "touch never.txt", "memory": 1, "after": ["bad"]},
    ]
    for job in jobs:
        job["command"] = f"cd {tmp_path} && {job['command']}"
    running = runner(tmp_path, jobs, [80.0])
    finish(running)
    assert running.done == {"first": 0, "second": 0, "bad": 3, "never": SKIPPED}
    assert (tmp_path / "second.txt").read_text() == "done\n"
    assert not (tmp_path / "never.txt").exists()
    assert json.loads((tmp_path / "status.json").read_text())["done"] == running.done


def test_no_gpu_is_given_more_than_its_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [{"name": f"{n}", "command": "sleep 0.2", "memory": 40} for n in range(5)]
    running = runner(tmp_path, jobs, [50.0, 90.0])
    running.turn()
    placed = sorted(gpu for _, gpu, _, _ in running.running.values())
    assert placed == [0, 1, 1]
    finish(running)
    assert len(re.findall("start", capsys.readouterr().out)) == 5


def test_a_line_is_a_paired_difference_of_the_files_conditions() -> None:
    scores = {name: {"a": {"1": [x]}, "b": {"1": [1.0]}} for name, x in (("t2l", 1.0), ("t2l-random", 0.0))}
    far = {"far_dev": scores}
    line = next(line for line in default_rule.LINES if (line.suite, line.minus) == ("far_dev", "random"))
    found = default_rule.compare(line, "plain", far, {}, {})
    assert found is not None and found.mean == difference(scores["t2l"], scores["t2l-random"]).mean == 0.5
    assert default_rule.compare(line, "described", far, {}, {}) is None


@pytest.mark.parametrize(
    ("text", "output", "listed"),
    [
        ("Which?\n- red\n- blue", "red", True),
        ("Is it so?\nOptions: yes, no", "yes", True),
        ("It was red.\nWhat colour is it?", "red", True),
        ("12 + 13 =", "25", False),
        ("A red house.", "red", False),
    ],
)
def test_inputs_that_list_options(text: str, output: str, listed: bool) -> None:
    assert default_rule.lists_options(text, output) is listed
