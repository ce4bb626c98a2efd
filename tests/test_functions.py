"""Functions made of descriptions: what they answer, what they share, and what they refuse."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_base, make_config, make_tokenizer

import t2l
from t2l import functions, hub
from t2l.apply import apply_adapters, largest_change
from t2l.errors import AdapterNotAppliedError, ConfigError, DataError, DescriptionError
from t2l.prompt import render, token_ids
from t2l.text_to_lora import LoraAdapter, TextToLora

TEXT = "Name the language of the text."
INPUTS = ["Où est la gare ?", "Wo?", "A much longer text than the others, which is padded on no side."]


@pytest.fixture(autouse=True)
def fresh() -> None:
    functions._runtime.cache_clear()


@pytest.fixture
def checkpoint(make_checkpoint: Any, tmp_path: Path) -> str:
    return str(make_checkpoint(tmp_path / "checkpoint"))


def expected(checkpoint: str, description: str, inputs: list[str], number: int) -> list[str]:
    """What `model.generate` answers under the adapter, one input at a time."""
    generator = TextToLora.from_pretrained(checkpoint)
    (adapter,) = generator.generate([description])
    model, tokenizer = make_base(make_config()), make_tokenizer()
    answers = []
    for ids in token_ids(tokenizer, [render(tokenizer, description, text, generator.prompt) for text in inputs]):
        given = torch.tensor([ids])
        with apply_adapters(model, adapter), torch.no_grad():
            out = model.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=number)
        answers.append(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip())
    return answers


def test_a_function_answers_as_the_adapted_model_does(checkpoint: str) -> None:
    f = t2l.function(TEXT, checkpoint=Path(checkpoint), max_new_tokens=7)
    wanted = expected(checkpoint, TEXT, INPUTS, 7)
    assert f(INPUTS) == wanted
    assert [f(text) for text in INPUTS] == wanted
    assert f([]) == []
    assert f.description == TEXT and f.largest_logit_change > 0


def test_functions_share_the_base_and_keep_apart(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    load = hub.load_causal_lm
    monkeypatch.setattr(
        hub, "load_causal_lm", lambda *args, **kwargs: (loaded.append(args[0]), load(*args, **kwargs))[1]
    )
    one = t2l.function(TEXT, checkpoint=checkpoint, max_new_tokens=7)
    before = one(INPUTS)
    other = t2l.function("Add the two numbers.", checkpoint=checkpoint, max_new_tokens=7)
    assert len(loaded) == 1  # this checkpoint reads the base's own states: that is the same base too
    assert other(INPUTS) == expected(checkpoint, "Add the two numbers.", INPUTS, 7) != before
    assert one(INPUTS) == before


def test_a_description_in_the_prompt_is_asked_for(checkpoint: str) -> None:
    plain = t2l.function(TEXT, checkpoint=checkpoint, max_new_tokens=7)
    shown = t2l.function(TEXT, checkpoint=checkpoint, max_new_tokens=7, description_in_prompt=True)
    assert not plain.prompt.description_in_prompt and shown.prompt.description_in_prompt
    assert shown(INPUTS) != plain(INPUTS)


def test_an_adapter_that_does_nothing_is_no_function(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write = TextToLora.generate

    def nothing(self: Any, texts: Any) -> Any:
        return [LoraAdapter(x.lora.map(torch.zeros_like), x.spec, x.description, {}) for x in write(self, texts)]

    monkeypatch.setattr(TextToLora, "generate", nothing)
    with pytest.raises(AdapterNotAppliedError, match=r"in nothing.*is the checkpoint trained"):
        t2l.function(TEXT, checkpoint=checkpoint)


def test_a_base_with_broken_weights_is_named_as_that(checkpoint: str) -> None:
    broken = make_base(make_config())
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    (adapter,) = TextToLora.from_pretrained(checkpoint, device="cpu").generate([TEXT])
    with pytest.raises(AdapterNotAppliedError, match=r"or the base's own, are not finite"):
        largest_change(broken, adapter, {"input_ids": torch.tensor([[5, 6, 7]])})


def test_bad_input_is_refused(checkpoint: str) -> None:
    with pytest.raises(DescriptionError, match="The description is empty"):
        t2l.function("", checkpoint=checkpoint)
    with pytest.raises(ConfigError, match="max_new_tokens must be at least 1, got 0"):
        t2l.function(TEXT, checkpoint=checkpoint, max_new_tokens=0)
    for device in ("gpu", "cuda:999999999999", *(() if torch.cuda.is_available() else ("cuda",))):
        with pytest.raises(ConfigError, match=f"torch finds no device '{device}' here"):
            t2l.function(TEXT, checkpoint=checkpoint, device=device)
        with pytest.raises(ConfigError, match="torch finds no device"):
            TextToLora.from_pretrained(checkpoint, device=device)
    f = t2l.function(TEXT, checkpoint=checkpoint, max_new_tokens=7)
    with pytest.raises(DataError, match="Input 1 is '  '; a function answers texts that are not blank"):
        f(["fine", "  "])
    with pytest.raises(DataError, match="Input 0 is 3; a function"):
        f([3])  # type: ignore[list-item]
    with pytest.raises(DataError, match="answers a text or a list of texts, got int"):
        f(3)  # type: ignore[call-overload]
    with pytest.raises(DataError, match=r"Input 0 takes [\d,]+ tokens, answer included.*at most 512"):
        f("long " * 200)
