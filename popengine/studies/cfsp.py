"""CFSP (arXiv 2409.13199): shares of the channels per layer, and the channels within it, from one pass of activations.

Coarse: a layer keeps channels in proportion to a sigmoid of the mean angle between its input and its output, minus the
mean over all layers. The slope is that of the authors' code for its 128 samples of 1,024 tokens (131,072 angles summed,
over 10,000). As in their code, shares are drawn together if a layer would keep more than it has. Fine: the score of a
channel is its activation times its share of each of the three matrices; down_proj's share includes the activation once
more.

Differences from the paper: counts are not multiples of 128; a channel's share of a matrix is its sum of absolute
weights over that of all channels (divided by the channel's own sum, as in the code, weights would cancel); no recovery
training.

I FFN channels, L layers.
"""

import math

import torch
from torch import Tensor

from models.feed_forward import FeedForward
from models.ranks import Ranks
from popengine.studies.activations import layer_of
from popengine.studies.calibration import Moments
from popengine.studies.request import Request
from popengine.studies.resolve import StudyPruning

SLOPE = 131_072 / 10_000
# Margin between the largest share of a layer and all of its channels.
MARGIN = 1.05


def cfsp(request: Request) -> StudyPruning:
    """Choose shares per layer by the angle of its output, channels by activation and weights (arXiv 2409.13199)."""
    calibration = request.calibrated("cfsp")
    ranks = request.model.config.ranks
    scores = {name: channel_worth(ffn, calibration.moments[name], ranks) for name, ffn in request.networks.items()}
    layers = sorted({layer_of(name) for name in scores})
    shares = dict(zip(layers, kept_shares(calibration.angles[layers], 1 - request.ffn_ratio).tolist(), strict=True))
    wanted = {name: shares[layer_of(name)] * request.channels(of) for name, of in scores.items()}
    return request.keep(scores, in_whole_numbers(wanted, sum(map(request.count_kept, scores.values()))))


def kept_shares(angles: Tensor, mean: float) -> Tensor:
    """Compute the share of channels that each layer keeps, `mean` on average. angles [L] -> [L], at most 1"""
    weights = ((angles - angles.mean()) * SLOPE).sigmoid()
    relative = weights / weights.mean() - 1                                         # [L], 0 on average
    if (1 + relative.max()) * mean >= 1:
        relative = relative * ((1 / mean - 1) / relative.max().clamp(min=1e-12) / MARGIN)
    return (1 + relative) * mean


def channel_worth(ffn: FeedForward, moments: Moments, ranks: Ranks) -> Tensor:
    """Score the channels of one network, float32 [I]; by weights alone if no token of the text reached it."""
    if moments.tokens == 0:
        return ffn.weight_scores()
    activation = moments.mean_square.sqrt()                                         # [I]
    down = ffn.down_proj.values().float().abs().sum(dim=0) * activation
    held = [down, *(rows.values().float().abs().sum(dim=1) for rows in (ffn.gate_proj, ffn.up_proj))]
    return activation * torch.stack([one / ranks.add_up(one.sum()) for one in held]).sum(dim=0)


def in_whole_numbers(wanted: dict[str, float], total: int) -> dict[str, int]:
    """Round counts of channels to integers of at least 1 that add up to `total`, as near as possible."""
    kept = {name: max(1, math.floor(count)) for name, count in wanted.items()}
    by_rest = sorted(wanted, key=lambda name: kept[name] - wanted[name])
    for name in by_rest[: total - sum(kept.values())]:
        kept[name] += 1
    return kept
