"""Serves the default base with vLLM and the plug-in, and asks for adapters by their descriptions.

    python benchmarks/vllm_serve.py --out vllm_serve.json

Needs vLLM, for CUDA or built for CPUs; this library may be installed or run from a checkout. Four things are measured
and written as one JSON document:
- greedy answers of `t2l:<description>` through the OpenAI API against Transformers' under the same adapter;
- seconds until the first answer of a new description (its adapter is written and loaded on the way);
- tokens a second with the base alone, with one adapter and with eight adapters in flight;
- whether answers given while eight adapters are in flight are those given one at a time.
Exits with 1 if an adapter has no effect, an unknown name is answered, or too few answers agree.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

DESCRIPTIONS = (
    "Say whether the review is positive or negative.",
    "Translate the sentence into French.",
    "Name the language of the text.",
    "Decide whether the sentence is a question. Answer yes or no.",
    "Give the plural of the noun.",
    "Write the opposite of the word.",
    "Say whether the number is even or odd.",
    "Name the colour that the text is about.",
)
INPUTS = ("A dull film; I left early.", "The station is closed today.", "Où est la gare ?", "seven")
TOKENS = 32
SERVER_SECONDS = 420
LITTLE_MEMORY = {"VLLM_CPU_KVCACHE_SPACE": "1"}
"""GiB for the cache of keys and values on a CPU, where vLLM otherwise asks for 92 % of the memory."""
AGREEMENT = {"bfloat16": 0.8, "float32": 1.0}
"""Share of greedy answers that must be equal; bfloat16 rounds differently in differently shaped batches."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="t2l:smollm2-135m")
    parser.add_argument("--requests", type=int, default=512, help="requests of each throughput run")
    parser.add_argument("--port", type=int, default=8155)
    parser.add_argument("--dtype", choices=AGREEMENT, help="bfloat16 on a GPU, float32 on a CPU, if not given")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile; starting takes minutes")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    dtype = options.dtype or ("float32" if on_cpu() else "bfloat16")
    folder, rank = base_and_rank(options.checkpoint)
    arguments = ["--dtype", dtype, *lora_arguments(rank), *([] if options.compile else ["--enforce-eager"])]
    variables = {"VLLM_PLUGINS": "t2l", "T2L_VLLM_CHECKPOINT": options.checkpoint}
    prompts, expected = reference(options.checkpoint, dtype)
    with serving(folder, arguments, variables, options.port) as server:
        report = measure(server, prompts, expected, options.requests, AGREEMENT[dtype])
    report |= {"device": "cpu" if on_cpu() else "cuda", "dtype": dtype, "requests": options.requests}
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))
    problems = [name for name, fine in report["checks"].items() if not fine]
    if problems:
        sys.exit(f"failed: {', '.join(problems)}")


def on_cpu() -> bool:
    """Whether the vLLM that is installed is built for CPUs."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def base_and_rank(checkpoint: str) -> tuple[Path, int]:
    """The folder of a checkpoint's base model, and the rank under which vLLM takes its adapters."""
    from t2l import hub
    from t2l.checkpoint import read_config
    from t2l.ranks import next_rank
    from t2l.text_to_lora import checkpoint_folder

    spec, _ = read_config(checkpoint_folder(checkpoint))
    return hub.resolve(spec.base_model), next_rank(spec.rank)


def reference(checkpoint: str, dtype: str) -> tuple[list[list[list[int]]], list[list[str]]]:
    """Token ids of each description's prompts, and Transformers' greedy answers under its adapter."""
    import torch

    from t2l import hub
    from t2l.apply import apply_adapters
    from t2l.prompt import render, token_ids
    from t2l.text_to_lora import TextToLora

    generator = TextToLora.from_pretrained(checkpoint)
    base, device = generator.spec.base_model, "cpu" if on_cpu() else "cuda"
    model: Any = hub.load_causal_lm(base, device=device, dtype=getattr(torch, dtype))
    tokenizer: Any = hub.load_tokenizer(base)
    prompts, answers = [], []
    for adapter in generator.generate(DESCRIPTIONS):
        texts = [render(tokenizer, adapter.description, text, generator.prompt) for text in INPUTS]
        prompts.append(token_ids(tokenizer, texts))
        with apply_adapters(model, adapter), torch.no_grad():
            answers.append([greedy(model, tokenizer, ids) for ids in prompts[-1]])
    del model
    torch.cuda.empty_cache()
    return prompts, answers


def greedy(model: Any, tokenizer: Any, ids: list[int]) -> str:
    import torch

    given = torch.tensor([ids], device=model.device)
    out = model.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=TOKENS)
    return str(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))


# ---------------------------------------------------------------------------------------------------- the server


class Server:
    """A running server, and the two calls that are made of it."""

    def __init__(self, port: int, model: str, log: Path) -> None:
        self.url, self.model, self.log = f"http://127.0.0.1:{port}", model, log

    def call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as response:
            text = response.read()
        return json.loads(text) if text else {}

    def answer(self, prompt: list[int], description: str | None) -> tuple[str, int]:
        """A greedy answer, and of how many tokens it is."""
        model = self.model if description is None else f"t2l:{description}"
        body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": TOKENS}
        found = self.call("/v1/completions", body)
        return str(found["choices"][0]["text"]), int(found["usage"]["completion_tokens"])

    def status(self, model: str) -> int:
        try:
            self.call("/v1/completions", {"model": model, "prompt": "a", "max_tokens": 1})
        except urllib.error.HTTPError as error:
            return error.code
        return 200


def lora_arguments(rank: int) -> list[str]:
    """What vLLM is told to keep all of the adapters at once."""
    arguments = ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(len(DESCRIPTIONS))]
    return [*arguments, "--max-cpu-loras", str(2 * len(DESCRIPTIONS))]


