"""Attention masks: which tokens a query may attend to, and which cache slots hold them.

B batch, T query tokens, S slots.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from models.cache import KVCache
from models.slots import AttentionPattern

Masks = dict[AttentionPattern, Any]


def visible(
    queries: Tensor, keys: Tensor, padding: Tensor | None, window: int | None, blocks: Tensor | None = None
) -> Tensor:
    """Compute which keys each query may attend to: no later token, no padding, none beyond the window.

    With `blocks`, tokens of one picture may also attend to later tokens of that picture. A padding token attends to
    itself, so that no row of the softmax is empty.

    queries int64 [T] or [B, T] and keys int64 [S] or [B, S]: token indices in the padded prompt, from 0; -1: no token;
    padding int64 [B, 1], number of padding tokens on the left; blocks int64 [B, tokens so far], see PictureRows
    -> bool [B or 1, T, S]
    """
    query, key = queries[..., None], keys[..., None, :]
    seen = key <= query                                                             # [T, S] or [B, T, S]
    if blocks is not None:
        own, other = blocks_at(blocks, queries)[..., None], blocks_at(blocks, keys)[..., None, :]
        seen = seen | ((own == other) & (own >= 0))                                 # [B, T, S]
    if window is not None:
        seen = seen & (key > query - window)
    if padding is None:
        return seen.view(-1, *seen.shape[-2:])
    return (seen & (key >= padding[:, None])) | (key == query)                     # [B, T, S]


def blocks_at(blocks: Tensor, tokens: Tensor) -> Tensor:
    """Look up the blocks of these tokens, -1 if a token has none. blocks int64 [B, n]; tokens int64 [S] or [B, S]
    -> [B, S]"""
    tokens = tokens.expand(len(blocks), -1)
    inside = (tokens >= 0) & (tokens < blocks.shape[1])
    return blocks.gather(1, tokens * inside).masked_fill(~inside, -1)


def masks_in_cache(
    patterns: Iterable[AttentionPattern], cache: KVCache, tokens: Tensor, dtype: torch.dtype,
    blocks: Tensor | None = None,
) -> Masks:
    """Compute masks for attention to the cache, per pattern float [B, 1, T, S]: 0 if visible, else -inf.

    tokens int64 [T] or [B, T], the query tokens; blocks: see PictureRows
    """
    masks: Masks = {}
    for pattern in patterns:
        held = cache.maps[pattern].tokens                                           # [S] or [B, S]
        hidden = ~visible(tokens, held, cache.padding, pattern.window, blocks)[:, None]             # [B, 1, T, S]
        masks[pattern] = torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, -torch.inf)
    return masks
