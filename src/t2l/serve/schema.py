"""What a request may say, in OpenAI's words. Whatever else it says is an error that names it.

A setting that this server does not have is taken at the value that changes nothing, so that clients which always send
it are served, and refused at any other.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_STOPS = 4
MAX_TOP_LOGPROBS = 20


def _unicode(text: str) -> str:
    """JSON can spell halves of characters, which no tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"holds half a character at position {error.start}") from error
    return text


Text = Annotated[str, AfterValidator(_unicode)]
StopText = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_unicode)]


class Strict(BaseModel):
    """An object without unknown keys."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TextPart(Strict):
    """A part of a message; only text is understood."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=64)]
    name: str | None = None
    refusal: None = None

    def plain(self) -> dict[str, str]:
        """As chat templates know it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class StreamOptions(Strict):
    """What a stream holds besides the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ResponseFormat(Strict):
    """Only plain text is written."""

    type: Literal["text"]


class Sampled(Strict):
    """What both kinds of completions may say."""

    model: Text
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None
    """Seconds after which the answer is given up; not OpenAI's."""
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def streams_usage(self) -> bool:
        """Whether a last chunk tells how many tokens there were."""
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="before")
    @classmethod
    def _zero_is_zero(cls, values: Any) -> Any:
        # A client's 0.0 is JSON's 0; a literal compares types.
        if isinstance(values, dict):
            for key in ("frequency_penalty", "presence_penalty"):
                if values.get(key) == 0 and not isinstance(values[key], bool):
                    values = values | {key: 0}
        return values


class ChatRequest(Sampled):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    prompt_from: Text | None = None
    """The adapter whose prompt is shown to the model, where it is not the model's own; not OpenAI's. It makes answers
    of the base model and of other adapters comparable: all see the same prompt."""
    response_format: ResponseFormat | None = None
    store: Literal[False] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    service_tier: Literal["auto", "default"] | None = None
    metadata: dict[str, str] | None = None

    @model_validator(mode="after")
    def _goes_together(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self


class CompletionRequest(Sampled):
    """Body of `POST /v1/completions`."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[int], Field(min_length=1)]
        | Annotated[list[list[int]], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: Literal[False] | None = None
    suffix: None = None
    best_of: Literal[1] | None = None


class AdapterRequest(Strict):
    """Body of `POST /v1/adapters`."""

    description: Text
    strength: Annotated[float, Field(ge=0, le=2)] = 1.0
    """How much of the description's change is added to the LoRA that all descriptions share, see
    `TextToLora.generate`."""
    n: Annotated[int, Field(strict=True)] | None = None

    @field_validator("n")
    @classmethod
    def _one(cls, n: int | None) -> int | None:
        if n not in (None, 1):
            raise ValueError(
                f"{n} adapters of one description would all be the same; ask for 1, or send the others' descriptions"
            )
        return n
