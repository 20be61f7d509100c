"""What prefill leaves behind and decode steps carry on: the cache, and per layer the weights that stay active."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from models.attention import ActiveHeads
from models.cache import KVCache
from models.clock import Clock
from models.pruning.resolve import Pruning


@dataclass
class LayerState:
    """One layer's share: its slice of the cache, its active heads and its active feed-forward weights.

    ffn is what the layer's own feed-forward network made: ActiveFeedForward, or the experts' of a mixture.
    """

    keys: Tensor                                                                    # [B, K, S, D]
    values: Tensor                                                                  # [B, K, S, D]
    heads: ActiveHeads
    ffn: Any


class Gathering:
    """Evidence after the prompt, counted on the host: which steps are dense, and which of them draw the partitions.

    tokens       real tokens that the scores have seen; live: sequences that have not ended
    steps        decode steps so far, dense_steps of them dense, redraws of these drew anew
    """

    def __init__(self, pruning: Pruning, live: int) -> None:
        settings = pruning.settings
        prunes = pruning.rule.follows_prompt and pruning.ratio > 0
        self.least = settings.min_evidence if prunes else 0
        self.dense_every = settings.dense_every if prunes else None
        self.redraw_every = settings.redraw_every
        self.live, self.tokens, self.steps, self.dense_steps, self.redraws = live, 0, 0, 0, 0
        self.drawn_at = 0

    @property
    def ever_dense(self) -> bool:
        """Whether any step can be dense."""
        return self.least > 0 or self.dense_every is not None

    def prompt(self, tokens: int) -> bool:
        """A prompt of so many tokens is seen: whether it is enough to draw partitions from."""
        self.tokens += tokens
        return self.tokens >= self.least

    def next_step(self) -> tuple[bool, bool]:
        """Count a step: whether it runs dense, and whether it then draws the partitions."""
        self.steps += 1
        lacking = self.tokens < self.least
        if not lacking and (self.dense_every is None or self.steps % self.dense_every):
            return False, False
        self.dense_steps += 1
        self.tokens += self.live
        due = self.redraw_every is not None and self.steps - self.drawn_at >= self.redraw_every
        draws = self.tokens >= self.least and (lacking or due)
        if draws:
            self.redraws += not lacking
            self.drawn_at = self.steps
        return True, draws


@dataclass
class DecodeState:
    """Allocated once for a batch size, a capacity and a pruning; every prefill starts it anew.

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
    gathering: "Gathering"

    def start(self, prompt_slots: int, real: Tensor | None) -> None:
        """Forget the last prompt. real bool [B, T] is False where a slot is padding."""
        self.cache.start(prompt_slots, real)
        for layer in self.layers:
            layer.heads.restart()
            layer.ffn.restart()
        self.live.fill_(True)
        self.clock, self.step_clock = Clock(self.live.device), Clock(self.live.device)
        self.gathering = Gathering(self.pruning, len(self.live))

    def end(self, index: int) -> None:
        """One sequence has ended."""
        self.live[index] = False
        self.gathering.live -= 1

    def fits(self, batch: int, capacity: int, pruning: Pruning) -> bool:
        """Made for just this: a cache of another capacity would cost attention time, or be too small."""
        return (len(self.live), self.cache.capacity, self.pruning) == (batch, capacity, pruning)

    def partition_bytes(self) -> int:
        """Memory that the copies of active weights take, in bytes."""
        return sum(layer.heads.copied_bytes() + layer.ffn.copied_bytes() for layer in self.layers)
