"""The key/value cache: plain preallocated tensors that every forward pass is handed explicitly.

B batch, K key/value heads, S slots (capacity), D head size, T prompt tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.slots import AttentionPattern


@dataclass
class LayerCache:
    """One layer's part of the cache: keys and values [B, K, S, D], and its attention pattern."""

    keys: Tensor
    values: Tensor
    pattern: AttentionPattern

    def write(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Write keys and values into slots. keys, values [B, K, T, D]; slots int64 [T]"""
        self.keys.index_copy_(2, slots, keys)
        self.values.index_copy_(2, slots, values)


class KVCache:
    """Keys and values of every layer, `[B, K, S, D]` each, and the number of filled slots.

    Prompts of different lengths are padded on the left, so all sequences of a batch end in the same slot and share
    one length. It is stored twice: a decode step computes with `length`, a tensor on the device (nothing in a step
    depends on a Python number, so its shapes are static); the host uses `filled`.

    layers  one LayerCache per decoder layer; maps: one SlotMap per attention pattern
    """

    def __init__(
        self, patterns: Sequence[AttentionPattern], attends: Sequence[bool], batch: int, heads: int, capacity: int,
        dropped: int, head_dim: int, dtype: torch.dtype, device: torch.device,
    ) -> None:
        """patterns, attends: per layer; a layer whose attention does not run has no slots. dropped: see SlotMap"""
        # Layers of equal patterns have one object: by its identity the compiler tells layers apart.
        self.patterns = {pattern: pattern for pattern in patterns}
        self.attends = attends
        none = torch.zeros(batch, heads, 0, head_dim, dtype=dtype, device=device)
        self.layers = [LayerCache(none, none, self.patterns[pattern]) for pattern in patterns]
        self.length = torch.zeros(1, dtype=torch.int64, device=device)              # [1]
        self.padding = torch.zeros(batch, 1, dtype=torch.int64, device=device)      # [B, 1] slots on the left
        self.rope_delta = torch.zeros(batch, 1, dtype=torch.int64, device=device)   # [B, 1] see PictureRows
        self.allocate(capacity, dropped)

    def allocate(self, capacity: int, dropped: int) -> None:
        """Make empty slots for `capacity` tokens. Arguments as for `__init__`"""
        self.capacity, self.dropped, self.filled = capacity, dropped, 0
        device = self.length.device
        self.maps = {one: one.slots(len(self.padding), capacity, dropped, device) for one in self.patterns.values()}
        for layer, runs in zip(self.layers, self.attends, strict=True):
            batch, heads, _, head_dim = layer.keys.shape
            shape = batch, heads, self.maps[layer.pattern].tokens.shape[-1] if runs else 0, head_dim
            # Zeros, not empty: attention gives unfilled slots weight 0, and 0 * NaN would still be NaN.
            layer.keys, layer.values = layer.keys.new_zeros(shape), layer.values.new_zeros(shape)

    @property
    def keys(self) -> list[Tensor]:
        """The keys of every layer."""
        return [layer.keys for layer in self.layers]

    @property
    def values(self) -> list[Tensor]:
        """The values of every layer."""
        return [layer.values for layer in self.layers]

    def start(self, prompt_slots: int, real: Tensor | None, rope_delta: Tensor | None = None) -> None:
        """Start a new prompt of `prompt_slots` slots; real bool [B, T] is False where a slot is padding."""
        self.shift(rope_delta)
        self.filled = prompt_slots
        self.length.fill_(prompt_slots)
        for slot_map in self.maps.values():
            slot_map.start()
        if real is None:
            self.padding.zero_()
        else:
            self.padding.copy_((~real).sum(dim=1, keepdim=True))

    def shift(self, rope_delta: Tensor | None) -> None:
        """Set the offset of the positions of following tokens, int64 [B, 1]; None: 0."""
        if rope_delta is None:
            self.rope_delta.zero_()
        else:
            self.rope_delta.copy_(rope_delta)

    def following(self, rows: int) -> Tensor:
        """Return the indices of the next tokens, in a tensor of their own: `advance` changes the length in place.

        -> int64 [rows]
        """
        return self.length.clone() if rows == 1 else self.length + torch.arange(rows, device=self.length.device)

    def positions(self, tokens: Tensor) -> Tensor:
        """Compute rotary positions of tokens after the prompt, or of a text. int64 [T] -> [B, T]"""
        return tokens - self.padding + self.rope_delta

    def go_back(self, tokens: int) -> None:
        """Drop everything after the first `tokens` tokens, of one sequence."""
        for slot_map in self.maps.values():
            slot_map.go_back(self.filled, tokens)
        self.filled = tokens
        self.length.fill_(tokens)

    def grow(self, capacity: int) -> None:
        """Add slots up to `capacity`; filled slots keep their places. Replaces the buffers by new tensors."""
        more = capacity - self.capacity
        for slot_map in self.maps.values():
            slot_map.grow(more)
        for layer in self.layers:
            if layer.keys.numel():              # empty: its attention does not run
                layer.keys, layer.values = (F.pad(old, (0, 0, 0, more)) for old in (layer.keys, layer.values))
        self.capacity = capacity

    def make_room(self, rows: int = 1) -> None:
        """Raise ValueError if the next `rows` tokens do not fit. Runs on the host, before the step."""
        capacity = min(self.capacity, *(slot_map.most_tokens for slot_map in self.maps.values()))
        if self.filled + rows > capacity:
            more = "one more token does" if rows == 1 else f"{rows} more tokens do"
            raise ValueError(f"the cache is full: {more} not fit in {capacity} slots, {self.filled} are taken")

    def advance(self, rows: int = 1) -> None:
        """Count the slots of the last `rows` tokens as filled."""
        self.length.add_(rows)
        self.filled += rows
