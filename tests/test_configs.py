"""Every config that ships is read by the strict reader, and a tiny version of it is trained to a checkpoint."""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from transformers import LlamaForCausalLM

from t2l import TextToLora, hub
from t2l.apply import apply_adapters
from t2l.config import build, load_yaml, to_plain
from t2l.errors import ConfigError
from t2l.tasks import Example, Task
from t2l.train import dataset as train_data
from t2l.train.computed import computed_tasks
from t2l.train.config import SftConfig
from t2l.train.metrics import read_metrics
from t2l.train.sft import train

ROOT = Path(__file__).resolve().parents[1] / "configs"
CONFIGS = sorted(path for path in ROOT.rglob("*.yaml") if path.parent.name not in ("task-loras", "reconstruction"))


def names(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix()


@pytest.mark.parametrize("path", CONFIGS, ids=names)
def test_config_is_read(path: Path) -> None:
    plain = load_yaml(path)
    config = build(SftConfig, plain, where=str(path))
    # What a reader copies is there to be seen, not left to defaults that may change.
    if path.name == "own.yaml":  # but for the one whose point is that all else follows the base and the tasks
        assert sum(len(x) if isinstance(x, dict) else 1 for x in plain.values()) == 4
        return
    assert {"base", "lora", "encoder", "hypernet", "prompt", "train"} <= plain.keys()
    assert path.read_text().startswith("# ")
    assert config.prompt.description_in_prompt == (config.train.description_in_prompt_prob > 0)


@pytest.mark.parametrize("path", sorted((ROOT / "baselines").glob("*.yaml")), ids=names)
def test_every_baseline_differs_only_where_it_says(path: Path) -> None:
    """A comparison is of one thing at a time: each file's comment names all settings in which it is not t2l.yaml."""
    reference, config = (
        leaves(to_plain(build(SftConfig, load_yaml(file)))) for file in (path.with_name("t2l.yaml"), path)
    )
    differing = [name for name in reference if config[name] != reference[name]]
    comment = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    said = re.findall(r"Differs from t2l\.yaml in: ([\w., ]+)\.", comment)
    assert said == ([", ".join(differing)] if path.stem != "t2l" else [])
    assert differing or path.stem == "t2l"


def leaves(plain: dict[str, Any], section: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in plain.items():
        found |= leaves(value, f"{section}{key}.") if isinstance(value, dict) else {f"{section}{key}": value}
    return found


def fake_tasks(split: str) -> list[Task]:
    """Three training tasks and two validation tasks with the answers that their descriptions say."""
    examples = {s: tuple(Example(f"{s}{n}", f"{s} {n}?", ("?",)) for n in range(8)) for s in ("train", "val")}
    made = []
    for n, word in enumerate(("yes", "no", "ja", "nein", "oui")):
        definition = f"Whatever it is, say {word}."
        # The first has one answer, the others a few: both kinds that variants tell apart.
        words = (word, f"not {word}" if n else word)
        answers = {
            s: tuple(Example(e.id, f"{e.input} {n}", (words[place % 2],)) for place, e in enumerate(some))
            for s, some in examples.items()
        }
        longer = (
            f"Read each line with care, then give only {word}; keep from more.",
            f"Your whole answer must stay {word}, what ever this text says here, over and over.",
        )
        texts = (definition, *longer, f"Say {word}.", f"Reply {word}.", f"Just {word}.", f"Write {word}.")
        # The first is one that configs/descriptions.jsonl describes.
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
        ("smollm2-135m", "runs/default-multitask/checkpoint"): "smollm2-135m/default-multitask.yaml",
    }

    def shrink(path: Path) -> SftConfig:
        plain: dict[str, Any] = {"encoder": {"kind": "tokens"}, "lora": {}, "hypernet": {}} | load_yaml(path)
        plain["base"] = str(base_folder)
        if plain["encoder"]["kind"] != "onehot":
            plain["encoder"]["max_tokens"] = 96
        if plain["encoder"]["kind"] == "tokens":
            plain["encoder"]["layers"] = [0 if plain["hypernet"].get("pointer") else 1, 2]
        if "model" in plain["encoder"] and plain["encoder"]["model"] != "base":
            plain["encoder"]["model"] = str(sentence_folder)
        plain["lora"].pop("layers_to_transform", None)
        plain["hypernet"] |= {"width": 24, "head_size": 16, "token_blocks": 1, "attention_heads": 4}
        small = {
            "max_steps": 3,
            "tasks_per_batch": 3,
            "max_seq_length": 160,
            "max_target_length": 60,
            "logging_steps": 1,
        }
        plain["train"] |= small | {
            "eval_steps": 2,
            "eval_batches": 1,
            "torch_compile": False,
            "dataloader_num_workers": 0,
        }
        plain["train"] |= {"report_to": "none"}
        if plain["train"].get("init_from"):
            source = starts[path.parent.name, plain["train"]["init_from"]]
            plain["train"]["init_from"] = str(run(ROOT / source)[0] / "checkpoint")
        return build(SftConfig, plain)

    def run(path: Path) -> tuple[Path, SftConfig]:
        if path not in done:
            config, folder = shrink(path), root / names(path)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(train_data, "load_sni", lambda _, splits: fake_tasks(splits[0]))
                patch.setattr(train_data, "load_t0", lambda: [replace(fake_tasks("train")[1], name="t0_one")])
                patch.setattr(train_data, "computed_tasks", lambda: computed_tasks()[:2])
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
        config.conditioning != "task" and config.data.tasks == "sni"
    )
    generator = TextToLora.from_pretrained(str(run / "checkpoint"))
    assert generator.config.conditioning == config.conditioning
    texts = list(generator.config.encoder.names[:2]) or ["Say yes.", "Whatever it is, say no."]
    one, other = generator.generate(texts)
    assert any(b.abs().max() > 0 for b in one.lora.b)
    same = all(torch.equal(x, y) for x, y in zip(one.lora.b, other.lora.b, strict=True))
    assert same is config.unconditional


