"""The key/value cache: plain preallocated tensors that every forward pass is handed explicitly.

B batch, K key/value heads, S slots (capacity), D head size, T prompt tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer, `[B, K, S, D]` each, and how many of the S slots are filled.

    Prompts of different lengths are padded on the left, so all sequences of a batch end in the same slot and one
    length serves them all. That length is kept twice: `length`, a tensor on the device, is what a decode step
    computes with (nothing in a step depends on a Python number, so its shapes are static); `filled` is the same
    number for the host.

    attends  per layer, whether its attention runs; one that does not keeps nothing
    """

    def __init__(
        self, attends: Sequence[bool], batch: int, heads: int, capacity: int, head_dim: int,
        dtype: torch.dtype, device: torch.device,
    ) -> None:
        def buffers() -> list[Tensor]:
            # Zeros, not empty: unfilled slots get weight 0 in attention, and 0 * NaN would still be NaN.
            return [
                torch.zeros(batch, heads, capacity if kept else 0, head_dim, dtype=dtype, device=device)
                for kept in attends
            ]

        self.keys = buffers()                                               # per layer [B, K, S, D]
        self.values = buffers()                                             # per layer [B, K, S, D]
        self.capacity = capacity
        self.filled = 0
        self.length = torch.zeros(1, dtype=torch.int64, device=device)      # [1]
        self.padding = torch.zeros(batch, 1, dtype=torch.int64, device=device)      # [B, 1] slots on the left
        self.rope_delta = torch.zeros(batch, 1, dtype=torch.int64, device=device)   # [B, 1] of what follows pictures
        self.slots = torch.arange(capacity, device=device)                  # [S]
        self.passed_by = torch.zeros(1, dtype=torch.int64, device=device)   # [1] the first slots, in skipped layers

    def start(self, prompt_slots: int, real: Tensor | None, rope_delta: Tensor | None = None) -> None:
        """Begin anew with a prompt of `prompt_slots` slots; real [B, T] is False where a slot is padding."""
        self.shift(rope_delta)
        self.filled = prompt_slots
        self.length.fill_(prompt_slots)
        self.passed_by.zero_()
        if real is None:
            self.padding.zero_()
        else:
            self.padding.copy_((~real).sum(dim=1, keepdim=True))

    def shift(self, rope_delta: Tensor | None) -> None:
        """How far the positions of what is to come are from one for each token, int64 [B, 1]; None: not at all."""
        if rope_delta is None:
            self.rope_delta.zero_()
        else:
            self.rope_delta.copy_(rope_delta)

    def positions(self, slots: Tensor) -> Tensor:
        """Of the tokens of a text that fill these slots, int64 [T] -> [B, T]"""
        return slots - self.padding + self.rope_delta

    def go_back(self, slots: int) -> None:
        """Forget what lies beyond the first `slots`."""
        self.filled = slots
        self.length.fill_(slots)

    def grow(self, capacity: int) -> None:
        """To more slots, what is filled staying where it is. These are other tensors than before."""
        for buffers in (self.keys, self.values):
            for index, old in enumerate(buffers):
                kept = old.shape[2]                     # 0 where a layer does not attend
                buffers[index] = old.new_zeros(*old.shape[:2], capacity if kept else 0, old.shape[3])
                buffers[index][:, :, :kept] = old
        self.capacity, self.slots = capacity, torch.arange(capacity, device=self.slots.device)

    def make_room(self, rows: int = 1) -> None:
        """Before decode steps, on the host: fail instead of writing past the end."""
        if self.filled + rows > self.capacity:
            full = f"all {self.capacity} slots are taken"
            raise ValueError(f"the cache is full: {full if rows == 1 else f'{rows} more do not fit; {full} or nearly'}")

    def advance(self, rows: int = 1) -> None:
        """After decode steps: their slots are filled."""
        self.length.add_(rows)
        self.filled += rows
