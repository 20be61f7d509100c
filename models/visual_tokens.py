"""Visual tokens left out of a prompt: from a layer on they are no rows any more, and have no slots in the cache.

By attention (FastV, arXiv 2403.06764): after layer K those go that the prompt's last token attends to least there, its
heads together. By diversity, before the first layer: of each picture those features stay that are furthest from each
other, one after the other (the greedy max-min choice of DivPrune, arXiv 2503.02175). What stays keeps its position.

Each picture of a prompt keeps the same share, or number: FastV's authors have one picture to a prompt.

B batch, T rows, R of them that stay, S cache slots, N query heads, K key/value heads, D head size, H hidden size, n
rows of a picture.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.cache import KVCache
from models.passes import PictureRows, PrefillPass, Stretch, masks_in_cache, visible
from models.pruning.resolve import Pruning
from models.state import LayerState


def rows_left(pruning: Pruning, stretches: Sequence[Stretch], lengths: Sequence[int]) -> int:
    """R: rows of the longest prompt of a batch when its pictures have lost theirs. lengths: of the prompts"""
    left = list(lengths)
    for stretch in stretches:
        left[stretch.sequence] -= stretch.length - pruning.visual_tokens(stretch.length)
    return max(left)


def attended_by_last(layer: Any, x: Tensor, own: LayerState, step: PrefillPass, cache: KVCache) -> Tensor:
    """How much the last row attends to each slot, the mean over its heads, once the layer has run.

    x [B, T, H], what the layer was given -> float32 [B, S]
    """
    attention, view = layer.self_attn, own.heads.view
    last = replace(step, turns={view: (cos[:, -1:], sin[:, -1:]) for view, (cos, sin) in step.turns.items()})
    q, _, _ = attention.queries_keys_values(layer.input_layernorm(x[:, -1:]), own.heads.whole, last, view)
    q = own.heads.in_cache(q).float().view(len(x), own.keys.shape[1], -1, q.shape[-1])          # [B, K, N/K, D]
    mask = masks_in_cache([view], cache, step.places[-1:], torch.float32)[view]     # [B, 1, 1, S]
    weights = (q @ own.keys.float().transpose(2, 3) * attention.scale + mask).softmax(dim=-1)   # [B, K, N/K, S]
    return layer.ranks.add_up(weights.mean(dim=(1, 2)))


def most_diverse(features: Tensor, count: int) -> Tensor:
    """The feature whose nearest is furthest, then each time the one furthest from all that are chosen, by the cosine.

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
    pruning: Pruning, x: Tensor, step: PrefillPass, given: PictureRows, cache: KVCache, attended: Tensor | None
) -> tuple[Tensor, PrefillPass, PictureRows]:
    """The rows of a prompt that stay, their pass, and what they have because of pictures.

    x [B, T, H]; attended [B, S], see `attended_by_last`, None: by diversity -> [B, R, H]
    """
    batch, rows, _ = x.shape
    stays = cache.padding <= step.places                                            # [B, T]
    before = int(step.places[0])                                                    # slots before these rows,
    own = before - cache.missing                                                    # and in thin layers
    for sequence, first, length in given.stretches:
        stretch, count = slice(first, first + length), pruning.visual_tokens(length)
        if attended is None:
            chosen = most_diverse(x[sequence, stretch], count)
        else:
            of_picture = attended[sequence, before + first :][:length]            # of equal ones the earlier stays
            chosen = of_picture.sort(descending=True, stable=True).indices[:count]
        stays[sequence, stretch] = False
        stays[sequence, first + chosen] = True
    left = int(stays.sum(dim=1).max())
    order = stays.int().argsort(dim=1, stable=True)[:, rows - left :]               # [B, R], those that stay at the end

    def taken(of_rows: Tensor) -> Tensor:
        """[B or 1, T, ...] -> [B, R, ...]"""
        index = order.view(*order.shape, *[1] * (of_rows.dim() - 2))
        return of_rows.expand(batch, *of_rows.shape[1:]).gather(1, index.expand(-1, -1, *of_rows.shape[2:]))

    real = taken(stays)
    places = taken(step.places[None]).masked_fill(~real, -1)                        # [B, R]
    slots = own + torch.arange(left, device=x.device)                               # [R]
    cache.places[:, own : own + left] = places
    cache.leave_out(cache.missing + rows - left, own + left)
    thin = [view for view in step.slots if view.thin]
    if step.follows:
        masks = masks_in_cache(thin, cache, places, x.dtype, given.blocks)
    else:
        sees_all = given.blocks is None and bool(real.all())
        masks = {
            view: None if sees_all and view.window is None
            else visible(places, places, cache.padding, view.window, given.blocks)[:, None]
            for view in thin
        }
    counted = None if step.counted is None and bool(real.all()) else real
    if counted is not None and step.counted is not None:
        counted = counted & taken(step.counted)
    left_step = replace(
        step, places=places, slots=dict.fromkeys(thin, slots), masks=masks, counted=counted,
        turns={view: (taken(cos), taken(sin)) for view, (cos, sin) in step.turns.items() if view.thin},
        tokens=batch * left if counted is None else int(counted.sum()),
    )
    return taken(x), left_step, replace(given, added=[taken(one) for one in given.added])
