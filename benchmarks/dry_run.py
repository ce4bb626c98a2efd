"""How near a dry run comes to the run: peak memory and seconds a step, estimated and then measured, in one process.

    python benchmarks/dry_run.py --out dry_run.json     # one GPU with 80 GB: Llama-3.1-8B's shape, a network of 55 M
    python benchmarks/dry_run.py --too-large            # the same with too many rows: is the advice it gives right?
    python benchmarks/dry_run.py --tiny                 # CPU, seconds: shows that it runs, measures little

Weights, descriptions' encodings and tasks are made here, so that no model and no data is needed: memory and time depend
on shapes alone. First `t2l train sft --dry-run`'s own estimate of a run; then the run, as `t2l train sft` takes its
steps, thirty of them after ten that compile and warm up.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))
from train_step import SHAPES, TINY, RandomEncoder, Shape, make_base

from t2l.config import EncoderConfig, HypernetConfig, LoraConfig
from t2l.hypernet import Hypernet
from t2l.spec import AdapterSpec
from t2l.train.config import DataConfig, SftConfig, TrainConfig
from t2l.train.dataset import RunData, prepare_data
from t2l.train.dry_run import sft_work
from t2l.train.embeddings import EmbeddingCache
from t2l.train.estimate import Estimate, estimate, size
from t2l.train.loop import StopRequest
from t2l.train.metrics import MetricLogger, peak_bytes, read_metrics
from t2l.train.processes import Processes
from t2l.train.resume import Progress
from t2l.train.sft import Session, fit, make_optimizer, stepping

WARM_UP, STEPS = 10, 30


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def write_tasks(path: Path, number: int = 16) -> None:
    """Own tasks whose rows can be filled."""
    rows = [
        {
            "task": f"task {n}",
            "description": f"Say {n} times what it is.",
            "input": f"Is it {k}? " * 4,
            "output": f"{n}",
        }
        | {"split": "val" if k < 4 else "train"}
        for n in range(number)
        for k in range(64)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def settings(shape: Shape, tasks: Path, *, rows: int, compiled: bool, tiny: bool) -> SftConfig:
    """The paper's run, cut short."""
    sizes = {"width": 24, "head_size": 16} if tiny else {"width": 128, "head_size": 512}
    return SftConfig(
        base=shape.name,
        lora=LoraConfig(target_modules=("q_proj", "v_proj"), r=8, lora_alpha=16, use_rslora=True),
        encoder=EncoderConfig(kind="sentence", model="random", max_tokens=512),
        hypernet=HypernetConfig(**sizes),
        data=DataConfig(tasks=str(tasks), held_out_descriptions=0),
        train=TrainConfig(
            max_steps=WARM_UP + STEPS,
            tasks_per_batch=rows,
            max_seq_length=shape.tokens,
            max_target_length=shape.answer_tokens,
            description_in_prompt_prob=0.0,
            l2_weight=1e-3,
            label_smoothing_factor=0.1,
            neftune_noise_alpha=5.0,
            torch_compile=compiled,
            logging_steps=WARM_UP,
            eval_steps=10**6,
            save_steps=10**6,
            report_to="none",
        ),
    )


def new_session(config: SftConfig, shape: Shape, base: Any, data: RunData, device: torch.device) -> Session:
    """What `t2l.train.sft.setup` makes of folders, made of what is in memory."""
    torch.manual_seed(0)
    encoder: Any = RandomEncoder("sentence", shape.sentence, 512, device)
    spec = AdapterSpec.from_config(base.config, shape.name, config.lora)
    network = Hypernet(spec, embedding_size=shape.sentence, kind="sentence", config=config.hypernet)
    network.to(device).train()
    cache = EmbeddingCache(encoder, data.texts)
    optimizer = make_optimizer(network, config.train)
    return Session(
        config, Processes(device), byte_tokenizer(), base, encoder, data, cache, spec, network, None, optimizer
    )


def forget(device: torch.device) -> None:
    """Frees what is gone, so that the next peak is the next run's."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def estimated(session: Session) -> Estimate:
    """The dry run, which begins where the models are loaded."""
    with stepping(session) as trainer:
        return estimate(sft_work(session, trainer, 0.0), budget=20.0)


def run_really(session: Session, run: Path) -> dict[str, float]:
    """The run itself; returns its last steps' mean time and its peak."""
    train = session.config.train
    logger = MetricLogger(run, {}, steps=train.max_steps, first_step=0, report_to="none", bar=False, log=lambda _: None)
    with logger, StopRequest(None) as stop:
        fit(session, run, Progress(), logger, stop)
    rows = [row for row in read_metrics(run) if "seconds_per_step" in row][1:]  # without what compiled and warmed up
    return {
        "seconds": sum(row["seconds_per_step"] for row in rows) / len(rows),
        "peak": peak_bytes(session.device),
        "steps": len(rows) * train.logging_steps,
    }


def compare(shape: Shape, device: torch.device, *, rows: int, compiled: bool, tiny: bool) -> dict[str, Any]:
    """Estimate and run of one setting."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        base = make_base(shape, device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        write_tasks(Path(folder) / "own.jsonl")
        config = settings(shape, Path(folder) / "own.jsonl", rows=rows, compiled=compiled, tiny=tiny)
        data = prepare_data(config, byte_tokenizer(), lambda texts: [1] * len(texts))
        print(f"made in {time.perf_counter() - started:.0f} s", flush=True)
        forget(device)
        started = time.perf_counter()
        found = estimated(new_session(config, shape, base, data, device))
        print(f"{found.table()}\nestimated in {time.perf_counter() - started:.0f} s", flush=True)
        result: dict[str, Any] = {"estimate": found.plain(), "rows": rows, "compiled": compiled}
        if not found.fits:  # then what it advises must fit
            rows = int(found.advice.split("=")[1].split()[0])
            config = replace(config, train=replace(config.train, tasks_per_batch=rows))
            data = prepare_data(config, byte_tokenizer(), lambda texts: [1] * len(texts))
        forget(device)
        started = time.perf_counter()
        really = run_really(new_session(config, shape, base, data, device), Path(folder) / "run")
    print(
        f"really, {rows} rows: {really['seconds'] * 1000:.1f} ms a step, {size(really['peak'])} "
        f"({really['steps']:.0f} steps; {time.perf_counter() - started:.0f} s in all)"
    )
    result |= {"really": really, "rows_run": rows}
    if found.fits:
        ratios = {"seconds": found.seconds_per_step / really["seconds"], "peak": found.peak / really["peak"]}
        print(f"estimate / run: seconds {ratios['seconds']:.3f}, peak {ratios['peak']:.3f}", flush=True)
        result["ratios"] = ratios
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--rows", type=int, help="of a step; 8, or 256 with --too-large")
    parser.add_argument("--too-large", action="store_true", help="more rows than fit; not compiled")
    parser.add_argument("--out", type=Path, help="JSON with all numbers")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --tiny runs anywhere")
    device = torch.device("cpu" if arguments.tiny else "cuda")
    shape = TINY if arguments.tiny else replace(SHAPES[0], tokens=640, answer_tokens=256)
    torch.set_float32_matmul_precision("high")
    rows = arguments.rows or (256 if arguments.too_large else 4 if arguments.tiny else 8)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}", flush=True)
    compiled = device.type == "cuda" and not arguments.too_large
    result = compare(shape, device, rows=rows, compiled=compiled, tiny=arguments.tiny)
    if arguments.out:
        record = {"device": name, "torch": torch.__version__, **result}
        arguments.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
