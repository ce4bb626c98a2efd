"""Asking and recording: every row sees the prompt it says, gets the adapter it says, and no answer is asked twice."""

import dataclasses
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_base, make_config, make_tokenizer, random_lora
from eval_helpers import SETTINGS, TASKS
from typer.testing import CliRunner

from t2l.apply import apply_adapters
from t2l.checkpoint import load_checkpoint, save_checkpoint
from t2l.cli import app
from t2l.config import LoraConfig
from t2l.errors import AdapterNotAppliedError, ConfigError, DataError
from t2l.eval import answers, conditions, decode, retrieval, suites
from t2l.eval.adapters import AdapterCache, UsedAdapter, require_effect
from t2l.eval.arrow import arrow, prototypes
from t2l.eval.conditions import CONDITIONS, choose_conditions
from t2l.eval.run import Settings, run
from t2l.eval.sources import Sources
from t2l.library import AdapterLibrary, save_library
from t2l.lora import LoraTensors
from t2l.pace import Pace
from t2l.prompt import token_ids
from t2l.spec import AdapterSpec
from t2l.text_to_lora import DEFAULT, LoraAdapter, TextToLora


@pytest.fixture(scope="module")
def library(base_folder: Path, tiny_config: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Adapters of two of the tasks and of one more."""
    folder = tmp_path_factory.mktemp("libraries") / "library"
    spec = AdapterSpec.from_config(tiny_config, str(base_folder), LoraConfig(r=4, lora_alpha=8))
    lora = LoraTensors.stack([random_lora(spec, seed, size=0.2) for seed in range(3)])
    save_library(folder, lora, spec, {"reverse": {}, "upper": {}, "other": {}})
    return str(folder)


@pytest.fixture(scope="module")
def finished(
    tasks_file: Path, checkpoint: str, multitask: str, library: str, tmp_path_factory: pytest.TempPathFactory
) -> answers.AnswerFile:
    """A whole run of all rows but `nearest` and Hyperdecoders, which need more than tiny models."""
    out = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    names = ",".join(name for name in CONDITIONS if not name.startswith("nearest"))
    settings = SETTINGS | {"conditions": names}
    run(
        Settings(
            suites=(str(tasks_file),), checkpoint=checkpoint, multitask=multitask, libraries=(library,), **settings
        ),
        out,
        log=lambda text: None,
    )
    return answers.read(out)


def instances_of(tasks_file: Path) -> list[suites.EvalInstance]:
    """As `run` draws them for the tiny checkpoint, whose encoder reads 96 tokens, a byte each."""
    tasks = suites.load_suite(str(tasks_file), per_task=None)
    return suites.instances(tasks, [0, 1], fits=lambda text: len(text.encode()) < 96)


# -------------------------------------------------------------------------------------------------------- a whole run


def test_every_condition_answers_every_instance_once(finished: answers.AnswerFile) -> None:
    counts: dict[str, int] = defaultdict(int)
    for line in finished.lines:
        counts[line["condition"]] += 1
    oracle = {"task-lora": 12, "task-lora+description": 12}  # the library holds two of the three tasks
    left_out = {name for name in CONDITIONS if name.startswith(("hyperdecoders", "nearest"))}
    assert counts == {name: 18 for name in CONDITIONS if name not in left_out} | oracle
    assert finished.header["left_out"] == {
        "hyperdecoders": "no --hyperdecoders",
        "hyperdecoders+description": "no --hyperdecoders",
    }


def test_conditions_of_one_form_see_the_same_prompts(finished: answers.AnswerFile) -> None:
    by_instance: dict[Any, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for line in finished.lines:
        key = line["seed"], line["task"], line["id"]
        by_instance[key][CONDITIONS[line["condition"]].prompt].add(line["prompt"])
    for prompts in by_instance.values():
        assert sorted(prompts) == ["description", "plain", "shots", "shots+description"]
        assert all(len(hashes) == 1 for hashes in prompts.values())
        assert len({next(iter(hashes)) for hashes in prompts.values()}) == 4


def test_no_prompt_is_said_to_show_examples_that_there_are_none_of(
    tasks_file: Path, checkpoint: str, tmp_path: Path
) -> None:
    """A prompt without its examples would be the plain one under another name."""
    lines = tasks_file.read_text().splitlines()
    tests = [line for line in lines if json.loads(line).get("split") == "test"]
    train = {name: [x for x in lines if json.loads(x)["task"] == name and x not in tests] for name in TASKS}
    two = [*tests, *train["first"][:2]]
    found = {}
    for name, kept in (("none", two), ("one", [*two, *train["upper"][:3]])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(kept))
        settings = SETTINGS | {"conditions": "base,base+shots,base+shots+description", "seeds": (0,)}
        run(
            Settings(suites=(str(tmp_path / f"{name}.jsonl"),), checkpoint=checkpoint, **settings),
            tmp_path / f"{name}.answers",
            log=lambda text: None,
        )
        found[name] = answers.read(tmp_path / f"{name}.answers")
    assert {line["condition"] for line in found["none"].lines} == {"base"}
    why = "fewer than three training examples to show"
    assert found["none"].header["left_out"] == {"base+shots": why, "base+shots+description": why}
    assert found["none"].header["conditions"] == ["base"]
    assert conditions.reasons(found["none"].header["left_out"]) == [f"base+shots ({why})"]
    assert {line["task"] for line in found["one"].lines if line["condition"] == "base+shots"} == {"upper"}
    assert {line["task"] for line in found["one"].lines if line["condition"] == "base"} == set(TASKS)


def test_answers_are_those_of_each_instance_alone(
    finished: answers.AnswerFile, tasks_file: Path, checkpoint: str, tiny_base: Any, tiny_tokenizer: Any
) -> None:
    """Batched with other rows and tasks, padded and sorted: the same words as one prompt with its own adapter."""
    said = {answers.key_of(line): line for line in finished.lines}
    t2l = TextToLora.from_pretrained(checkpoint)
    for instance in instances_of(tasks_file)[::5]:
        texts = {
            "base+shots": None,
            "t2l": instance.description,
            "t2l-wrong+description": instance.wrong_description,
            "t2l-random": instance.random_text,
        }
        for name, text in texts.items():
            prompt = conditions.prompt_of(CONDITIONS[name], instance, tiny_tokenizer)
            (ids,) = token_ids(tiny_tokenizer, [prompt])
            used = None if text is None else t2l.generate([text])
            (alone,) = decode.greedy(tiny_base, tiny_tokenizer, [ids], used, max_new_tokens=5)
            line = said[instance.task.suite, name, instance.seed, instance.task.name, instance.item.id]
            assert line["answer"] == alone.strip()
            assert line["prompt"] == conditions.short_hash(prompt)
            assert line["description"] == (None if text is None else conditions.short_hash(text))
            assert line["scores"]["exact_match"] == float(alone.strip() in instance.item.outputs)


def test_adapters_differ_where_they_must_and_only_there(finished: answers.AnswerFile) -> None:
    used: dict[str, set[tuple[str, int, str]]] = defaultdict(set)
    for line in finished.lines:
        used[line["condition"]].add((line["task"], line["seed"], line["adapter"]))
    for adapter in ("multitask", "average"):
        assert len({id_ for _, _, id_ in used[adapter]}) == 1
    assert {id_ for _, _, id_ in used["base"]} == {None}
    right, wrong = ({(t, s): id_ for t, s, id_ in used[row]} for row in ("t2l", "t2l-wrong"))
    assert all(right[key] != wrong[key] for key in right)
    assert used["t2l"] == used["t2l+description"]
    assert len({id_ for _, _, id_ in used["task-lora"]}) == 2


def test_task_loras_average_and_arrow_are_the_librarys(
    library: str, base_folder: Path, tasks_file: Path, tiny_tokenizer: Any
) -> None:
    base = make_base(make_config())
    opened = AdapterLibrary.open(Path(library))
    cache = AdapterCache((base, tiny_tokenizer), Sources(libraries=(opened,)), log=lambda text: None)
    instance = instances_of(tasks_file)[-1]
    assert instance.task.name == "upper"
    cache.prepare([(CONDITIONS["task-lora"], instance), (CONDITIONS["average"], instance)])
    (oracle,), (mean,) = cache.of(CONDITIONS["task-lora"], [instance]), cache.of(CONDITIONS["average"], [instance])
    stacked = opened.stack(opened.names)
    assert torch.equal(oracle.lora.a[0], stacked.a[0][1])
    assert torch.allclose(mean.lora.b[1], stacked.b[1].mean(0))
    tokens = torch.tensor([[0, 5, 9, 12]])
    plain = base(tokens).logits
    with arrow(base, opened) as routed:
        assert not torch.allclose(routed(tokens).logits, plain)
    assert torch.equal(base(tokens).logits, plain)


def test_arrow_is_pefts(tmp_path: Path) -> None:
    """Five adapters, three a token. PEFT's power iteration is exact where the first singular value stands out."""
    from peft import ArrowConfig, create_arrow_model

    base = make_base(make_config())
    spec = AdapterSpec.from_config(base.config, "tiny", LoraConfig(r=3, lora_alpha=6))
    alone = []
    for n in range(5):
        lora = random_lora(spec, n)
        for b in lora.b:
            b[..., 0] *= 20
        alone.append(lora)
    opened = save_library(tmp_path / "five", LoraTensors.stack(alone), spec, {f"task{n}": {} for n in range(5)})
    tokens = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = base(tokens).logits
        with arrow(base, opened):
            ours = base(tokens).logits
        opened.export(tmp_path / "peft")
        theirs = (
            create_arrow_model(
                base_model=base,
                task_specific_adapter_paths=[str(tmp_path / "peft" / name) for name in opened.names],
                arrow_config=ArrowConfig(top_k=3, rng_seed=0),
            )
            .eval()(tokens)
            .logits
        )
    assert (ours - plain).abs().max() > 0.1
    assert (ours - theirs).abs().max() <= 1e-4


def test_a_prototype_is_the_first_right_singular_vector() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 3, 12, generator=generator), torch.randn(4, 7, 3, generator=generator)
    expected = torch.linalg.svd(b.double() @ a.double()).Vh[:, 0]
    found = prototypes(a, b).double()
    assert torch.allclose((found * expected).sum(-1).abs(), torch.ones(4).double(), atol=1e-6)
    assert torch.allclose(found.norm(dim=-1), torch.ones(4).double(), atol=1e-6)


