"""What is asked of the base model: an instance under a condition, and its answer as a line of the file of answers.

Knows conditions, adapters and whoever answers. Knows no settings of a run and no statistics.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from t2l.eval import decode, suites
from t2l.eval.adapters import AdapterCache, UsedAdapter
from t2l.eval.answers import Key
from t2l.eval.backends import Backend
from t2l.eval.conditions import Condition, can_show, prompt_of, short_hash
from t2l.eval.suites import EvalInstance
from t2l.prompt import spaced, token_ids

ROUTED = 2**31
"""Arrow's routing holds tokens x adapters x rank numbers at a time; its batches are kept under this."""
LIKELIHOOD_TOKENS = 2**18
"""Most tokens that a batch of likelihoods is counted from where the user says nothing: larger ones are no faster."""
KEY_PARTS = ("suite", "condition", "seed", "task", "id")
Line = dict[str, Any]
"""One answer as the file holds it."""


@dataclass(frozen=True)
class Request:
    """An instance under a condition."""

    condition: Condition
    instance: EvalInstance
    prompt: str
    ids: list[int]
    duplicates: tuple["Request", ...] = ()
    """Others with the same prompt and adapter, such as the base model's under another seed: answered along."""

    @property
    def key(self) -> Key:
        """What tells its answer from all others."""
        instance = self.instance
        return instance.task.suite, self.condition.name, instance.seed, instance.task.name, instance.item.id


def make_requests(
    instances: Iterable[EvalInstance], conditions: Sequence[Condition], adapters: AdapterCache
) -> list[Request]:
    """Every instance under every condition that answers it; token ids come with `merge_duplicates`."""
    return [
        Request(condition, instance, prompt_of(condition, instance, adapters.tokenizer), [])
        for instance in instances
        for condition in conditions
        if can_show(condition, instance.task) and adapters.has(condition, instance)
    ]


def merge_duplicates(requests: Sequence[Request], adapters: AdapterCache) -> list[Request]:
    """One request for all that have the same prompt and adapter and so the same answer, with its token ids."""
    texts = list(dict.fromkeys(request.prompt for request in requests))
    ids = dict(zip(texts, token_ids(adapters.tokenizer, texts), strict=True)) if texts else {}
    alike: dict[Any, list[Request]] = {}
    for request in requests:
        task = request.instance.task
        adapter = adapters.key(request.condition, request.instance) or request.condition.adapter
        alike.setdefault((request.prompt, adapter, task.suite, task.name, request.instance.item.id), []).append(request)
    return [
        dataclasses.replace(first, ids=ids[first.prompt], duplicates=tuple(others)) for first, *others in alike.values()
    ]


def stages(requests: Sequence[Request]) -> tuple[list[Request], list[Request], list[Request], list[Request]]:
    """The base's likelihoods first (for the floor check), then the plain base, adapters, and Arrow's own model."""
    floor: list[Request] = []
    plain: list[Request] = []
    adapted: list[Request] = []
    routed: list[Request] = []
    for request in requests:
        if request.condition.adapter == "base":
            (floor if request.instance.task.kind == "likelihood" else plain).append(request)
        else:
            (routed if request.condition.adapter == "arrow" else adapted).append(request)
    return floor, plain, adapted, routed


