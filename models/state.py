"""The state that a prefill writes and decode steps continue: per layer its cache and the blocks that run.

A layer has two residual blocks, attention and feed-forward network. A state lists the blocks of each layer that run;
leaving out a layer, or one block of it, makes the list shorter.

B batch, T tokens, S cache slots, H hidden size.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.attention import CachedAttention
from models.blocks import PrunedBlock, Sublayer
from models.cache import KVCache, LayerCache
from models.clock import Clock
from models.passes import DecodePass, PrefillPass
from models.pruning.active_weights import AnyMatrix
from models.pruning.pruning import Pruning
from models.pruning.refresh import RefreshSchedule


@dataclass
class LayerState:
    """One layer of a state: its cache, its attention and feed-forward network as pruned, and the blocks that run."""

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
    """The state of a run, allocated once for a batch size, a capacity and a pruning.

    A prefill resets it, or continues after the tokens it holds.

    lm_head   what a step's output projection multiplies with: the model's matrix, or what a rule puts in its place
    live      bool [B, 1], False for a sequence that has ended: it no longer counts when candidates are chosen
    clock     time of the prompt's phases
    schedule  decides when steps run dense, and when channels are partitioned again
    """

    cache: KVCache
    layers: list[LayerState]
    lm_head: AnyMatrix
    pruning: Pruning
    live: Tensor
    clock: Clock
    schedule: RefreshSchedule

    def start(self, prompt_slots: int, real: Tensor | None, rope_delta: Tensor | None = None) -> None:
        """Reset for a new prompt. real bool [B, T], False where a slot is padding; rope_delta: see PictureRows"""
        self.cache.start(prompt_slots, real, rope_delta)
        for layer in self.layers:
            layer.attention.restart()
            layer.ffn.restart()
        self.live.fill_(True)
        self.clock = Clock(self.live.device)
        self.schedule = self.pruning.new_schedule(len(self.live))

    def go_on(self, kept: int, rope_delta: Tensor | None = None) -> None:
        """Keep the first `kept` slots of the cache and continue the prompt after them. The evidence is kept whole."""
        self.cache.go_back(kept)
        self.cache.shift(rope_delta)
        self.live.fill_(True)
        self.clock = Clock(self.live.device)
        self.schedule.live = len(self.live)

    @torch.inference_mode()
    def grow(self, capacity: int) -> None:
        """Enlarge the cache to `capacity` slots."""
        self.cache.grow(capacity)

    def fits(self, batch: int, pruning: Pruning) -> bool:
        """Return True if the state was made for this batch size and pruning. Its cache may have another capacity."""
        return (len(self.live), self.pruning) == (batch, pruning)

    @torch.inference_mode()
    def resize(self, capacity: int, dropped: int) -> None:
        """Give the cache exactly this capacity, since a larger one is slower. The next prompt must be a new one."""
        self.cache.allocate(capacity, dropped)

    def end(self, index: int) -> None:
        """Mark one sequence as ended."""
        self.live[index] = False
        self.schedule.live -= 1

    def partition_bytes(self) -> int:
        """Return the memory of the copies of active weights, in bytes."""
        return sum(layer.attention.copied_bytes() + layer.ffn.copied_bytes() for layer in self.layers)