def test_a_library_for_evaluation_is_no_baseline(
    library: str, tmp_path: Path, tiny_base: Any, tiny_tokenizer: Any
) -> None:
    opened = AdapterLibrary.open(Path(library))
    facts = {name: {} for name in opened.names}
    marked = save_library(tmp_path / "marked", opened.stack(opened.names), opened.spec, facts, purpose="evaluation")
    left_out = Sources(libraries=(marked,)).left_out(choose_conditions("average,arrow,nearest,task-lora"))
    assert left_out.keys() == {"average", "arrow", "nearest"}


def test_nearest_is_the_adapter_of_the_most_similar_description(
    library: str, tasks_file: Path, sentence_folder: Path, tiny_base: Any, tiny_tokenizer: Any, monkeypatch: Any
) -> None:
    from t2l.tasks import Task

    described = {"reverse": "zzz zzz zzz", "upper": TASKS["first"][0], "other": "!!!!!!!!!!!!!"}
    known = [Task(name, (text,), {}) for name, text in described.items()]
    monkeypatch.setattr(retrieval, "load_sni", lambda names, splits: known)
    monkeypatch.setattr(retrieval, "WINDOW", 100)
    monkeypatch.setattr(retrieval, "RETRIEVER", str(sentence_folder))
    opened = AdapterLibrary.open(Path(library))
    cache = AdapterCache((tiny_base, tiny_tokenizer), Sources(libraries=(opened,)), log=lambda text: None)
    instance = dataclasses.replace(instances_of(tasks_file)[0], description=TASKS["first"][0])
    cache.prepare([(CONDITIONS["nearest"], instance)])
    (used,) = cache.of(CONDITIONS["nearest"], [instance])
    assert torch.equal(used.lora.a[0], opened.stack(["upper"]).a[0][0])


