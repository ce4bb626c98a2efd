"""lm-evaluation-harness asks the base under the adapter: its scores are those of PEFT with the saved adapter."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# The harness brings many packages along, so setting up for tests does not install it.
lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (text-to-lora[lm-eval])")

import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase  # noqa: E402
from vllm_helpers import BASE, bench, ended, needs_vllm  # noqa: E402

from t2l import hub  # noqa: E402
from t2l.errors import (  # noqa: E402
    AdapterNotAppliedError,
    CheckpointError,
    ConfigError,
    DescriptionError,
)
from t2l.eval.lm_eval import T2LLM, main  # noqa: E402
from t2l.text_to_lora import TextToLora  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # of a package that is not ours

DESCRIPTION = "Say whether the review is positive, or negative."
OTHER = "Add the two numbers."
REVIEWS = ["good film", "bad film, too long", "I laughed", "never again"]
CHOICES = {
    "task": "tiny_choice",
    "output_type": "multiple_choice",
    "doc_to_text": "Review: {{text}}\nAnswer:",
    "doc_to_target": "{{label}}",
    "doc_to_choice": ["yes", "no", "perhaps"],
    "metric_list": [{"metric": "acc"}],
}
WORDS = {
    "task": "tiny_words",
    "output_type": "generate_until",
    "doc_to_text": "Review: {{text}}\nAnswer:",
    "doc_to_target": "x",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two local tasks as the harness reads them: YAML, and a JSON file of items."""
    folder = tmp_path_factory.mktemp("tasks")
    items = "".join(json.dumps({"text": text, "label": i % 3}) + "\n" for i, text in enumerate(REVIEWS))
    (folder / "items.jsonl").write_text(items)
    data = {"dataset_path": "json", "test_split": "test", "num_fewshot": 0}
    files = {"dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}}}
    for task in (CHOICES, WORDS):
        (folder / f"{task['task']}.yaml").write_text(json.dumps(task | data | files))  # JSON is YAML
    return folder


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="module")
def saved(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (adapter,) = TextToLora.from_pretrained(str(checkpoint)).generate([DESCRIPTION])
    return adapter.save_pretrained(tmp_path_factory.mktemp("adapters") / "saved")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))


def evaluate(tasks: Path, model_args: dict[str, Any], *, names: tuple[str, ...] = ("tiny_choice",), **more: Any) -> Any:
    from lm_eval.tasks import TaskManager

    return lm_eval.simple_evaluate(
        model="t2l",
        model_args=model_args,
        tasks=list(names),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
        batch_size=3,
        log_samples=True,
        bootstrap_iters=0,
        **more,
    )


def scores(results: Any) -> torch.Tensor:
    """Log-likelihoods of the choices, items x choices."""
    samples = sorted(results["samples"]["tiny_choice"], key=lambda sample: sample["doc_id"])
    return torch.tensor([[float(score) for score, _ in sample["filtered_resps"]] for sample in samples])


def expected(
    model: Any, tokenizer: PreTrainedTokenizerBase, make: Callable[[str], str], space: str = " "
) -> torch.Tensor:
    """The same, straight from a model."""
    rows = []
    for text in REVIEWS:
        context = tokenizer(make(f"Review: {text}\nAnswer:"), add_special_tokens=False).input_ids
        row = []
        for choice in CHOICES["doc_to_choice"]:
            more = tokenizer(space + choice, add_special_tokens=False).input_ids
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*context, *more]])).logits[0].log_softmax(-1)
            row.append(sum(float(logits[len(context) + i - 1, token]) for i, token in enumerate(more)))
        rows.append(row)
    return torch.tensor(rows)


