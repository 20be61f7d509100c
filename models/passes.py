"""Passes: the tokens that run through a layer, with their positions, masks, cache slots and role in pruning.

There are two kinds, as every block has two paths. A PrefillPass runs a prompt: its tokens are evidence. A DecodePass
runs tokens after the prompt: one per sequence, which share one choice of channels, or the tokens of a known text, each
with a choice of its own. A mixture hands each of its experts a part of a pass.

B batch, T tokens, S visible slots, D head size.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from models.cache import KVCache, LayerCache
from models.clock import Clock, phase
from models.masks import Masks, masks_in_cache, visible
from models.matrices.products import attend_cache, attend_prompt
from models.pruning.evidence import Evidence, channel_scores
from models.slots import AttentionPattern

RotaryOf = Callable[..., tuple[Tensor, Tensor]]


class ImageSpan(NamedTuple):
    """The consecutive tokens of one picture: index of the prompt in the batch, first token, number of tokens."""

    sequence: int
    first: int
    length: int


RotaryPairs = dict[AttentionPattern, tuple[Tensor, Tensor]]
Slots = dict[AttentionPattern, Tensor]


@dataclass
class PictureRows:
    """Extra inputs of a prompt's tokens because of its pictures, beside their embeddings.

    positions   int64 [3, B, T], by time, row and column; None: consecutive, as in a text
    rope_delta  int64 [B, 1], added to the positions of the tokens after the prompt; None: nothing
    added       [B, T, H] each, added to the output of the first layers (DeepStack)
    blocks      int64 [B, slots so far]: tokens of equal number attend to each other both ways; -1: of no picture
    stretches   the pictures among these tokens; set only if some of their tokens are dropped
    """

    positions: Tensor | None = None
    rope_delta: Tensor | None = None
    added: Sequence[Tensor] = ()
    blocks: Tensor | None = None
    stretches: Sequence[ImageSpan] = ()

    def add_features(self, layer: int, x: Tensor) -> Tensor:
        """Add the features of pictures that belong to the output of this layer. [B, T, H] -> [B, T, H]"""
        return x + self.added[layer] if layer < len(self.added) else x


NO_PICTURES = PictureRows()


class Partitioned(Protocol):
    """What has channels to partition (see PrunedFFN in models/pruning/interface.py)."""

    def sort_channels(self) -> None: ...

    def copy_weights(self) -> None: ...


def repartition(network: Partitioned, clock: Clock | None = None) -> None:
    """Partition channels by all evidence so far; copy the weights of the active ones. clock: sums the time of both"""
    with phase(clock, "sort"):
        network.sort_channels()
    with phase(clock, "copy"):
        network.copy_weights()


@dataclass
class PrefillPass:
    """Inputs that every layer needs to run tokens of a prompt, or a dense step after it.

    rotary        per attention pattern: cos, sin [B, T, D] of the rotary embedding
    token_index   int64 [T] or [B, T], index of each token, counted from the start of the padded prompt
    slots         per attention pattern: int64 [T], the cache slots that these tokens fill in its layers
    masks         per attention pattern. If `follows`: float [B, 1, T, S], 0 if visible, else -inf. Otherwise bool
                  [B, 1, T, T], True if visible; None: plain causal attention
    follows       True if these tokens attend to the cache, which holds earlier tokens; else to each other alone
    pictures      extra inputs because of pictures in the prompt
    counted       bool [B, T], tokens that count as evidence (None: all), `tokens` of them
    partitions    True if layers partition their channels from the evidence so far
    finish_dense  down_proj and o_proj run on all channels (prefill "dense"), not only on the active ones
    clock         sums the time of the prompt's phases; None: no timing
    of_prompt     True for tokens of a prompt, False for a dense step after it
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
        """Set which tokens of the batch are evidence. counted bool [B, T], None: all"""
        self.counted = counted
        self.tokens = batch * self.token_index.shape[-1] if counted is None else int(counted.sum())

    def see(self, evidence: Evidence, h: Tensor) -> None:
        """Add the squared activations of these tokens to the evidence. h [B, T, I]"""
        with phase(self.clock, "scores"):
            evidence.add(h, self.counted, self.tokens)

    def repartition(self, network: Partitioned) -> None:
        """Partition a network's channels, or an attention's heads, by all evidence so far."""
        repartition(network, self.clock)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, scale: float) -> Tensor:
        """Attend to the cache if earlier tokens are there, else to each other.

        q [B, N, T, D]; k, v [B, K, T, D] of these tokens -> [B, T, N, D]
        """
        mask = self.masks[cache.pattern]
        if not self.follows:
            return attend_prompt(q, k, v, mask, scale)
        return attend_cache(q, cache.keys, cache.values, mask, scale)

    def part(self, counted: Tensor | None, tokens: int) -> "PrefillPass":
        """Return the pass of some of the tokens, for a network that ignores positions. counted bool [1, n]"""
        return replace(self, counted=counted, tokens=tokens)


