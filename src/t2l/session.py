"""A base model in memory once, one adapter for it, and the same prompts for both: what `t2l run` answers with.

Knows generating, prompts and greedy decoding. Knows no tasks and no command line.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from t2l import hub
from t2l.apply import apply_adapters, largest_change
from t2l.checkpoint import read_config
from t2l.encoder import check_description
from t2l.eval.decode import require_room
from t2l.prompt import pad_on_the_left, render, token_ids
from t2l.text_to_lora import LoraAdapter, TextToLora, checkpoint_folder


class Session:
    """The base model, shared by the encoder and the answers, and one adapter for it.

    Args:
        checkpoint: Checkpoint that says how prompts are rendered, and that writes the adapter if none is given.
        description: What the task is; an adapter's own, if absent.
        adapter: PEFT folder of an adapter. The base model is then the one that the adapter is for.
        base: Reference of the base model, if it is not to be had by the adapter's or checkpoint's name for it.
        device: Where it all happens; the GPU, if there is one.
        description_in_prompt: Whether prompts show the description too; as the checkpoint says, if absent.

    Raises:
        DescriptionError: if there is no usable description.
        T2LError: if the checkpoint, the adapter or the base model cannot be loaded, or do not fit.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        description: str | None = None,
        adapter: Path | None = None,
        base: str | None = None,
        device: str | None = None,
        description_in_prompt: bool | None = None,
    ) -> None:
        self.device = hub.best_device(device)
        spec, config = read_config(checkpoint_folder(checkpoint))
        self.prompt = config.prompt.with_description(description_in_prompt)
        if adapter is None:
            self.description = check_description(description)
            self.base_model = base or spec.base_model
            self._load_base()
            loaded = (self.model, self.tokenizer)
            generator = TextToLora.from_pretrained(
                checkpoint, base=loaded, base_reference=self.base_model, device=self.device
            )
            (self.adapter,) = generator.generate([self.description])
        else:  # read before the base model is, so that one that does not fit fails at once
            self.adapter = LoraAdapter.from_pretrained(adapter, base_model=base)
            self.description = check_description(description or self.adapter.description)
            self.base_model = self.adapter.spec.base_model
            self._load_base()

    def _load_base(self) -> None:
        self.model: Any = hub.load_causal_lm(self.base_model, device=self.device)
        self.tokenizer: Any = hub.load_tokenizer(self.base_model)
        pad_on_the_left(self.tokenizer)

    def prompts(self, texts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Rendered prompts, one for both the base and the adapted model, checked against the base's window."""
        rendered = [render(self.tokenizer, self.description, text, self.prompt) for text in texts]
        for number, ids in enumerate(token_ids(self.tokenizer, rendered), start=1):
            require_room(self.model, len(ids) + max_new_tokens, f"Input {number}")
        return rendered

    def adapted(self) -> Any:
        """The model with the adapter, for the length of a `with` block."""
        return apply_adapters(self.model, self.adapter)

    def largest_change(self, prompt: str) -> float:
        """How much the adapter moves a logit after a prompt.

        Raises:
            AdapterNotAppliedError: if it moves none.
        """
        return largest_change(self.model, self.adapter, self._tokens([prompt]))

    def answer(self, prompts: list[str], max_new_tokens: int) -> list[str]:
        """Whole answers, by greedy decoding."""
        tokens = self._tokens(prompts)
        output = self._generate(tokens, max_new_tokens)[:, tokens["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(output, skip_special_tokens=True)]

    def stream(self, prompt: str, max_new_tokens: int) -> None:
        """Prints one answer as it comes, by greedy decoding, without white space before it, and a line's end."""
        from transformers import TextStreamer

        class Stripped(TextStreamer):
            begun = False

            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                text = text if self.begun else text.lstrip()
                self.begun = bool(text) or self.begun
                super().on_finalized_text(text, stream_end)

        streamer = Stripped(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._generate(self._tokens([prompt]), max_new_tokens, streamer=streamer)

    def _tokens(self, prompts: list[str]) -> Any:
        return self.tokenizer(
            prompts, add_special_tokens=False, padding=True, return_tensors="pt", return_token_type_ids=False
        ).to(self.device)

    def _generate(self, tokens: Any, max_new_tokens: int, **options: Any) -> Any:
        from transformers import GenerationConfig

        # Written out, so that sampling settings in a model's own generation config play no part.
        greedy = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=self.model.generation_config.eos_token_id or self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        with torch.no_grad():
            return self.model.generate(**tokens, generation_config=greedy, **options)
