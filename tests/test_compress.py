"""A library as one checkpoint: scores against a model run by hand, the report against its parts, the commands."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import full_disk, random_lora
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from typer.testing import CliRunner

from t2l import TextToLora, cli
from t2l.apply import apply_adapters
from t2l.compress import run
from t2l.compress.networks import KINDS, principal, score_controls, texts_for
from t2l.compress.plan import fitting_head, network_parameters, plan_networks, size_warnings, subset
from t2l.compress.report import recovered
from t2l.compress.run import compress
from t2l.compress.scores import Scores, prepare_scores, read_scores
from t2l.config import EncoderConfig, HypernetConfig, LoraConfig, PromptConfig
from t2l.errors import ConfigError, DataError, OutputError
from t2l.hypernet import Hypernet
from t2l.library import AdapterLibrary, save_library
from t2l.lora import LoraTensors
from t2l.peft_io import load_adapter
from t2l.prompt import render, token_ids
from t2l.spec import AdapterSpec
from t2l.tasks import Example, Task
from t2l.text_to_lora import LoraAdapter
from t2l.train.reconstruction import (
    ReconstructionConfig,
    ReconstructionTrainConfig,
    Trainer,
    saved_config,
)
from t2l.train.reconstruction_data import ReconstructionDataConfig, choose_descriptions, names_as_texts
from t2l.train.reconstruction_losses import compare

NAMES = ("add", "bark", "count", "dance")


@pytest.fixture(scope="module")
def spec(tiny_config: LlamaConfig, base_folder: Path) -> AdapterSpec:
    return AdapterSpec.from_config(tiny_config, str(base_folder), LoraConfig(r=2, lora_alpha=4))


@pytest.fixture(scope="module")
def library(spec: AdapterSpec, tmp_path_factory: pytest.TempPathFactory) -> AdapterLibrary:
    lora = LoraTensors.stack([random_lora(spec, n) for n in range(4)])
    facts = {
        name: {
            "descriptions": [f"{word} {name}." for word in ("Do", "Please", "Always", "Never", "Now")],
            "prompt": {"description_in_prompt": False},
        }
        for name in NAMES
    }
    return save_library(tmp_path_factory.mktemp("library") / "four", lora, spec, facts)


@pytest.fixture(scope="module")
def shared(library: AdapterLibrary) -> AdapterLibrary:
    """The same adapters, all with the A of the first."""
    lora = library.stack()
    lora = LoraTensors(tuple(a[:1].repeat(4, 1, 1, 1) for a in lora.a), lora.b, lora.scaling)
    return save_library(library.folder.parent / "shared", lora, library.spec, library.index)


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    """The last one has no held-out examples."""
    return [
        Task(
            name,
            (f"Do {name}.",),
            {"test": tuple(Example(f"{name}-{n}", f"{name} {n}", (f"{n}", "never")) for n in range(5))}
            if name != "dance"
            else {},
        )
        for name in NAMES
    ]


@pytest.fixture(scope="module")
def config(library: AdapterLibrary, sentence_folder: Path) -> ReconstructionConfig:
    return ReconstructionConfig(
        encoder=EncoderConfig(kind="sentence", model=str(sentence_folder), max_tokens=60),
        hypernet=HypernetConfig(width=24, head_size=16, dropout=0.0),
        data=ReconstructionDataConfig(library=str(library.folder), held_out_descriptions=1),
        train=ReconstructionTrainConfig(
            max_steps=20, adapters_per_batch=4, logging_steps=5, save_steps=10, report_to="none"
        ),
    )


def quiet(_: str) -> None:
    pass


# ---------------------------------------------------------------------------------------------------- the scores


def test_scores_are_the_models_own(
    library: AdapterLibrary,
    tasks: list[Task],
    tiny_base: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Loss and exact match of every example, as one forward pass each gives them, in whichever batch."""
    scorer = prepare_scores(library, tasks, (tiny_base, tiny_tokenizer), tokens=80, answer_tokens=20, batch_size=2)
    singles = library.stack().unbind()
    rows = {
        "base": (scorer.score("base", None, library.names), [None] * 4),
        "task-lora": (scorer.score("task-lora", library.stack(), library.names), singles),
    }
    for row, (scores, adapters) in rows.items():
        assert [s.task for s in scores] == list(NAMES[:3])
        for n, s in enumerate(scores):
            assert (s.condition, s.ids) == (row, [f"{s.task}-{i}" for i in range(5)])
            for i, example in enumerate(tasks[n].examples["test"]):
                prompt = render(tiny_tokenizer, "", example.input, PromptConfig())
                before, answer = token_ids(tiny_tokenizer, [prompt, example.outputs[0] + "</s>"])
                tokens = torch.tensor([before + answer])
                with torch.no_grad():
                    if adapters[n] is None:
                        logits = tiny_base(tokens).logits
                    else:
                        with apply_adapters(tiny_base, LoraAdapter(adapters[n], library.spec, "", {})):
                            logits = tiny_base(tokens).logits
                said = logits[0, len(before) - 1 : -1]
                assert s.loss[i] == pytest.approx(F.cross_entropy(said, torch.tensor(answer)).item(), abs=2e-4)
                assert s.exact_match[i] == int(said.argmax(-1).tolist() == answer)
    assert rows["base"][0][0].loss != rows["task-lora"][0][0].loss
    limited = prepare_scores(library, tasks, (tiny_base, tiny_tokenizer), limit=2)
    assert all(len(s.ids) == 2 for s in limited.score("base", None, library.names))


