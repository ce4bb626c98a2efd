"""Every config that ships is read by the strict reader, and a tiny version of it is trained to a checkpoint."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_base, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from t2l import TextToLora, hub
from t2l.apply import apply_adapters
from t2l.config import build, load_yaml
from t2l.errors import ConfigError
from t2l.tasks import Example, Task
from t2l.train import dataset as train_data
from t2l.train import sft
from t2l.train.config import SftConfig
from t2l.train.sft import train
from t2l.train.watch import read_metrics

ROOT = Path(__file__).resolve().parents[1] / "configs"
CONFIGS = sorted(path for path in ROOT.rglob("*.yaml") if path.parent.name not in ("oracle", "recon"))  # of sft


def names(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix()


@pytest.mark.parametrize("path", CONFIGS, ids=names)
def test_config_is_read(path: Path) -> None:
    plain = load_yaml(path)
    config = build(SftConfig, plain, where=str(path))
    # What a reader copies is there to be seen, not left to defaults that may change.
    assert {"base", "lora", "encoder", "hypernet", "prompt", "train"} <= plain.keys()
    assert path.read_text().startswith("# ")
    assert config.prompt.description_in_prompt == (config.train.description_in_prompt > 0)


def test_every_baseline_differs_only_where_it_says() -> None:
    """A comparison is of one thing at a time: each file names the settings in which it is not t2l.yaml."""
    reference = build(SftConfig, load_yaml(ROOT / "baselines" / "t2l.yaml"))
    assert reference == build(SftConfig, load_yaml(ROOT / "baselines" / "t2l.yaml"))
    for name, setting in {
        "codebook-vq": "hypernet",
        "codebook-softmax": "hypernet",
        "random-descriptions": "data",
    }.items():
        other = build(SftConfig, load_yaml(ROOT / "baselines" / f"{name}.yaml"))
        fields = ("base", "seed", "method", "conditioning", "lora", "encoder", "hypernet", "prompt", "data", "train")
        assert [f for f in fields if getattr(other, f) != getattr(reference, f)] == [setting]


def fake_tasks(split: str) -> list[Task]:
    """Three training tasks and two validation tasks with the answers that their descriptions say."""
    examples = {s: tuple(Example(f"{s}{n}", f"{s} {n}?", ("?",)) for n in range(8)) for s in ("train", "val")}
    made = []
    for n, word in enumerate(("yes", "no", "ja", "nein", "oui")):
        definition = f"Whatever it is, say {word}."
        # The first has one answer, the others a few: both kinds that relabelling tells apart.
        words = (word, f"not {word}" if n else word)
        answers = {
            s: tuple(Example(e.id, f"{e.input} {n}", (words[place % 2],)) for place, e in enumerate(some))
            for s, some in examples.items()
        }
        # Words that stand in several descriptions, for `relabel_vocabulary`.
        longer = (
            f"Read each line with care, then give only {word}; keep from more.",
            f"Your whole answer must stay {word}, what ever this text says here, over and over.",
        )
        texts = (definition, *longer, f"Say {word}.", f"Reply {word}.", f"Just {word}.", f"Write {word}.")
        name = "task1338_peixian_equity_evaluation_corpus_sentiment_classifier" if n == 0 else f"task{n}"
        made.append(Task(name, texts, answers, "ab"[n % 2], definition))
    return made[:3] if split == "train" else made[3:]


Tiny = Callable[[Path], tuple[Path, SftConfig]]


@pytest.fixture(scope="module")
def tiny(
    base_folder: Path, sentence_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], tuple[Path, SftConfig]]:
    """Trains a tiny version of a config, once, its starting checkpoint first; returns the run and its settings."""
    done: dict[Path, tuple[Path, SftConfig]] = {}
    root = tmp_path_factory.mktemp("configs")
    starts = {
        ("baselines", "runs/multitask/checkpoint"): "baselines/multitask.yaml",
        ("smollm2-135m", "runs/sft/checkpoint"): "smollm2-135m/1-sft.yaml",
    }

    def shrink(path: Path) -> SftConfig:
        plain = load_yaml(path)
        plain["base"] = str(base_folder)
        if plain["encoder"]["kind"] != "onehot":
            plain["encoder"]["max_tokens"] = 96
        if plain["encoder"]["kind"] == "tokens":
            plain["encoder"]["layers"] = [0 if plain["hypernet"].get("pointer") else 1, 2]
        if "model" in plain["encoder"] and plain["encoder"]["model"] != "base":
            plain["encoder"]["model"] = str(sentence_folder)
        plain["lora"].pop("layers_to_transform", None)
        plain["hypernet"] |= {"width": 24, "head_size": 16, "token_blocks": 1, "attention_heads": 4}
        small = {"steps": 3, "tasks_per_step": 3, "sequence_tokens": 160, "answer_tokens": 60, "log_every": 1}
        plain["train"] |= small | {"evaluate_every": 2, "evaluate_batches": 1, "compile": False, "workers": 0}
        plain["train"] |= {"tensorboard": names(path) == "smoke"}
        if plain["train"].get("start_from"):
            source = starts[path.parent.name, plain["train"]["start_from"]]
            plain["train"]["start_from"] = str(run(ROOT / source)[0] / "checkpoint")
        return build(SftConfig, plain)

    def run(path: Path) -> tuple[Path, SftConfig]:
        if path not in done:
            config, folder = shrink(path), root / names(path)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(train_data, "load_sni", lambda _, splits: fake_tasks(splits[0]))
                patch.setattr(sft, "write_report", lambda folder: folder)  # takes longer than these runs do
                patch.chdir(ROOT.parent)
                train(config, folder, device="cpu", log=lambda _: None)
            done[path] = folder, config
        return done[path]

    return run


@pytest.mark.parametrize("path", CONFIGS, ids=names)
def test_tiny_version_trains(path: Path, tiny: Tiny) -> None:
    """Weights move, the loss is finite, and what it leaves loads again."""
    run, config = tiny(path)
    rows = read_metrics(run)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert all(row["gradient_norm"] > 0 for row in rows if "loss" in row)
    judged = rows[-1]
    compared = not config.unconditional
    assert any(key.endswith("/margin") for key in judged) is compared
    assert any(key.startswith("validation/") for key in judged) is (
        config.conditioning != "task" and not config.data.only and config.data.tasks == "sni"
    )
    if config.method == "full":
        assert not (run / "checkpoint").exists()
        return
    t2l = TextToLora.from_pretrained(str(run / "checkpoint"))
    assert t2l.config.conditioning == config.conditioning
    texts = list(t2l.config.encoder.names[:2]) or ["Say yes.", "Whatever it is, say no."]
    one, other = t2l.generate(texts)
    assert any(b.abs().max() > 0 for b in one.lora.b)
    same = all(torch.equal(x, y) for x, y in zip(one.lora.b, other.lora.b, strict=True))
    # Two texts may well share a code.
    assert same is config.unconditional or config.hypernet.codebook == "vq"


def test_full_fine_tuning_leaves_a_model(tiny: Tiny, tiny_config: LlamaConfig) -> None:
    """It loads as any base does, all of it has moved, and its card says how it came about."""
    run, _ = tiny(ROOT / "baselines" / "full.yaml")
    before, after = make_base(tiny_config), hub.load_causal_lm(str(run / "model"))
    moved = dict(after.named_parameters())
    # Tokens that never occurred have no gradient, but all else has.
    same = [name for name, value in before.named_parameters() if torch.equal(value, moved[name])]
    assert same == []
    record = json.loads((run / "model" / "training.json").read_text())
    assert record["steps"] == 3 and record["settings"]["method"] == "full"
    assert hub.load_tokenizer(str(run / "model")).eos_token == "</s>"


def test_saving_a_model_draws_no_bar(
    tiny_base: LlamaForCausalLM, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sft._save_model(tmp_path / "model", tiny_base, make_tokenizer(), {})
    assert capfd.readouterr() == ("", "")


def test_one_hot_checkpoint_knows_its_tasks_by_name(tiny: Tiny) -> None:
    run, _ = tiny(ROOT / "baselines" / "onehot.yaml")
    t2l = TextToLora.from_pretrained(str(run / "checkpoint"))
    assert t2l.config.encoder.names == tuple(sorted(task.name for task in fake_tasks("train")))
    t2l.generate(["task2"])
    with pytest.raises(ValueError, match="knows tasks by their names only, not 'task 2'; did you mean 'task2'"):
        t2l.generate(["task 2"])


def test_hyperdecoder_writes_adapters_from_inputs(tiny: Tiny, tiny_base: LlamaForCausalLM) -> None:
    """Its encoder reads whole inputs; another input gives another adapter, and so other logits."""
    run, _ = tiny(ROOT / "baselines" / "hyperdecoders.yaml")
    t2l = TextToLora.from_pretrained(str(run / "checkpoint"))
    tokens = torch.tensor(make_tokenizer()(["train 1?"] * 2).input_ids)
    with apply_adapters(tiny_base, t2l.generate(["train 1?", "train 2?"])), torch.no_grad():
        one, other = tiny_base(tokens).logits
    assert not torch.equal(one, other)


def test_smoke_suite_is_learnt_from_its_descriptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the steps of `configs/smoke.yaml` on the real default model: the right description pays."""
    config = build(SftConfig, load_yaml(ROOT / "smoke.yaml"))
    for reference in (config.base, config.encoder.model):
        if not hub.is_cached(reference):
            pytest.skip(f"needs {reference} in the cache: make models")
    monkeypatch.chdir(ROOT.parent)
    short = replace(config.train, steps=12, evaluate_every=12, evaluate_batches=1, tensorboard=False)
    train(replace(config, train=short), tmp_path / "run", device="cpu", log=lambda _: None)
    judged = read_metrics(tmp_path / "run")[-1]
    # New words and descriptions that were held out.
    assert judged["seen/adapter/margin"] > 0.1
    assert judged["seen/adapter/loss"] < 4


