"""What prefill leaves behind and decode steps carry on: the cache, and per layer the weights that stay active."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.active_heads import ActiveHeads
from models.cache import KVCache
from models.clock import Clock
from models.gathering import Drift, Gathering
from models.passes import View
from models.pruning.left_out import HALVES
from models.pruning.resolve import Pruning


@dataclass
class LayerState:
    """One layer's share: its slice of the cache, its active heads and its active feed-forward weights.

    ffn is what the layer's own feed-forward network made: ActiveFeedForward, or the experts' of a mixture.
    drift is the last attention's alone, where partitions are drawn anew on it.
    halves are those of the layer that run; probed: a rule looks at the prompt's stream before the network runs on it.
    """

    keys: Tensor                                                                    # [B, K, S, D]
    values: Tensor                                                                  # [B, K, S, D]
    heads: ActiveHeads
    ffn: Any
    drift: Drift | None = None
    halves: tuple[str, ...] = HALVES
    probed: bool = False


@dataclass
class DecodeState:
    """Allocated once for a batch size, a capacity and a pruning; a prefill starts it anew, or goes on after a prompt.

    live       bool [B, 1], False for a sequence that has ended: it no longer counts when candidates are chosen
    clock      time of the prompt's phases; step_clock: of partitions that are drawn later
    gathering  when steps run dense, and when partitions are drawn anew
    """

    cache: KVCache
    layers: list[LayerState]
    pruning: Pruning
    live: Tensor
    clock: Clock
    step_clock: Clock
    gathering: Gathering

    @property
    def views(self) -> list[View]:
        """What the layers' rows see."""
        return [layer.heads.view for layer in self.layers]

    def start(self, prompt_slots: int, real: Tensor | None, rope_delta: Tensor | None = None) -> None:
        """Forget the last prompt. real bool [B, T] is False where a slot is padding; rope_delta: see PictureRows"""
        self.cache.start(prompt_slots, real, rope_delta)
        for layer in self.layers:
            layer.heads.restart()
            layer.ffn.restart()
            if layer.drift is not None:
                layer.drift.restart()
        self.live.fill_(True)
        self.clock, self.step_clock = Clock(self.live.device), Clock(self.live.device)
        drift = next((layer.drift for layer in self.layers if layer.drift is not None), None)
        self.gathering = Gathering(self.pruning, len(self.live), drift)

    def go_on(self, kept: int, rope_delta: Tensor | None = None) -> None:
        """More of a prompt comes, after the first `kept` slots of the cache; what is evidence already stays so."""
        self.cache.go_back(kept)
        self.cache.shift(rope_delta)
        self.live.fill_(True)
        self.clock, self.step_clock = Clock(self.live.device), Clock(self.live.device)
        self.gathering.live = len(self.live)

    @torch.inference_mode()
    def grow(self, capacity: int) -> None:
        """Make the cache larger."""
        self.cache.grow(capacity)
        for layer, keys, values in zip(self.layers, self.cache.keys, self.cache.values, strict=True):
            layer.keys, layer.values = keys, values

    def end(self, index: int) -> None:
        """One sequence has ended."""
        self.live[index] = False
        self.gathering.live -= 1

    def fits(self, batch: int, capacity: int, pruning: Pruning, thin_capacity: int) -> bool:
        """Made for just this: a cache of another capacity would cost attention time, or be too small."""
        cache = self.cache
        made_for = len(self.live), cache.capacity, self.pruning, cache.thin_capacity
        return made_for == (batch, capacity, pruning, thin_capacity)

    def partition_bytes(self) -> int:
        """Memory that the copies of active weights take, in bytes."""
        return sum(layer.heads.copied_bytes() + layer.ffn.copied_bytes() for layer in self.layers)