@contextmanager
def serving(folder: Path, arguments: Sequence[str], variables: Mapping[str, str], port: int) -> Iterator[Server]:
    """vLLM with a base model named `base`, for the length of a `with` block; its log is shown where something fails.

    None of its processes outlives the block.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), "--served-model-name", "base"]
    command += ["--host", "127.0.0.1", "--port", str(port), *arguments]
    given = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}  # or no resolver is asked
    given |= LITTLE_MEMORY
    command += [] if on_cpu() else ["--gpu-memory-utilization", "0.5"]
    with tempfile.TemporaryDirectory() as scratch:
        paths = [str(declare_plugin(Path(scratch))), str(Path(__file__).resolve().parents[1] / "src")]
        given["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
        log, environment = Path(scratch) / "server.log", os.environ | given | variables
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        try:
            server = Server(port, "base", log)
            wait_until_up(server, process, log)
            yield server
        except Exception:
            print(tail(log), file=sys.stderr)
            raise
        finally:
            stop(process)
            for line in log.read_text(errors="replace").splitlines():
                if "t2l" in line:
                    print(line, file=sys.stderr)


def stop(process: "subprocess.Popen[Any]") -> None:
    """Ends a server and the processes that it started, which are of its group."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(30)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def declare_plugin(folder: Path) -> Path:
    """A folder for the path of Python's modules that declares the entry point, where the library is not installed."""
    installed = [entry.name for entry in metadata.entry_points(group="vllm.general_plugins")]
    if "t2l" not in installed:
        declared = folder / "t2l_checkout-0.dist-info"
        declared.mkdir()
        (declared / "METADATA").write_text("Metadata-Version: 2.1\nName: t2l-checkout\nVersion: 0\n")
        (declared / "entry_points.txt").write_text("[vllm.general_plugins]\nt2l = t2l.vllm_plugin:register\n")
    return folder


def wait_until_up(server: Server, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + SERVER_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            server.call("/health")
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    sys.exit(f"vLLM did not start within {SERVER_SECONDS} s (exit code {process.poll()}):\n{tail(log)}")


def tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-40:])


# --------------------------------------------------------------------------------------------------- measuring


def measure(
    server: Server, prompts: list[list[list[int]]], expected: list[list[str]], requests: int, agreement: float
) -> dict[str, Any]:
    first = []
    for description, (prompt, *_) in zip(DESCRIPTIONS, prompts, strict=True):
        started = time.perf_counter()
        server.answer(prompt, description)
        first.append(round(time.perf_counter() - started, 3))
    alone = [
        [server.answer(prompt, description)[0] for prompt in row]
        for description, row in zip(DESCRIPTIONS, prompts, strict=True)
    ]
    plain = [[server.answer(prompt, None)[0] for prompt in row] for row in prompts]
    pairs = [(found, wanted) for row in zip(alone, expected, strict=True) for found, wanted in zip(*row, strict=True)]
    changed = [any(a != b for a, b in zip(*rows, strict=True)) for rows in zip(alone, plain, strict=True)]
    together, eight = throughput(server, prompts, DESCRIPTIONS, requests)
    cells = [(n, m) for n in range(len(DESCRIPTIONS)) for m in range(len(INPUTS))]
    same = [answer == alone[n][m] for answer, (n, m) in zip(together, cycle(cells, requests), strict=True)]
    _, one = throughput(server, prompts, (DESCRIPTIONS[0],), requests)
    _, base = throughput(server, prompts, (None,), requests)
    equal = sum(found == wanted for found, wanted in pairs)
    names = [card["id"] for card in server.call("/v1/models")["data"]]
    return {
        "versions": {name: metadata.version(name) for name in ("vllm", "torch", "transformers")},
        "equal_to_transformers": f"{equal} of {len(pairs)}",
        "different": [{"vllm": found, "transformers": wanted} for found, wanted in pairs if found != wanted],
        "seconds_to_first_answer": first,
        "tokens_per_second": {"base": base, "one_adapter": one, "eight_adapters": eight},
        "same_in_flight_as_alone": f"{sum(same)} of {len(same)}",
        "models": names,
        "checks": {
            "every adapter changes an answer": all(changed),
            "answers agree with Transformers'": equal >= agreement * len(pairs),
            "answers in flight are those given alone": sum(same) >= agreement * len(same),
            "an unknown name is 404": server.status("nobody/knows-this") == 404,
            "an empty description is 404": server.status("t2l:") == 404,
            "eight adapters are listed": sum(name.startswith("t2l-") for name in names) == len(DESCRIPTIONS),
        },
    }


def cycle(cells: Sequence[tuple[int, int]], number: int) -> list[tuple[int, int]]:
    return [cells[n % len(cells)] for n in range(number)]


def throughput(
    server: Server, prompts: list[list[list[int]]], descriptions: Sequence[str | None], requests: int
) -> tuple[list[str], float]:
    """Answers to requests that go round descriptions and inputs, 64 at once, and tokens a second after a warm-up."""
    cells = [(n, m) for n in range(len(descriptions)) for m in range(len(INPUTS))]

    def ask(cell: tuple[int, int]) -> tuple[str, int]:
        n, m = cell
        return server.answer(prompts[n][m], descriptions[n])

    with ThreadPoolExecutor(64) as pool:
        list(pool.map(ask, cycle(cells, min(64, requests))))
        started = time.perf_counter()
        answers = list(pool.map(ask, cycle(cells, requests)))
        seconds = time.perf_counter() - started
    return [text for text, _ in answers], round(sum(tokens for _, tokens in answers) / seconds, 1)


if __name__ == "__main__":
    main()
