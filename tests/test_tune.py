"""Tuning on a few examples: what is trained and measured is what PEFT and the library's own hooks compute."""

import json
import os
import signal
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_base, make_config, make_tokenizer, random_lora
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from t2l import peft_io
from t2l.apply import apply_adapters
from t2l.cli import app
from t2l.config import LoraConfig, PromptConfig
from t2l.errors import ConfigError, DataError, DescriptionError, TrainingError
from t2l.prompt import render
from t2l.spec import AdapterSpec
from t2l.text_to_lora import LoraAdapter
from t2l.train.tune import TuneConfig, read_examples, tune

EXAMPLES = [(f"number {n}", "even" if n % 2 == 0 else "odd") for n in range(16)]
PROMPT = PromptConfig()
QUICK = TuneConfig(learning_rate=3e-2, max_epochs=6, patience=6)


def make_adapter(size: float = 0.05, **lora: Any) -> LoraAdapter:
    spec = AdapterSpec.from_config(make_config(), "tiny", LoraConfig(**({"r": 4, "lora_alpha": 8} | lora)))
    return LoraAdapter(random_lora(spec, size=size), spec, "Say whether the number is even or odd.", {"seed": "7"})


@pytest.fixture
def base() -> tuple[Any, Any]:
    return make_base(make_config()), make_tokenizer()


@torch.no_grad()
def held_out_loss(base: tuple[Any, Any], adapter: LoraAdapter, seed: int = 0) -> float:
    """Mean loss of an answer's token, one example at a time, under the library's own hooks."""
    import random

    model, tokenizer = base
    chosen = random.Random(seed).sample(range(len(EXAMPLES)), len(EXAMPLES))[:4]
    total, tokens = 0.0, 0
    for text, answer in (EXAMPLES[i] for i in chosen):
        asked = tokenizer(render(tokenizer, adapter.description, text, PROMPT), add_special_tokens=False).input_ids
        said = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False).input_ids
        with apply_adapters(model, adapter):
            logits = model(torch.tensor([[*asked, *said]])).logits[0]
        total += float(cross_entropy(logits[len(asked) - 1 : -1], torch.tensor(said), reduction="sum"))
        tokens += len(said)
    return total / tokens


@pytest.mark.parametrize("rslora", [False, True])
def test_losses_are_those_of_the_adapters(rslora: bool, base: tuple[Any, Any]) -> None:
    """The first is that of the adapter given, the best is that of the adapter that comes out."""
    adapter = make_adapter(use_rslora=rslora, target_modules=("down_proj", "q_proj"), layers_to_transform=(0, 2))
    tuned = tune(adapter, base, EXAMPLES, prompt=PROMPT, config=QUICK)
    assert tuned.trained_on == 12
    assert tuned.held_out_losses[0] == pytest.approx(held_out_loss(base, adapter), rel=1e-4)
    assert tuned.held_out_losses[tuned.best_epoch] == pytest.approx(held_out_loss(base, tuned.adapter), rel=1e-4)
    assert min(tuned.held_out_losses) == tuned.held_out_losses[tuned.best_epoch] < 0.7 * tuned.held_out_losses[0]
    assert tuned.adapter.spec == adapter.spec
    assert tuned.adapter.provenance["tuned on"] == f"12 examples, 4 held out, {tuned.best_epoch} rounds, seed 0"


def test_the_base_is_as_it_was(base: tuple[Any, Any]) -> None:
    model, _ = base
    before = {name: value.clone() for name, value in model.state_dict().items()}
    places = {name: type(module) for name, module in model.named_modules()}
    tune(make_adapter(), base, EXAMPLES, prompt=PROMPT, config=replace(QUICK, max_epochs=1))
    assert {name: type(module) for name, module in model.named_modules()} == places
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())


