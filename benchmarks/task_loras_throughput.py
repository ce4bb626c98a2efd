"""Task LoRAs many at once against one after another: seconds an adapter, same code, same rows, same results.

    python benchmarks/task_loras_throughput.py --config configs/task-loras/paper-tasks.yaml --tasks 64 --steps 100

Three ways, in one run: all tasks in one batch; one task after another by the same trainer, compiled alike; and one task
after another by PEFT with torch's AdamW, uncompiled, as a plain script would. Compiling and the first steps are not
counted. Prints JSON; `ratio` is what many at once saves. `--tiny` runs on a model made in memory.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from t2l import hub
from t2l.config import LoraConfig, build, load_yaml
from t2l.io import read_json
from t2l.spec import AdapterSpec
from t2l.train.loop import StopRequest, schedule
from t2l.train.packing import Stream, pack
from t2l.train.task_config import TaskLorasConfig, TaskLorasDataConfig, TaskLorasTrainConfig
from t2l.train.task_data import TaskData, load_tasks, tokenize_tasks
from t2l.train.task_loras import Trainer


class Clock:
    """Stands in for a MetricLogger: when each segment ended, and after how many steps."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, int]] = []

    def record(self, row: dict[str, Any]) -> None:
        self.rows.append((time.perf_counter(), row["step"]))

    def step(self, done: int) -> None:
        pass

    @property
    def seconds_per_step(self) -> float:
        (start, first), (end, last) = self.rows[0], self.rows[-1]
        return (end - start) / (last - first)


def ours(
    config: TaskLorasConfig, data: list[TaskData], base: Any, spec: AdapterSpec, device: torch.device, at_once: int
) -> dict[str, Any]:
    """Seconds an adapter takes with so many at once, and what became of them."""
    config = replace(config, train=replace(config.train, tasks_per_batch=at_once, early_stopping_patience=1_000_000))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, base, spec, data, Path(folder), device, lambda _: None)
        clock = Clock()
        trainer.fit(clock, StopRequest())  # type: ignore[arg-type]
        facts = {name: read_json(Path(folder) / "finished" / name / "facts.json") for name in trainer.finished}
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    return {
        "at_once": at_once,
        "seconds_per_step": clock.seconds_per_step,
        "seconds_per_adapter": clock.seconds_per_step * config.train.max_steps / at_once,
        "memory_gb": peak,
        "losses": {name: fact["loss"] for name, fact in facts.items()},
    }


def plain_peft(
    config: TaskLorasConfig, data: TaskData, base: Any, spec: AdapterSpec, device: torch.device, steps: int
) -> float:
    """Seconds a step of one adapter takes with PEFT and torch's AdamW, on the same rows."""
    train = config.train
    names = [target.name for target in spec.targets]
    model = get_peft_model(
        base, PeftLoraConfig(r=spec.rank, lora_alpha=int(spec.alpha), target_modules=names, task_type="CAUSAL_LM")
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=train.learning_rate, weight_decay=train.weight_decay)
    sizes = {"tokens": train.max_seq_length, "answer_tokens": train.max_target_length}
    stream = Stream(data.task.name, data.train, **sizes, seed=config.seed)
    started = 0.0
    for step in range(steps + 3):
        if step == 3:
            _wait(device)
            started = time.perf_counter()
        listed = [(data.train, stream.row()) for _ in range(train.rows_per_task)]
        rows = pack(listed, **sizes, groups=[0] * len(listed)).to(device)
        optimizer.param_groups[0]["lr"] = train.learning_rate * schedule(
            min(step, train.max_steps - 1), train.max_steps, train.warmup_ratio
        )
        place = torch.arange(rows.tokens.shape[1], device=device)
        visible = (rows.documents[:, :, None] == rows.documents[:, None, :]) & (place[:, None] >= place)
        hidden = base.base_model(
            input_ids=rows.tokens, position_ids=rows.positions, attention_mask=visible[:, None], use_cache=False
        ).last_hidden_state
        chosen = hidden.gather(1, rows.label_positions[..., None].expand(-1, -1, hidden.shape[-1]))
        logits = base.lm_head(chosen).float()
        losses = F.cross_entropy(logits.flatten(0, 1), rows.labels.flatten(), reduction="none")
        optimizer.zero_grad()
        (losses * rows.weights.flatten()).sum().backward()
        torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)
        optimizer.step()
    _wait(device)
    model.unload()
    base.requires_grad_(False)
    return (time.perf_counter() - started) / steps


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def tiny_config(folder: Path) -> TaskLorasConfig:
    """Six little tasks and a model of two layers, written to a folder."""
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder / "base")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=264, num_key_value_heads=2, initializer_range=0.3, **shape)
    ).save_pretrained(folder / "base")
    rows = [
        {"task": word, "description": f"Say {word}.", "input": f"{n}?", "output": word}
        for word in ("yes", "no", "up", "down", "in", "out")
        for n in range(10, 50)
    ]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return TaskLorasConfig(
        base=str(folder / "base"),
        lora=LoraConfig(r=2, lora_alpha=4),
        data=TaskLorasDataConfig(tasks=(str(folder / "own.jsonl"),)),
        train=TaskLorasTrainConfig(
            max_steps=12, eval_steps=4, max_seq_length=64, max_target_length=32, learning_rate=1e-2
        ),
    )


def measure(config: TaskLorasConfig, *, tasks: int, one_by_one: int, device: torch.device) -> dict[str, Any]:
    tokenizer = hub.load_tokenizer(config.base)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    base = hub.load_causal_lm(config.base, device=device, dtype=dtype)
    spec = AdapterSpec.from_config(base.config, config.base, config.lora)
    data = tokenize_tasks(load_tasks(config)[:tasks], config, tokenizer)
    together = ours(config, data, base, spec, device, len(data))
    alone = ours(config, data[:one_by_one], base, spec, device, 1)
    peft = plain_peft(config, data[0], base, spec, device, config.train.max_steps) * config.train.max_steps
    differences = [abs(alone["losses"][name] - together["losses"][name]) for name in alone["losses"]]
    for way in (together, alone):
        way["mean_loss"] = sum(way["losses"].values()) / len(way["losses"])
        way.pop("losses")
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "adapters": len(data),
        "steps_each": config.train.max_steps,
        "many_at_once": together,
        "one_after_another": alone,
        "peft_eager_seconds_per_adapter": peft,
        "ratio": alone["seconds_per_adapter"] / together["seconds_per_adapter"],
        "ratio_to_peft": peft / together["seconds_per_adapter"],
        "largest_difference_in_validation_loss": max(differences),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/task-loras/paper-tasks.yaml"))
    parser.add_argument("--tasks", type=int, default=64, help="adapters at once")
    parser.add_argument("--one-by-one", type=int, default=3, help="adapters that are trained one after another")
    parser.add_argument("--steps", type=int, default=100, help="steps of each; a multiple of train.eval_steps")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--tiny", action="store_true", help="six tasks on a model made in memory, on the CPU")
    given = parser.parse_args(arguments)
    torch.set_float32_matmul_precision("high")
    if given.tiny:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(tiny_config(Path(folder)), tasks=6, one_by_one=2, device=torch.device("cpu"))
    else:
        config = build(TaskLorasConfig, load_yaml(given.config), where=str(given.config))
        config = replace(config, train=replace(config.train, max_steps=given.steps))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        result = measure(config, tasks=given.tasks, one_by_one=given.one_by_one, device=device)
    text = json.dumps(result, indent=2)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")
    return result


if __name__ == "__main__":
    main()
