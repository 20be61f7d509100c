"""CFSP (arXiv 2409.13199): shares of the channels per layer, and the channels inside it, from one pass of activations.

Coarse: a layer keeps the more channels the further it turns the stream: in proportion to a sigmoid of the mean angle
between what goes in and what comes out, less the mean of all layers. The slope is that of the authors' code for its 128
samples of 1,024 tokens (131,072 angles summed, over 10,000), and as there the shares are drawn together where a layer
would keep more than it has. Fine: a channel is worth its activation times what it holds of each of the three matrices,
of down_proj with the activation once more.

Not as in the paper: counts are no multiples of 128; what a channel holds of a matrix is its sum of absolute weights
over that of all channels (divided by the channel's own sum, as the code has it, weights would cancel); no recovery
training.

I FFN channels, L layers.
"""

import math

import torch
from torch import Tensor

from models.feed_forward import FeedForward
from models.ranks import Ranks
from popengine.methods.activations import layer_of
from popengine.methods.calibration import Moments
from popengine.methods.request import Request
from popengine.studies.resolve import StudyPruning

SLOPE = 131_072 / 10_000
# How near the layer that keeps most may come to keeping all.
MARGIN = 1.05


def cfsp(request: Request) -> StudyPruning:
    """Shares per layer by how far it turns the stream, channels by activation and weights (arXiv 2409.13199)."""
    calibration = request.calibrated("cfsp")
    ranks = request.model.config.ranks
    scores = {name: channel_worth(ffn, calibration.moments[name], ranks) for name, ffn in request.networks.items()}
    layers = sorted({layer_of(name) for name in scores})
    shares = dict(zip(layers, kept_shares(calibration.angles[layers], 1 - request.ffn_ratio).tolist(), strict=True))
    wanted = {name: shares[layer_of(name)] * request.channels(of) for name, of in scores.items()}
    return request.keep(scores, in_whole_numbers(wanted, sum(map(request.count_kept, scores.values()))))


def kept_shares(angles: Tensor, mean: float) -> Tensor:
    """What each layer keeps of its channels, `mean` on average. angles [L] -> [L], at most 1"""
    weights = ((angles - angles.mean()) * SLOPE).sigmoid()
    relative = weights / weights.mean() - 1                                         # [L], 0 on average
    if (1 + relative.max()) * mean >= 1:
        relative = relative * ((1 / mean - 1) / relative.max().clamp(min=1e-12) / MARGIN)
    return (1 + relative) * mean


def channel_worth(ffn: FeedForward, moments: Moments, ranks: Ranks) -> Tensor:
    """float32 [I]; of a network that the text never reached by its weights alone"""
    if moments.tokens == 0:
        return ffn.weight_scores()
    activation = moments.mean_square.sqrt()                                         # [I]
    down = ffn.down_proj.values().float().abs().sum(dim=0) * activation
    held = [down, *(rows.values().float().abs().sum(dim=1) for rows in (ffn.gate_proj, ffn.up_proj))]
    return activation * torch.stack([one / ranks.add_up(one.sum()) for one in held]).sum(dim=0)


def in_whole_numbers(wanted: dict[str, float], total: int) -> dict[str, int]:
    """Counts of channels that add up to the total, the nearest to these; one at least."""
    kept = {name: max(1, math.floor(count)) for name, count in wanted.items()}
    by_rest = sorted(wanted, key=lambda name: kept[name] - wanted[name])
    for name in by_rest[: total - sum(kept.values())]:
        kept[name] += 1
    return kept