def test_scratch_begins_with_the_plain_base(base: tuple[Any, Any]) -> None:
    adapter = make_adapter()
    nothing = replace(adapter, lora=adapter.lora.map(torch.zeros_like))
    tuned = tune(adapter, base, EXAMPLES, prompt=PROMPT, config=QUICK, start="scratch")
    assert tuned.held_out_losses[0] == pytest.approx(held_out_loss(base, nothing), rel=1e-4)
    assert tuned.adapter.provenance["tuned from"] == "a fresh LoRA"


def test_it_is_never_worse_on_the_held_out_examples(base: tuple[Any, Any]) -> None:
    """An adapter that knows the task, and steps that are far too large: what comes out is what went in, to the bit."""
    same = [(text, "yes") for text, _ in EXAMPLES]
    known = tune(make_adapter(), base, same, prompt=PROMPT, config=replace(QUICK, max_epochs=20)).adapter
    wild = TuneConfig(learning_rate=50.0, max_epochs=9, patience=2, max_grad_norm=1e9)
    tuned = tune(known, base, same, prompt=PROMPT, config=wild)
    assert tuned.held_out_losses[0] < 0.5
    assert tuned.best_epoch == 0
    assert len(tuned.held_out_losses) == 3  # patience
    for m in range(len(known.lora.a)):
        assert torch.equal(tuned.adapter.lora.a[m], known.lora.a[m])
        assert torch.equal(tuned.adapter.lora.b[m], known.lora.b[m])


