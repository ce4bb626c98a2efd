"""Weak scaling of fine-tuning: the same rows for each GPU, on one and on all of them, in one command.

    python benchmarks/scaling.py --out scaling.json     # every GPU there is; some two minutes, most of it compiling
    python benchmarks/scaling.py --tiny                 # two processes on the CPU: shows that it runs, measures nothing

Steps are those of `t2l train sft` (forward, backward, gradients added up, clipping, optimiser) at Llama-3.1-8B's shape,
with random weights that are made on the device. No model and no data are needed.

    1 GPU         one process trains, the others wait
    N GPUs        the hypernetwork in each (DDP), and the whole base in each
    N GPUs, FSDP  the hypernetwork in each, the base sharded over them (train.fsdp)
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from train_step import SHAPES, TINY, RandomEncoder, Shape, llama_config, packed_batch

from t2l.apply import compiled, decoder_layers, hooked
from t2l.config import EncoderConfig, HypernetConfig, LoraConfig
from t2l.hypernet import Hypernet
from t2l.spec import AdapterSpec
from t2l.train.batches import Batch
from t2l.train.config import SftConfig, TrainConfig
from t2l.train.embeddings import EmbeddingCache
from t2l.train.loss import answer_losses
from t2l.train.processes import Processes, join
from t2l.train.sft_step import Trainer, make_optimizer

TEXTS = 64
DEADLINE = 150.0
"""Seconds for everything, the start included."""


@dataclass
class Row:
    """One row of the table."""

    step: str
    devices: int
    milliseconds: float
    """Median over rounds of a step's mean."""
    spread: float
    """Of the rounds, largest over smallest."""
    tokens_per_second: float
    """Of each device; document tokens, padding not counted."""
    gigabytes: float
    """Peak of the first device."""
    scaling: float | None = None
    """Tokens per second of all devices over those of one alone."""


def make_base(shape: Shape, processes: Processes, *, sharded: bool) -> tuple[Any, AdapterSpec]:
    """A frozen Llama with random weights, which are made where they stay."""
    from transformers import LlamaForCausalLM

    device, config = processes.device, llama_config(shape)
    with torch.device("meta"):
        base: Any = LlamaForCausalLM(config).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    base.eval().requires_grad_(False)
    spec = AdapterSpec.from_config(config, shape.name, LoraConfig(r=8, lora_alpha=16))
    if sharded:
        processes.shard(base, decoder_layers(base, spec))
    base.to_empty(device=device)
    base.model.rotary_emb = type(base.model.rotary_emb)(config).to(device)  # its buffer is computed, not drawn
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in base.parameters():
            own = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            own.fill_(1.0) if parameter.dim() == 1 else own.normal_(std=0.02)
    return base, spec


@contextmanager
def stepping(shape: Shape, processes: Processes, *, sharded: bool, compile_: bool) -> Iterator[Any]:
    """Yields a function from processes to a trainer that takes steps with them, on one base and hypernetwork."""
    device = processes.device
    base, spec = make_base(shape, processes, sharded=sharded)
    encoder = RandomEncoder("sentence", shape.sentence, 128, device)
    torch.manual_seed(0)
    hypernet = Hypernet(spec, embedding_size=shape.sentence, kind="sentence", config=HypernetConfig()).to(device)
    bank = EmbeddingCache(encoder, [f"{n}" for n in range(TEXTS)])  # type: ignore[arg-type]
    train = TrainConfig(max_steps=10_000, fsdp="full_shard" if sharded else "off", torch_compile=compile_)
    config = SftConfig(base=shape.name, encoder=EncoderConfig(kind="sentence", model="none"), train=train)
    write = torch.compile(hypernet, dynamic=False) if compile_ else hypernet
    with hooked(base, spec) as slots, compiled(base, spec) if compile_ else nullcontext():
        losses = answer_losses(base, slots, fuse=compile_)

        def trainer(together: Processes) -> Trainer:
            wrapped = together.prepare(write)
            optimizer = make_optimizer(hypernet, train)
            return Trainer(config, base, hypernet, wrapped, losses, bank, optimizer, device, together, wrapped)

        yield trainer


def measure(trainer: Trainer, batch: Batch, *, warm_up: int, rounds: int, steps: int) -> tuple[list[float], float]:
    """(milliseconds of a step in each round, peak GB)."""
    device = trainer.device

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for step in range(warm_up):
        trainer.step(batch, step)
    wait()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    found = []
    for _ in range(rounds):
        trainer.processes.wait()
        started = time.perf_counter()
        for step in range(steps):
            loss, _ = trainer.step(batch, warm_up + step)
        wait()
        found.append((time.perf_counter() - started) / steps * 1000)
    assert loss.isfinite(), f"the loss is {loss.item()}"
    return found, torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0