@dataclass
class DecodePass:
    """Inputs that every layer needs to run tokens after the prompt.

    rotary    per attention pattern: cos, sin [B, T, D] of the rotary embedding
    masks     per attention pattern: float [B, 1, T, S], 0 if visible, else -inf
    slots     per attention pattern: int64 [T], the cache slots that these tokens fill in its layers
    live      bool [B, 1], False for sequences that have ended: they do not count when candidates are chosen
    together  True if all tokens share one choice of candidates (a step of a batch); False if each has its own
    """

    rotary: RotaryPairs
    masks: Masks
    slots: Slots
    live: Tensor
    together: bool

    def scores(self, h: Tensor, norms: Tensor) -> Tensor:
        """Score channels at this step. h [B, T, C], norms [C] -> [C] if `together`, else [B, T, C]"""
        return channel_scores(h, norms, self.live) if self.together else h.float().abs() * norms

    def part(self, live: Tensor) -> "DecodePass":
        """Return the pass of some of the tokens, as one sequence each. live bool [n, 1]"""
        return replace(self, live=live)


def prefill_pass(
    rotary: RotaryOf, patterns: Iterable[AttentionPattern], x: Tensor, real: Tensor | None,
    pictures: PictureRows = NO_PICTURES,
) -> PrefillPass:
    """Build the pass of a whole prompt, without earlier tokens. x [B, T, H]; real bool [B, T], None: no padding"""
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
    """Build the pass of tokens that follow those in the cache and attend to it. x [B, T, H]"""
    tokens = cache.following(x.shape[1])                                            # [T]
    positions = cache.positions(tokens) if pictures.positions is None else pictures.positions
    masks = masks_in_cache(cache.maps, cache, tokens, x.dtype, pictures.blocks)
    pairs, slots = rotary_pairs(rotary, cache.maps, positions, x.dtype), slots_in_cache(cache, tokens)
    return PrefillPass(pairs, tokens, slots, masks, follows=True, pictures=pictures)


def decode_pass(rotary: RotaryOf, x: Tensor, cache: KVCache, live: Tensor, together: bool) -> DecodePass:
    """Build the pass of a step, after the tokens in the cache. x [B, T, H]; live bool [B, 1]"""
    tokens = cache.following(x.shape[1])                                            # [T]
    pairs = rotary_pairs(rotary, cache.maps, cache.positions(tokens), x.dtype)
    masks = masks_in_cache(cache.maps, cache, tokens, x.dtype)
    return DecodePass(pairs, masks, slots_in_cache(cache, tokens), live, together)


def rotary_pairs(
    rotary: RotaryOf, patterns: Iterable[AttentionPattern], positions: Tensor, dtype: torch.dtype
) -> RotaryPairs:
    """Compute rotary embeddings for every attention pattern. positions int64 [B, T] or [3, B, T]"""
    return {pattern: rotary(positions, dtype, pattern.window) for pattern in patterns}


def slots_in_cache(cache: KVCache, tokens: Tensor) -> Slots:
    """Return the cache slots that these tokens fill, for every attention pattern. tokens int64 [T]"""
    return {pattern: slot_map.slots(tokens) for pattern, slot_map in cache.maps.items()}
