"""What adapters do on held-out examples: loss, and teacher-forced exact match, which is what a greedy answer equal to
the reference comes to.

Knows libraries, tasks and the base model. Knows no hypernetworks. Shape letters as in `spec.py`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from t2l.apply import hooked
from t2l.config import PromptConfig
from t2l.errors import DataError
from t2l.eval.stats import scipy_stats
from t2l.library import AdapterLibrary
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec
from t2l.tasks import Task
from t2l.train.loss import answer_losses, document_gap
from t2l.train.packing import TaskDocuments, document_scores, fixed_rows, pack, tokenize_examples


@dataclass(frozen=True)
class Scores:
    """How one condition did on one task."""

    condition: str
    task: str
    ids: list[str]
    """Examples, in the same order in every condition."""
    loss: list[float]
    """Mean loss of each example's answer tokens."""
    exact_match: list[int]
    """1 where every token of the answer is the model's first choice."""


@dataclass(frozen=True)
class Scorer:
    """Held-out examples of a library's tasks, tokenised, and the base model that answers them.

    Args:
        model: The base model.
        spec: The adapters' shape.
        documents: Task to its documents.
        tokens: T, the length of the rows that documents are packed into.
        answer_tokens: A, the most answer tokens of a row.
        batch_size: B, the rows of a batch.
    """

    model: Any
    spec: AdapterSpec
    documents: dict[str, TaskDocuments]
    tokens: int
    answer_tokens: int
    batch_size: int

    @torch.no_grad()
    def score(self, condition: str, lora: LoraTensors | None, names: Sequence[str]) -> list[Scores]:
        """Scores one condition: each task under its own adapter.

        Args:
            condition: The condition's name.
            lora: A batch with one adapter for each name; None for the base alone.
            names: Tasks; those without documents are passed over.
        """
        parameter = next(self.model.parameters())
        listed = [
            (0 if lora is None else n, name, found)
            for n, name in enumerate(names)
            if name in self.documents
            for found in fixed_rows(self.documents[name], tokens=self.tokens, answer_tokens=self.answer_tokens)
        ]
        lora = (lora or _nothing(self.spec)).map(lambda x: x.to(parameter.device, parameter.dtype))
        answers: dict[str, dict[int, tuple[float, int]]] = {name: {} for _, name, _ in listed}
        with hooked(self.model, self.spec) as hooks:
            losses = answer_losses(self.model, hooks)
            for start in range(0, len(listed), self.batch_size):
                chunk = listed[start : start + self.batch_size]
                rows = pack(
                    [(self.documents[name], found) for _, name, found in chunk],
                    tokens=self.tokens,
                    answer_tokens=self.answer_tokens,
                    groups=[0] * len(chunk),
                ).to(parameter.device)
                by_token = losses(rows, lora.select(torch.tensor([n for n, *_ in chunk], device=parameter.device)))
                loss, correct, _ = document_scores(by_token.losses, by_token.correct, rows)
                for (_, name, found), values, right in zip(chunk, loss.float().tolist(), correct.tolist(), strict=True):
                    answers[name] |= {d: (values[i], int(right[i])) for i, d in enumerate(found)}
        return [self._task_scores(condition, name, known) for name, known in answers.items()]

    def _task_scores(self, condition: str, name: str, known: dict[int, tuple[float, int]]) -> Scores:
        store = self.documents[name]
        mine = [known[variants[0]] for variants in store.variants]
        return Scores(condition, name, list(store.ids), [round(x, 5) for x, _ in mine], [y for _, y in mine])


def _nothing(spec: AdapterSpec) -> LoraTensors:
    """A batch of one adapter that does nothing."""
    depth = len(spec.layers)
    return LoraTensors(
        tuple(torch.zeros(1, depth, spec.rank, t.in_features) for t in spec.targets),
        tuple(torch.zeros(1, depth, t.out_features, spec.rank) for t in spec.targets),
        spec.scaling,
    )


def prepare_scores(
    library: AdapterLibrary,
    tasks: Sequence[Task],
    base: tuple[Any, Any],
    *,
    tokens: int = 512,
    answer_tokens: int = 384,
    limit: int | None = None,
    batch_size: int = 32,
) -> Scorer:
    """Tokenises the held-out examples of a library's tasks, with prompts as the adapters were trained on.

    Args:
        library: Whose adapters are scored.
        tasks: With examples of split `test`, or `val` where there are none.
        base: The base model and its tokenizer.
        tokens: Longest example.
        answer_tokens: Longest answer.
        limit: Most examples of a task, the first ones.
        batch_size: Rows of a batch.

    Raises:
        DataError: if no task of the library has examples, or its adapters were trained on different prompts.
        EvaluationError: if what computes the report's intervals is not installed.
    """
    scipy_stats()  # found out now, not after hours of training
    model, tokenizer = base
    prompts = {json.dumps(library.index[name].get("prompt")) for name in library.names}
    if len(prompts) > 1:
        raise DataError(
            f"{library.folder} holds adapters that were trained with the description in the prompt and without"
        )
    prompt = PromptConfig(**(json.loads(prompts.pop()) or {}))
    documents = {}
    for task in tasks:
        if task.name not in library.index:
            continue
        examples = (task.examples.get("test") or task.examples.get("val") or ())[:limit]
        found = tokenize_examples(
            task,
            examples,
            tokenizer,
            prompt,
            tokens=tokens,
            answer_tokens=answer_tokens,
            seed=0,
            first_answer=True,
            gap=document_gap(model.config),
        )
        if found.variants:
            documents[task.name] = found
    if not documents:
        raise DataError(
            f"None of the {len(tasks)} tasks to score has held-out examples and an adapter in {library.folder}"
        )
    return Scorer(model, library.spec, documents, tokens, answer_tokens, batch_size)
