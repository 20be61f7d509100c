"""Walks: which rows run through which layers, in what order.

B batch, T rows, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from models.blocks import Sublayer
from models.cache import KVCache
from models.passes import DecodePass, PrefillPass


class RunningLayer(Protocol):
    """A decoder layer of a run (LayerState in models/state.py). x [B, T, H] -> [B, T, H]

    sublayers  its residual blocks that run
    """

    index: int
    sublayers: list[Sublayer]

    def prefill(self, x: Tensor, rows: PrefillPass) -> Tensor:
        """Run rows of a prompt, or of a dense step."""

    def decode(self, x: Tensor, step: DecodePass) -> Tensor:
        """Run rows of a step."""


class RunningState(Protocol):
    """The state that a walk works on (DecodeState in models/state.py)."""

    cache: KVCache
    live: Tensor


def prefill_layers(layers: Sequence[RunningLayer], x: Tensor, rows: PrefillPass) -> Tensor:
    """Run rows of a prompt, or of a dense step, through some layers. x [B, T, H] -> [B, T, H]"""
    for layer in layers:
        x = layer.prefill(x, rows)
    return x


def decode_layers(layers: Sequence[RunningLayer], x: Tensor, step: DecodePass) -> Tensor:
    """Run rows of a step through some layers. x [B, T, H] -> [B, T, H]"""
    for layer in layers:
        x = layer.decode(x, step)
    return x


class Walk(Protocol):
    """How a prompt walks through layers."""

    def __call__(self, layers: Sequence[RunningLayer], x: Tensor, rows: PrefillPass, state: RunningState) -> Tensor:
        """Run the rows of a prompt through some layers of a state. x [B, T, H] -> [B, T, H]"""

    def evidence_tokens(self, rows: PrefillPass, state: RunningState) -> int:
        """Count the tokens that are evidence, in the layer where fewest are."""


@dataclass(frozen=True)
class EveryLayer:
    """All rows run through every layer, one after the other."""

    def __call__(self, layers: Sequence[RunningLayer], x: Tensor, rows: PrefillPass, state: RunningState) -> Tensor:
        return prefill_layers(layers, x, rows)

    def evidence_tokens(self, rows: PrefillPass, state: RunningState) -> int:
        return rows.tokens