def answer(
    requests: Sequence[Request], adapters: AdapterCache, backend: Backend, *, batch_tokens: int | None = None
) -> Iterator[list[tuple[Request, Line]]]:
    """The answers of one batch after the other; `with_duplicates` makes the lines of those that are the same.

    Args:
        requests: Of one stage.
        adapters: Ready for them.
        backend: Who answers in words; likelihoods come from the base model here.
        batch_tokens: Tokens of a batch; what the device has room for, if absent.
    """
    # Together what can share a batch: adapters of one shape, and answers of one limit.
    groups: dict[Any, list[Request]] = {}
    for request in requests:
        task = request.instance.task
        shape = adapters.sources.shape(request.condition)
        groups.setdefault((task.kind == "likelihood", task.max_new_tokens, shape), []).append(request)
    for (likelihood, limit, _), part in groups.items():
        # Another engine makes its own batches; these are what an interruption loses.
        tokens, sequences = decode.room(adapters.model, adapters.sources.spec(part[0].condition))
        tokens = batch_tokens or (min(tokens, LIKELIHOOD_TOKENS) if likelihood else tokens)
        if part[0].condition.adapter == "arrow" and adapters.sources.training is not None:
            library = adapters.sources.training
            tokens = max(1, min(tokens, ROUTED // (library.spec.rank * len(library.names))))
        if likelihood:
            # Every token of a choice meets the whole vocabulary: logits are what takes memory.
            yield from _likelihoods(part, adapters, max(1, tokens // 4))
        else:
            yield from _words(part, adapters, backend, limit, tokens, sequences)


def _words(
    requests: Sequence[Request], adapters: AdapterCache, backend: Backend, limit: int, tokens: int, sequences: int
) -> Iterator[list[tuple[Request, Line]]]:
    """Greedy answers, batch by batch."""
    lengths = [len(request.ids) + limit for request in requests]
    for batch in decode.batches(lengths, max_tokens=tokens, max_sequences=sequences):
        chosen = [requests[i] for i in batch]
        decode.require_room(adapters.model, len(chosen[0].ids) + limit, f"{chosen[0].key}")
        used = _adapters(chosen, adapters)
        answers = backend.answers([request.prompt for request in chosen], used, limit)
        lines = []
        for request, adapter, text in zip(chosen, used, answers, strict=True):
            # In code, white space at the start belongs to the answer.
            text = text if request.instance.task.kind == "code" else text.strip()
            lines.append((request, _line(request, adapter, text, suites.score(request.instance, text))))
        yield lines


def _likelihoods(
    requests: Sequence[Request], adapters: AdapterCache, budget: int
) -> Iterator[list[tuple[Request, Line]]]:
    """Log-likelihoods of all choices: each choice is a sequence, and an instance's choices share a batch."""
    space = {condition: adapters.sources.answer_space(condition) for condition in {r.condition for r in requests}}
    choices = {r.key: [spaced(choice, space[r.condition]) for choice in r.instance.item.choices] for r in requests}
    texts = sorted({choice for found in choices.values() for choice in found})
    ids = dict(zip(texts, token_ids(adapters.tokenizer, texts), strict=True))
    lengths = [(len(r.ids) + max(len(ids[c]) for c in choices[r.key])) * len(choices[r.key]) for r in requests]
    for batch in decode.batches(lengths, max_tokens=budget):
        chosen = [requests[i] for i in batch]
        used = _adapters(chosen, adapters)
        pairs = [(n, ids[choice]) for n, request in enumerate(chosen) for choice in choices[request.key]]
        longest = max(len(chosen[n].ids) + len(choice) for n, choice in pairs)
        decode.require_room(adapters.model, longest, f"An instance of {chosen[0].key}")
        values = decode.log_likelihoods(
            adapters.model,
            adapters.tokenizer,
            [chosen[n].ids for n, _ in pairs],
            [choice for _, choice in pairs],
            [adapter for n, _ in pairs if (adapter := used[n]) is not None] or None,
        )
        lines: list[tuple[Request, Line]] = []
        for request, adapter in zip(chosen, used, strict=True):
            own, values = values[: len(choices[request.key])], values[len(choices[request.key]) :]
            scores = suites.score_likelihoods(request.instance, own)
            lines.append((request, _line(request, adapter, [round(value, 3) for value in own], scores)))
        yield lines


def _adapters(requests: Sequence[Request], adapters: AdapterCache) -> list[UsedAdapter | None]:
    """Each request's adapter; conditions are looked up together, because some write theirs only now."""
    found: dict[int, UsedAdapter | None] = {}
    for condition in {request.condition for request in requests}:
        positions = [i for i, request in enumerate(requests) if request.condition == condition]
        used = adapters.of(condition, [requests[i].instance for i in positions])
        found |= dict(zip(positions, used, strict=True))
    return [found[i] for i in range(len(requests))]


def _line(
    request: Request, adapter: UsedAdapter | None, said: str | list[float], scores: dict[str, float | None]
) -> Line:
    """An answer as it is kept: of the data hashes, and what the model said or its choices' log-likelihoods."""
    description = None if adapter is None else adapter.description
    return dict(zip(KEY_PARTS, request.key, strict=True)) | {
        "prompt": short_hash(request.prompt),
        "description": None if description is None else short_hash(description),
        "adapter": None if adapter is None else adapter.id,
        "answer": said,
        "scores": scores,
    }


def with_duplicates(request: Request, line: Line) -> list[Line]:
    """The line of an answer and those of its duplicates, which differ in what tells them apart."""
    return [line, *(line | dict(zip(KEY_PARTS, other.key, strict=True)) for other in request.duplicates)]
