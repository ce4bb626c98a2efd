"""The one place that renders prompts. Training, evaluation, `t2l run` and serving all call `render`.

Knows text and chat templates. Knows no tensors and no models.
"""

from typing import Any

from t2l.config import PromptConfig


def messages(description: str, text: str, prompt: PromptConfig) -> list[dict[str, str]]:
    """One user message: the input, after the description and a blank line where `prompt` says so."""
    content = text.strip()
    if prompt.description_in_prompt:
        content = f"{description.strip()}\n\n{content}"
    return [{"role": "user", "content": content}]


def render(tokenizer: Any, description: str, text: str, prompt: PromptConfig) -> str:
    """The prompt up to where the answer starts, with special tokens spelt out.

    Args:
        tokenizer: The base model's; its chat template is used where it has one.
        description: The task's description; it stands in the prompt only if `prompt` says so.
        text: The input.
        prompt: The checkpoint's setting.
    """
    turn = messages(description, text, prompt)
    if tokenizer.chat_template is None:
        return f"{tokenizer.bos_token or ''}{turn[0]['content']}\n\n"
    return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


def token_ids(tokenizer: Any, rendered: list[str]) -> list[list[int]]:
    """Token ids of rendered texts; special tokens are in the text already, so none are added."""
    ids: list[list[int]] = tokenizer(rendered, add_special_tokens=False, verbose=False).input_ids
    return ids
