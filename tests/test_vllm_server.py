"""Adapters in a real vLLM server: by description, by name, from a folder, and merged; answers are Transformers'.

On a CPU all is float32, and every greedy answer must be equal. vLLM's kernels for GPUs apply adapters in half precision
only: there it is bfloat16, and the share of equal answers that the benchmark demands.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import t2l
from vllm_helpers import BASE, bench, needs_vllm

from t2l import hub
from t2l.apply import apply_adapters
from t2l.text_to_lora import TextToLora, checkpoint_folder

pytestmark = [pytest.mark.slow, needs_vllm, pytest.mark.filterwarnings("default")]
CHECKPOINT = "t2l:smollm2-135m"
NAMED = bench.DESCRIPTIONS[0]


@dataclass(frozen=True)
class Served:
    server: Any
    base: Path
    cache: Path
    """Where vLLM's own resolver looks for adapters."""
    written: Path
    """Where the plug-in writes them."""
    prompts: list[list[list[int]]]
    expected: list[list[str]]
    dtype: str

    def answers(self, model: str) -> list[str]:
        """To the first description's prompts."""
        return [ask(self.server, model, prompt) for prompt in self.prompts[0]]


def ask(server: Any, model: str, prompt: list[int], **more: Any) -> Any:
    body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": bench.TOKENS} | more
    (choice,) = server.call("/v1/completions", body)["choices"]
    return choice if more else choice["text"]


def run(*arguments: object) -> None:
    done = t2l(*arguments)
    assert done.exit_code == 0, done.output


def free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server with every setting of the plug-in, and vLLM's resolver of folders beside it.

    The base lies in a folder that the checkpoint does not know.
    """
    root = tmp_path_factory.mktemp("vllm")
    base, cache, written = (root / name for name in ("base", "cache", "written"))
    base.mkdir()
    cache.mkdir()
    for path in hub.resolve(BASE).iterdir():
        (base / path.name).symlink_to(path)
    (root / "names.yaml").write_text(json.dumps({"sentiment": NAMED}))
    dtype = "float32" if bench.on_cpu() else "bfloat16"
    prompts, expected = bench.reference(CHECKPOINT, dtype)
    variables = {
        "VLLM_PLUGINS": "t2l,lora_filesystem_resolver",
        "VLLM_LORA_RESOLVER_CACHE_DIR": str(cache),
        "T2L_VLLM_CHECKPOINT": str(checkpoint_folder(CHECKPOINT)),
        "T2L_VLLM_BASE": str(base),
        "T2L_VLLM_ADAPTERS": str(root / "names.yaml"),
        "T2L_VLLM_MAX_ADAPTERS": str(len(bench.DESCRIPTIONS)),
        "T2L_VLLM_RANK": "16",
        "T2L_VLLM_FOLDER": str(written),
    }
    arguments = ["--dtype", dtype, "--enforce-eager", *bench.lora_arguments(16)]
    with bench.serving(base, arguments, variables, free_port()) as server:
        yield Served(server, base, cache, written, prompts, expected, dtype)
    assert list(written.iterdir()) == [], "the adapters go with the server"


def test_answers_are_those_of_transformers_also_with_eight_adapters_at_once(served: Served) -> None:
    share = bench.AGREEMENT[served.dtype]
    report = bench.measure(served.server, served.prompts, served.expected, 32, share)
    assert all(report["checks"].values()), report


def test_probabilities_are_those_of_transformers(served: Served) -> None:
    """Within 0.001 of each of the first token's five likeliest logarithms in float32, within 0.2 in bfloat16."""
    (adapter,) = TextToLora.from_pretrained(CHECKPOINT).generate([NAMED])
    model = hub.load_causal_lm(BASE, device="cpu", dtype=torch.float32)
    for prompt in served.prompts[0]:
        found = ask(served.server, f"t2l:{NAMED}", prompt, logprobs=5, max_tokens=1, return_tokens_as_token_ids=True)
        tops = found["logprobs"]["top_logprobs"][0]
        ids = [int(token.removeprefix("token_id:")) for token in tops]
        with torch.no_grad(), apply_adapters(model, adapter):
            wanted = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)[ids]
        difference = (torch.tensor(list(tops.values())) - wanted).abs().max()
        assert difference <= (1e-3 if served.dtype == "float32" else 0.2)


def test_a_registered_name_stands_for_its_description(served: Served) -> None:
    assert served.answers("sentiment") == served.answers(f"t2l:{NAMED}")
    listed = {card["id"] for card in served.server.call("/v1/models")["data"]}
    (folder,) = served.written.iterdir()
    for path in folder.iterdir():
        assert path.name in listed
        assert json.loads((path / "adapter_config.json").read_text())["r"] == 16


def test_a_description_is_a_model_of_the_official_client(served: Served) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{served.server.url}/v1", api_key="none")
    messages = [{"role": "user", "content": bench.INPUTS[0]}]
    settings = {"messages": messages, "temperature": 0, "max_tokens": bench.TOKENS}
    reply = client.chat.completions.create(model=f"t2l:{NAMED}", **settings)
    again = client.chat.completions.create(model=reply.model, **settings)
    assert reply.model.startswith("t2l-") and len(reply.model) == 20
    assert reply.choices[0].message.content == again.choices[0].message.content != ""


def test_no_more_are_written_than_allowed(served: Served) -> None:
    for description in bench.DESCRIPTIONS:
        assert served.server.status(f"t2l:{description}") == 200
    assert served.server.status("t2l:A ninth description.") == 404
    assert "as many as T2L_VLLM_MAX_ADAPTERS allows" in served.server.log.read_text()
    assert served.server.status(f"t2l:{bench.DESCRIPTIONS[3]}") == 200


def test_vllms_own_resolver_takes_what_export_writes(served: Served) -> None:
    arguments = ["export", "peft", NAMED, "--vllm", "-o"]
    run(*arguments, served.cache / "review", "--base-name", served.base)
    run(*arguments, served.cache / "stranger", "--base-name", "another/base")
    answers = served.answers("review")
    assert answers == served.answers(f"t2l:{NAMED}")
    assert answers != served.answers("base")
    assert served.server.status("stranger") == 404


def test_a_merged_model_is_served_like_any_other(served: Served, tmp_path: Path) -> None:
    run("merge", NAMED, "-o", tmp_path / "merged")
    arguments = ["--dtype", served.dtype, "--enforce-eager"]
    with bench.serving(tmp_path / "merged", arguments, {}, free_port()) as server:
        found = [ask(server, "base", prompt) for prompt in served.prompts[0]]
    equal = sum(a == b for a, b in zip(found, served.expected[0], strict=True))
    assert equal >= bench.AGREEMENT[served.dtype] * len(found), (found, served.expected[0])
    assert found != served.answers("base")
