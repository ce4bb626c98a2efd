"""Who looks on sees what a training needs and how it answers, and changes nothing of it."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from sft_helpers import quiet, shorter

from t2l import TextToLora, apply_adapters, hub, render_prompt
from t2l.apply import compiled, hooked, not_compiled
from t2l.config import EncoderConfig, HypernetConfig, LoraConfig
from t2l.eval.decode import greedy
from t2l.prompt import token_ids
from t2l.spec import AdapterSpec
from t2l.train.config import SftConfig
from t2l.train.reconstruction import (
    ReconstructionConfig,
    ReconstructionDataConfig,
    ReconstructionTrainConfig,
    train_reconstruction,
)
from t2l.train.sft import Session, Trainer, train
from t2l.train.task_config import TaskLorasConfig, TaskLorasDataConfig, TaskLorasTrainConfig
from t2l.train.task_loras import train_task_loras
from t2l.watching import MOST_TOKENS, samples, watch_reconstruction, watch_sft, watch_task_loras


def weights(folder: Path) -> bytes:
    (path,) = folder.glob("*.safetensors")
    return path.read_bytes()


def test_fine_tuning_that_is_looked_at_is_the_same_run(sft_config: SftConfig, tmp_path: Path) -> None:
    """The steps that an estimate takes, and the answers in between, leave weights, optimiser and random state alone."""
    dropout = replace(sft_config, hypernet=replace(sft_config.hypernet, token_dropout=0.3, dropout=0.2))
    dropout = shorter(dropout, eval_steps=3)
    lines: list[str] = []
    one = train(dropout, tmp_path / "one", device="cpu", log=quiet)
    other = train(dropout, tmp_path / "other", device="cpu", watch=watch_sft, log=lines.append)
    assert weights(one) == weights(other)
    (estimate,) = [line for line in lines if "a step," in line]
    assert "for 6 steps" in estimate and "memory" in estimate and "on disk" in estimate
    shown = [line.split()[0] for line in lines if line.startswith("    ")]
    assert shown == ["right", "another's", "base"] * 2
    assert [line for line in lines if re.match(r"step 6 of 6  right answers \d+%  another's \d+%$", line)]


def test_answers_are_those_of_the_checkpoint(sft_config: SftConfig, sft_jsonl: Path, tmp_path: Path) -> None:
    """What is shown at the end is what the saved checkpoint answers by the ordinary way."""
    seen: list[list[str]] = []

    def watch(session: Session, trainer: Trainer, step: int, log: Callable[[str], None]) -> None:
        seen.append(samples(session, trainer, 1))

    folder = train(sft_config, tmp_path / "run", device="cpu", watch=watch, log=quiet)
    (question, right, another, alone) = seen[-1]
    base, tokenizer = hub.load_causal_lm(sft_config.base), hub.load_tokenizer(sft_config.base)
    generator = TextToLora.from_pretrained(str(folder))
    text = re.match(r"  (Is it \d+\?)  \(right: (yes|no)\)$", question)
    assert text is not None
    described = [line.split("  ← ")[1] for line in (right, another)]
    assert text[2] in described[0] and text[2] not in described[1]
    (ids,) = token_ids(tokenizer, [render_prompt(tokenizer, described[0], text[1], generator.prompt)])
    for line, description in zip((right, another, alone), (*described, None), strict=True):
        (answer,) = greedy(
            base, tokenizer, [ids], description and generator.generate([description]), max_new_tokens=MOST_TOKENS
        )
        shown = " ".join(answer.split())[:20] or "(nothing)"
        assert line[4 + 19 :].startswith(shown[:8]), "half precision may tell late tokens apart"
    with apply_adapters(base, generator.generate([described[0]])[0]):
        pass  # the base is left as it was


def test_what_was_compiled_runs_plainly_meanwhile(sft_config: SftConfig) -> None:
    base = hub.load_causal_lm(sft_config.base)
    spec = AdapterSpec.from_config(base.config, "tiny", LoraConfig())
    with hooked(base, spec), compiled(base, spec):
        calls = [layer._compiled_call_impl for layer in base.model.layers]
        assert all(calls)
        with not_compiled(base):
            assert not any(layer._compiled_call_impl for layer in base.model.layers)
            base(torch.tensor([[5, 6, 7]]))
        assert [layer._compiled_call_impl for layer in base.model.layers] == calls


def test_the_other_trainings_are_the_same_when_looked_at(
    base_folder: Path, sft_jsonl: Path, sentence_folder: Path, tmp_path: Path
) -> None:
    config = TaskLorasConfig(
        base=str(base_folder),
        lora=LoraConfig(r=2, lora_alpha=4),
        data=TaskLorasDataConfig(tasks=(str(sft_jsonl),)),
        train=TaskLorasTrainConfig(
            max_steps=4, tasks_per_batch=1, max_seq_length=96, max_target_length=24, eval_steps=2, report_to="none"
        ),
    )
    lines: list[str] = []
    one = train_task_loras(config, tmp_path / "one", device="cpu", log=quiet)
    other = train_task_loras(config, tmp_path / "other", device="cpu", watch=watch_task_loras, log=lines.append)
    assert weights(one.folder) == weights(other.folder)
    assert sum("a step," in line for line in lines) == 1 and any("tasks done 2" in line for line in lines)
    again = ReconstructionConfig(
        encoder=EncoderConfig(kind="sentence", model=str(sentence_folder), max_tokens=60),
        hypernet=HypernetConfig(width=24, head_size=16, dropout=0.1),
        data=ReconstructionDataConfig(library=str(one.folder), held_out_descriptions=1),
        train=ReconstructionTrainConfig(max_steps=6, eval_steps=3, logging_steps=3, report_to="none"),
    )
    first = train_reconstruction(again, tmp_path / "first", device="cpu", log=quiet)
    second = train_reconstruction(
        again, tmp_path / "second", device="cpu", watch=watch_reconstruction, log=lines.append
    )
    assert weights(first) == weights(second)
    assert sum("a step," in line for line in lines) == 2
    assert any(re.search(r"relative error \d+%  held-out descriptions \d+%", line) for line in lines)