def test_what_cannot_be_scored(
    library: AdapterLibrary,
    tasks: list[Task],
    tiny_base: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    with pytest.raises(DataError, match="None of the 1 tasks to score has held-out examples"):
        prepare_scores(library, tasks[3:], (tiny_base, tiny_tokenizer))
    facts = {name: {"prompt": {"description_in_prompt": name == "add"}} for name in NAMES}
    mixed = save_library(tmp_path / "mixed", library.stack(), library.spec, facts)
    with pytest.raises(DataError, match="trained with the description in the prompt and without"):
        prepare_scores(mixed, tasks, (tiny_base, tiny_tokenizer))


def test_recovered_share() -> None:
    """Half the gain is half; a row that beats the task LoRAs has more than all; without a gain there is no share."""

    def scores(row: str, values: list[float]) -> list[Scores]:
        return [
            Scores(row, f"t{i}", list("0123456789"), [0.0] * 10, [1] * round(10 * v) + [0] * round(10 - 10 * v))
            for i, v in enumerate(values)
        ]

    table = [
        *scores("base", [0.1, 0.0, 0.2]),
        *scores("task-lora", [0.5, 0.4, 0.6]),
        *scores("half", [0.3, 0.2, 0.4]),
        *scores("more", [0.7, 0.4, 0.8]),
    ]
    half = recovered(table, "half")
    assert half is not None and (half.mean, half.low, half.high) == pytest.approx((0.5, 0.5, 0.5))
    more = recovered(table, "more")
    assert more is not None and more.mean == pytest.approx(4 / 3)
    assert more.low < more.mean < more.high
    assert recovered(table, "unknown") is None
    part = recovered([*table, *scores("part", [0.5])], "part")  # on its own tasks alone
    assert part is not None and part.mean == pytest.approx(1)
    flat = [*scores("base", [0.5]), *scores("task-lora", [0.5]), *scores("half", [0.2])]
    assert recovered(flat, "half") is None


# -------------------------------------------------------------------------------------------------- what is read


def test_texts_are_of_their_kind(library: AdapterLibrary, config: ReconstructionConfig) -> None:
    """Descriptions that the network was not trained on because they are too long are not read either."""
    long = save_library(
        Path(library.folder).parent / "long",
        library.stack(),
        library.spec,
        {name: {"descriptions": ["x" * 90, *library.index[name]["descriptions"]]} for name in NAMES},
    )
    known = choose_descriptions(
        long, NAMES, config.data, max_tokens=60, count_tokens=lambda texts: [len(text) for text in texts]
    )

    def fits(text: str) -> bool:
        return len(text) <= 30

    found = {kind: texts_for(kind, known, NAMES, fits) for kind in KINDS}
    assert found["trained"] == [f"Do {name}." for name in NAMES]
    assert found["held-out"] == [f"Now {name}." for name in NAMES]
    assert sorted(found["other"]) == sorted(found["trained"])
    assert all(x != y for x, y in zip(found["other"], found["trained"], strict=True))
    assert len(set(found["random"])) == 4 and all(5 < len(text) <= 30 for text in found["random"])
    onehot = names_as_texts(NAMES)
    assert texts_for("trained", onehot, NAMES, fits) == list(NAMES)


def test_subsets_are_nested(library: AdapterLibrary) -> None:
    assert set(subset(library, 1)) < set(subset(library, 2)) < set(subset(library, 4)) == set(NAMES)
    with pytest.raises(ConfigError, match=r"asks for 5 adapters; .* holds 4"):
        subset(library, 5)


def test_the_head_fits_a_quarter(library: AdapterLibrary, config: ReconstructionConfig) -> None:
    """Larger libraries get larger heads, each under its share where the smallest is."""
    heads = []
    for number in (1, 200, 2000, 20000):
        chosen = fitting_head(config, library.spec, number, 32, share=0.25)
        heads.append(chosen.hypernet.head_size)
    assert heads[0] == 128 and heads[-1] == 2048 and heads == sorted(heads) and len(set(heads)) > 2


def test_a_basis_fits_a_quarter_too(library: AdapterLibrary, config: ReconstructionConfig) -> None:
    """To the last adapter that it mixes; of few adapters it mixes all that tell them apart."""
    basis = replace(config, hypernet=replace(config.hypernet, variant="basis"))

    def parameters(size: int) -> int:
        hypernet = replace(basis.hypernet, head_size=size)
        network = Hypernet(library.spec, embedding_size=32, kind="sentence", config=saved_config(hypernet))
        return sum(p.numel() for p in network.parameters())

    size = fitting_head(basis, library.spec, 2000, 32, share=0.25).hypernet.head_size
    assert parameters(size) < 500 * library.spec.num_parameters <= parameters(size + 1)
    for number, all_of_them in ((1, 1), (4, 3), (20, 19)):
        assert fitting_head(basis, library.spec, number, 32, share=0.25).hypernet.head_size == all_of_them


# -------------------------------------------------------------------------------------------------- compressing


@pytest.fixture(scope="module")
def compressed(
    library: AdapterLibrary,
    tasks: list[Task],
    config: ReconstructionConfig,
    tiny_base: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Any]]:
    """The whole library and a part of it."""
    part = replace(config, data=replace(config.data, adapters=subset(library, 2)))
    out = tmp_path_factory.mktemp("compressed") / "out"
    plain = compress(
        library, out, {"all": config, "two": part}, tasks=tasks, base=(tiny_base, tiny_tokenizer), log=quiet
    )
    return out, plain


