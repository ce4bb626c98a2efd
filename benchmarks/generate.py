"""How fast adapters are written: by head, batch size and type, alone, into PEFT folders and into a library of shards.

    python benchmarks/generate.py --device cpu --batches 1,8,32 --dtypes float32
    python benchmarks/generate.py --device cuda

Random weights and random encodings at the shape of Mistral-7B (q_proj and v_proj of 32 layers, rank 8) with the paper's
sizes, so nothing is downloaded and the encoder is left out. One call of `TextToLora.tensors` writes one batch. Two
limits are computed for each: bytes written at the device's memory bandwidth, measured by a copy, and 2·D floating-point
operations for each written number at its rate for matrix products, measured by one. `share` is what the slower of the
two allows, over what was taken. What is saved has two bytes a number; shards are written as by `t2l library generate`.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import MistralConfig

from t2l.checkpoint import Checkpoint, CheckpointConfig
from t2l.config import EncoderConfig, HypernetConfig, LoraConfig, PromptConfig
from t2l.encoder import Encoded
from t2l.hypernet import Hypernet
from t2l.mass import WRITERS, Generator, Settings, rows_per_shard
from t2l.shards import Origin, ShardedLibrary
from t2l.spec import AdapterSpec
from t2l.text_to_lora import TextToLora

EMBEDDING_SIZE = 1024
HEAD_SIZES = {"L": 512, "M": 512, "S": 512}


class RandomEncoder:
    """Stands in for a sentence encoder, so that only the hypernetwork is timed; its numbers are drawn once."""

    kind, embedding_size, max_tokens = "sentence", EMBEDDING_SIZE, 128

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.states = torch.randn(4096, EMBEDDING_SIZE).to(device, dtype)

    def encode(self, descriptions: list[str]) -> Encoded:
        """Random vectors, (N, E)."""
        return Encoded(self.states[: len(descriptions)])

    def count_tokens(self, texts: list[str]) -> list[int]:
        """One for each."""
        return [1] * len(texts)


def make_generator(variant: str, device: str, dtype: torch.dtype, layers: int) -> TextToLora:
    """A generator of the paper's sizes."""
    spec = AdapterSpec.from_config(MistralConfig(num_hidden_layers=layers), "mistral", LoraConfig(r=8, lora_alpha=16))
    return with_random_weights(spec, HypernetConfig(variant=variant, head_size=HEAD_SIZES[variant]), device, dtype)


def with_random_weights(spec: AdapterSpec, shape: HypernetConfig, device: str, dtype: torch.dtype) -> TextToLora:
    """A generator with random weights, of random encodings."""
    torch.manual_seed(0)
    hypernet = Hypernet(spec, embedding_size=EMBEDDING_SIZE, kind="sentence", config=shape)
    for linear in hypernet.head.write:
        linear.weight.data.normal_(std=0.02)
    settings = CheckpointConfig.current(
        {},
        embedding_size=EMBEDDING_SIZE,
        encoder=EncoderConfig(kind="sentence", model="random"),
        encoder_revision="",
        hypernet=shape,
        prompt=PromptConfig(),
    )
    hypernet = hypernet.to(device, dtype).eval().requires_grad_(False)
    return TextToLora(Checkpoint(hypernet, spec, settings), RandomEncoder(device, dtype), reference="random")


