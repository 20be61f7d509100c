"""Visual tokens dropped from a prompt: from some layer on they are not computed and have no slots in the cache.

By attention (FastV, arXiv 2403.06764): after layer K, drop the tokens that get least attention from the prompt's last
token in that layer, averaged over heads. By diversity, before the first layer: keep the features of each picture that
are furthest from each other, chosen one by one (the greedy max-min choice of DivPrune, arXiv 2503.02175). Kept tokens
keep their positions.

Each picture of a prompt keeps the same share, or number; FastV's authors have one picture per prompt.

B batch, T tokens, R kept tokens, S cache slots, N query heads, K key/value heads, D head size, H hidden size, n tokens
of a picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.blocks import AttentionBlock
from models.cache import KVCache
from models.masks import masks_in_cache, visible
from models.passes import PrefillPass
from models.pruning.heads import PartitionedAttention
from models.slots import SlotMap
from models.state import LayerState
from models.walks import RunningLayer, RunningState, Walk


class DroppedTokens(SlotMap):
    """The slot map of layers that drop tokens of the prompt.

    Kept tokens fill consecutive slots, and later tokens follow without a gap.

    tokens   int64 [B, S];  gone  int64 [1], number of dropped tokens;  missing  the same number for the host
    """

    def __init__(self, batch: int, capacity: int, dropped: int, device: torch.device) -> None:
        self.tokens = torch.arange(capacity - dropped, device=device).repeat(batch, 1)
        self.gone, self.missing = torch.zeros(1, dtype=torch.int64, device=device), 0

    def slots(self, tokens: Tensor) -> Tensor:
        return tokens - self.gone

    def start(self) -> None:
        self.drop(0, 0)

    def drop(self, missing: int, stay: int) -> None:
        """Drop `missing` tokens. The first `stay` slots keep their tokens; later slots continue consecutively."""
        self.missing = missing
        self.gone.fill_(missing)
        self.tokens[:, stay:] = torch.arange(stay + missing, self.most_tokens, device=self.tokens.device)

    def go_back(self, filled: int, tokens: int) -> None:
        if self.missing:
            stay = int((self.tokens[0, : filled - self.missing] < tokens).sum())
            self.drop(tokens - stay, stay)

    def grow(self, more: int) -> None:
        before = self.tokens.shape[1]
        self.tokens = F.pad(self.tokens, (0, more))
        self.drop(self.missing, before)

    @property
    def most_tokens(self) -> int:
        return self.tokens.shape[1] + self.missing


@dataclass(frozen=True)
class DropVisualTokens:
    """A walk that drops picture tokens before the layer `first`; otherwise it follows another walk."""

    walk: Walk
    first: int
    pruning: Any

    def __call__(self, layers: Sequence[RunningLayer], x: Tensor, rows: PrefillPass, state: RunningState) -> Tensor:
        if not rows.pictures.stretches:
            return self.walk(layers, x, rows, state)
        attended = None
        if self.first:
            x = self.walk(layers[: self.first - 1], x, rows, state)
            last, entered = layers[self.first - 1], x
            x = self.walk([last], x, rows, state)
            assert isinstance(last, LayerState)
            attended = attended_by_last(last, entered, rows, state.cache)
        x, rows = leave_out(self.pruning, x, rows, state.cache, attended)
        return self.walk(layers[self.first :], x, rows, state)

    def evidence_tokens(self, rows: PrefillPass, state: RunningState) -> int:
        left = rows.tokens - self.pruning.uncounted(rows.pictures.stretches)
        return min(self.walk.evidence_tokens(rows, state), left)


def attended_by_last(layer: LayerState, x: Tensor, step: PrefillPass, cache: KVCache) -> Tensor:
    """Compute the last token's attention to each slot, mean over heads, after the layer has run.

    x [B, T, H], the layer's input -> float32 [B, S]
    """
    block, own, pattern = layer.sublayers[0], layer.attention, layer.cache.pattern
    assert isinstance(block, AttentionBlock)
    last = replace(step, rotary={pattern: (cos[:, -1:], sin[:, -1:]) for pattern, (cos, sin) in step.rotary.items()})
    normed = block.layer.before_attention(x[:, -1:])                                # [B, 1, H]
    q, _, _ = own.attention.queries_keys_values(normed, own.qkv, last, pattern)
    if isinstance(own, PartitionedAttention):
        q = own.in_cache(q)
    keys, scale = layer.cache.keys, own.attention.scale
    q = q.float().view(len(x), keys.shape[1], -1, q.shape[-1])                      # [B, K, N/K, D]
    mask = masks_in_cache([pattern], cache, step.token_index[-1:], torch.float32)[pattern]     # [B, 1, 1, S]
    weights = (q @ keys.float().transpose(2, 3) * scale + mask).softmax(dim=-1)     # [B, K, N/K, S]
    return own.attention.o_proj.ranks.add_up(weights.mean(dim=(1, 2)))      # the heads of all ranks


def most_diverse(features: Tensor, count: int) -> Tensor:
    """Choose the feature with the furthest nearest neighbour, then always the one furthest from all chosen (by cosine).

    features [n, H] -> int64 [count]
    """
    unit = F.normalize(features.float(), dim=-1)
    apart = 1 - unit @ unit.T                                                       # [n, n]
    nearest = apart.fill_diagonal_(torch.inf).amin(dim=1)                           # [n]
    chosen = [nearest.argmax()]
    nearest = torch.full_like(nearest, torch.inf)
    while len(chosen) < count:
        nearest = torch.minimum(nearest, apart[chosen[-1]]).index_fill(0, chosen[-1], -torch.inf)
        chosen.append(nearest.argmax())
    return torch.stack(chosen)


def leave_out(
    pruning: Any, x: Tensor, step: PrefillPass, cache: KVCache, attended: Tensor | None
) -> tuple[Tensor, PrefillPass]:
    """Drop picture tokens of a prompt; return the kept tokens and their pass.

    x [B, T, H]; attended [B, S], see `attended_by_last`, None: by diversity -> [B, R, H]
    """
    batch, rows, _ = x.shape
    given = step.pictures
    thin = {pattern: slot_map for pattern, slot_map in cache.maps.items() if isinstance(slot_map, DroppedTokens)}
    missing = next(iter(thin.values())).missing
    stays = cache.padding <= step.token_index                                       # [B, T]
    before = int(step.token_index[0])                                               # number of earlier tokens,
    own = before - missing                                                          # and of their slots
    for sequence, first, length in given.stretches:
        stretch, count = slice(first, first + length), pruning.visual_tokens(length)
        if attended is None:
            chosen = most_diverse(x[sequence, stretch], count)
        else:
            of_picture = attended[sequence, before + first :][:length]            # ties: the earlier token is kept
            chosen = of_picture.sort(descending=True, stable=True).indices[:count]
        stays[sequence, stretch] = False
        stays[sequence, first + chosen] = True
    left = int(stays.sum(dim=1).max())
    order = stays.int().argsort(dim=1, stable=True)[:, rows - left :]               # [B, R], kept tokens at the end

    def taken(of_rows: Tensor) -> Tensor:
        """Select the kept tokens. [B or 1, T, ...] -> [B, R, ...]"""
        index = order.view(*order.shape, *[1] * (of_rows.dim() - 2))
        return of_rows.expand(batch, *of_rows.shape[1:]).gather(1, index.expand(-1, -1, *of_rows.shape[2:]))

    real = taken(stays)
    tokens = taken(step.token_index[None]).masked_fill(~real, -1)                   # [B, R]
    slots = own + torch.arange(left, device=x.device)                               # [R]
    for slot_map in thin.values():
        slot_map.tokens[:, own : own + left] = tokens
        slot_map.drop(missing + rows - left, own + left)
    if step.follows:
        masks = masks_in_cache(thin, cache, tokens, x.dtype, given.blocks)
    else:
        sees_all = given.blocks is None and bool(real.all())
        masks = {
            pattern: None if sees_all and pattern.window is None
            else visible(tokens, tokens, cache.padding, pattern.window, given.blocks)[:, None]
            for pattern in thin
        }
    counted = None if step.counted is None and bool(real.all()) else real
    if counted is not None and step.counted is not None:
        counted = counted & taken(step.counted)
    left_step = replace(
        step, token_index=tokens, slots=dict.fromkeys(thin, slots), masks=masks, counted=counted,
        rotary={one: (taken(cos), taken(sin)) for one, (cos, sin) in step.rotary.items() if one in thin},
        tokens=batch * left if counted is None else int(counted.sum()),
        pictures=replace(given, added=[taken(one) for one in given.added]),
    )
    return taken(x), left_step
