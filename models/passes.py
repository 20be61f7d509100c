"""Passes: which rows go through a layer, at which positions, who sees whom, what counts as evidence, who decides.

Two kinds, as there are two visible paths in every block. A PrefillPass is a prompt on its way: its rows are evidence. A
DecodePass is what follows: one row per sequence, which decide together, or the rows of a text that is known already,
each for itself. A mixture hands each of its experts a part of a pass.

B batch, T rows, S slots that are seen, D head size.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from models.cache import AttentionPattern, KVCache, LayerCache
from models.clock import Clock, phase
from models.masks import Masks, masks_in_cache, visible
from models.matrices.products import attend_cache, attend_prompt
from models.pruning.partition import Evidence, channel_scores

RotaryOf = Callable[..., tuple[Tensor, Tensor]]


class ImageSpan(NamedTuple):
    """The rows of one picture, one after the other: of which prompt of the batch, the first of them, how many."""

    sequence: int
    first: int
    length: int


RotaryPairs = dict[AttentionPattern, tuple[Tensor, Tensor]]
Slots = dict[AttentionPattern, Tensor]


@dataclass
class PictureRows:
    """What rows of a prompt have because of its pictures, beside their embeddings.

    positions   int64 [3, B, T], by time, row and column; None: one after the other, as in a text
    rope_delta  int64 [B, 1], what is added to the positions of the tokens after the prompt; None: nothing
    added       [B, T, H] each: what is added to the rows that leave the first layers (DeepStack)
    blocks      int64 [B, slots so far], by slot: rows of one number see each other both ways; -1 those of no picture
    stretches   where the pictures among these rows are; only asked for where some of their rows are left out
    """

    positions: Tensor | None = None
    rope_delta: Tensor | None = None
    added: Sequence[Tensor] = ()
    blocks: Tensor | None = None
    stretches: Sequence[ImageSpan] = ()

    def add_features(self, layer: int, x: Tensor) -> Tensor:
        """The rows that leave a layer, with the features of pictures that are added there. [B, T, H]"""
        return x + self.added[layer] if layer < len(self.added) else x


NO_PICTURES = PictureRows()


@dataclass
class PrefillPass:
    """What every layer needs to run rows of a prompt, or a dense step after it.

    rotary        per attention pattern: cos, sin [B, T, D] of the rotary embedding
    token_index   int64 [T] or [B, T], the tokens that these rows are, counted from the start of the padded prompt
    slots         per attention pattern: int64 [T], the cache slots that these rows fill in its layers
    masks         per attention pattern. Of rows that follow: float [B, 1, T, S], 0 where a row may look and -inf
                  elsewhere; else bool [B, 1, T, T], True where it may look, None: causal and nothing else
    follows       whether rows came before, which these attend to in the cache; else to each other alone
    pictures      what the rows have because of pictures in the prompt
    counted       bool [B, T], rows that count as evidence (None: all), `tokens` of them
    partitions    whether layers partition their channels from the evidence so far
    finish_dense  down_proj and o_proj run on all channels (prefill "dense"), not only on the active ones
    clock         where the time of the prompt's phases is added up; None: nobody times them
    of_prompt     whether these are rows of a prompt; else of a dense step after it
    """

    rotary: RotaryPairs
    token_index: Tensor
    slots: Slots
    masks: Masks
    follows: bool
    pictures: PictureRows
    counted: Tensor | None = None
    tokens: int = 0
    partitions: bool = False
    finish_dense: bool = True
    clock: Clock | None = None
    of_prompt: bool = True

    def count(self, batch: int, counted: Tensor | None) -> None:
        """Say which rows of the batch are evidence. counted bool [B, T], None: all"""
        self.counted = counted
        self.tokens = batch * self.token_index.shape[-1] if counted is None else int(counted.sum())

    def see(self, evidence: Evidence, h: Tensor) -> None:
        """Add the squares of these rows to the evidence. h [B, T, I]"""
        with phase(self.clock, "scores"):
            evidence.add(h, self.counted, self.tokens)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, scale: float) -> Tensor:
        """Attend to each other, or to the cache where rows came before. q [B, N, T, D]; k, v [B, K, T, D] of these rows
        -> [B, T, N, D]"""
        mask = self.masks[cache.pattern]
        if not self.follows:
            return attend_prompt(q, k, v, mask, scale)
        return attend_cache(q, cache.keys, cache.values, mask, scale)

    def part(self, counted: Tensor | None, tokens: int) -> "PrefillPass":
        """The pass of some rows alone, through a network that does not look at positions. counted bool [1, n]"""
        return replace(self, counted=counted, tokens=tokens)


@dataclass
class DecodePass:
    """What every layer needs to run rows that come after the prompt.

    rotary    per attention pattern: cos, sin [B, T, D] of the rotary embedding
    masks     per attention pattern: float [B, 1, T, S], 0 where a row may look and -inf elsewhere
    slots     per attention pattern: int64 [T], the cache slots that these rows fill in its layers
    live      bool [B, 1], False for sequences that have ended: they do not count when candidates are chosen
    together  whether the rows decide together (the sequences of a batch, at one step) or each for itself
    """

    rotary: RotaryPairs
    masks: Masks
    slots: Slots
    live: Tensor
    together: bool

    def scores(self, h: Tensor, norms: Tensor) -> Tensor:
        """Importance of channels at this step. h [B, T, C], norms [C] -> [C], or [B, T, C] where rows are alone."""
        return channel_scores(h, norms, self.live) if self.together else h.float().abs() * norms

    def part(self, live: Tensor) -> "DecodePass":
        """The pass of some rows alone, as one sequence each. live bool [n, 1]"""
        return replace(self, live=live)


def prefill_pass(
    rotary: RotaryOf, patterns: Iterable[AttentionPattern], x: Tensor, real: Tensor | None,
    pictures: PictureRows = NO_PICTURES,
) -> PrefillPass:
    """The pass of a whole prompt, whose rows attend to each other. x [B, T, H]; real bool [B, T], None: no padding"""
    tokens = torch.arange(x.shape[1], device=x.device)                              # [T]
    padding = None if real is None else (~real).sum(dim=1, keepdim=True)            # [B, 1]
    positions = pictures.positions
    if positions is None:
        positions = tokens[None] if padding is None else (tokens - padding).clamp(min=0)
    patterns, masks = set(patterns), Masks()
    for pattern in patterns:
        masks[pattern] = None
        if padding is not None or pictures.blocks is not None or (pattern.window and pattern.window < len(tokens)):
            masks[pattern] = visible(tokens, tokens, padding, pattern.window, pictures.blocks)[:, None]
    pairs = rotary_pairs(rotary, patterns, positions, x.dtype)
    return PrefillPass(pairs, tokens, dict.fromkeys(patterns, tokens), masks, follows=False, pictures=pictures)


def following_pass(rotary: RotaryOf, x: Tensor, cache: KVCache, pictures: PictureRows) -> PrefillPass:
    """The pass of rows that come after those in the cache, and attend to it. x [B, T, H]"""
    tokens = cache.following(x.shape[1])                                            # [T]
    positions = cache.positions(tokens) if pictures.positions is None else pictures.positions
    masks = masks_in_cache(cache.maps, cache, tokens, x.dtype, pictures.blocks)
    pairs, slots = rotary_pairs(rotary, cache.maps, positions, x.dtype), slots_in_cache(cache, tokens)
    return PrefillPass(pairs, tokens, slots, masks, follows=True, pictures=pictures)


def decode_pass(rotary: RotaryOf, x: Tensor, cache: KVCache, live: Tensor, together: bool) -> DecodePass:
    """The pass of a step's rows, after those in the cache. x [B, T, H]; live bool [B, 1]"""
    tokens = cache.following(x.shape[1])                                            # [T]
    pairs = rotary_pairs(rotary, cache.maps, cache.positions(tokens), x.dtype)
    masks = masks_in_cache(cache.maps, cache, tokens, x.dtype)
    return DecodePass(pairs, masks, slots_in_cache(cache, tokens), live, together)


def rotary_pairs(
    rotary: RotaryOf, patterns: Iterable[AttentionPattern], positions: Tensor, dtype: torch.dtype
) -> RotaryPairs:
    """Rotary embeddings for every attention pattern. positions int64 [B, T] or [3, B, T]"""
    return {pattern: rotary(positions, dtype, pattern.window) for pattern in patterns}


def slots_in_cache(cache: KVCache, tokens: Tensor) -> Slots:
    """The cache slots that rows of these tokens fill, for every attention pattern. tokens int64 [T]"""
    return {pattern: slot_map.slots(tokens) for pattern, slot_map in cache.maps.items()}