def test_scores_are_those_of_peft(
    tasks: Path, checkpoint: Path, saved: Path, base_folder: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    written = {"base": str(base_folder), "checkpoint": str(checkpoint), "description": DESCRIPTION}
    results = evaluate(tasks, written)
    base = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    plain = expected(base, tiny_tokenizer, str)
    peft = PeftModel.from_pretrained(base, saved).eval()
    wanted = expected(peft, tiny_tokenizer, str)
    assert (scores(results) - wanted).abs().max() <= 1e-4
    assert (plain - wanted).abs().max() > 0.1
    assert results["config"]["description"] == DESCRIPTION
    assert results["config"]["adapter"].startswith("t2l-")

    read = scores(evaluate(tasks, {"adapter": str(saved)}))  # the base is the one that the adapter names
    assert (read - wanted).abs().max() <= 1e-4
    wrong = scores(evaluate(tasks, written | {"description": OTHER}))
    assert (wrong - wanted).abs().max() > 0.01

    def before(text: str) -> str:
        return f"{DESCRIPTION}\n\n{text}"

    told = evaluate(tasks, written | {"description_in_prompt": True})
    assert (scores(told) - expected(peft, tiny_tokenizer, before)).abs().max() <= 1e-4
    assert not told["samples"]["tiny_choice"][0]["arguments"][0][0].startswith(DESCRIPTION)

    def chat(text: str) -> str:
        return f"<s><user>{before(text)}\n<assistant>"

    told = evaluate(tasks, written | {"description_in_prompt": True}, apply_chat_template=True)
    sample = min(told["samples"]["tiny_choice"], key=lambda sample: sample["doc_id"])
    context, first = sample["arguments"][0]
    assert context == chat(f"Review: {REVIEWS[0]}\nAnswer:") and first.strip() == "yes"
    space = first.removesuffix("yes")  # the harness puts none where a template ends the context
    assert (scores(told) - expected(peft, tiny_tokenizer, chat, space)).abs().max() <= 1e-4


def test_words_are_those_of_peft(
    tasks: Path, checkpoint: Path, saved: Path, base_folder: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    results = evaluate(tasks, {"checkpoint": str(checkpoint), "description": DESCRIPTION}, names=("tiny_words",))
    samples = sorted(results["samples"]["tiny_words"], key=lambda sample: sample["doc_id"])
    base = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    peft = PeftModel.from_pretrained(base, saved).eval()
    for text, sample in zip(REVIEWS, samples, strict=True):
        ids = tiny_tokenizer(f"Review: {text}\nAnswer:", return_tensors="pt", add_special_tokens=False).input_ids
        out = peft.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=2
        )
        wanted = tiny_tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).split("\n")[0]
        assert sample["resps"][0][0] == wanted


def test_a_model_that_thinks_first_can_be_told_not_to(checkpoint: Path) -> None:
    lm = T2LLM(checkpoint=str(checkpoint), description=DESCRIPTION, device="cpu", enable_thinking=False)
    lm.tokenizer.chat_template = "{{ messages[0].content }}{% if not enable_thinking %}<think></think>{% endif %}"
    assert lm.apply_chat_template([{"role": "user", "content": "text"}]).endswith("text<think></think>")


def test_the_model_is_left_as_it_was(checkpoint: Path) -> None:
    lm = T2LLM(checkpoint=str(checkpoint), description=DESCRIPTION, device="cpu")
    assert not any(module._forward_hooks for module in lm.model.modules())
    assert lm.rank == 0 and lm.world_size == 1


@pytest.mark.slow  # the harness reads thousands of task files first
def test_the_command(tasks: Path, checkpoint: Path, tmp_path: Path) -> None:
    """A description with commas is given as JSON."""
    arguments = {"checkpoint": str(checkpoint), "description": DESCRIPTION}
    command = [sys.executable, "-c", "from t2l.eval.lm_eval import main; main()", "run", "--model", "t2l"]
    command += ["--model_args", json.dumps(arguments), "--tasks", "tiny_choice", "--include_path", str(tasks)]
    command += ["--device", "cpu", "--output_path", str(tmp_path / "out"), "--batch_size", "2"]
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "tiny_choice" in done.stdout
    (found,) = (tmp_path / "out").rglob("results_*.json")
    config = json.loads(found.read_text())["config"]
    assert config["model"] == "t2l" and config["description"] == DESCRIPTION


def test_the_harness_can_find_the_model() -> None:
    project = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lm_eval.models"] == {"t2l": f"{T2LLM.__module__}:{T2LLM.__qualname__}"}
    assert project["scripts"]["t2l-lm-eval"] == f"{main.__module__}:{main.__qualname__}"
    assert lm_eval.api.registry.get_model("t2l") is T2LLM


