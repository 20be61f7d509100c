"""Masks: which cache slots each row may attend to.

B batch, T rows, S slots.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from models.cache import KVCache, View

Masks = dict[View, Any]
Slots = dict[View, Tensor]


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
