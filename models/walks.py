"""Walks: which tokens run through which layers, in what order.

B batch, T tokens, H hidden size.
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
        """Run tokens of a prompt, or of a dense step."""

    def decode(self, x: Tensor, step: DecodePass) -> Tensor:
        """Run the tokens of a step."""


class RunningState(Protocol):
    """The state that a walk works on (DecodeState in models/state.py)."""

    cache: KVCache
    live: Tensor


def prefill_layers(layers: Sequence[RunningLayer], x: Tensor, rows: PrefillPass) -> Tensor:
    """Run tokens of a prompt, or of a dense step, through the given layers. x [B, T, H] -> [B, T, H]"""
    for layer in layers:
        x = layer.prefill(x, rows)
    return x


def decode_layers(layers: Sequence[RunningLayer], x: Tensor, step: DecodePass) -> Tensor:
    """Run the tokens of a step through the given layers. x [B, T, H] -> [B, T, H]"""
    for layer in layers:
        x = layer.decode(x, step)
    return x


class Walk(Protocol):
    """The way a prompt runs through layers."""

    def __call__(self, layers: Sequence[RunningLayer], x: Tensor, rows: PrefillPass, state: RunningState) -> Tensor:
        """Run the tokens of a prompt through the given layers of a state. x [B, T, H] -> [B, T, H]"""

    def evidence_tokens(self, rows: PrefillPass, state: RunningState) -> int:
        """Return how many tokens count as evidence, as the minimum over layers."""


@dataclass(frozen=True)
class EveryLayer:
    """All tokens run through every layer, one after the other."""

    def __call__(self, layers: Sequence[RunningLayer], x: Tensor, rows: PrefillPass, state: RunningState) -> Tensor:
        return prefill_layers(layers, x, rows)

    def evidence_tokens(self, rows: PrefillPass, state: RunningState) -> int:
        return rows.tokens
