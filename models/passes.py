"""Passes: which rows go through a layer, at which positions, who sees whom, what counts as evidence, who decides.

Two kinds, as there are two visible paths in every block. A PrefillPass is a prompt on its way: its rows are evidence. A
DecodePass is what follows: one row per sequence, which decide together, or the rows of a text that is known already,
each for itself. A mixture hands each of its experts a part of a pass.

B batch, T rows, S slots that are seen, D head size, n rows of a part.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.cache import KVCache
from models.clock import Clock
from models.products import attend_cache, attend_prompt
from models.pruning.partition import Evidence, channel_scores

# Told, by every feed-forward network, what it computed: see FeedForward.prefill and FeedForward.decode.
Observer = Callable[..., None]
Rotary = Callable[..., tuple[Tensor, Tensor]]


class View(NamedTuple):
    """What the rows of a layer see of what came before. The masks and rotary embeddings of a pass go by it.

    window  tokens a query sees, itself included; None: all before it
    blind   not the prompt's rows that passed the layer by
    thin    not the rows of pictures that have been left out (models/visual_tokens.py), which have no slots there
    """

    window: int | None
    blind: bool = False
    thin: bool = False


class Stretch(NamedTuple):
    """The rows of one picture, one after the other: of which prompt of the batch, the first of them, how many."""

    sequence: int
    first: int
    length: int


Masks = dict[View, Any]
Turns = dict[View, tuple[Tensor, Tensor]]
Slots = dict[View, Tensor]


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
    stretches: Sequence[Stretch] = ()


@dataclass
class PrefillPass:
    """What every layer needs to run a prompt, or more of one.

    turns         by what layers see: cos, sin [B, T, D], rotary embedding of the positions
    places        int64 [T], the cache slots that these rows fill; [B, T], would fill if none had been left out
    slots         by what layers see: int64 [T], those that they fill
    follows       whether rows came before, which these attend to in the cache; else to each other alone
    masks         by what layers see. Of rows that follow: float [B, 1, T, S], 0 where a row may look and -inf
                  elsewhere; else bool [B, 1, T, T], True where it may look, None: causal and nothing else
    counted       bool [B, T], rows that count as evidence (None: all), `tokens` of them
    draws         partitions are drawn from the evidence so far
    finish_dense  down_proj and o_proj run on all channels (prefill "dense"), not only on the resident ones
    rows          int64 [n], which rows of the batch these are, where they are a part; None: all
    of_prompt     whether these are rows of a prompt; else of a later step
    """

    turns: Turns
    places: Tensor
    slots: Slots
    follows: bool
    masks: Masks
    counted: Tensor | None
    tokens: int
    draws: bool
    finish_dense: bool
    clock: Clock
    observe: Observer | None = None
    rows: Tensor | None = None
    of_prompt: bool = True

    def see(self, evidence: Evidence, h: Tensor) -> None:
        """Add what these rows show to the evidence. h [B, T, I]"""
        if self.of_prompt:
            with self.clock.phase("scores"):
                evidence.add(h, self.counted, self.tokens)
        else:                           # a step, perhaps a compiled one: nobody times its parts
            evidence.add(h, self.counted, self.tokens)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, view: View, scale: float
    ) -> Tensor:
        """q [B, N, T, D]; k, v [B, K, T, D], of these rows; keys, values [B, K, S, D], the cache -> [B, T, N, D]"""
        if self.follows:
            return attend_cache(q, keys, values, self.masks[view], scale)
        return attend_prompt(q, k, v, self.masks[view], scale)

    def part(self, rows: Tensor, counted: Tensor | None, tokens: int) -> "PrefillPass":
        """The pass of some rows alone, through a network that does not look at positions. counted bool [1, n]"""
        return replace(self, rows=rows, counted=counted, tokens=tokens)


@dataclass
class DecodePass:
    """What every layer needs to run rows that come after the prompt.

    turns     by what layers see: cos, sin [B, T, D]
    masks     by what layers see: float [B, 1, T, S], 0 where a row may look and -inf elsewhere
    slots     by what layers see: int64 [T], the cache slots that these rows fill
    live      bool [B, 1], False for sequences that have ended: they do not count when candidates are chosen
    together  whether the rows decide together (the sequences of a batch, at one step) or each for itself
    """

    turns: Turns
    masks: Masks
    slots: Slots
    live: Tensor
    together: bool
    observe: Observer | None = None

    def scores(self, h: Tensor, norms: Tensor) -> Tensor:
        """Importance of channels at this step. h [B, T, C], norms [C] -> [C], or [B, T, C] where rows are alone."""
        return channel_scores(h, norms, self.live) if self.together else h.float().abs() * norms

    def part(self, live: Tensor) -> "DecodePass":
        """The pass of some rows alone, as one sequence each. live bool [n, 1]"""
        return replace(self, live=live)


class LayerRows(NamedTuple):
    """Which rows of a prompt run through one layer.

    running  the pass of those that do
    waiting  of the rows before them, which leave their keys and values there and pass the layer by (Prefill-Only
             pruning, arXiv 2602.03295); None: there are none, every row runs
    """

    running: PrefillPass
    waiting: PrefillPass | None = None


def visible(
    queries: Tensor, slots: Tensor, padding: Tensor | None, window: int | None, blocks: Tensor | None = None
) -> Tensor:
    """Where rows may look: at what is not after them, nor padding, nor further back than the window, counted with them.

    The rows of one picture may also look at those after them, where there are blocks. A row of padding sees itself, so
    that no row of the softmax is empty.

    queries int64 [T] or [B, T], the slots of the rows; slots int64 [S] or [B, S]; padding int64 [B, 1], slots on the
    left that are none; blocks int64 [B, slots so far], see PictureRows -> bool [B or 1, T, S]
    """
    query, key = queries[..., None], slots[..., None, :]
    seen = key <= query                                                             # [T, S] or [B, T, S]
    if blocks is not None:
        own, other = blocks_at(blocks, queries)[..., None], blocks_at(blocks, slots)[..., None, :]
        seen = seen | ((own == other) & (own >= 0))                                 # [B, T, S]
    if window is not None:
        seen = seen & (key > query - window)
    if padding is None:
        return seen.view(-1, *seen.shape[-2:])
    return (seen & (key >= padding[:, None])) | (key == query)                     # [B, T, S]


def blocks_at(blocks: Tensor, slots: Tensor) -> Tensor:
    """The blocks of these slots, -1 where there are none. blocks int64 [B, n]; slots int64 [S] or [B, S] -> [B, S]"""
    slots = slots.expand(len(blocks), -1)
    inside = (slots >= 0) & (slots < blocks.shape[1])
    return blocks.gather(1, slots * inside).masked_fill(~inside, -1)


def prefill_pass(
    rotary: Rotary, views: Iterable[View], x: Tensor, real: Tensor | None, counted: Tensor | None = None,
    clock: Clock | None = None, observe: Observer | None = None, positions: Tensor | None = None,
    blocks: Tensor | None = None,
) -> PrefillPass:
    """Of a whole prompt, to be finished on all channels.

    x [B, T, H]; real bool [B, T], None: no padding; counted bool [B, T], None: all real ones
    positions int64 [3, B, T], None: one after the other; blocks int64 [B, T], see PictureRows
    """
    slots = torch.arange(x.shape[1], device=x.device)                               # [T]
    padding = None if real is None else (~real).sum(dim=1, keepdim=True)            # [B, 1]
    if positions is None:
        positions = slots[None] if padding is None else (slots - padding).clamp(min=0)
    views = set(views)
    masks: Masks = {}
    for view in views:
        masks[view] = None
        if padding is not None or blocks is not None or (view.window is not None and view.window < len(slots)):
            masks[view] = visible(slots, slots, padding, view.window, blocks)[:, None]
    counted = real if counted is None else counted
    tokens = x.shape[:-1].numel() if counted is None else int(counted.sum())
    clock = clock or Clock(x.device)
    turns = turned(rotary, views, positions, x.dtype)
    own = dict.fromkeys(views, slots)
    return PrefillPass(turns, slots, own, False, masks, counted, tokens, True, True, clock, observe)


def turned(rotary: Rotary, views: Iterable[View], positions: Tensor, dtype: torch.dtype) -> Turns:
    """Rotary embeddings for every kind of layer. positions int64 [B, T] or [3, B, T]"""
    return {view: rotary(positions, dtype, view.window) for view in set(views)}


def following_pass(
    rotary: Rotary, views: Iterable[View], x: Tensor, cache: KVCache, counted: Tensor | None, tokens: int,
    draws: bool, clock: Clock, observe: Observer | None = None, of_prompt: bool = False,
    positions: Tensor | None = None, blocks: Tensor | None = None,
) -> PrefillPass:
    """Of rows after those in the cache, finished on all channels. x [B, T, H]; counted bool [B, T], `tokens` True

    positions int64 [3, B, T], None: one after the other; blocks int64 [B, slots so far], see PictureRows
    """
    slots = cache.length + torch.arange(x.shape[1], device=x.device)                # [T]
    turns = turned(rotary, views, cache.positions(slots) if positions is None else positions, x.dtype)
    masks = masks_in_cache(views, cache, slots, x.dtype, blocks)
    own = slots_in_cache(views, cache, slots)
    return PrefillPass(
        turns, slots, own, True, masks, counted, tokens, draws, True, clock, observe, of_prompt=of_prompt
    )


def prompt_plan(
    whole: PrefillPass, pruning: Any, layers: int, cache: KVCache, dtype: torch.dtype, blocks: Tensor | None = None
) -> list[LayerRows]:
    """Which rows of a prompt run through each layer: all of them, or in layers that are skipped the boundary alone.

    The boundary are the last rows of every sequence, padding being on the left. They run as a step's rows do, looking
    at the cache, and are the only evidence that a skipped layer has.
    """
    rows, boundary = whole.places.shape[-1], pruning.boundary
    skipped = pruning.skipped_by(rows)
    if not skipped:
        return [LayerRows(whole)] * layers
    rest = rows - boundary
    cache.passed_by.copy_(cache.left_out + rest)
    waiting, last = (
        replace(
            whole, places=whole.places[..., part], slots={view: slots[part] for view, slots in whole.slots.items()},
            turns={view: (cos[:, part], sin[:, part]) for view, (cos, sin) in whole.turns.items()},
        )
        for part in (slice(rest), slice(rest, None))
    )
    masks = masks_in_cache(whole.slots, cache, last.places, dtype, blocks)
    counted = None if whole.counted is None else whole.counted[:, rest:]            # [B, K]
    tokens = len(cache.padding) * boundary if counted is None else int(counted.sum())
    running = replace(last, follows=True, masks=masks, counted=counted, tokens=tokens)
    passed_by = LayerRows(running, waiting)
    return [passed_by if index in skipped else LayerRows(whole) for index in range(layers)]


def decode_pass(
    rotary: Rotary, views: Iterable[View], x: Tensor, cache: KVCache, live: Tensor, together: bool,
    observe: Observer | None = None,
) -> DecodePass:
    """Of rows after those in the cache. x [B, T, H]; live bool [B, 1]"""
    slots = cache.length if x.shape[1] == 1 else cache.length + torch.arange(x.shape[1], device=x.device)       # [T]
    turns, masks = turned(rotary, views, cache.positions(slots), x.dtype), masks_in_cache(views, cache, slots, x.dtype)
    return DecodePass(turns, masks, slots_in_cache(views, cache, slots), live, together, observe)


def slots_in_cache(views: Iterable[View], cache: KVCache, slots: Tensor) -> Slots:
    """Where rows are kept that would fill these slots if no row had been left out. int64 [T]"""
    return {view: slots - cache.left_out if view.thin else slots for view in set(views)}


def masks_in_cache(
    views: Iterable[View], cache: KVCache, slots: Tensor, dtype: torch.dtype, blocks: Tensor | None = None
) -> Masks:
    """Masks of rows that fill these slots of the cache, int64 [T] or [B, T]; blocks: see PictureRows."""
    masks: Masks = {}
    for view in set(views):
        kept = cache.places if view.thin else cache.slots                           # [B, S] or [S]
        hidden = ~visible(slots, kept, cache.padding, view.window, blocks)[:, None]             # [B, 1, T, S]
        if view.blind:
            hidden = hidden | (kept < cache.passed_by)[..., None, None, :]
        masks[view] = torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, -torch.inf)
    return masks
