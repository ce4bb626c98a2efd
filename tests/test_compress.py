"""A library as one checkpoint: scores against a model run by hand, the report against its parts, the commands."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_lora
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from typer.testing import CliRunner

from t2l import TextToLora, cli
from t2l.apply import apply_adapters
from t2l.config import EncoderConfig, HypernetConfig, LoraConfig, PromptConfig
from t2l.errors import ConfigError, DataError, TrainingError
from t2l.hypernet import Hypernet
from t2l.library import AdapterLibrary, save_library
from t2l.lora import LoraTensors
from t2l.peft_io import load_adapter
from t2l.prompt import render, token_ids
from t2l.spec import AdapterSpec
from t2l.tasks import Example, Task
from t2l.text_to_lora import LoraAdapter
from t2l.train.compress import (
    KINDS,
    Scores,
    compress,
    fitting_head,
    prepare_scores,
    principal,
    read_scores,
    recovered,
    score_controls,
    subset,
    texts_for,
)
from t2l.train.reconstruction import (
    ReconstructionConfig,
    ReconstructionTrainConfig,
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
    scored = prepare_scores(library, tasks, (tiny_base, tiny_tokenizer), tokens=80, answer_tokens=20, rows_at_once=2)
    singles = library.stack().unbind()
    rows = {
        "base": (scored.score("base", None, library.names), [None] * 4),
        "oracle": (scored.score("oracle", library.stack(), library.names), singles),
    }
    for row, (scores, adapters) in rows.items():
        assert [s.task for s in scores] == list(NAMES[:3])
        for n, s in enumerate(scores):
            assert (s.row, s.ids) == (row, [f"{s.task}-{i}" for i in range(5)])
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
    assert rows["base"][0][0].loss != rows["oracle"][0][0].loss
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
    """Half the gain is half; a row that beats the oracles has more than all; without a gain there is no share."""

    def scores(row: str, values: list[float]) -> list[Scores]:
        return [
            Scores(row, f"t{i}", list("0123456789"), [0.0] * 10, [1] * round(10 * v) + [0] * round(10 - 10 * v))
            for i, v in enumerate(values)
        ]

    names = [f"t{i}" for i in range(3)]
    table = [
        *scores("base", [0.1, 0.0, 0.2]),
        *scores("oracle", [0.5, 0.4, 0.6]),
        *scores("half", [0.3, 0.2, 0.4]),
        *scores("more", [0.7, 0.4, 0.8]),
    ]
    half = recovered(table, "half", names)
    assert half == pytest.approx((0.5, 0.5, 0.5))
    more = recovered(table, "more", names)
    assert more is not None and more[0] == pytest.approx(4 / 3)
    assert more[1] < more[0] < more[2]
    assert recovered(table, "half", ["unknown"]) is None
    assert recovered([*scores("base", [0.5]), *scores("oracle", [0.5]), *scores("half", [0.2])], "half", ["t0"]) is None


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
    t2l = TextToLora.from_pretrained(str(out))
    written = LoraTensors.stack([a.lora for a in t2l.generate([f"Do {name}." for name in NAMES])])
    errors = compare(written, library.stack())
    network = plain["networks"][0]
    assert network["errors"]["trained"]["relative"] == pytest.approx(errors.relative)
    assert network["mean_errors"]["trained"]["cosine"] == pytest.approx(np.mean(errors.cosine))
    assert network["size"] == (out / "hypernet.safetensors").stat().st_size
    assert network["library_size"] == 2 * 4 * library.spec.num_parameters
    assert network["share"] == pytest.approx(network["size"] / network["library_size"])
    assert network["parameters"] == sum(p.numel() for p in t2l.hypernet.parameters())


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
    assert network["distinct_size"] == 2 * (4 * own + 3 * 2 * (32 + 32))
    assert network["distinct_share"] == pytest.approx(network["size"] / network["distinct_size"])
    text = (tmp_path / "out" / "report.md").read_text()
    assert "The 4 adapters of “all” have one A" in text and f"the network is {network['distinct_share']:.0%}" in text
    assert f"| {network['share']:.0%} |" in text
    scored = prepare_scores(shared, tasks[:1], (tiny_base, tiny_tokenizer), limit=1)
    for of, size, number in ((shared, own, 2), (library, spec.num_parameters, 1)):
        rows = [s.row for s in score_controls(scored, of, number * size)]
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
    rows = (
        "base",
        "oracle",
        "mean of all",
        "3 components",
        "all, trained",
        "all, held-out",
        "two, trained",
        "two, held-out",
    )
    assert tuple(dict.fromkeys(s.row for s in scores)) == rows
    for row, found in plain["rows"].items():
        mine = [s for s in scores if s.row == row]
        assert (found["tasks"], found["n"]) == (len(mine), 5 * len(mine))
        assert found["loss"][0] == pytest.approx(np.mean([np.mean(s.loss) for s in mine]))
        assert found["loss"][1] <= found["loss"][0] <= found["loss"][2]
    for s in scores:
        cell = plain["tasks"][s.task][s.row]
        assert cell["exact_match"][0] == pytest.approx(np.mean(s.exact_match)) and cell["n"] == 5
    text = (out / "report.md").read_text()
    assert "have one A" not in text and plain["networks"][0]["distinct_share"] == plain["networks"][0]["share"]
    assert "| all | 4 | trained |" in text and "| two | 2 | held-out |" in text and "| oracle | 3 | 15 |" in text
    assert all(f"| {name} |" in text for name in NAMES)
    # Three components and the mean hold all of four adapters.
    of = {row: [s.loss for s in scores if s.row == row] for row in ("oracle", "3 components", "mean of all")}
    for exact, made in zip(of["oracle"], of["3 components"], strict=True):
        assert made == pytest.approx(exact, abs=1e-3)
    assert of["mean of all"] != of["oracle"]
    assert plain["rows"]["base"]["recovered"] is None and plain["rows"]["oracle"]["recovered"] in (
        None,
        [1.0] * 3,
        (1.0,) * 3,
    )
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_compressing_goes_on_where_time_ran_out(
    library: AdapterLibrary, config: ReconstructionConfig, compressed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """The checkpoint is the one of a compression that was not interrupted."""
    out = tmp_path / "out"
    points = {"all": config, "again": config}
    for _ in range(20):
        try:
            compress(library, out, points, max_minutes=0.0, log=quiet)
        except TrainingError as error:
            assert "the same command goes on" in str(error) and not out.exists()
            assert (tmp_path / "out.runs" / "all" / "state.safetensors").exists()
            if "of network “again”" in str(error):
                break
    plain = compress(library, out, points, log=quiet)
    assert plain["rows"] == {} and not (tmp_path / "out.runs").exists()
    assert (out / "hypernet.safetensors").read_bytes() == (compressed[0] / "hypernet.safetensors").read_bytes()


# -------------------------------------------------------------------------------------------------- the commands


def t2l(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def oracle_files(base_folder: Path, sentence_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Own tasks and configs for the whole way from tasks to a checkpoint."""
    folder = tmp_path_factory.mktemp("way")
    rows = [
        {"task": name, "description": f"Say {name}.", "input": f"Is it {n}?", "output": name, "split": split}
        for name in ("yes", "no")
        for split, numbers in (("train", range(30, 50)), ("val", range(50, 53)), ("test", range(53, 56)))
        for n in numbers
    ]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    oracle = {
        "base": str(base_folder),
        "lora": {"r": 2, "lora_alpha": 4},
        "data": {"sources": [str(folder / "own.jsonl")]},
        "train": {"steps": 10, "evaluate_every": 5, "sequence_tokens": 96, "answer_tokens": 16, "learning_rate": 0.01},
    }
    recon = {
        "encoder": {"kind": "sentence", "model": str(sentence_folder), "max_tokens": 60},
        "hypernet": {"width": 24, "head_size": 16, "dropout": 0.0},
        "train": {"max_steps": 15, "logging_steps": 5},
    }
    (folder / "oracle.yaml").write_text(json.dumps(oracle))  # JSON is YAML
    (folder / "recon.yaml").write_text(json.dumps(recon))
    return folder