def test_the_checkpoint_is_the_first_networks(compressed: tuple[Path, dict[str, Any]], library: AdapterLibrary) -> None:
    """It writes what the report says it writes, and the runs are gone."""
    out, plain = compressed
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]
    generator = TextToLora.from_pretrained(str(out))
    written = LoraTensors.stack([a.lora for a in generator.generate([f"Do {name}." for name in NAMES])])
    errors = compare(written, library.stack())
    network = plain["networks"][0]
    assert network["errors"]["trained"]["relative"] == pytest.approx(np.mean(errors.relative))
    assert network["errors"]["trained"]["cosine"] == pytest.approx(np.mean(errors.cosine))
    assert network["size"] == (out / "hypernet.safetensors").stat().st_size
    assert network["library_size"] == 2 * 4 * library.spec.num_parameters
    assert network["share"] == pytest.approx(network["size"] / network["library_size"])
    assert network["parameters"] == sum(p.numel() for p in generator.hypernet.parameters())


def test_one_a_of_all_is_counted_once(
    library: AdapterLibrary,
    shared: AdapterLibrary,
    tasks: list[Task],
    config: ReconstructionConfig,
    tiny_base: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    """The report has both sizes and the network's share of both; components are of what differs."""
    spec = library.spec
    alone = replace(
        config,
        hypernet=replace(config.hypernet, freeze_a=True),
        data=replace(config.data, library=str(shared.folder)),
    )
    plain = compress(shared, tmp_path / "out", {"all": alone}, log=quiet)
    (network,) = plain["networks"]
    own = sum(3 * 2 * t.out_features for t in spec.targets)
    assert network["library_size"] == 2 * 4 * spec.num_parameters
    assert network["library_size_one_a"] == 2 * (4 * own + 3 * 2 * (32 + 32))
    assert network["share_one_a"] == pytest.approx(network["size"] / network["library_size_one_a"])
    text = (tmp_path / "out" / "report.md").read_text()
    assert "The 4 adapters of “all” have one A" in text and f"the network is {network['share_one_a']:.0%}" in text
    assert f"| {network['share']:.0%} |" in text
    scorer = prepare_scores(shared, tasks[:1], (tiny_base, tiny_tokenizer), limit=1)
    for of, size, number in ((shared, own, 2), (library, spec.num_parameters, 1)):
        rows = [s.condition for s in score_controls(scorer, of, number * size)]
        assert f"{number} components" in rows


def test_principal_components_are_numpys(spec: AdapterSpec) -> None:
    """The projection on the first right singular vectors of the centred adapters, laid out as vectors."""
    lora = LoraTensors.stack([random_lora(spec, n) for n in range(7)])
    flat = torch.cat([x.flatten(1) for x in (*lora.a, *lora.b)], 1).double().numpy()
    mean = flat.mean(0)
    _, sizes, right = np.linalg.svd(flat - mean, full_matrices=False)
    for number in (0, 1, 4, 6):
        found = principal(lora, number)
        made = torch.cat([x.flatten(1) for x in (*found.a, *found.b)], 1).numpy()
        basis = right[:number]
        np.testing.assert_allclose(made, mean + (flat - mean) @ basis.T @ basis, atol=1e-5)
        left = ((flat - made) ** 2).sum()
        assert left == pytest.approx((sizes[number:] ** 2).sum(), rel=1e-3, abs=1e-4)


def test_the_report_follows_from_the_scores(compressed: tuple[Path, dict[str, Any]]) -> None:
    out, plain = compressed
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(plain))
    scores = read_scores(out / "scores.jsonl")
    conditions = (
        "base",
        "task-lora",
        "mean of all",
        "3 components",
        "all, trained",
        "all, held-out",
        "two, trained",
        "two, held-out",
    )
    assert tuple(dict.fromkeys(s.condition for s in scores)) == tuple(plain["conditions"]) == conditions
    for name, found in plain["conditions"].items():
        mine = [s for s in scores if s.condition == name]
        assert (found["tasks"], found["n"]) == (len(mine), 5 * len(mine))
        assert found["loss"][0] == pytest.approx(np.mean([np.mean(s.loss) for s in mine]))
        assert found["loss"][1] <= found["loss"][0] <= found["loss"][2]
    for s in scores:
        assert plain["tasks"][s.task][s.condition] == {"n": 5, "exact_match": pytest.approx(np.mean(s.exact_match))}
    text = (out / "report.md").read_text()
    assert "have one A" not in text and plain["networks"][0]["share_one_a"] == plain["networks"][0]["share"]
    assert "| all | 4 | trained |" in text and "| two | 2 | held-out |" in text and "| task-lora | 3 | 15 |" in text
    # Three components and the mean hold all of four adapters.
    of = {
        name: [s.loss for s in scores if s.condition == name] for name in ("task-lora", "3 components", "mean of all")
    }
    for exact, made in zip(of["task-lora"], of["3 components"], strict=True):
        assert made == pytest.approx(exact, abs=1e-3)
    assert of["mean of all"] != of["task-lora"]
    assert plain["conditions"]["base"]["recovered"] is None
    assert plain["conditions"]["task-lora"]["recovered"] in (None, [1.0] * 3)
    assert sorted(path.name for path in out.iterdir() if path.stem in ("report", "scores", "curve")) == [
        "report.json",
        "report.md",
        "scores.jsonl",
    ]