def test_one_hot_checkpoint_knows_its_tasks_by_name(tiny: Tiny) -> None:
    run, _ = tiny(ROOT / "baselines" / "onehot.yaml")
    generator = TextToLora.from_pretrained(str(run / "checkpoint"))
    assert generator.config.encoder.names == tuple(sorted(task.name for task in fake_tasks("train")))
    generator.generate(["task2"])
    with pytest.raises(ValueError, match="knows tasks by their names only, not 'task 2'; did you mean 'task2'"):
        generator.generate(["task 2"])


def test_hyperdecoder_writes_adapters_from_inputs(tiny: Tiny, tiny_base: LlamaForCausalLM) -> None:
    """Its encoder reads whole inputs; another input gives another adapter, and so other logits."""
    run, _ = tiny(ROOT / "baselines" / "hyperdecoders.yaml")
    generator = TextToLora.from_pretrained(str(run / "checkpoint"))
    tokens = torch.tensor(make_tokenizer()(["train 1?"] * 2).input_ids)
    with apply_adapters(tiny_base, generator.generate(["train 1?", "train 2?"])), torch.no_grad():
        one, other = tiny_base(tokens).logits
    assert not torch.equal(one, other)


@pytest.mark.slow
def test_smoke_suite_is_learnt_from_its_descriptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the steps of `configs/smoke.yaml` on the real default model: the right description pays."""
    config = build(SftConfig, load_yaml(ROOT / "smoke.yaml"))
    for reference in (config.base, config.encoder.model):
        if not hub.is_cached(reference):
            pytest.skip(f"needs {reference} in the cache: make models")
    monkeypatch.chdir(ROOT.parent)
    short = replace(config.train, max_steps=12, eval_steps=12, eval_batches=1, report_to="none")
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


FEW = {"max_steps": 1}
NAN = float("nan")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"conditioning": "task"}, "conditioning 'task' and encoder.kind 'onehot' go together"),
        ({"encoder": {"kind": "onehot"}}, "go together, got 'description' and 'onehot'"),
        ({"conditioning": "input"}, "conditioning 'input' needs encoder.kind 'sentence'"),
        (
            {"hypernet": {"variant": "none"}, "train": FEW | {"margin_loss_weight": 1.0}},
            "train.margin_loss_weight would do nothing",
        ),
        (
            {"hypernet": {"variant": "none"}, "data": {"random_description_prob": 0.1}},
            "data.random_description_prob would do nothing",
        ),
        (
            {"train": FEW | {"margin_loss_weight": 1.0, "description_in_prompt_prob": 1.0}},
            "train.description_in_prompt_prob 1 leaves none",
        ),
        ({"hypernet": {"freeze_a": True}}, "freeze_a is for"),
        ({"hypernet": {"variant": "basis"}}, "variant 'basis' is for"),
        (
            {"conditioning": "task", "encoder": {"kind": "onehot"}, "data": {"auxiliary_task_prob": 0.3}},
            "data.auxiliary_task_prob: descriptions say what is to be answered; here is read the 'task'",
        ),
        ({"train": FEW | {"neftune_alpha": 5.0}}, "unknown key; did you mean 'neftune_noise_alpha'"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], match: str) -> None:
    plain = {"base": "x", "encoder": {"kind": "tokens", "layers": [1]}, "train": FEW}
    with pytest.raises(ConfigError, match=match):
        build(SftConfig, plain | changes)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *((f"train.{name}", value) for name in ("learning_rate", "shared_lora_learning_rate") for value in (-1.0, NAN)),
        *((f"train.{name}", value) for name in ("max_grad_norm",) for value in (0.0, -1.0, NAN)),
        *((f"train.{name}", 0) for name in ("max_steps", "tasks_per_batch", "eval_batches")),
        *((f"train.{name}", -1) for name in ("max_seq_length", "max_target_length", "logging_steps", "save_steps")),
        *((f"train.{name}", 1.5) for name in ("warmup_ratio", "label_smoothing_factor")),
        *(
            (f"train.{name}", -1.0)
            for name in ("margin_loss_weight", "l2_weight", "neftune_noise_alpha", "weight_decay")
        ),
        ("train.early_stopping_patience", -1),
        ("train.dataloader_num_workers", -1),
        ("data.max_tasks", 0),
        ("data.held_out_tasks", -1),
        *((f"data.{name}", 1.5) for name in ("label_remap_prob", "format_variation_prob", "auxiliary_task_prob")),
        ("seed", -1),
        ("seed", 2**40),
    ],
)
def test_numbers_out_of_their_range_are_named_when_they_are_read(setting: str, value: float) -> None:
    plain: dict[str, Any] = {"base": "x", "encoder": {"kind": "tokens", "layers": [1]}, "train": dict(FEW)}
    *section, name = setting.split(".")
    (plain.setdefault(section[0], {}) if section else plain)[name] = value
    with pytest.raises(ConfigError, match=rf"^{re.escape(setting)} must be .*, got {re.escape(str(value))}$"):
        build(SftConfig, plain)


def test_settings_are_few_and_each_of_them_is_used() -> None:
    """A setting that no config, test or documented recipe uses is one that nobody needs."""
    config = build(SftConfig, load_yaml(ROOT / "smoke.yaml"))
    texts = [path.read_text() for path in (*CONFIGS, *Path(__file__).parent.glob("test_*.py"))]
    words = Counter(word for text in texts for word in set(re.findall(r"\w+", text)))
    own = [name for name in leaves(to_plain(config)) if name.split(".")[0] in ("data", "train", "seed", "conditioning")]
    assert [name for name in own if words[name.rsplit(".")[-1]] < 1] == []
    assert len(own) <= 45
