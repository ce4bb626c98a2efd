"""How fast adapters are written: by head, batch size and type, with and without saving them.

    python benchmarks/generate.py --device cpu --batches 1,8,32
    python benchmarks/generate.py --device cuda --batches 1,16,64,256,1024 --dtypes float32,bfloat16

Random weights and random encodings at the shape of Mistral-7B (q_proj and v_proj of 32 layers, rank 8) with the paper's
sizes, so nothing is downloaded and the encoder is left out. One call of `TextToLora.generate` writes one batch, tensors
and adapters. Two limits are computed for each: bytes written at the device's memory bandwidth, measured by a copy, and
2·D floating-point operations for each written number at its rate for matrix products, measured by one. `share` is what
the slower of the two allows, over what was taken.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import MistralConfig

from t2l.checkpoint import Checkpoint, CheckpointConfig
from t2l.config import EncoderConfig, HypernetConfig, LoraConfig, PromptConfig
from t2l.encoder import Encoded
from t2l.hypernet import Hypernet
from t2l.spec import AdapterSpec
from t2l.text_to_lora import TextToLora

EMBEDDING_SIZE = 1024
HEAD_SIZES = {"L": 512, "M": 512, "S": 512}


class RandomEncoder:
    """Stands in for a sentence encoder, so that only the hypernetwork is timed."""

    kind, embedding_size, max_tokens = "sentence", EMBEDDING_SIZE, 128

    def encode(self, descriptions: list[str]) -> Encoded:
        """Random vectors, (N, E)."""
        return Encoded(torch.randn(len(descriptions), EMBEDDING_SIZE))

    def count_tokens(self, texts: list[str]) -> list[int]:
        """One for each."""
        return [1] * len(texts)


def make_generator(variant: str, device: str, dtype: torch.dtype, layers: int) -> TextToLora:
    """A generator with random weights."""
    config = MistralConfig(num_hidden_layers=layers)
    spec = AdapterSpec.from_config(config, "mistral", LoraConfig(r=8, lora_alpha=16))
    shape = HypernetConfig(variant=variant, head_size=HEAD_SIZES[variant])
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
    return TextToLora(Checkpoint(hypernet, spec, settings), RandomEncoder(), reference="random")


def seconds(function: Callable[[], object], device: str, budget: float = 2.0) -> float:
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


def measure(options: argparse.Namespace) -> None:
    """Prints one line of a Markdown table for each combination."""
    print("| head | type | batch | adapters/s | GB/s | share of the limit | saved, adapters/s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for word in options.dtypes.split(","):
        dtype = getattr(torch, word)
        bandwidth, flops = limits(options.device, dtype)
        for variant in options.variants.split(","):
            generator = make_generator(variant, options.device, dtype, options.layers)
            numbers = generator.spec.num_parameters
            for size in map(int, options.batches.split(",")):
                texts = [f"Description {n}." for n in range(size)]
                with torch.no_grad():
                    taken = seconds(lambda g=generator, t=texts: g.generate(t, batch_size=len(t)), options.device)
                written = size * numbers
                least = max(written * dtype.itemsize / bandwidth, 2 * HEAD_SIZES[variant] * written / flops)
                adapters = generator.generate(texts[:8], batch_size=8)
                with tempfile.TemporaryDirectory() as folder:
                    began = time.perf_counter()
                    for n, adapter in enumerate(adapters):
                        adapter.save_pretrained(Path(folder) / str(n), dtype=dtype)
                    saving = (time.perf_counter() - began) / len(adapters)
                print(
                    f"| {variant} | {word} | {size} | {size / taken:,.0f} | "
                    f"{written * dtype.itemsize / taken / 1e9:.2f} | {least / taken:.0%} | "
                    f"{1 / (taken / size + saving):,.0f} |",
                    flush=True,
                )


def main() -> None:
    """Reads the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--variants", default="L,M,S")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--batches", default="1,16,64,256,1024")
    parser.add_argument("--layers", type=int, default=32, help="Layers of the base; fewer for a quick look.")
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
