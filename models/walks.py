"""Walks: which rows run through which layers, in what order.

B batch, T rows, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from models.passes import DecodePass, PrefillPass


def prefill_layers(layers: Sequence[Any], x: Tensor, rows: PrefillPass) -> Tensor:
    """Rows of a prompt, or of a dense step, through some layers. x [B, T, H] -> [B, T, H]"""
    for layer in layers:
        x = layer.prefill(x, rows)
    return x


def decode_layers(layers: Sequence[Any], x: Tensor, step: DecodePass) -> Tensor:
    """Rows of a step through some layers. x [B, T, H] -> [B, T, H]"""
    for layer in layers:
        x = layer.decode(x, step)
    return x


class Walk(Protocol):
    """How a prompt walks through layers."""

    def __call__(self, layers: Sequence[Any], x: Tensor, rows: PrefillPass, state: Any) -> Tensor:
        """layers: LayerState of the DecodeState `state`. x [B, T, H] -> [B, T, H]"""

    def evidence_tokens(self, rows: PrefillPass, state: Any) -> int:
        """How many tokens count as evidence, in the layer where fewest do."""


@dataclass(frozen=True)
class EveryLayer:
    """All rows run through every layer, one after the other."""

    def __call__(self, layers: Sequence[Any], x: Tensor, rows: PrefillPass, state: Any) -> Tensor:
        return prefill_layers(layers, x, rows)

    def evidence_tokens(self, rows: PrefillPass, state: Any) -> int:
        return rows.tokens