def test_from_tasks_to_a_checkpoint_on_the_command_line(oracle_files: Path, base_folder: Path) -> None:
    """train oracle, library export and import, compress, train recon, library judge."""
    way, run = oracle_files, oracle_files / "run"
    done = t2l("train", "oracle", "--config", way / "oracle.yaml", "--run", run, "--device", "cpu", "--json")
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
        "compress", library.folder, "-o", way / "small", "--config", way / "recon.yaml", "--curve", "1",
        "--networks", "S:16", "--score", way / "own.jsonl", "--device", "cpu", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert [network["label"] for network in report["networks"]] == ["all", "1 adapters", "S 16"]
    assert set(report["tasks"]) == {"yes", "no"} and report["rows"]["oracle"]["n"] == 6
    again = t2l("compress", library.folder, "-o", way / "small", "--config", way / "recon.yaml")
    assert again.exit_code == 1 and "exists already" in again.stderr

    onehot = ["--set", "encoder={kind: onehot}", "--set", f"data.library={library.folder}"]
    done = t2l(
        "train", "reconstruction", "--config", way / "recon.yaml", "--run", way / "one-hot", *onehot, "--device", "cpu"
    )
    assert done.exit_code == 0, done.output
    done = t2l(
        "library", "judge", library.folder, way / "small", way / "one-hot" / "checkpoint", "-o", way / "judged",
        "--score", way / "own.jsonl", "--device", "cpu",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = list(json.loads((way / "judged" / "report.json").read_text())["rows"])
    kinds = ["trained", "held-out", "random", "other"]
    assert rows[:4] == ["base", "oracle", "mean of all", "1 components"]
    assert rows[4:] == [*(f"small, {k}" for k in kinds), "one-hot, trained", "one-hot, other"]
    wrong = t2l("library", "judge", imported.folder, way / "small", "-o", way / "wrong", "--device", "cpu")
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
