"""Work that is shared by workers is what one process makes, also when a worker is killed at it."""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import DESCRIPTIONS
from eval_helpers import SETTINGS
from typer.testing import CliRunner

from t2l import fanout, mass
from t2l.cli import app
from t2l.config import LoraConfig
from t2l.errors import ConfigError, DescriptionError
from t2l.eval import answers
from t2l.eval import workers as eval_workers
from t2l.eval.run import Settings, run
from t2l.library import AdapterLibrary
from t2l.shards import ShardedLibrary
from t2l.train import workers as train_workers
from t2l.train.task_config import TaskLorasConfig, TaskLorasDataConfig, TaskLorasTrainConfig
from t2l.train.task_loras import train_task_loras
from t2l.train.workers import train_on_workers

TEXTS = [f"{text} Part {n}." for n in range(6) for text in DESCRIPTIONS]


def quiet(_: str) -> None:
    pass


def in_this_process(
    make: Callable[..., Any], arguments: tuple[Any, ...], jobs: Iterable[Any], **_: Any
) -> Iterator[Any]:
    """`fanout.run` without Ray; jobs and results pass through JSON, as there."""
    work = make(*arguments)
    for job in jobs:
        yield json.loads(json.dumps(work(json.loads(json.dumps(job)))))


class KilledError(Exception):
    pass


def killed_after(number: int) -> Callable[..., Iterator[Any]]:
    """`fanout.run`, as if this process were killed after so many jobs."""

    def run(*arguments: Any, **options: Any) -> Iterator[Any]:
        for done, result in enumerate(in_this_process(*arguments, **options), start=1):
            yield result
            if done == number:
                raise KilledError

    return run


# ------------------------------------------------------------------------------------------------- what is shared


@pytest.fixture(scope="module")
def texts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"description": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def mass_settings(checkpoint: str) -> mass.Settings:
    return mass.Settings(checkpoint=checkpoint, device="cpu", shard_bytes=1 << 13)


def generate(source: Path, folder: Path, settings: mass.Settings, workers: int) -> list[str]:
    """Ids in the library, sorted, and every one once."""
    done = mass.generate_library(source, folder, settings, workers=workers, log=quiet)
    assert done.written + done.there == len(TEXTS)
    found = sorted(name for names in ShardedLibrary.open(folder).ids() for name in names)
    assert len(set(found)) == len(found)
    return found


@pytest.fixture(scope="module")
def task_config(base_folder: Path, sft_jsonl: Path) -> TaskLorasConfig:
    return TaskLorasConfig(
        base=str(base_folder),
        lora=LoraConfig(target_modules=("q_proj",), r=2, lora_alpha=4),
        data=TaskLorasDataConfig(tasks=(str(sft_jsonl),)),
        train=TaskLorasTrainConfig(
            max_steps=4, eval_steps=2, tasks_per_batch=1, max_seq_length=96, max_target_length=24, report_to="none"
        ),
    )


def same_library(one: AdapterLibrary, other: AdapterLibrary) -> bool:
    stacks = one.stack(), other.stack()
    largest = max(float((x - y).abs().max()) for x, y in zip(stacks[0].b, stacks[1].b, strict=True))
    return (one.names, one.spec, one.purpose) == (other.names, other.spec, other.purpose) and largest <= 1e-5


@pytest.fixture(scope="module")
def eval_settings(tasks_file: Path, checkpoint: str) -> Settings:
    conditions = "base+shots,t2l,t2l-wrong"
    return Settings(suites=(str(tasks_file),), checkpoint=checkpoint, conditions=conditions, **SETTINGS)


def said(path: Path) -> dict[Any, Any]:
    return {answers.key_of(line): line for line in answers.read(path).lines}


# --------------------------------------------------------------------------------------------------- without Ray


