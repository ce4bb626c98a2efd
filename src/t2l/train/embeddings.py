"""What the hypernetwork reads in a run, encoded once. Knows encoders and texts; knows no tasks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from t2l.encoder import Encoded, Encoder
from t2l.pace import Pace


class EmbeddingCache:
    """Every text the hypernetwork reads in a run, encoded once; hands out padded batches of one static shape.

    Without a GPU this can take longer than the steps do, so `log` hears of it every `every` seconds.
    """

    def __init__(
        self,
        encoder: Encoder,
        texts: Sequence[str],
        *,
        chunk: int = 256,
        log: Callable[[str], None] = lambda text: None,
        every: float = 20.0,
    ) -> None:
        self.kind, self.width, self.window = encoder.kind, encoder.embedding_size, encoder.max_tokens
        states, lengths = [], []
        # In order of length, so that little of a chunk is padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        pace = Pace(len(texts), "texts read", log, work=sum(map(len, texts)), every=every)
        for start in range(0, len(order), chunk):
            part = [texts[i] for i in order[start : start + chunk]]
            encoded = encoder.encode(part)
            pace.add(len(part), sum(map(len, part)))
            if encoded.mask is None:
                states.append(encoded.states)
            else:
                states.append(encoded.states[encoded.mask].bfloat16())
                lengths.append(encoded.mask.sum(1))
        self.states = torch.cat(states)
        place = torch.empty(len(order), dtype=torch.long)
        place[torch.tensor(order)] = torch.arange(len(order))
        self.place = place.to(self.states.device)
        if lengths:
            self.lengths = torch.cat(lengths)
            self.starts = self.lengths.cumsum(0) - self.lengths

    def __getitem__(self, index_N: Tensor) -> Encoded:
        """Texts by their position in the run's list: (N, E), or (N, window, E) with a mask."""
        place = self.place[index_N]
        if self.kind == "sentence":
            return Encoded(self.states[place])
        offsets = torch.arange(self.window, device=place.device)
        mask = offsets < self.lengths[place][:, None]
        where = (self.starts[place][:, None] + offsets).clamp_max(self.states.shape[0] - 1)
        return Encoded(self.states[where].float() * mask[..., None], mask)

    def sample(self, index_N: Tensor) -> Tensor:
        """Encodings of 4096 of these texts at most, evenly spaced: (K, E), of tokens a row each."""
        some = index_N[:: -(-len(index_N) // 4096)].to(self.place.device)
        encoded = [self[part] for part in some.split(256)]
        return torch.cat([e.states if e.mask is None else e.states[e.mask] for e in encoded])