def test_what_is_not_clear_is_refused(checkpoint: Path, saved: Path) -> None:
    with pytest.raises(ConfigError, match="needs description=TEXT, or adapter=DIR"):
        T2LLM()
    with pytest.raises(ConfigError, match="name two adapters"):
        T2LLM(description=DESCRIPTION, adapter=str(saved))
    with pytest.raises(ConfigError, match="needs the description too"):
        T2LLM(adapter=str(saved), description_in_prompt=True)
    with pytest.raises(ConfigError, match="must be True or False, got 'yes'"):
        T2LLM(description=DESCRIPTION, description_in_prompt="yes")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"dtype must be one of .* got 'int8'"):
        T2LLM(description=DESCRIPTION, dtype="int8")
    with pytest.raises(DescriptionError):
        T2LLM(checkpoint=str(checkpoint), description=" ", device="cpu")
    lm = T2LLM(checkpoint=str(checkpoint), description=DESCRIPTION, device="cpu", description_in_prompt=True)
    with pytest.raises(ConfigError, match="has no prompt"):
        lm.loglikelihood_rolling([])


def test_an_adapter_without_effect_is_refused(
    make_checkpoint: Callable[..., Path], tmp_path: Path, saved: Path, base_folder: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "zero"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((saved / "adapter_config.json").read_bytes())
    zeros = {name: torch.zeros_like(x) for name, x in load_file(saved / "adapter_model.safetensors").items()}
    save_file(zeros, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterNotAppliedError, match=r"changes no answer of .* \(largest change of a logit: 0"):
        T2LLM(adapter=str(folder), device="cpu")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        T2LLM(base=str(base_folder), adapter=str(folder), device="cpu")


def test_a_checkpoint_that_reads_another_base_is_refused(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", revision="sha256:of-another")
    with pytest.raises(CheckpointError, match=r"was trained with the encoder .* at sha256:of-another"):
        T2LLM(checkpoint=str(other), description=DESCRIPTION, device="cpu")


# ------------------------------------------------------------------------------------------- the harness's own models


@needs_vllm
@pytest.mark.slow
def test_the_model_vllm_scores_as_the_model_hf_does(tasks: Path, tmp_path: Path) -> None:
    """The commands of docs/ecosystem.md, on the items of a local task."""
    (adapter,) = TextToLora.from_pretrained("t2l:smollm2-135m").generate([DESCRIPTION])
    folder, model = adapter.save_pretrained(tmp_path / "adapter"), hub.resolve(BASE)
    # vLLM's kernels for GPUs apply adapters in half precision only.
    dtype = "float32" if bench.on_cpu() else "bfloat16"
    more = f",dtype={dtype},enforce_eager=True,gpu_memory_utilization=0.4,max_model_len=512"
    given = {
        "hf": ("hf", f"pretrained={model},peft={folder},dtype={dtype}"),
        "vllm": ("vllm", f"pretrained={model},max_lora_rank=8,lora_local_path={folder}{more}"),
        "plain": ("vllm", f"pretrained={model}{more}"),
    }
    own = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    found = {}
    for name, (kind, arguments) in given.items():
        command = [sys.executable, "-m", "lm_eval", "run", "--model", kind, "--model_args", arguments, "--limit", "5"]
        command += ["--tasks", "tiny_choice", "--include_path", str(tasks), "--apply_chat_template", "--log_samples"]
        command += ["--output_path", str(tmp_path / name), *(["--device", "cpu"] if kind == "hf" else [])]
        with open(tmp_path / "log", "w") as log, ended(command, stdout=log, stderr=log, env=own) as process:
            assert process.wait(400) == 0, (tmp_path / "log").read_text()[-3000:]
        (file,) = (tmp_path / name).rglob("samples_tiny_choice_*.jsonl")
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        found[name] = scores({"samples": {"tiny_choice": samples}})
    assert found["hf"].shape == (len(REVIEWS), 3)
    tolerance = 1e-3 if dtype == "float32" else 0.5
    assert (found["vllm"] - found["hf"]).abs().max() <= tolerance
    assert (found["plain"] - found["hf"]).abs().max() > 0.5