def test_hyperdecoders_read_the_input(
    make_checkpoint: Callable[..., Path], sentence_folder: Path, tasks_file: Path, tmp_path: Path, tiny_base: Any
) -> None:
    hyper = TextToLora.from_pretrained(str(make_checkpoint(tmp_path / "hyper", encoder=str(sentence_folder))))
    tokenizer = make_tokenizer()
    with pytest.raises(ConfigError, match="reads the description; Hyperdecoders read the input"):
        Sources(hyperdecoders=hyper)
    object.__setattr__(hyper.config, "conditioning", "input")
    cache = AdapterCache((tiny_base, tokenizer), Sources(hyperdecoders=hyper), log=lambda text: None)
    one, other = instances_of(tasks_file)[:2]
    long = dataclasses.replace(one, item=dataclasses.replace(one.item, text="word " * 500))
    used = cache.of(CONDITIONS["hyperdecoders"], [one, other, long])
    (expected,) = hyper.generate([other.item.text])
    assert torch.allclose(used[1].lora.a[0], expected.lora.a[0], atol=1e-6)
    assert [adapter.description for adapter in used] == [None] * 3
    assert len({adapter.id for adapter in used}) == 3


def test_answers_of_one_prompt_and_adapter_are_asked_once(
    tasks_file: Path, checkpoint: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """The base's prompt without a description is the same under every seed."""
    asked = []

    def counting(model: Any, tokenizer: Any, prompts: Any, *rest: Any, **options: Any) -> list[str]:
        asked.extend(prompts)
        return ["x"] * len(prompts)

    monkeypatch.setattr(decode, "greedy", counting)
    out = tmp_path / "answers.jsonl"
    settings = SETTINGS | {"conditions": "base", "seeds": (0, 1, 2)}
    run(Settings(suites=(str(tasks_file),), checkpoint=checkpoint, **settings), out, log=lambda text: None)
    assert len(asked) == 9
    lines = answers.read(out).lines
    assert sorted(line["seed"] for line in lines) == [0] * 9 + [1] * 9 + [2] * 9
    assert len({answers.key_of(line) for line in lines}) == 27


# ------------------------------------------------------------------------------------------------------- interruption


@pytest.mark.parametrize("kept", [0.3, 0.8])
def test_an_interrupted_run_goes_on(
    kept: float,
    finished: answers.AnswerFile,
    tasks_file: Path,
    checkpoint: str,
    multitask: str,
    library: str,
    tmp_path: Path,
) -> None:
    """Cut anywhere, in the middle of a line too, the file ends up with the same answers, none of them twice."""
    out = tmp_path / "answers.jsonl"
    data = finished.path.read_bytes()
    out.write_bytes(data[: int(len(data) * kept)])
    before = out.read_bytes()
    whole = before[: before.rfind(b"\n") + 1]
    assert whole != before
    names = ",".join(name for name in CONDITIONS if not name.startswith(("nearest", "arrow")))
    values = SETTINGS | {"conditions": names, "checkpoint": checkpoint, "multitask": multitask, "libraries": (library,)}
    settings = Settings(suites=(str(tasks_file),), **values)
    run(settings, out, log=lambda text: None)
    assert out.read_bytes().startswith(whole)
    expected = [line for line in finished.lines if "arrow" not in line["condition"]]
    found = {answers.key_of(line): line for line in answers.read(out).lines}
    assert {key: found[key] for key in map(answers.key_of, expected)} == {answers.key_of(x): x for x in expected}
    done = out.read_bytes()
    run(settings, out, log=lambda text: None)
    assert out.read_bytes() == done


def test_ctrl_c_says_where_the_answers_are(
    tasks_file: Path, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("t2l.eval.requests.answer", interrupted)
    said: list[str] = []
    settings = Settings(suites=(str(tasks_file),), **SETTINGS | {"conditions": "base", "checkpoint": checkpoint})
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "answers.jsonl", log=said.append)
    assert said[-1] == f"interrupted: the answers so far are in {tmp_path / 'answers.jsonl'}; the same command goes on"


def test_rows_and_seeds_can_be_added_but_nothing_else_changed(
    tasks_file: Path, checkpoint: str, multitask: str, tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    first = SETTINGS | {"conditions": "base", "seeds": (0,), "checkpoint": checkpoint, "suites": (str(tasks_file),)}
    run(Settings(**first), out, log=lambda text: None)
    more = first | {"conditions": "base,multitask", "seeds": (0, 1), "multitask": multitask}
    run(Settings(**more), out, log=lambda text: None)
    file = answers.read(out)
    assert file.header["conditions"] == ["base", "multitask"]
    assert file.header["seeds"] == [0, 1]
    assert file.header["multitask_sha256"]
    assert len(file.lines) == 2 * 2 * 9
    before = out.read_bytes()
    for change, match in (
        ({"max_new_tokens": 6}, "max_new_tokens 5; this one has 6"),
        ({"checkpoint": multitask, "conditions": "base"}, "variant is 'none'"),
        ({"per_task": 2}, "per_task None; this one has 2"),
        ({"conditions": "base,t2l-worng"}, "no condition 't2l-worng'"),
    ):
        with pytest.raises(ConfigError, match=match):
            run(Settings(**(more | change)), out, log=lambda text: None)
        assert out.read_bytes() == before


def test_another_checkpoint_needs_another_file(
    tasks_file: Path, checkpoint: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    settings = SETTINGS | {"conditions": "t2l", "seeds": (0,), "suites": (str(tasks_file),)}
    run(Settings(checkpoint=checkpoint, **settings), out, log=lambda text: None)
    other = str(make_checkpoint(tmp_path / "other", variant="M"))
    with pytest.raises(ConfigError, match="checkpoint_sha256"):
        run(Settings(checkpoint=other, **settings), out, log=lambda text: None)


# ------------------------------------------------------------------------------------------------------------- checks


def test_an_adapter_without_effect_is_found(tiny_base: Any, tiny_config: Any, tiny_tokenizer: Any) -> None:
    spec = AdapterSpec.from_config(tiny_config, "tiny/base", LoraConfig(r=4, lora_alpha=8))
    works = LoraAdapter(random_lora(spec), spec, "", {})
    idle = LoraAdapter(works.lora.map(torch.zeros_like), spec, "Do nothing.", {})
    used = [UsedAdapter(x, "id") for x in (works, idle)]
    require_effect(tiny_base, tiny_tokenizer, used[:1])
    with pytest.raises(AdapterNotAppliedError, match=r"“Do nothing.”.*1 of 2"):
        require_effect(tiny_base, tiny_tokenizer, used)


def test_an_untrained_checkpoint_is_found(tasks_file: Path, checkpoint: str, tmp_path: Path) -> None:
    loaded, fresh = load_checkpoint(Path(checkpoint)), str(tmp_path / "fresh")
    assert loaded.hypernet.head is not None
    for tensor in (*loaded.hypernet.head.write.parameters(), *loaded.hypernet.shared_lora.b):
        tensor.zero_()
    save_checkpoint(Path(fresh), loaded.hypernet, loaded.spec, loaded.config)
    with pytest.raises(AdapterNotAppliedError, match="Was the checkpoint trained"):
        run(
            Settings(suites=(str(tasks_file),), checkpoint=fresh, **SETTINGS),
            tmp_path / "answers.jsonl",
            log=lambda text: None,
        )


def test_likelihoods_are_those_of_each_sequence_alone(tiny_base: Any, tiny_config: Any, tiny_tokenizer: Any) -> None:
    spec = AdapterSpec.from_config(tiny_config, "tiny/base", LoraConfig(r=4, lora_alpha=8))
    adapters = [LoraAdapter(random_lora(spec, seed), spec, "", {}) for seed in range(3)]
    prompts = [[0, 17, 93], [0, 8, 200, 41, 12, 90], [0, 99]]
    continuations = [[7, 20, 31, 5], [44], [9, 10]]
    for used in (None, adapters):
        together = decode.log_likelihoods(tiny_base, tiny_tokenizer, prompts, continuations, used)
        for n, (prompt, rest) in enumerate(zip(prompts, continuations, strict=True)):
            with apply_adapters(tiny_base, adapters[n]) if used else torch.no_grad():
                logits = tiny_base(torch.tensor([prompt + rest])).logits[0].log_softmax(-1)
            alone = sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(rest))
            assert together[n] == pytest.approx(alone, abs=1e-4)


def test_batches_hold_every_sequence_once_within_the_budget() -> None:
    lengths = [5, 9, 30, 2, 9, 9, 1, 14]
    found = list(decode.batches(lengths, max_tokens=20))
    assert sorted(itertools.chain(*found)) == list(range(len(lengths)))
    assert all(len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 20 for batch in found)
    assert found[0] == [2]
    assert list(decode.batches([], max_tokens=5)) == []


def test_a_prompt_beyond_the_window_is_named(tasks_file: Path, checkpoint: str, tmp_path: Path) -> None:
    settings = SETTINGS | {"max_new_tokens": 5000}
    with pytest.raises(DataError, match=r"takes 5,\d+ tokens.*at most 512"):
        run(Settings(suites=(str(tasks_file),), checkpoint=checkpoint, **settings), tmp_path / "a.jsonl")


def test_instances_do_not_depend_on_the_other_tasks(tasks_file: Path) -> None:
    tasks = suites.load_suite(str(tasks_file), per_task=None)
    alone = suites.instances(tasks[:1], [0, 1])
    together = suites.instances(tasks, [0, 1])[: len(alone)]
    for one, other in zip(alone, together, strict=True):
        assert dataclasses.replace(one, wrong_description=other.wrong_description) == other
        assert one.wrong_description not in tasks[0].descriptions
        assert other.wrong_description in (*tasks[1].descriptions, *tasks[2].descriptions)
    assert {instance.description for instance in alone} == set(tasks[0].descriptions)  # two seeds, two, in turn
    assert len({instance.random_text for instance in alone}) == 2


# ------------------------------------------------------------------------------------------------------- command line


def test_wrong_use_is_named(tasks_file: Path, checkpoint: str, tmp_path: Path) -> None:
    runner = CliRunner()
    out = ["--out", str(tmp_path / "a.jsonl")]
    for arguments, code, message in (
        (["--suite", "test", "--seeds", "one", *out], 2, "whole numbers"),
        (["--suite", "test", "--full", "--per-task", "3", *out], 2, "give one"),
        (
            ["--suite", str(tmp_path / "no.jsonl"), "--checkpoint", checkpoint, *out],
            1,
            "There is no suite and no file ",
        ),
        (
            ["--suite", str(tasks_file), "--checkpoint", checkpoint, "--conditions", "task-lora", *out],
            1,
            "No condition is left",
        ),
        (["--suite", str(tasks_file), "--checkpoint", checkpoint, "--out", "a.jsonl.gz"], 1, "plain .jsonl"),
    ):
        result = runner.invoke(app, ["eval", "run", *arguments])
        assert (result.exit_code, message in result.output) == (code, True), result.output
    assert not (tmp_path / "a.jsonl").exists()


def test_progress_says_what_is_left() -> None:
    told: list[str] = []
    progress = Pace(10, "answers", told.append, every=0.0)
    progress.add(4)
    progress.add(6)
    assert told[0].startswith("4 of 10 answers")
    assert told[1].startswith("10 of 10 answers")
    assert re.search(r", in \d+(\.\d+)? m?s$", told[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    result = CliRunner().invoke(app, ["eval", "run", "--suite", "seen", "--out", str(out), "--device", "cuda"])
    assert result.exit_code == 1
    assert "torch finds no device 'cuda' here" in result.output
    assert not out.exists()


def test_the_shipped_checkpoint_is_evaluated_where_nothing_else_is_named(
    tasks_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Settings] = []
    monkeypatch.setattr("t2l.eval.run.run", lambda settings, out, log: given.append(settings))
    common = ["eval", "run", "--suite", str(tasks_file), "--out", str(tmp_path / "a.jsonl")]
    for more in ([], ["--base", "some/base"], ["--library", "folder"], ["--checkpoint", "own"]):
        assert CliRunner().invoke(app, [*common, *more]).exit_code == 0
    assert [settings.checkpoint for settings in given] == [DEFAULT, None, None, "own"]
    with pytest.raises(ConfigError, match="Nothing says which base model"):
        run(Settings(suites=(str(tasks_file),)), tmp_path / "a.jsonl")
