"""The few-shot curve: a run goes on where its file ends, and the report pairs what belongs together."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from t2l.errors import DataError
from t2l.eval.suites import EvalTask, Item
from t2l.train.tune import TuneConfig


@pytest.fixture
def few_shot(import_script: Callable[[str], ModuleType]) -> ModuleType:
    return import_script("few_shot")


def row(task: str, seed: int, number: int, start: str, score: float) -> dict[str, Any]:
    scores = {f"{task}-{i}": score for i in range(4)}
    return {"task": task, "seed": seed, "examples": number, "start": start, "scores": scores}


def test_the_report_has_means_and_paired_differences(few_shot: ModuleType) -> None:
    rows = []
    for number, gain in ((0, 0.5), (8, 0.25)):
        for task in ("one", "two", "three"):
            for start, score in (("description", gain), ("multitask", 0.25), ("scratch", 0.0)):
                rows.append(row(task, 0, number, start, score))
    rows.append(row("four", 0, 8, "description", 1.0))  # the others lack it
    table = few_shot.report(rows).splitlines()
    assert table[2].startswith("| 0 | 0.500 [0.500, 0.500] | 0.250 [0.250, 0.250] | 0.000")
    assert "| +0.250 [+0.250, +0.250]" in table[2]
    assert table[3].startswith("| 8 | 0.250") and "| +0.000 [" in table[3]


def test_answers_of_one_beginning_are_no_curve(few_shot: ModuleType) -> None:
    with pytest.raises(DataError, match="No number of examples has answers from all three beginnings"):
        few_shot.report([row("one", 0, 0, "scratch", 0.0)])


def test_the_table_takes_the_place_of_the_last_one(few_shot: ModuleType, tmp_path: Path) -> None:
    page, file = tmp_path / "page.md", tmp_path / "rows.jsonl"
    page.write_text(f"Before.\n\n{few_shot.BEGIN}An old table.\n{few_shot.END}\n\nAfter.\n")
    rows = [row("one", 0, 8, start, 0.5) for start in few_shot.STARTS]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    for _ in range(2):
        few_shot.main(["report", str(file), "--page", str(page)])
        assert page.read_text() == f"Before.\n\n{few_shot.BEGIN}{few_shot.report(rows)}{few_shot.END}\n\nAfter.\n"
    page.write_text("No marks.\n")
    with pytest.raises(DataError, match=r"has no lines <!-- by research/few_shot\.py -->"):
        few_shot.main(["report", str(file), "--page", str(page)])
    guide = Path(few_shot.__file__).parents[1] / "docs" / "tuning.md"
    assert few_shot.BEGIN in guide.read_text(encoding="utf-8")


def test_a_run_goes_on_where_its_file_ends(
    few_shot: ModuleType, make_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = tuple(Item(f"numbers-{n}", f"number {n}", ("even" if n % 2 == 0 else "odd",)) for n in range(12))
    task = EvalTask("own", "numbers", "text", ("Say even or odd.",), items[:3], shots=items[3:], max_new_tokens=4)
    monkeypatch.setattr(few_shot, "load_suite", lambda suite, per_task: [task] if suite == "held-back" else [])
    checkpoint = str(make_checkpoint(tmp_path / "checkpoint"))
    multitask = str(make_checkpoint(tmp_path / "multitask", variant="none"))
    options = argparse.Namespace(
        out=tmp_path / "out.jsonl",
        checkpoint=checkpoint,
        multitask=multitask,
        seeds=1,
        per_task=3,
        numbers=[0, 8],
        tasks=0,
        tokens=4096,
    )
    monkeypatch.setattr(few_shot, "TuneConfig", lambda: TuneConfig(max_epochs=1))
    few_shot.run(options)
    rows = [json.loads(line) for line in options.out.read_text().splitlines()]
    assert [(r["examples"], r["start"]) for r in rows] == [(n, s) for n in (0, 8) for s in few_shot.STARTS]
    assert rows[3]["held_out_losses"][0] != rows[4]["held_out_losses"][0] != rows[5]["held_out_losses"][0]
    kept = options.out.read_text().splitlines(keepends=True)
    options.out.write_text("".join(kept[:4]))
    few_shot.run(options)
    again = [json.loads(line) for line in options.out.read_text().splitlines()]
    assert [{k: v for k, v in r.items() if k != "seconds"} for r in again] == [
        {k: v for k, v in r.items() if k != "seconds"} for r in rows
    ]
    assert few_shot.report(again).count("\n") == 4


def test_many_tunings_are_those_of_one_at_a_time() -> None:
    from conftest import make_base, make_config, make_tokenizer, random_lora
    from tune_many import Job, tune_many

    from t2l.config import LoraConfig, PromptConfig
    from t2l.spec import AdapterSpec
    from t2l.text_to_lora import LoraAdapter
    from t2l.train.tune import tune

    base, prompt = (make_base(make_config()), make_tokenizer()), PromptConfig()
    spec = AdapterSpec.from_config(make_config(), "tiny", LoraConfig(r=4, lora_alpha=8))
    config = TuneConfig(learning_rate=3e-2, max_epochs=8, patience=1)
    examples = [(f"number {n}" + " and more" * (n % 3), "even" if n * n % 5 > 1 else "odd") for n in range(24)]
    jobs = [
        Job(LoraAdapter(random_lora(spec, seed=seed), spec, "Say even or odd.", {}), examples[seed:][:16], start, seed)
        for seed, start in ((0, "adapter"), (1, "scratch"), (2, "adapter"), (3, "adapter"))
    ]
    found = tune_many(jobs, base, prompt=prompt, config=config, tokens=800)
    lengths = set()
    for job, (lora, losses, best) in zip(jobs, found, strict=True):
        own = TuneConfig(learning_rate=3e-2, max_epochs=8, patience=1, seed=job.seed)
        alone = tune(job.adapter, base, examples[job.seed :][:16], prompt=prompt, config=own, start=job.start)
        assert losses == pytest.approx(alone.held_out_losses, rel=1e-3) and best == alone.best_epoch
        for ours, theirs in zip((*lora.a, *lora.b), (*alone.adapter.lora.a, *alone.adapter.lora.b), strict=True):
            assert (ours - theirs).abs().max() <= 2e-3 * theirs.abs().max()
        lengths.add(len(losses))
    assert len(lengths) > 1  # some ended before others