def seconds(function: Callable[[], object], device: str, budget: float) -> float:
    """Time of one call: the median of as many as fit into the budget, three at least, after one that warms up."""

    def once() -> float:
        started = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    once()
    times, began = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < budget:
        times.append(once())
    return sorted(times)[len(times) // 2]


def limits(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes written in a second by a copy, and floating-point operations in a second of a large matrix product."""
    size = 2**28 if device == "cuda" else 2**25
    source = torch.empty(size, dtype=dtype, device=device).fill_(1)
    target = torch.empty_like(source)
    bandwidth = source.nbytes / seconds(lambda: target.copy_(source), device, 0.5)
    side = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return bandwidth, 2 * side**3 / seconds(lambda: a @ b, device, 0.5)


def operations(generator: TextToLora) -> float:
    """Floating-point operations for each adapter of a batch, without the encoder's."""
    texts = [f"Description {n}." for n in range(8)]
    with FlopCounterMode(display=False) as counter:
        generator.tensors(texts)
    return counter.get_total_flops() / len(texts)


def in_folders(generator: TextToLora, dtype: torch.dtype, place: Path | None) -> float:
    """Seconds for each adapter that is written alone and saved as a PEFT folder."""

    def one() -> None:
        with tempfile.TemporaryDirectory(dir=place) as folder:
            generator.generate("A description.")[0].save_pretrained(Path(folder) / "adapter", dtype=dtype)

    return seconds(one, generator.device.type, 0.5)


def in_shards(generator: TextToLora, dtype: torch.dtype, options: argparse.Namespace) -> float:
    """Seconds for each adapter of a library of shards, written for `--shard-seconds`, the last byte included."""
    settings = Settings(
        checkpoint="random",
        dtype=str(dtype).removeprefix("torch."),
        batch_size=options.shard_batch,
        shard_bytes=options.shard_mb << 20,
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        origin = Origin(checkpoint_sha256="0", dtype=settings.dtype)
        library = ShardedLibrary.begin(Path(folder) / "library", generator.spec, origin)
        writer, size = Generator(generator, library, settings), rows_per_shard(generator.spec, settings)
        warm = [[f"Memory of shards {n} is made once."] * size for n in range(writer.threads + 1)]
        sum(writer.run(iter(warm)))

        def chunks() -> Iterator[list[str]]:
            for first in itertools.count(0, size):
                yield [f"Description {n}." for n in range(first, first + size)]
                if time.perf_counter() - began > options.shard_seconds:
                    return

        began = time.perf_counter()
        written = sum(writer.run(chunks()))
        return (time.perf_counter() - began) / written


def disk(options: argparse.Namespace) -> float:
    """Bytes in a second that threads write as a library's shards are written, with nothing else to do."""
    data = {"a": torch.ones(1 << 27)}

    def write(number: int) -> None:
        save_file(data, Path(folder) / str(number))

    with tempfile.TemporaryDirectory(dir=options.folder) as folder, ThreadPoolExecutor(WRITERS) as pool:
        began = time.perf_counter()
        list(pool.map(write, range(options.disk_files)))
        return options.disk_files * data["a"].nbytes / (time.perf_counter() - began)


def measure(options: argparse.Namespace) -> None:
    """Prints one line of a Markdown table for each combination."""
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}")
    if options.disk_files:
        print(f"disk {disk(options) / 1e9:.2f} GB/s by {WRITERS} threads")
    print()
    print("| head | type | batch | adapters/s | GB/s | share of the limit | × one at a time | saved, adapters/s | as |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for word in options.dtypes.split(","):
        dtype = getattr(torch, word)
        saved = torch.float16 if dtype == torch.float32 else dtype
        bandwidth, flops = limits(options.device, dtype)
        facts = [f"copy {bandwidth / 1e9:.0f} GB/s", f"matrix product {flops / 1e12:.1f} TFLOP/s"]
        for variant in options.variants.split(","):
            generator = make_generator(variant, options.device, dtype, options.layers)
            facts.append(f"{variant} {operations(generator) / 1e9:.2f} GFLOP an adapter")
            alone = 0.0
            for size in map(int, options.batches.split(",")):
                texts = [f"Description {n}." for n in range(size)]
                with torch.no_grad():
                    taken = seconds(lambda g=generator, t=texts: g.tensors(t), options.device, options.seconds)
                alone = alone or taken / size
                written = size * generator.spec.num_parameters
                least = max(written * dtype.itemsize / bandwidth, 2 * HEAD_SIZES[variant] * written / flops)
                kept = f"{1 / in_folders(generator, saved, options.folder):,.0f} | PEFT folder" if size == 1 else " | "
                rate = written * dtype.itemsize / taken / 1e9
                row = f"| {variant} | {word} | {size} | {size / taken:,.0f} | {rate:.2f}"
                print(f"{row} | {least / taken:.0%} | {alone * size / taken:.1f} | {kept} |", flush=True)
            shards = 1 / in_shards(generator, saved, options)
            print(
                f"| {variant} | {word} | | | | | | {shards:,.0f} | shards, {saved} |".replace("torch.", ""), flush=True
            )
            del generator
        print(f"<!-- {word}: {', '.join(facts)} -->", flush=True)


def main() -> None:
    """Reads the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--variants", default="L,M,S")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--batches", default="1,64,512", help="The first is what `one at a time` means.")
    parser.add_argument("--layers", type=int, default=32, help="Layers of the base; fewer for a quick look.")
    parser.add_argument("--seconds", type=float, default=1.0, help="For each number.")
    parser.add_argument("--shard-seconds", type=float, default=3.0, help="For each library of shards.")
    parser.add_argument(
        "--shard-batch", type=int, default=0, help="Descriptions of a forward pass; 0 is the command's."
    )
    parser.add_argument("--shard-mb", type=int, default=512, help="Largest size of a shard in MiB.")
    parser.add_argument("--disk-files", type=int, default=16, help="Files of 512 MiB for the disk's own speed.")
    parser.add_argument("--folder", type=Path, help="Where files are written for a while; the system's, if absent.")
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
