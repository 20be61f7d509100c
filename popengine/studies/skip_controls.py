"""A control of Prefill-Only Pruning (arXiv 2602.03295, Table 4): skipped layers keep nothing of the prompt.

B batch, T tokens, S cache slots.
"""

from dataclasses import dataclass

import torch

from models.passes import PrefillPass
from models.pruning.prefill_only import PrefillOnly
from models.slots import SlotMap
from models.walks import RunningState


class ForgottenPrompt(SlotMap):
    """The slot map of layers in which no token attends to prompt tokens that skipped them."""

    def start(self) -> None:
        torch.arange(len(self.tokens), out=self.tokens)

    def go_back(self, filled: int, tokens: int) -> None:
        torch.arange(tokens, len(self.tokens), out=self.tokens[tokens:])    # new tokens may be attended to

    def grow(self, more: int) -> None:
        hidden = self.tokens < 0
        super().grow(more)
        self.tokens[: len(hidden)].masked_fill_(hidden, -1)


@dataclass(frozen=True)
class ForgetSkipped(PrefillOnly):
    """Prefill-Only Pruning after which no token attends to the prompt in the skipped layers."""

    def split(self, rows: PrefillPass, state: RunningState) -> tuple[PrefillPass, PrefillPass]:
        for pattern, slot_map in state.cache.maps.items():
            if isinstance(slot_map, ForgottenPrompt):
                slot_map.tokens[rows.slots[pattern][: -self.boundary or None]] = -1
        return super().split(rows, state)
