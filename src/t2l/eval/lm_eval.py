"""The model `t2l` of lm-evaluation-harness: a base model under one adapter, for every task that the harness knows.

    t2l-lm-eval --model t2l --model_args '{"description": "Answer the science question."}' --tasks arc_easy

Needs `text-to-lora[lm-eval]`. Knows the harness, adapters and prompts. Knows no tasks.
"""

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from t2l import __version__, hub, peft_io
from t2l.apply import apply_adapters
from t2l.checkpoint import read_config
from t2l.encoder import check_description
from t2l.errors import AdapterNotAppliedError, ConfigError
from t2l.eval.backends import adapter_name
from t2l.text_to_lora import DEFAULT, LoraAdapter, TextToLora, checkpoint_folder

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@register_model("t2l")
class T2LLM(HFLM):
    """HFLM with the base model under an adapter, written from a description or read from a PEFT folder.

    Args:
        base: Model reference of the base; by default the one that the checkpoint, or the adapter, is for.
        description: What the adapter is written from.
        checkpoint: Hypernetwork that writes it.
        adapter: PEFT folder of a plain LoRA, in place of writing one.
        description_in_prompt: Whether the description also stands before every context (in the first user message
            where the harness applies the chat template); by default what the checkpoint was trained with.
        device: Where everything runs; a GPU if there is one.
        dtype: float32, float16 or bfloat16; by default bfloat16 on a GPU, float32 elsewhere.
        batch_size: As the harness has it, `auto` included.
        max_batch_size: Limit of `auto`.
        max_length: Window of the model, if not its own.
        enable_thinking: What the base's chat template is told. False for models that think first, such as Qwen3: the
            likelihood of an answer right after the prompt is otherwise that of a model that expected to think.

    Raises:
        ConfigError: if it is not clear which adapter is meant, or a value is none of those above.
        AdapterNotAppliedError: if the adapter changes no logit.
        T2LError: as in `t2l.text_to_lora.TextToLora`.
    """

    def __init__(
        self,
        base: str | None = None,
        description: str | None = None,
        checkpoint: str = DEFAULT,
        adapter: str | None = None,
        description_in_prompt: bool | None = None,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = 64,
        max_length: int | None = None,
        enable_thinking: bool | None = None,
    ) -> None:
        _check(description, adapter, description_in_prompt, dtype)
        device = hub.best_device(device)
        dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
        reference = base or _base_of(checkpoint, adapter)
        model = hub.load_causal_lm(reference, device=device, dtype=DTYPES[dtype])
        tokenizer = hub.load_tokenizer(reference)
        plain = _some_logits(model, tokenizer)
        self._adapter: LoraAdapter | None = None
        self._facts = {"base": reference, "base_fingerprint": hub.fingerprint(reference), "t2l": __version__}
        if adapter is not None:
            from peft import PeftModel

            peft_io.read_facts(Path(adapter))  # refuses pickles and what is no plain LoRA
            model = PeftModel.from_pretrained(model, adapter, torch_device=device).eval()
            in_prompt = bool(description_in_prompt)
            self._facts["adapter"] = adapter
        else:
            generator = TextToLora.from_pretrained(
                checkpoint, base=(model, tokenizer), base_reference=reference, device=device
            )
            prompt = generator.prompt.with_description(description_in_prompt)
            in_prompt = prompt.description_in_prompt
            (self._adapter,) = generator.generate([str(description)])
            self._facts |= {"adapter": adapter_name(self._adapter), **self._adapter.provenance}
        self._before = f"{check_description(str(description))}\n\n" if in_prompt else ""
        self._templated = False
        self._facts |= {"description": str(description), "description_in_prompt": str(in_prompt)}
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            max_length=max_length,
            enable_thinking=enable_thinking,
        )
        with self._adapted():
            change = float((_some_logits(model, tokenizer) - plain).abs().max())
        if not change > 0:  # also a NaN
            raise AdapterNotAppliedError(
                f"The adapter changes no answer of {reference} (largest change of a logit: {change}); "
                "is the checkpoint trained, and the adapter for this base and not all zeros?"
            )

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Computes log-probabilities of continuations, and whether each is the greedy one."""
        with self._adapted():
            return super().loglikelihood(self._prompted(requests), disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Computes log-probabilities of whole texts.

        Raises:
            ConfigError: if the description should stand in the prompt, of which there is none here.
        """
        if self._before:
            raise ConfigError("A task of whole texts has no prompt: give description_in_prompt=False")
        with self._adapted():
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues contexts greedily up to a stop."""
        with self._adapted():
            return super().generate_until(self._prompted(requests), disable_tqdm=disable_tqdm)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as the base's template writes it, the description first in the first user message if anywhere."""
        self._templated = True  # contexts hold the description from here on
        turns = [dict(turn) for turn in chat_history]
        first = next((turn for turn in turns if turn["role"] == "user"), None)
        if first is not None:
            first["content"] = self._before + first["content"]
        return super().apply_chat_template(turns, add_generation_prompt=add_generation_prompt)

    def get_model_info(self) -> dict[str, Any]:
        """Says what the results were made with."""
        return {"model_num_parameters": self.model.num_parameters(), "model_dtype": self.model.dtype, **self._facts}

    def _adapted(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._adapter is None else apply_adapters(self.model, self._adapter)

    def _prompted(self, requests: Sequence[Any]) -> list[Any]:
        """The requests with the description before their contexts; the harness's own stay as they are."""
        if not self._before or self._templated:
            return list(requests)
        return [dataclasses.replace(r, arguments=(self._before + r.args[0], *r.args[1:])) for r in requests]


def _check(description: Any, adapter: Any, description_in_prompt: Any, dtype: Any) -> None:
    if adapter is None and description is None:
        raise ConfigError("model t2l needs description=TEXT, or adapter=DIR, in --model_args")
    if adapter is not None and description is not None and not description_in_prompt:
        raise ConfigError("description and adapter name two adapters; with description_in_prompt=True the text is used")
    if adapter is not None and description is None and description_in_prompt:
        raise ConfigError("description_in_prompt needs the description too")
    if description_in_prompt not in (None, True, False):
        raise ConfigError(f"description_in_prompt must be True or False, got {description_in_prompt!r}")
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


def _base_of(checkpoint: str, adapter: str | None) -> str:
    if adapter is not None:
        return peft_io.read_facts(Path(adapter)).base_model
    return read_config(checkpoint_folder(checkpoint))[0].base_model


@torch.no_grad()
def _some_logits(model: Any, tokenizer: Any) -> torch.Tensor:
    tokens = tokenizer("The answer to this question is", return_tensors="pt").to(model.device)
    logits: torch.Tensor = model(input_ids=tokens.input_ids).logits
    return logits.float()


def main() -> None:
    """The harness's own command, to which model `t2l` is known also where it looks for no plug-ins."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
