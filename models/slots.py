"""Which tokens a layer attends to, and which cache slots hold them.

B batch, S slots (capacity), T tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class SlotMap:
    """The token that each cache slot holds; here slot n holds token n.

    A method that drops tokens from the cache of some layers has its own map (popengine/studies/visual_tokens.py).

    tokens  int64 [S] or [B, S], index of the token in each slot, padding included; -1: no token may attend to it
    """

    def __init__(self, batch: int, capacity: int, dropped: int, device: torch.device) -> None:
        """dropped: number of the `capacity` tokens that need no slot, in maps that drop tokens"""
        self.tokens = torch.arange(capacity, device=device)

    def slots(self, tokens: Tensor) -> Tensor:
        """Return the slots that new tokens fill. int64 [T] -> [T]"""
        return tokens

    def start(self) -> None:
        """Forget the last prompt."""

    def go_back(self, filled: int, tokens: int) -> None:
        """Drop all but the first `tokens` of `filled` tokens, of one sequence."""

    def grow(self, more: int) -> None:
        """Add slots at the end."""
        self.tokens = torch.arange(len(self.tokens) + more, device=self.tokens.device)

    @property
    def most_tokens(self) -> int:
        """Number of tokens that fit, including dropped ones."""
        return self.tokens.shape[-1]


class AttentionPattern(NamedTuple):
    """The tokens that a layer attends to. Layers of one pattern share masks, slots and rotary embeddings.

    window  number of tokens a query attends to, itself included; None: all before it
    slots   class of the layer's slot map
    """

    window: int | None
    slots: type[SlotMap] = SlotMap