def test_compressing_goes_on_where_time_ran_out(
    library: AdapterLibrary, config: ReconstructionConfig, compressed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """The checkpoint is the one of a compression that was not interrupted."""
    out, lines = tmp_path / "out", list[str]()
    networks = {"all": config, "again": config}
    for steps in (*range(5, 40, 5), None):
        plain = compress(library, out, networks, max_minutes=0.0, log=lines.append)
        if steps is None:
            break
        assert plain is None and not out.exists()
        assert lines[-1] == (
            f"Time is up after {steps} of 40 steps; they are saved in {out}.runs, and the same command goes on"
        )
    assert f"network “again”, 2 of 2: 4 adapters; {steps or 35} of 40 steps are done" in lines
    assert plain is not None and plain["conditions"] == {} and not (tmp_path / "out.runs").exists()
    assert (out / "hypernet.safetensors").read_bytes() == (compressed[0] / "hypernet.safetensors").read_bytes()


def test_compressing_goes_on_after_ctrl_c(
    library: AdapterLibrary,
    config: ReconstructionConfig,
    compressed: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was trained is saved, and the last line says how to go on."""
    step, taken = Trainer.step, 0

    def interrupted(self: Trainer, *given: Any) -> torch.Tensor:
        nonlocal taken
        taken += 1
        if taken == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *given)

    monkeypatch.setattr(Trainer, "step", interrupted)
    out, lines = tmp_path / "out", list[str]()
    with pytest.raises(KeyboardInterrupt):
        compress(library, out, {"all": config}, log=lines.append)
    assert lines[-1].startswith("Interrupted after 7 of 20 steps") and lines[-1].endswith("the same command goes on")
    assert compress(library, out, {"all": config}, log=quiet) is not None
    assert (out / "hypernet.safetensors").read_bytes() == (compressed[0] / "hypernet.safetensors").read_bytes()


def test_killed_before_the_report_it_is_made_by_the_same_command(
    library: AdapterLibrary, config: ReconstructionConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is trained again, and nothing that was half written stays."""

    class Killed(Exception):
        pass

    def dying(*_: Any) -> None:
        raise Killed

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run, "write_report", dying)
        compress(library, out, {"all": config}, log=quiet)
    assert not out.exists()
    monkeypatch.setattr(run, "train_reconstruction", dying)
    assert compress(library, out, {"all": config}, log=quiet) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["train_reconstruction", "write_report"])
