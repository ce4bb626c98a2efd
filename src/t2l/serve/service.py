"""What the server does, without HTTP: adapters from descriptions, models from names, prompts from messages.

A description is data: it is read by the hypernetwork and by the base model, and never names a file, an address or a
model. Knows the engine, the store and the generator. Knows no HTTP.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from t2l.encoder import check_description
from t2l.errors import AdapterNotFoundError, RequestError, SpecMismatchError
from t2l.prompt import render_turns, token_ids, with_description
from t2l.serve.answers import Generation
from t2l.serve.engine import Engine
from t2l.serve.sampling import Sampling
from t2l.serve.schema import ChatRequest, CompletionRequest, Sampled
from t2l.serve.store import AdapterStore, Entry, StoredAdapter

BASE = "base"
"""Names the base model, besides its own name."""
REMEMBERED = 1024
"""Descriptions whose adapters are found again without being written again."""


class Service:
    """Answers and adapters by name.

    Args:
        engine: Runs the base model; its limits are the service's.
        store: Holds the adapters.
        generator: Writes adapters; a `TextToLora` that shares the engine's model, or does not need it.
    """

    def __init__(self, engine: Engine, store: AdapterStore, generator: Any) -> None:
        self.engine, self.store, self.generator, self.limits = engine, store, generator, engine.limits
        self.base_model: str = generator.spec.base_model
        self.started = int(time.time())
        self._remembered: OrderedDict[str, str] = OrderedDict()

    async def create(self, description: str, strength: float = 1.0) -> tuple[Entry, bool]:
        """Writes an adapter and stores it.

        Args:
            description: What it is for.
            strength: As in `TextToLora.generate`.

        Returns:
            What is stored, and whether it was not there before.

        Raises:
            DescriptionError: if the description is blank or too long.
            BusyError: if too much is going on, or as many adapters are stored as may be.
        """
        stored, new = await self._written(description, strength)
        return stored.entry, new

    async def _written(self, description: str, strength: float) -> tuple[StoredAdapter, bool]:
        """The adapter itself, which serves whoever asked for it even if it is deleted in the same moment."""
        description = check_description(description)
        size = len(description.encode())
        if size > self.limits.description_bytes:
            raise RequestError(
                f"The description has {size:,} bytes; this server reads at most {self.limits.description_bytes:,}"
            )

        def write() -> tuple[Any, float]:
            started = time.perf_counter()
            (adapter,) = self.generator.generate([description], strength=strength)
            return adapter, time.perf_counter() - started

        adapter, seconds = await asyncio.wrap_future(self.engine.run(write))
        entry, new = await asyncio.to_thread(self.store.add, adapter, seconds=seconds, strength=strength)
        if strength == 1:
            self._remembered[description] = entry.id
            self._remembered.move_to_end(description)
            if len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        return StoredAdapter(entry, adapter.lora), new

    async def resolve(self, model: str) -> StoredAdapter | None:
        """The adapter that a `model` field names; None for the base model.

        Args:
            model: `base` or the base model's name; an adapter's name, alone or after the base's and a colon; or
                `t2l:` and a description, whose adapter is written if it is not there.

        Raises:
            AdapterNotFoundError: if there is no such adapter.
            SpecMismatchError: if it is for another base.
        """
        if model in (BASE, self.base_model):
            return None
        if model.startswith("t2l:"):
            description = check_description(model.removeprefix("t2l:"))
            name = self._remembered.get(description)
            if name is not None:
                try:
                    return await asyncio.to_thread(self.stored, name)
                except AdapterNotFoundError:
                    self._remembered.pop(description, None)  # deleted since
            return (await self._written(description, 1.0))[0]
        name = model.removeprefix(f"{self.base_model}:").removeprefix(f"{BASE}:")
        return await asyncio.to_thread(self.stored, name)

    def stored(self, name: str) -> StoredAdapter:
        """A stored adapter of this base; the folder may hold others, of a server with another checkpoint.

        Raises:
            AdapterNotFoundError: if there is none of this name.
            SpecMismatchError: if it is for another base.
        """
        found = self.store.get(name)
        if found.spec.base_model != self.base_model:
            raise SpecMismatchError(
                f"Adapter {name} is for the base {found.spec.base_model}, and this server runs {self.base_model}; "
                "start one with that base's checkpoint"
            )
        return found

    async def chat(self, request: ChatRequest) -> tuple[list[Generation], StoredAdapter | None]:
        """What a chat request asks the engine for, a generation a choice, and its adapter."""
        adapter = await self.resolve(request.model)
        shown = adapter if request.prompt_from is None else await self.resolve(request.prompt_from)
        turns = [message.plain() for message in request.messages]
        if shown is not None and self.generator.prompt.description_in_prompt:
            turns = with_description(turns, shown.entry.description)
        ids = await asyncio.to_thread(self._rendered, turns)
        top = (request.top_logprobs or 0) if request.logprobs else None
        limit = request.max_completion_tokens or request.max_tokens
        return self._generations(request, [ids], adapter, top, limit or self.limits.max_tokens, limit is None), adapter

    async def complete(self, request: CompletionRequest) -> tuple[list[Generation], StoredAdapter | None]:
        """What a completion request asks the engine for, a generation a choice, and its adapter."""
        adapter = await self.resolve(request.model)
        prompt: Any = request.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            prompt = [prompt]
        if len(prompt) > self.limits.choices:
            raise RequestError(f"The request has {len(prompt)} prompts; at most {self.limits.choices} are taken")
        ids = await asyncio.to_thread(lambda: [self._tokens(one) for one in prompt])
        return self._generations(request, ids, adapter, request.logprobs, request.max_tokens or 16, False), adapter

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        ids = self.engine.tokenizer(prompt, verbose=False).input_ids if isinstance(prompt, str) else prompt
        vocabulary = len(self.engine.tokenizer)
        strange = [token for token in ids if not 0 <= token < vocabulary]
        if strange or not ids:
            what = f"token {strange[0]}, and there are {vocabulary:,}" if strange else "no token"
            raise RequestError(f"A prompt holds {what}; give text, or token ids of this base model")
        return list(ids)

    def _rendered(self, turns: list[dict[str, str]]) -> list[int]:
        try:
            (ids,) = token_ids(self.engine.tokenizer, [render_turns(self.engine.tokenizer, turns)])
            return ids
        except Exception as error:  # templates refuse orders of roles that their models do not know, in many ways
            raise RequestError(f"The base model's chat template does not take these messages: {error}") from error

    def _generations(
        self,
        request: Sampled,
        prompts: Sequence[list[int]],
        adapter: StoredAdapter | None,
        top_logprobs: int | None,
        max_tokens: int,
        cut: bool,
    ) -> list[Generation]:
        n = request.n or 1
        if n * len(prompts) > self.limits.choices:
            raise RequestError(
                f"The request asks for {n} answers to {len(prompts)} prompts; at most {self.limits.choices} are given"
            )
        if max_tokens > self.limits.max_tokens:
            raise RequestError(
                f"max_tokens is {max_tokens:,}; at most {self.limits.max_tokens:,} are written (t2l serve --max-tokens)"
            )
        sampling = Sampling(
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=request.seed,
            top_logprobs=top_logprobs,
        )
        timeout = min(request.timeout or self.limits.timeout, self.limits.timeout)
        made = []
        for ids in prompts:
            room = self.engine.most_tokens - len(ids)
            for choice in range(n):
                seed = None if request.seed is None else request.seed + choice
                made.append(
                    Generation(
                        prompt=ids,
                        max_tokens=max(1, min(max_tokens, room)) if cut else max_tokens,
                        adapter=adapter,
                        sampling=replace(sampling, seed=seed),
                        stops=request.stops,
                        timeout=timeout,
                    )
                )
        return made
