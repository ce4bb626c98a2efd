"""The one place that renders prompts. Training, evaluation, `t2l run` and serving all call `render`.

Knows text and chat templates. Knows no tensors and no models.
"""

from collections.abc import Sequence
from typing import Any

from t2l.config import PromptConfig


def messages(
    description: str, text: str, prompt: PromptConfig, examples: Sequence[tuple[str, str]] = ()
) -> list[dict[str, str]]:
    """The input as a user message, after worked examples as earlier turns.

    Where `prompt` says so, the description and a blank line stand before everything else.
    """
    turns = []
    for example, answer in examples:
        said = spaced(answer.strip(), prompt.answer_space)
        turns += [{"role": "user", "content": example.strip()}, {"role": "assistant", "content": said}]
    turns.append({"role": "user", "content": text.strip()})
    return with_description(turns, description) if prompt.description_in_prompt else turns


def with_description(turns: Sequence[dict[str, str]], description: str) -> list[dict[str, str]]:
    """A conversation whose first user turn begins with the description and a blank line."""
    first = next((n for n, turn in enumerate(turns) if turn["role"] == "user"), None)
    return [
        turn | {"content": f"{description.strip()}\n\n{turn['content']}"} if n == first else turn
        for n, turn in enumerate(turns)
    ]


def spaced(answer: str, space: bool) -> str:
    """The answer as it continues a prompt, with or without a space before it."""
    return f" {answer}" if space else answer


def render(
    tokenizer: Any, description: str, text: str, prompt: PromptConfig, *, examples: Sequence[tuple[str, str]] = ()
) -> str:
    """The prompt up to where the answer starts, with special tokens spelt out.

    Args:
        tokenizer: The base model's; its chat template is used where it has one.
        description: The task's description; it stands in the prompt only if `prompt` says so.
        text: The input.
        prompt: The checkpoint's setting.
        examples: Pairs of input and answer that the model sees before the input.
    """
    return render_turns(tokenizer, messages(description, text, prompt, examples))


def render_turns(tokenizer: Any, turns: Sequence[dict[str, str]]) -> str:
    """A conversation up to where the next answer starts, with special tokens spelt out.

    Args:
        tokenizer: The base model's; its chat template is used where it has one.
        turns: Objects with `role` and `content`.
    """
    if tokenizer.chat_template is None:
        return (tokenizer.bos_token or "") + "".join(f"{turn['content']}\n\n" for turn in turns)
    return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True))


def token_ids(tokenizer: Any, rendered: list[str]) -> list[list[int]]:
    """Token ids of rendered texts; special tokens are in the text already, so none are added."""
    ids: list[list[int]] = tokenizer(rendered, add_special_tokens=False, verbose=False).input_ids
    return ids
