"""Keys and values of rows that come and go, each row with a length of its own.

Every row starts at column 0 of one rectangle (rows, heads, columns, size), so nothing is shifted when a row joins or
leaves: a row's next token is written at the column of its position, and a query sees the columns up to its own
position. Columns beyond hold what earlier rows left; they are masked, and must be finite all the same (0 · NaN is NaN),
so a row that leaves is zeroed.

A layer that mixes tokens by a short convolution (LFM2) keeps what its convolution reads in the place of keys: a column
a token too, so rows come, go and read prompts piece by piece as they do with attention.

Knows Transformers' cache interface. Knows no adapters, requests or text.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

ROOM = 64
"""Columns are added this many at a time, or half as many again as there are."""


class _Layer(CacheLayerMixin):
    """One layer's rectangle; where to write comes from the cache that it belongs to."""

    keys: Tensor | None
    values: Tensor | None
    owner: "RowCache"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes an empty rectangle with the heads and sizes of the first keys and values."""
        rows, columns = self.owner.capacity
        self.keys = key_states.new_zeros(rows, key_states.shape[1], columns, key_states.shape[3])
        self.values = value_states.new_zeros(rows, value_states.shape[1], columns, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes new keys and values (B, H, T, D) of the selected rows and returns all of theirs."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        start, stop, columns = self.owner.window
        rows_B1, positions_BT = self.owner.places
        self.keys[rows_B1, :, positions_BT] = key_states.transpose(1, 2)
        self.values[rows_B1, :, positions_BT] = value_states.transpose(1, 2)
        return self.keys[start:stop, :, :columns], self.values[start:stop, :, :columns]

    def convolve(self, inputs_BHT: Tensor, width: int) -> Tensor:
        """Writes what a convolution reads of the selected rows, and returns it with earlier tokens before it.

        Args:
            inputs_BHT: What it reads.
            width: K, how many tokens before; zeros stand before a row's first.

        Returns:
            (B, H, K + T).
        """
        inputs_B1TH = inputs_BHT.mT[:, None]
        self.update(inputs_B1TH, inputs_B1TH[..., :0])
        assert self.keys is not None
        rows_B1, positions_BT = self.owner.places
        before_BK = positions_BT[:, :1] + torch.arange(-width, 0, device=positions_BT.device)
        past_BKH = self.keys[rows_B1, 0, before_BK.clamp(min=0)].masked_fill(before_BK[..., None] < 0, 0)
        return torch.cat([past_BKH.mT, inputs_BHT], dim=-1)

    def grow(self, rows: int, columns: int) -> None:
        """Makes the rectangle larger; what it holds stays."""
        if self.keys is None or self.values is None:
            return
        for name, old in (("keys", self.keys), ("values", self.values)):
            new = old.new_zeros(rows, old.shape[1], columns, old.shape[3])
            new[: old.shape[0], :, : old.shape[2]] = old
            setattr(self, name, new)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a mask covers, and where they start."""
        return self.owner.window[2], 0

    def get_seq_length(self) -> int:
        """Columns before the tokens that are being read; only said for models that ask though they are told."""
        return self.owner.window[2] - self.owner.places[1].shape[1]

    def get_max_length(self) -> int:
        """No maximum: the rectangle grows."""
        return -1


class RowCache(Cache):
    """The cache of a batch whose rows change; give it to a model as its `decode.cache_argument`.

    Args:
        num_layers: Layers of the model.
    """

    def __init__(self, num_layers: int) -> None:
        layers = [_Layer() for _ in range(num_layers)]
        super().__init__(layers=layers)
        self._layers = layers
        for layer in layers:
            layer.owner = self
        self.release()

    def release(self) -> None:
        """Gives all memory back; no row is left."""
        self.capacity = (0, 0)
        self.window = (0, 0, 0)
        self.places = (torch.empty(0), torch.empty(0))
        for layer in self._layers:
            layer.keys, layer.values = None, None
            layer.is_initialized = False

    def select(self, start: int, positions_BT: Tensor, columns: int) -> Tensor:
        """Says which rows the coming forward pass reads, and at which positions.

        Args:
            start: The first row; the others follow it.
            positions_BT: Position of each token in its own row. Where rows have different numbers of tokens, the
                shorter ones go on counting: what is written there is overwritten by the tokens that belong there.
            columns: One more than the largest position; asking the tensor would make the device wait.

        Returns:
            The mask (B, 1, T, columns), True where a query may look.
        """
        rows = start + len(positions_BT)
        self._reserve(rows, columns)
        device = positions_BT.device
        self.window = (start, rows, columns)
        self.places = (torch.arange(start, rows, device=device)[:, None], positions_BT)
        return (torch.arange(columns, device=device) <= positions_BT[..., None])[:, None]

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, *, conv_kernel_size: int, **kwargs: Any
    ) -> Tensor:
        """What a layer's convolution reads, with that of earlier tokens before it."""
        return self._layers[layer_idx].convolve(conv_states, conv_kernel_size)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """No state to write to in place, for one token either: `update_conv_state` gives all that is to be read."""

    def has_previous_state(self, layer_idx: int | None = None) -> bool:
        """No, for the same reason; Transformers 5.15 asks so."""
        return False

    def move(self, source: int, to: int) -> None:
        """Row `source` becomes row `to`; `source` is empty then."""
        for layer in self._layers:
            for tensor in (layer.keys, layer.values):
                if tensor is not None:
                    tensor[to] = tensor[source]
                    tensor[source] = 0

    def clear(self, row: int) -> None:
        """Empties a row."""
        for layer in self._layers:
            for tensor in (layer.keys, layer.values):
                if tensor is not None and row < tensor.shape[0]:
                    tensor[row] = 0

    @property
    def nbytes(self) -> int:
        """Memory that keys and values take."""
        held = (tensor for layer in self._layers for tensor in (layer.keys, layer.values))
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def _reserve(self, rows: int, columns: int) -> None:
        old_rows, old_columns = self.capacity
        if rows <= old_rows and columns <= old_columns:
            return
        rows = old_rows if rows <= old_rows else max(rows, 2 * old_rows)
        if columns > old_columns:
            columns = -(-max(columns, 3 * old_columns // 2) // ROOM) * ROOM
        self.capacity = (rows, max(columns, old_columns))
        for layer in self._layers:
            layer.grow(*self.capacity)