def test_smoke_inputs_do_not_tell_the_task() -> None:
    """Every word is asked under every task, with different answers."""
    rows = [json.loads(line) for line in (ROOT / "smoke.jsonl").read_text().splitlines()]
    answers: dict[str, list[str]] = {}
    for row in rows:
        answers.setdefault(row["input"], []).append(row["output"])
    assert len(answers) == 30
    assert all(len(found) == len(set(found)) == 7 for found in answers.values())


def test_offset_stays_as_it_was(tiny: Tiny) -> None:
    from safetensors.torch import load_file

    weights = [
        load_file(tiny(ROOT / "baselines" / f"{name}.yaml")[0] / "checkpoint" / "hypernet.safetensors")
        for name in ("multitask", "offset")
    ]
    offset = [name for name in weights[0] if name.startswith("shared_lora.")]
    assert offset and all(torch.equal(weights[0][name], weights[1][name]) for name in offset)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"conditioning": "task"}, "conditioning 'task' and encoder.kind 'onehot' go together"),
        ({"hypernet": {"freeze_a": True}}, "freeze_a is for `t2l train recon`"),
        ({"hypernet": {"variant": "basis"}}, "variant 'basis' is for `t2l train recon`"),
        ({"encoder": {"kind": "onehot"}}, "go together, got 'description' and 'onehot'"),
        ({"conditioning": "input"}, "conditioning 'input' needs encoder.kind 'sentence'"),
        ({"method": "full"}, "method 'full' needs hypernet.variant none, got 'L'"),
        (
            {"method": "full", "hypernet": {"variant": "none"}, "train": {"steps": 1, "start_from": "x"}},
            "from the base",
        ),
        ({"hypernet": {"variant": "none"}, "train": {"steps": 1, "contrast": 1.0}}, "train.contrast would do nothing"),
        (
            {"train": {"steps": 1, "contrast": 1.0, "contrast_in_prompt": False, "description_in_prompt": 1.0}},
            "train.description_in_prompt 1 leaves none",
        ),
        ({"train": {"steps": 1, "mix_descriptions": 0.5}}, "needs encoder.kind 'sentence'"),
        ({"hypernet": {"variant": "none"}, "train": {"steps": 1, "early_stop": "margin"}}, "here use 'loss'"),
        ({"train": {"steps": 1, "label_smoothing": 1.5}}, r"train\.label_smoothing must be in \[0, 1\], got 1.5"),
        ({"train": {"steps": 1, "neftune_alpha": -1.0}}, "train.neftune_alpha must not be negative, got -1.0"),
        (
            {"method": "full", "hypernet": {"variant": "none"}, "train": {"steps": 1, "distill": 1.0}},
            "which train.distill needs frozen as the teacher",
        ),
        ({"train": {"steps": 1, "distill": -1.0}}, "train.distill must not be negative, got -1.0"),
        ({"train": {"steps": 1, "distill_shots": -1}}, "train.distill_shots must not be negative, got -1"),
        ({"train": {"steps": 1, "distill_temperature": 0.0}}, "train.distill_temperature must be above 0, got 0.0"),
        ({"train": {"steps": 1, "teacher_tokens": 0}}, "train.teacher_tokens must be at least 1, got 0"),
        ({"train": {"steps": 1, "patience": 0}}, "train.patience must be at least 1, got 0"),
        ({"data": {"keep_descriptions": False}}, "keep_descriptions false needs a file"),
        ({"data": {"max_tasks": 0}}, "data.max_tasks must be at least 1 or null, got 0"),
        ({"train": {"steps": 1, "nefttune_alpha": 5.0}}, "unknown key; did you mean 'neftune_alpha'"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], match: str) -> None:
    plain = {"base": "x", "encoder": {"kind": "tokens", "layers": [1]}, "train": {"steps": 1}}
    with pytest.raises(ConfigError, match=match):
        build(SftConfig, plain | changes)
