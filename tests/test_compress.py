"""A library as one checkpoint: scores against a model run by hand, the report, and runs that are broken off."""

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
from compress_helpers import NAMES, four_adapters
from conftest import full_disk, random_lora
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from t2l import TextToLora
from t2l.apply import apply_adapters
from t2l.compress import run
from t2l.compress.networks import KINDS, principal, score_controls, texts_for
from t2l.compress.plan import fitting_head, network_parameters, plan_network, size_warning
from t2l.compress.report import recovered
from t2l.compress.run import compress
from t2l.compress.scores import Scores, prepare_scores
from t2l.config import EncoderConfig, HypernetConfig, LoraConfig, PromptConfig
from t2l.errors import DataError, OutputError
from t2l.hypernet import Hypernet
from t2l.library import AdapterLibrary, save_library
from t2l.lora import LoraTensors
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


@pytest.fixture(scope="module")
def spec(tiny_config: LlamaConfig, base_folder: Path) -> AdapterSpec:
    return AdapterSpec.from_config(tiny_config, str(base_folder), LoraConfig(r=2, lora_alpha=4))


@pytest.fixture(scope="module")
def library(spec: AdapterSpec, tmp_path_factory: pytest.TempPathFactory) -> AdapterLibrary:
    return four_adapters(tmp_path_factory.mktemp("library") / "four", spec)


@pytest.fixture(scope="module")
def shared(library: AdapterLibrary) -> AdapterLibrary:
    return four_adapters(library.folder.parent / "shared", library.spec, one_a=True)


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
    out = tmp_path_factory.mktemp("compressed") / "out"
    plain = compress(library, out, config, tasks=tasks, base=(tiny_base, tiny_tokenizer), log=quiet)
    assert plain is not None
    return out, plain


def test_the_checkpoint_is_the_networks(compressed: tuple[Path, dict[str, Any]], library: AdapterLibrary) -> None:
    """It writes what the report says it writes, and the run is gone."""
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
    plain = compress(shared, tmp_path / "out", alone, log=quiet)
    (network,) = plain["networks"]
    own = sum(3 * 2 * t.out_features for t in spec.targets)
    assert network["library_size"] == 2 * 4 * spec.num_parameters
    assert network["library_size_one_a"] == 2 * (4 * own + 3 * 2 * (32 + 32))
    assert network["share_one_a"] == pytest.approx(network["size"] / network["library_size_one_a"])
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.startswith("# 4 adapters in one network: out\n")
    assert "The 4 adapters of “out” have one A" in text and f"the network is {network['share_one_a']:.0%}" in text
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
    scores = [Scores(**json.loads(line)) for line in (out / "scores.jsonl").read_text().splitlines()]
    conditions = (
        "base",
        "task-lora",
        "mean of all",
        "3 components",
        "out, trained",
        "out, held-out",
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
    assert "| out | 4 | trained |" in text and "| out | 4 | held-out |" in text and "| task-lora | 3 | 15 |" in text
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
    for steps in (*range(5, 20, 5), None):
        plain = compress(library, out, config, max_minutes=0.0, log=lines.append)
        if steps is None:
            break
        assert plain is None and not out.exists()
        assert lines[-1] == (
            f"Time is up after {steps} of 20 steps; they are saved in {out}.run, and the same command goes on"
        )
    assert plain is not None and plain["conditions"] == {} and not (tmp_path / "out.run").exists()
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
        compress(library, out, config, log=lines.append)
    assert lines[-1].startswith("Interrupted after 7 of 20 steps") and lines[-1].endswith("the same command goes on")
    assert compress(library, out, config, log=quiet) is not None
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
        compress(library, out, config, log=quiet)
    assert not out.exists()
    monkeypatch.setattr(run, "train_reconstruction", dying)
    assert compress(library, out, config, log=quiet) is not None
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
        compress(library, out, config, log=quiet)
    assert not out.exists() and not list(tmp_path.rglob(".*"))
    assert compress(library, out, config, log=quiet) is not None


def test_a_network_larger_than_its_adapters_is_warned_of(library: AdapterLibrary, config: ReconstructionConfig) -> None:
    """Before it is trained, with a setting that is smaller; of one that is smaller nothing is said."""
    wide = replace(config, hypernet=replace(config.hypernet, width=128, head_size=512))
    many = LoraTensors.stack([random_lora(library.spec, n) for n in range(60)])
    larger = save_library(
        library.folder.parent / "sixty", many, library.spec, {f"x{n}": {"descriptions": ["d"]} for n in range(60)}
    )
    limit = 2 * 60 * library.spec.num_parameters
    warning = size_warning(wide, larger)
    assert warning is not None
    share = 2 * network_parameters(wide, library.spec, 32) / limit
    assert f"{share:,.0%}" in warning and "nothing is compressed" in warning
    settings = dict(x.split("=") for x in warning.split() if x.startswith("hypernet."))
    smaller = replace(
        wide,
        hypernet=replace(
            wide.hypernet, width=int(settings["hypernet.width"]), head_size=int(settings["hypernet.head_size"])
        ),
    )
    share = 2 * network_parameters(smaller, library.spec, 32) / limit
    assert share <= 0.5 and warning.endswith(f"makes it {share:.0%}")
    assert size_warning(smaller, larger) is None
    hopeless = size_warning(wide, library)
    assert (
        hopeless is not None
        and "4 adapters" in hopeless
        and hopeless.endswith("keep the adapters, or compress more at once")
    )


def test_the_command_lines_settings_replace_the_files(library: AdapterLibrary, config: ReconstructionConfig) -> None:
    settings = {
        "encoder": {"kind": "sentence", "model": config.encoder.model, "max_tokens": 60},
        "hypernet": {"width": 24, "head_size": 16, "dropout": 0.0},
        "train": {"max_steps": 15},
    }
    found = plan_network(library, settings, ["train.max_steps=7"])
    assert (found.train.max_steps, found.hypernet.head_size, found.data.library) == (7, 16, str(library.folder))
