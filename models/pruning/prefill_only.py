"""Prefill-Only Pruning (arXiv 2602.03295): a walk in which the prompt skips the deepest layers.

A prompt token only has to write keys and values; deep layers matter little for that. In a skipped layer all prompt
tokens but the last K write keys and values of the hidden state that reached them (Eq. 14), and nothing else. The last
K tokens, the boundary, run like the first decode step: through every layer, attending to the cache (Eq. 15). Decode
steps run the whole model.

B batch, T tokens of the prompt, K boundary tokens, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.masks import masks_in_cache
from models.passes import PrefillPass
from models.walks import EveryLayer, RunningLayer, RunningState


@dataclass(frozen=True)
class PrefillOnly:
    """All tokens run through the kept layers; only the boundary runs through the skipped layers.

    skipped   the layers that the prompt skips; boundary: number of last tokens that run through them
    """

    skipped: tuple[int, ...]
    boundary: int

    def __call__(self, layers: Sequence[RunningLayer], x: Tensor, rows: PrefillPass, state: RunningState) -> Tensor:
        if x.shape[1] <= self.boundary:                     # the whole prompt is boundary: nothing is skipped
            return EveryLayer()(layers, x, rows, state)
        rest, last = self.split(rows, state)
        for layer in layers:
            x = self.pass_by(layer, x, rest, last) if layer.index in self.skipped else layer.prefill(x, rows)
        return x

    def pass_by(self, layer: RunningLayer, x: Tensor, rest: PrefillPass, last: PrefillPass) -> Tensor:
        """Run one skipped layer. x [B, T, H] -> [B, T, H]"""
        passing, running = x.tensor_split([x.shape[1] - self.boundary], dim=1)      # [B, T - K, H], [B, K, H]
        for sublayer in layer.sublayers:
            sublayer.skip(passing, rest)                                            # k, v of T - K tokens (Eq. 14)
        passing = rest.pictures.add_features(layer.index, passing)
        if self.boundary:
            running = layer.prefill(running, last)                                  # K tokens in full (Eq. 15)
        return torch.cat([passing, running], dim=1)

    def split(self, rows: PrefillPass, state: RunningState) -> tuple[PrefillPass, PrefillPass]:
        """Split a pass into the tokens before the boundary and the boundary, which attends to the cache."""
        before = rows.token_index.shape[-1] - self.boundary
        rest, last = (
            replace(
                rows, token_index=rows.token_index[..., part],
                slots={pattern: slots[part] for pattern, slots in rows.slots.items()},
                rotary={pattern: (cos[:, part], sin[:, part]) for pattern, (cos, sin) in rows.rotary.items()},
                pictures=replace(rows.pictures, added=[one[:, part] for one in rows.pictures.added]),
            )
            for part in (slice(before), slice(before, None))
        )
        dtype = state.cache.layers[0].keys.dtype
        last.masks = masks_in_cache(rows.slots, state.cache, last.token_index, dtype, rows.pictures.blocks)
        last.follows = True
        last.count(len(state.live), None if rows.counted is None else rows.counted[:, before:])
        return rest, last

    def evidence_tokens(self, rows: PrefillPass, state: RunningState) -> int:
        total = rows.token_index.shape[-1]
        if total <= self.boundary:
            return rows.tokens
        if rows.counted is None:
            return self.boundary * rows.tokens // total
        return int(rows.counted[:, total - self.boundary :].sum())
