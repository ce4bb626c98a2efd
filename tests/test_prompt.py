"""How inputs become prompts and answers become what is trained on."""

import pytest
from conftest import make_tokenizer

from t2l.config import PromptConfig
from t2l.prompt import messages, render
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
    for labels, documents in zip(batch.labels, batch.label_documents, strict=True):
        for document in range(int(documents.max()) + 1):
            said = tokenizer.decode(labels[documents == document]).removesuffix(tokenizer.eos_token)
            assert said.startswith(" word") == space and said.strip().startswith("word") and not said.endswith(" ")
    first = int(batch.label_positions[0, 0]) + 1  # the prompt's last token says the first of the answer
    assert batch.tokens[0, :first].equal(plain.tokens[0, :first])
    prompt = PromptConfig(answer_space=space)
    turns = messages("Say it.", "now", prompt, [("then", " yes ")])
    assert [turn["content"] for turn in turns] == ["then", " yes" if space else "yes", "now"]
    assert render(tokenizer, "Say it.", "now", prompt) == render(tokenizer, "Say it.", "now", PromptConfig())


def test_asking_for_the_description_keeps_the_rest() -> None:
    prompt = PromptConfig(answer_space=True)
    assert prompt.with_description(None) == prompt
    assert prompt.with_description(True) == PromptConfig(description_in_prompt=True, answer_space=True)
