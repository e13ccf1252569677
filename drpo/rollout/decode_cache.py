"""The key-value cache for decoding, preallocated for the whole text: each step writes one column."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class PreallocatedLayer(DynamicLayer):
    """Keys and values (B, heads, T, width) as views of buffers for `capacity` positions.

    transformers' own layer copies the whole cache at every step to append one column. Sliding-window layers
    may use this one too: the attention mask cuts the window. Under autocast the buffers have its precision: rotary
    positions leave keys in float32, and attention would round all of them anew at every step.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append new positions and return all keys and values so far."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self._buffers is None:
            self.lazy_initialization(key_states, value_states)
            self._buffers = (self._room_like(key_states), self._room_like(value_states))
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def reorder_cache(self, indices: Tensor) -> None:
        """Keep the rows at `indices` (int64, in that order, repeats allowed).

        The name is that of transformers; `batch_select_indices` would not reorder recurrent layers.
        """
        if self._buffers is None:  # a layer that reads another layer's keys and values
            return
        length = self.get_seq_length()
        chosen = []
        for buffer in self._buffers:
            room = buffer.new_empty(len(indices), *buffer.shape[1:])
            room[:, :, :length] = buffer[:, :, :length].index_select(0, indices)
            chosen.append(room)
        self._buffers = tuple(chosen)
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    def _room_like(self, states: Tensor) -> Tensor:
        shape, kind = (*states.shape[:2], self.capacity, states.shape[-1]), states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        return torch.empty(shape, dtype=dtype, device=states.device)


def decode_cache(config: PreTrainedConfig, capacity: int) -> DynamicCache:
    """Make an empty cache for a model of this config with room for `capacity` positions.

    Layers that are not plain or sliding-window attention (recurrent states, ...) keep transformers' own kind.
    """
    cache = DynamicCache(config=config)
    cache.layers = [
        PreallocatedLayer(capacity) if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) else layer
        for layer in cache.layers
    ]
    return cache