def test_it_ends_where_nothing_is_left_to_learn(base: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    first = tune(make_adapter(), base, EXAMPLES, prompt=PROMPT, config=QUICK).held_out_losses
    monkeypatch.setattr("t2l.train.tune.SOLVED", (first[1] + first[2]) / 2)
    tuned = tune(make_adapter(), base, EXAMPLES, prompt=PROMPT, config=QUICK)
    assert first[2] < first[1] and tuned.held_out_losses == first[:3] and tuned.best_epoch == 2


def test_a_seed_decides_everything(base: tuple[Any, Any]) -> None:
    one, same = (tune(make_adapter(), base, EXAMPLES, prompt=PROMPT, config=QUICK) for _ in range(2))
    assert one.held_out_losses == same.held_out_losses
    assert all(torch.equal(x, y) for x, y in zip(one.adapter.lora.b, same.adapter.lora.b, strict=True))
    torch.manual_seed(99)
    other = tune(make_adapter(), base, EXAMPLES, prompt=PROMPT, config=replace(QUICK, seed=1))
    assert other.held_out_losses != one.held_out_losses


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([("a", "b")], "at least two examples, one of them to hold out; got 1"),
        ([{"input": "a", "output": "b"}] * 4, "Example 0 is .*; examples are pairs of texts, input and answer"),
        (["ab", "cd"], "Example 0 is 'ab'; examples are pairs of texts"),
        ([("a", "b"), ("a", 3)], "Example 1 is .*; examples are pairs of texts"),
        ([("a", "b"), ("c", " ")], "Example 1 has a blank answer"),
        ([("a", "b"), ("long " * 300, "c")], r"Example 1 takes \d+ tokens, answer included; at most 1024 are read"),
    ],
)
def test_bad_examples_are_refused(examples: Any, message: str, base: tuple[Any, Any]) -> None:
    with pytest.raises(DataError, match=message):
        tune(make_adapter(), base, examples, prompt=PROMPT)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"learning_rate": -1.0}, "tune.learning_rate must be above 0, got -1"),
        ({"held_out": 1.0}, "tune.held_out must be above 0 and below 1, got 1.0"),
        ({"batch_size": 0}, "tune.batch_size must be at least 1, got 0"),
        ({"max_grad_norm": float("nan")}, "tune.max_grad_norm must be a finite number"),
    ],
)
def test_bad_settings_are_refused(setting: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TuneConfig(**setting)


def test_prompts_that_show_a_description_need_one(base: tuple[Any, Any]) -> None:
    nameless = replace(make_adapter(), description="")
    with pytest.raises(DescriptionError, match="this adapter has none; tune it with prompts that do not"):
        tune(nameless, base, EXAMPLES, prompt=PromptConfig(description_in_prompt=True))


@pytest.mark.parametrize("rounds", [0, 2])
def test_ctrl_c_keeps_the_best_of_the_rounds_that_were_done(rounds: int, base: tuple[Any, Any]) -> None:
    """It is the adapter of a tuning that had so many rounds from the start, and the base is as it was."""
    found: list[str] = []

    def log(text: str) -> None:
        found.append(text)
        if len(found) == rounds:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    if rounds == 0:
        hook = base[0].register_forward_hook(lambda *_: (os.kill(os.getpid(), signal.SIGINT), hook.remove())[1])
    tuned = tune(make_adapter(), base, EXAMPLES, prompt=PROMPT, config=QUICK, log=log)
    assert tuned.interrupted and len(tuned.held_out_losses) == rounds + 1
    assert signal.getsignal(signal.SIGINT) is before
    whole = tune(make_adapter(), base, EXAMPLES, prompt=PROMPT, config=QUICK)
    assert tuned.held_out_losses == whole.held_out_losses[: rounds + 1] and not whole.interrupted
    best = min(range(rounds + 1), key=tuned.held_out_losses.__getitem__)
    assert tuned.best_epoch == best


def test_nothing_is_warned_of_that_a_user_cannot_mend(base: tuple[Any, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tune(make_adapter(), base, EXAMPLES, prompt=PROMPT, config=TuneConfig(max_epochs=1))


def test_a_loss_that_is_no_number_ends_it(base: tuple[Any, Any]) -> None:
    adapter = make_adapter()
    broken = replace(adapter, lora=adapter.lora.map(lambda x: x * float("inf")))
    with pytest.raises(TrainingError, match="The loss on held-out examples is nan; lower learning_rate"):
        tune(broken, base, EXAMPLES, prompt=PROMPT)
    assert not hasattr(base[0], "peft_config")


def test_lines_are_read_and_named(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text('{"input": "a", "output": "b\u2028c", "id": 3}\n\n{"input": "d", "output": "e"}\n')
    assert read_examples(path) == [("a", "b\u2028c"), ("d", "e")]
    for line, message in (
        ("{", r"examples\.jsonl:1 cannot be read as JSON"),
        ("input,output", r"JSON lines are wanted: one JSON document on each line"),
        ('{"inptu": "a", "output": "b"}', "not blank; it has inptu, output$"),
        ("[" * 100_000, r"examples\.jsonl:1 cannot be read as JSON"),
        ('{"input": "a"}', r"examples\.jsonl:1 must be an object whose input and output are texts"),
        ('["input"]', "must be an object"),
        ('{"input": "a", "output": 3}', "must be an object"),
    ):
        path.write_text(line)
        with pytest.raises(DataError, match=message):
            read_examples(path)


def test_the_command_writes_a_peft_folder(make_checkpoint: Any, tmp_path: Path) -> None:
    checkpoint = str(make_checkpoint(tmp_path / "checkpoint"))
    lines = [json.dumps({"input": text, "output": answer}) for text, answer in EXAMPLES]
    (tmp_path / "examples.jsonl").write_text("\n".join(lines))
    text = "Say whether the number is even or odd."
    arguments = ["tune", text, "--examples", str(tmp_path / "examples.jsonl"), "--checkpoint", checkpoint]
    arguments += ["--learning-rate", "0.003", "--max-epochs", "2", "--json"]
    done = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "tuned")])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["held_out_losses"][0] > min(json.loads(done.stdout)["held_out_losses"])
    assert peft_io.read_facts(tmp_path / "tuned").rank == 4
    card = (tmp_path / "tuned" / "README.md").read_text()
    assert "Tuned on a few examples of the task" in card and "| tuned on | 12 examples, 4 held out" in card
    # A tuned adapter is an adapter: it can be tuned again.
    arguments[1] = str(tmp_path / "tuned")
    again = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "again")])
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["held_out_losses"][0] == pytest.approx(
        min(json.loads(done.stdout)["held_out_losses"]), rel=1e-4
    )