def test_a_full_disk_is_an_error_of_ours(
    name: str, library: AdapterLibrary, config: ReconstructionConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a network is saved or the report is written; nothing half-written stays, and the same command goes on."""
    original = getattr(run, name)

    def limited(*given: Any, **more: Any) -> Any:
        with full_disk(600):
            return original(*given, **more)

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(OutputError, match="Cannot write"):
        patch.setattr(run, name, limited)
        compress(library, out, {"all": config}, log=quiet)
    assert not out.exists() and not list(tmp_path.rglob(".*"))
    assert compress(library, out, {"all": config}, log=quiet) is not None


def test_a_network_larger_than_its_adapters_is_warned_of(library: AdapterLibrary, config: ReconstructionConfig) -> None:
    """Before it is trained, with a setting that is smaller; of one that is smaller nothing is said."""
    wide = replace(config, hypernet=replace(config.hypernet, width=128, head_size=512))
    many = LoraTensors.stack([random_lora(library.spec, n) for n in range(60)])
    larger = save_library(
        library.folder.parent / "sixty", many, library.spec, {f"x{n}": {"descriptions": ["d"]} for n in range(60)}
    )
    limit = 2 * 60 * library.spec.num_parameters
    (warning,) = size_warnings({"all": wide}, larger)
    share = 2 * network_parameters(wide, library.spec, 32) / limit
    assert "network “all”" in warning and f"{share:,.0%}" in warning and "nothing is compressed" in warning
    settings = dict(x.split("=") for x in warning.split() if x.startswith("hypernet."))
    smaller = replace(
        wide,
        hypernet=replace(
            wide.hypernet, width=int(settings["hypernet.width"]), head_size=int(settings["hypernet.head_size"])
        ),
    )
    share = 2 * network_parameters(smaller, library.spec, 32) / limit
    assert share <= 0.5 and warning.endswith(f"makes it {share:.0%}")
    assert size_warnings({"all": smaller}, larger) == []
    (hopeless,) = size_warnings({"all": wide}, library)
    assert "4 adapters" in hopeless and hopeless.endswith("keep the adapters, or compress more at once")


def test_planned_networks(library: AdapterLibrary, config: ReconstructionConfig) -> None:
    """The file's settings, then parts of the library, then other heads; the command line's settings hold in all."""
    settings = {
        "encoder": {"kind": "sentence", "model": config.encoder.model, "max_tokens": 60},
        "hypernet": {"width": 24, "head_size": 16, "dropout": 0.0},
        "train": {"max_steps": 15},
    }
    found = plan_networks(library, settings, ["train.max_steps=7"], curve=[2], heads=[("S", 8)])
    assert list(found) == ["all", "2 adapters", "S 8"]
    assert {x.train.max_steps for x in found.values()} == {7}
    assert {x.data.library for x in found.values()} == {str(library.folder)}
    assert [x.data.adapters for x in found.values()] == [(), subset(library, 2), ()]
    assert (found["S 8"].hypernet.variant, found["S 8"].hypernet.head_size) == ("S", 8)


# -------------------------------------------------------------------------------------------------- the commands


def t2l(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def way(base_folder: Path, sentence_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Own tasks and configs for the whole way from tasks to a checkpoint."""
    folder = tmp_path_factory.mktemp("way")
    rows = [
        {"task": name, "description": f"Say {name}.", "input": f"Is it {n}?", "output": name, "split": split}
        for name in ("yes", "no")
        for split, numbers in (("train", range(30, 50)), ("val", range(50, 53)), ("test", range(53, 56)))
        for n in numbers
    ]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task_loras = {
        "base": str(base_folder),
        "lora": {"r": 2, "lora_alpha": 4},
        "data": {"tasks": [str(folder / "own.jsonl")]},
        "train": {
            "max_steps": 10,
            "eval_steps": 5,
            "max_seq_length": 96,
            "max_target_length": 16,
            "learning_rate": 0.01,
        },
    }
    reconstruction = {
        "encoder": {"kind": "sentence", "model": str(sentence_folder), "max_tokens": 60},
        "hypernet": {"width": 24, "head_size": 16, "dropout": 0.0},
        "train": {"max_steps": 15, "logging_steps": 5},
    }
    (folder / "task-loras.yaml").write_text(json.dumps(task_loras))  # JSON is YAML
    (folder / "reconstruction.yaml").write_text(json.dumps(reconstruction))
    return folder


def test_from_tasks_to_a_checkpoint_on_the_command_line(way: Path, base_folder: Path) -> None:
    """train task-loras, library export and import, compress, train reconstruction, library evaluate."""
    run = way / "run"
    done = t2l("train", "task-loras", "--config", way / "task-loras.yaml", "--run", run, "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["adapters"] == 2
    library = AdapterLibrary.open(run / "library")
    assert library.names == ("no", "yes")

    assert t2l("library", "export", library.folder, "-o", way / "peft", "--name", "yes").exit_code == 0
    exported = load_adapter(way / "peft" / "yes", library.spec)
    assert torch.equal(exported.b[0], library.stack(["yes"]).b[0][0])
    assert t2l("library", "export", library.folder, "-o", way / "both").exit_code == 0
    (way / "said.jsonl").write_text('{"task": "yes", "description": "Say yes."}\n')
    done = t2l(
        "library", "import", way / "both" / "yes", way / "both" / "no", "-o", way / "imported", "--base", base_folder,
        "--descriptions", way / "said.jsonl",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    imported = AdapterLibrary.open(way / "imported")
    assert imported.names == ("yes", "no") and imported.index["yes"] == {"descriptions": ["Say yes."]}

    done = t2l(
        "compress", library.folder, "-o", way / "small", "--config", way / "reconstruction.yaml", "--curve", "1",
        "--networks", "S:16", "--score", way / "own.jsonl", "--device", "cpu", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert [network["label"] for network in report["networks"]] == ["all", "1 adapters", "S 16"]
    assert set(report["tasks"]) == {"yes", "no"} and report["conditions"]["task-lora"]["n"] == 6
    assert "nothing is compressed" in done.stderr
    done = t2l(
        "compress", library.folder, "-o", way / "stopped", "--config", way / "reconstruction.yaml",
        "--max-minutes", "0", "--device", "cpu", "--json",
    )  # fmt: skip
    assert done.exit_code == 0 and json.loads(done.stdout) == {"complete": False, "runs": str(way / "stopped.runs")}
    assert "Time is up after 5 of 15 steps" in done.stderr and "the same command goes on" in done.stderr
    again = t2l("compress", library.folder, "-o", way / "small", "--config", way / "reconstruction.yaml")
    assert again.exit_code == 1 and "exists already" in again.stderr

    onehot = ["--set", "encoder={kind: onehot}", "--set", f"data.library={library.folder}"]
    done = t2l(
        "train",
        "reconstruction",
        "--config",
        way / "reconstruction.yaml",
        "--run",
        way / "one-hot",
        *onehot,
        "--device",
        "cpu",
    )
    assert done.exit_code == 0, done.output
    done = t2l(
        "library", "evaluate", library.folder, way / "small", way / "one-hot" / "checkpoint", "-o", way / "evaluated",
        "--score", way / "own.jsonl", "--device", "cpu",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = list(json.loads((way / "evaluated" / "report.json").read_text())["conditions"])
    kinds = ["trained", "held-out", "random", "other"]
    assert rows[:4] == ["base", "task-lora", "mean of all", "1 components"]
    assert rows[4:] == [*(f"small, {k}" for k in kinds), "one-hot, trained", "one-hot, other"]
    wrong = t2l("library", "evaluate", imported.folder, way / "small", "-o", way / "wrong", "--device", "cpu")
    assert wrong.exit_code == 1 and "was not trained to reconstruct" in wrong.stderr


def test_wrong_use_of_the_commands(library: AdapterLibrary, tmp_path: Path) -> None:
    for arguments in (["--reads", "trained,gossip"], ["--curve", "many"]):
        done = t2l("compress", library.folder, "-o", tmp_path / "out", "--device", "cpu", *arguments)
        assert done.exit_code == 2, done.output
    done = t2l("compress", tmp_path / "nothing", "-o", tmp_path / "out", "--device", "cpu")
    assert done.exit_code == 1 and "is not an adapter library" in done.stderr
    assert not (tmp_path / "out").exists()


def test_without_a_file_one_a_makes_a_basis(
    library: AdapterLibrary, shared: AdapterLibrary, sentence_folder: Path, tmp_path: Path
) -> None:
    """Of adapters that share A all differences fit; others get variant L."""
    quick = [f"encoder.model={sentence_folder}", "encoder.max_tokens=60", "train.max_steps=2", "hypernet.width=24"]
    options = [word for setting in quick for word in ("--set", setting)]
    found = {}
    for name, of in (("own", library), ("one", shared)):
        done = t2l("compress", of.folder, "-o", tmp_path / name, "--device", "cpu", *options)
        assert done.exit_code == 0, done.output
        found[name] = json.loads((tmp_path / name / "config.json").read_text())["hypernet"]
    assert (found["own"]["variant"], found["own"]["freeze_a"], found["own"]["head_size"]) == ("L", False, 128)
    assert (found["one"]["variant"], found["one"]["freeze_a"], found["one"]["head_size"]) == ("basis", True, 3)