def bench(
    shape: Shape,
    processes: Processes,
    show: Callable[[list[Row]], None],
    *,
    compile_: bool,
    warm_up: int,
    rounds: int,
    steps: int,
) -> None:
    """Measures all rows; those of the main process count, and `show` gets them after each one."""
    number, effort = processes.number, {"rounds": rounds, "steps": steps}
    alone, device = Processes(processes.device), processes.device
    small = packed_batch(shape, TEXTS, device)
    large = packed_batch(replace(shape, rows=shape.rows * number), TEXTS, device)
    rows: list[Row] = []

    def add(step: str, devices: int, batch: Batch, found: tuple[list[float], float]) -> None:
        times, memory = found
        rate = int((batch.rows.documents >= 0).sum()) / devices / statistics.median(times) * 1000
        scaling = rate * devices / rows[0].tokens_per_second if rows else None
        rows.append(Row(step, devices, statistics.median(times), max(times) / min(times), rate, memory, scaling))
        show(rows)

    with stepping(shape, processes, sharded=False, compile_=compile_) as trainer:
        one = trainer(alone)
        measure(one, small, warm_up=warm_up, rounds=1, steps=1)  # all at the same time, for it compiles
        processes.wait()
        if processes.main:
            add("alone", 1, small, measure(one, small, warm_up=1, **effort))
        processes.wait()
        del one
        found = measure(trainer(processes), large, warm_up=warm_up, **effort)
        if processes.main:
            add("base replicated", number, large, found)
    del trainer
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with stepping(shape, processes, sharded=True, compile_=compile_) as trainer:
        found = measure(trainer(processes), large, warm_up=warm_up, **effort)
        if processes.main:
            add("base sharded (FSDP2)", number, large, found)


def format_row(row: Row) -> str:
    """A line of the table."""
    scaling = "" if row.scaling is None else f"{row.scaling:.2f}"
    return (
        f"| {row.step} | {row.devices} | {row.milliseconds:.1f} (× {row.spread:.2f}) | {row.tokens_per_second:,.0f} | "
        f"{scaling} | {row.gigabytes:.1f} |"
    )


def work(arguments: argparse.Namespace) -> None:
    """One process of the benchmark."""
    tiny = arguments.tiny
    with join("cpu" if tiny else "cuda", timeout=DEADLINE) as processes:
        torch.set_float32_matmul_precision("high")
        shape = TINY if tiny else SHAPES[0]
        name = "CPU, tiny: these times mean nothing" if tiny else torch.cuda.get_device_name()
        if processes.main:
            print(f"{name}, torch {torch.__version__}; {shape.name}, {shape.rows} rows of {shape.tokens} tokens each\n")
            print("| step | devices | ms (spread) | tokens/s each | scaling | peak GB |")
            print("| --- | --- | --- | --- | --- | --- |", flush=True)

        def show(rows: list[Row]) -> None:
            print(format_row(rows[-1]), flush=True)
            if arguments.out:
                record = {"device": name, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}
                arguments.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

        bench(
            shape,
            processes,
            show,
            compile_=not (tiny or arguments.no_compile),
            warm_up=1 if tiny else 3,
            rounds=1 if tiny else arguments.rounds,
            steps=1 if tiny else arguments.steps,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, a step or two")
    parser.add_argument("--processes", type=int, help="as many as there are GPUs, if absent; two with --tiny")
    parser.add_argument("--no-compile", action="store_true", help="faster to start, slower steps")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="of a round")
    parser.add_argument("--out", type=Path, help="JSON with every row")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    number = arguments.processes or (2 if arguments.tiny else torch.cuda.device_count())
    if number < 2:
        parser.error(f"scaling needs two GPUs or more, here is {number}; --tiny runs anywhere")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    command = [sys.executable, *launcher, __file__, *sys.argv[1:], "--worker"]
    started = time.monotonic()
    try:
        code = subprocess.run(command, timeout=DEADLINE, check=False).returncode
    except subprocess.TimeoutExpired:
        sys.exit(f"not done after {DEADLINE:.0f} s; the rows above stand")
    print(f"\n{time.monotonic() - started:.0f} s in all")
    sys.exit(code)


if __name__ == "__main__":
    main()
