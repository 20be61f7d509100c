"""What a prefill leaves behind and decode steps carry on: per layer its cache and the blocks that run.

A layer is two residual blocks, attention and feed-forward network. A state lists the blocks of each layer that run, so
that leaving out a layer, or one block of it, is a shorter list.

B batch, T rows, S cache slots, H hidden size.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.attention import CachedAttention
from models.blocks import PrunedBlock, Sublayer
from models.cache import KVCache, LayerCache
from models.clock import Clock
from models.passes import DecodePass, PrefillPass
from models.pruning.refresh import RefreshSchedule
from models.pruning.resolve import Pruning


@dataclass
class LayerState:
    """One layer's part of the cache, what runs in place of its two blocks' insides, and the blocks that run."""

    index: int
    cache: LayerCache
    attention: CachedAttention
    ffn: PrunedBlock
    sublayers: list[Sublayer] = field(default_factory=list)

    def prefill(self, x: Tensor, rows: PrefillPass) -> Tensor:
        for sublayer in self.sublayers:
            x = sublayer.prefill(x, rows)
        return rows.pictures.add_features(self.index, x)

    def decode(self, x: Tensor, step: DecodePass) -> Tensor:
        for sublayer in self.sublayers:
            x = sublayer.decode(x, step)
        return x


@dataclass
class DecodeState:
    """Allocated once for a batch size, a capacity and a pruning; a prefill starts it anew, or goes on after a prompt.

    live      bool [B, 1], False for a sequence that has ended: it no longer counts when candidates are chosen
    clock     time of the prompt's phases
    schedule  when steps run dense, and when channels are partitioned again
    """

    cache: KVCache
    layers: list[LayerState]
    pruning: Pruning
    live: Tensor
    clock: Clock
    schedule: RefreshSchedule

    def start(self, prompt_slots: int, real: Tensor | None, rope_delta: Tensor | None = None) -> None:
        """Forget the last prompt. real bool [B, T], False where a slot is padding; rope_delta: see PictureRows"""
        self.cache.start(prompt_slots, real, rope_delta)
        for layer in self.layers:
            layer.attention.restart()
            layer.ffn.restart()
        self.live.fill_(True)
        self.clock = Clock(self.live.device)
        self.schedule = self.pruning.new_schedule(len(self.live))

    def go_on(self, kept: int, rope_delta: Tensor | None = None) -> None:
        """Go on with more of a prompt after the first `kept` slots of the cache. What is evidence stays evidence."""
        self.cache.go_back(kept)
        self.cache.shift(rope_delta)
        self.live.fill_(True)
        self.clock = Clock(self.live.device)
        self.schedule.live = len(self.live)

    @torch.inference_mode()
    def grow(self, capacity: int) -> None:
        """Enlarge the cache to so many slots."""
        self.cache.grow(capacity)

    def fits(self, batch: int, capacity: int, pruning: Pruning, dropped: int) -> bool:
        """Whether it was made for just this: a cache of another capacity would cost attention time, or be too small."""
        made_for = len(self.live), self.cache.capacity, self.pruning, self.cache.dropped
        return made_for == (batch, capacity, pruning, dropped)

    def end(self, index: int) -> None:
        """One sequence has ended."""
        self.live[index] = False
        self.schedule.live -= 1

    def partition_bytes(self) -> int:
        """Memory that the copies of active weights take, in bytes."""
        return sum(layer.attention.copied_bytes() + layer.ffn.copied_bytes() for layer in self.layers)
