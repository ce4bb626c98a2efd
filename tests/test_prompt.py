"""How inputs become prompts and answers become what is trained on."""

from typing import Any

import pytest
from conftest import make_tokenizer

from t2l.config import PromptConfig
from t2l.errors import ConfigError
from t2l.prompt import messages, pad_id, pad_on_the_left, render
from t2l.tasks import Example
from t2l.train.batches import Batches, Pool


@pytest.mark.parametrize("space", [False, True])
def test_answers_begin_with_a_space_where_the_setting_says_so(space: bool) -> None:
    """What is trained on and worked examples; the prompt up to the answer is the same."""
    tokenizer = make_tokenizer()
    pool = Pool("a", tuple(Example(f"{n}", f"input {n}", (f" word {n} ",)) for n in range(8)), (0,))
    settings = {"rows": 3, "tokens": 64, "answer_tokens": 24, "in_prompt": 0.5, "seed": 3}
    batch, plain = (
        Batches([pool], ["Say it."], tokenizer, **settings, prompt=PromptConfig(answer_space=x))[0]  # type: ignore[arg-type]
        for x in (space, False)
    )
    for labels, documents in zip(batch.rows.labels, batch.rows.label_documents, strict=True):
        for document in range(int(documents.max()) + 1):
            said = tokenizer.decode(labels[documents == document]).removesuffix(tokenizer.eos_token)
            assert said.startswith(" word") == space and said.strip().startswith("word") and not said.endswith(" ")
    first = int(batch.rows.label_positions[0, 0]) + 1  # the prompt's last token says the first of the answer
    assert batch.rows.tokens[0, :first].equal(plain.rows.tokens[0, :first])
    prompt = PromptConfig(answer_space=space)
    turns = messages("Say it.", "now", prompt, [("then", " yes ")])
    assert [turn["content"] for turn in turns] == ["then", " yes" if space else "yes", "now"]
    assert render(tokenizer, "Say it.", "now", prompt) == render(tokenizer, "Say it.", "now", PromptConfig())


def test_asking_for_the_description_keeps_the_rest() -> None:
    prompt = PromptConfig(answer_space=True)
    assert prompt.with_description(None) == prompt
    assert prompt.with_description(True) == PromptConfig(description_in_prompt=True, answer_space=True)


SOUND = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def templated(template: Any) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_a_template_that_insists_on_a_system_turn_gets_an_empty_one() -> None:
    strict = "{% if messages[0].role != 'system' %}{{ raise_exception('No system message') }}{% endif %}" + SOUND
    assert render(templated(strict), "Do it.", " text ", PromptConfig()) == "<system><user>text"
    assert render(templated(SOUND), "Do it.", " text ", PromptConfig()) == "<user>text"


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "fails on a user's message .TemplateError: Roles must alt"),
        ("{% for m in messages %}{{ m['content'] }", "fails on a user's message .TemplateSyntaxError"),
        ("{{ messages[0]['content'] + tools[0]['name'] }}", "fails on a user's message .UndefinedError"),
        ("{{ 1 / 0 }}", "fails on a user's message .ZeroDivisionError"),
        ({"rag": "x", "tool_use": SOUND}, "fails on a user's message .ValueError"),
        ("{# nothing #}", "leaves the input out"),
        ("<s>{{ messages[0].role }}", "leaves the input out"),
    ],
)
def test_templates_that_do_not_work_are_named(template: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=f"chat template of .* {match}"):
        render(templated(template), "Do it.", "text", PromptConfig())


def test_padding_is_any_token_where_the_tokenizer_names_none() -> None:
    tokenizer = make_tokenizer()
    assert pad_id(tokenizer) == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert pad_id(tokenizer) == tokenizer.eos_token_id
    pad_on_the_left(tokenizer)
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("</s>", "left")
    tokenizer.pad_token = tokenizer.eos_token = None
    assert pad_id(tokenizer) == 0
    pad_on_the_left(tokenizer)
    assert tokenizer.pad_token == "<s>"
    tokenizer.pad_token = tokenizer.bos_token = None
    with pytest.raises(ConfigError, match="names no padding, end or other special token"):
        pad_on_the_left(tokenizer)
