"""The key/value cache: plain preallocated tensors that every forward pass is handed explicitly.

B batch, K key/value heads, S slots (capacity), D head size, T prompt tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class View(NamedTuple):
    """What the rows of a layer see of what came before. The masks and rotary embeddings of a pass go by it.

    window  tokens a query sees, itself included; None: all before it
    blind   not the prompt's rows that passed the layer by
    thin    not the rows of pictures that have been left out, which have no slots there
    """

    window: int | None
    blind: bool = False
    thin: bool = False


@dataclass
class LayerCache:
    """One layer's part of the cache: keys and values [B, K, S, D], and what its rows see of them."""

    keys: Tensor
    values: Tensor
    view: View

    def write(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """keys, values [B, K, T, D]; slots int64 [T]"""
        self.keys.index_copy_(2, slots, keys)
        self.values.index_copy_(2, slots, values)


class KVCache:
    """Keys and values of every layer, `[B, K, S, D]` each, and how many of the S slots are filled.

    Prompts of different lengths are padded on the left, so all sequences of a batch end in the same slot and one
    length serves them all. That length is kept twice: `length`, a tensor on the device, is what a decode step
    computes with (nothing in a step depends on a Python number, so its shapes are static); `filled` is the same
    number for the host.

    Where rows of pictures are left out, some layers have fewer slots, `thin_capacity`:
    `left_out` of those that are filled are missing there, and `places` says which stands for which.
    """

    def __init__(
        self, sizes: Sequence[int], batch: int, heads: int, capacity: int, thin_capacity: int, head_dim: int,
        dtype: torch.dtype, device: torch.device,
    ) -> None:
        """sizes: slots of each layer: `capacity`, `thin_capacity`, or none where its attention does not run"""
        def buffers() -> list[Tensor]:
            # Zeros, not empty: unfilled slots get weight 0 in attention, and 0 * NaN would still be NaN.
            return [torch.zeros(batch, heads, size, head_dim, dtype=dtype, device=device) for size in sizes]

        self.keys = buffers()                                               # per layer [B, K, S, D]
        self.values = buffers()                                             # per layer [B, K, S, D]
        self.capacity = capacity
        self.filled = 0
        self.length = torch.zeros(1, dtype=torch.int64, device=device)      # [1]
        self.padding = torch.zeros(batch, 1, dtype=torch.int64, device=device)      # [B, 1] slots on the left
        self.rope_delta = torch.zeros(batch, 1, dtype=torch.int64, device=device)   # [B, 1] of what follows pictures
        self.slots = torch.arange(capacity, device=device)                  # [S]
        self.passed_by = torch.zeros(1, dtype=torch.int64, device=device)   # [1] the first slots, in skipped layers
        self.left_out = torch.zeros(1, dtype=torch.int64, device=device)    # [1] slots, and the same for the host
        self.missing = 0
        self.places = torch.arange(thin_capacity, device=device).repeat(batch, 1)   # [B, S], -1: padding

    def start(self, prompt_slots: int, real: Tensor | None, rope_delta: Tensor | None = None) -> None:
        """Begin anew with a prompt of `prompt_slots` slots; real [B, T] is False where a slot is padding."""
        self.shift(rope_delta)
        self.filled = prompt_slots
        self.length.fill_(prompt_slots)
        self.passed_by.zero_()
        self.leave_out(0, 0)
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

    @property
    def thin_capacity(self) -> int:
        return self.places.shape[1]

    def leave_out(self, missing: int, kept: int) -> None:
        """So many slots are missing from thin layers; after the first `kept` of those, which stand for what they stood
        for, every further one is the next."""
        self.missing = missing
        self.left_out.fill_(missing)
        self.places[:, kept:] = torch.arange(kept + missing, self.thin_capacity + missing, device=self.places.device)

    def go_back(self, slots: int) -> None:
        """Forget what lies beyond the first `slots`, of one sequence."""
        if self.missing:
            kept = int((self.places[0, : self.filled - self.missing] < slots).sum())
            self.leave_out(slots - kept, kept)
        self.filled = slots
        self.length.fill_(slots)

    def grow(self, capacity: int) -> None:
        """To more slots, what is filled staying where it is. These are other tensors than before."""
        more, of_thin = capacity - self.capacity, self.places
        for buffers in (self.keys, self.values):
            for index, old in enumerate(buffers):
                buffers[index] = F.pad(old, (0, 0, 0, more if old.shape[2] else 0))     # 0: it does not attend
        self.capacity, self.slots = capacity, torch.arange(capacity, device=self.slots.device)
        self.places = F.pad(of_thin, (0, more))
        self.leave_out(self.missing, of_thin.shape[1])

    def make_room(self, rows: int = 1) -> None:
        """Before decode steps, on the host: fail instead of writing past the end."""
        capacity = min(self.capacity, self.thin_capacity + self.missing)
        if self.filled + rows > capacity:
            full = f"all {capacity} slots are taken"
            raise ValueError(f"the cache is full: {full if rows == 1 else f'{rows} more do not fit; {full} or nearly'}")

    def advance(self, rows: int = 1) -> None:
        """After decode steps: their slots are filled."""
        self.length.add_(rows)
        self.filled += rows