def test_generated_by_workers(
    texts_file: Path, mass_settings: mass.Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(texts_file, tmp_path / "one", mass_settings, workers=0)
    monkeypatch.setattr(fanout, "run", killed_after(2))
    with pytest.raises(KilledError):
        generate(texts_file, tmp_path / "two", mass_settings, workers=2)
    assert 0 < len(ShardedLibrary.open(tmp_path / "two")) < len(expected)
    monkeypatch.setattr(fanout, "run", in_this_process)
    assert generate(texts_file, tmp_path / "two", mass_settings, workers=2) == expected
    shards = [{p.name for p in (tmp_path / name / "shards").iterdir()} for name in ("one", "two")]
    assert shards[0] == shards[1] and len(shards[0]) > 3


def test_task_loras_by_workers(task_config: TaskLorasConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = train_task_loras(task_config, tmp_path / "one", device="cpu", log=quiet)
    options: dict[str, Any] = {"workers": 2, "device": "cpu", "log": quiet}
    monkeypatch.setattr(fanout, "run", killed_after(1))
    with pytest.raises(KilledError):
        train_on_workers(task_config, tmp_path / "two", **options)
    monkeypatch.setattr(fanout, "run", in_this_process)
    found = train_on_workers(task_config, tmp_path / "two", resume=True, **options)
    assert len(found.names) == 2 and same_library(found, expected)
    with pytest.raises(ConfigError, match="one process"):
        train_on_workers(task_config, tmp_path / "three", max_minutes=1, **options)


def test_answers_by_workers(eval_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(eval_settings, tmp_path / "one.jsonl", log=quiet)
    out = tmp_path / "two.jsonl"
    monkeypatch.setattr(fanout, "run", killed_after(2))
    with pytest.raises(KilledError):
        eval_workers.run_on_workers(eval_settings, out, workers=2, log=quiet)
    monkeypatch.setattr(fanout, "run", in_this_process)
    for _ in range(2):  # and once more, when everything is there
        eval_workers.run_on_workers(eval_settings, out, workers=3, log=quiet)
        assert said(out) == said(tmp_path / "one.jsonl")
        assert answers.read(out).header == answers.read(tmp_path / "one.jsonl").header
    assert [path.name for path in tmp_path.iterdir()].count("two.jsonl.parts") == 0
    other = Settings(**(vars(eval_settings) | {"held_out": 3}))
    with pytest.raises(ConfigError, match="held_out 4; this one has 3"):
        eval_workers.run_on_workers(other, out, workers=2, log=quiet)


def test_only_task_loras_are_trained_by_workers(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("base: x\n")
    arguments = ["train", "sft", "--config", str(tmp_path / "settings.yaml"), "--run", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*arguments, "--workers", "2"])
    assert result.exit_code == 2 and "do not depend on one another" in result.output


# ------------------------------------------------------------------------------------------------------- with Ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on this machine, with room for two workers."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def dying(worker: type, flag: Path, seconds: float) -> type:
    """A worker of which the first is killed so long after its first job began, by SIGKILL."""

    class Dying(worker):  # type: ignore[misc, valid-type]
        def __call__(self, job: Any) -> Any:
            try:
                flag.touch(exist_ok=False)
            except FileExistsError:
                return super().__call__(job)
            threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
            super().__call__(job)
            return threading.Event().wait(60)  # done, and killed before it could say so

    return Dying


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("cluster")
class TestRay:
    """Every row exactly once, with a worker killed in flight."""

    @pytest.mark.parametrize("seconds", [0.0, 0.02, 2.0])
    def test_generate(
        self,
        seconds: float,
        texts_file: Path,
        mass_settings: mass.Settings,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        expected = generate(texts_file, tmp_path / "one", mass_settings, workers=0)
        monkeypatch.setattr(mass, "Worker", dying(mass.Worker, tmp_path / "died", seconds))
        assert generate(texts_file, tmp_path / "two", mass_settings, workers=2) == expected
        assert (tmp_path / "died").exists()

    def test_task_loras(self, task_config: TaskLorasConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = train_task_loras(task_config, tmp_path / "one", device="cpu", log=quiet)
        monkeypatch.setattr(train_workers, "Worker", dying(train_workers.Worker, tmp_path / "died", 0.5))
        found = train_on_workers(task_config, tmp_path / "two", workers=2, device="cpu", log=quiet)
        assert same_library(found, expected) and (tmp_path / "died").exists()

    def test_answers(self, eval_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run(eval_settings, tmp_path / "one.jsonl", log=quiet)
        monkeypatch.setattr(eval_workers, "Worker", dying(eval_workers.Worker, tmp_path / "died", 0.1))
        eval_workers.run_on_workers(eval_settings, tmp_path / "two.jsonl", workers=2, log=quiet)
        assert said(tmp_path / "two.jsonl") == said(tmp_path / "one.jsonl") and (tmp_path / "died").exists()

    def test_what_a_job_raises_is_raised_here(self, mass_settings: mass.Settings, tmp_path: Path) -> None:
        source = tmp_path / "texts.jsonl"
        source.write_text(json.dumps({"description": "long " * 100}) + "\n")
        with pytest.raises(DescriptionError, match="reads at most 96"):
            mass.generate_library(source, tmp_path / "library", mass_settings, workers=1, log=quiet)
