"""The one place that renders prompts. Training, evaluation, `t2l run` and serving all call `render`.

Knows text and chat templates. Knows no tensors and no models.
"""

from collections.abc import Sequence
from typing import Any

from t2l.config import PromptConfig
from t2l.errors import ConfigError


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

    Raises:
        ConfigError: if the tokenizer's chat template fails on these turns, or leaves the input out.
    """
    return render_turns(tokenizer, messages(description, text, prompt, examples))


def render_turns(tokenizer: Any, turns: Sequence[dict[str, str]]) -> str:
    """A conversation up to where the next answer starts, with special tokens spelt out.

    Args:
        tokenizer: The base model's; its chat template is used where it has one.
        turns: Objects with `role` and `content`.

    Raises:
        ConfigError: as `render`.
    """
    if tokenizer.chat_template is None:
        return (tokenizer.bos_token or "") + "".join(f"{turn['content']}\n\n" for turn in turns)
    rendered = _by_template(tokenizer, list(turns))
    if turns[-1]["content"].strip() not in rendered:
        raise ConfigError(
            f"The chat template of {tokenizer.name_or_path or 'the base model'} leaves the input out: all inputs would "
            f"get one prompt, {rendered[:200]!r}. Put a working chat template into the base model's folder"
        )
    return rendered


def _by_template(tokenizer: Any, turns: list[dict[str, str]]) -> str:
    """Turns as the tokenizer's chat template writes them.

    Templates are other people's programs and may raise anything. One that insists on a system turn gets an empty one.
    """
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception as error:
        try:
            turns = [{"role": "system", "content": ""}, *turns]
            return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        except Exception:
            raise ConfigError(
                f"The chat template of {tokenizer.name_or_path or 'the base model'} fails on a user's message "
                f"({type(error).__name__}: {' '.join(str(error).split())[:300]}). Put a working chat template into the "
                "base model's folder, or none, to have prompts without one"
            ) from error


def pad_id(tokenizer: Any) -> int:
    """The token that fills up shorter prompts of a batch; it is masked, so any other does where there is none."""
    named = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in named if token is not None), 0)


def pad_on_the_left(tokenizer: Any) -> None:
    """Prepares a tokenizer for batches of prompts, which are padded where no answer starts.

    Raises:
        ConfigError: if it has no special token at all that could stand for padding.
    """
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        special = [tokenizer.eos_token, *tokenizer.all_special_tokens]
        if not any(special):
            raise ConfigError(
                f"The tokenizer of {tokenizer.name_or_path or 'the base model'} names no padding, end or other special "
                "token, so batches of prompts cannot be padded; give it a pad_token in its tokenizer_config.json"
            )
        tokenizer.pad_token = next(filter(None, special))


def token_ids(tokenizer: Any, rendered: list[str]) -> list[list[int]]:
    """Token ids of rendered texts; special tokens are in the text already, so none are added."""
    ids: list[list[int]] = tokenizer(rendered, add_special_tokens=False, verbose=False).input_ids
    return ids
