"""Fewer experts in every mixture, chosen from what its router does with a text: that of the task, for one task alone.

router-statistics  those that count least in it are removed (what UNCURL's authors call pruning by activation)
uncurl             those that the router treats alike become one (UNCURL, arXiv 2409.01483)

A token is still sent to as many experts: a step reads no less, the model holds less. The FFN ratio is the share of the
experts that is gone, so that as many parameters are as under methods that cut channels, rounded to whole experts.

E experts of a mixture, G that are left, I channels of one, H hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.experts import MixtureOfExperts
from models.feed_forward import FeedForward
from models.matrix import Matrix
from models.pruning.pop import POP
from popengine.methods.activations import mixtures_of_experts
from popengine.methods.calibration import RouterStatistics
from popengine.methods.request import Request
from popengine.studies.resolve import StudyPruning
from weights.errors import InputError

# The router of a mixture with fewer experts, and the network for each of its outputs.
Left = tuple[Matrix, Sequence[FeedForward]]


@dataclass(frozen=True, eq=False)
class FewerExperts(POP):
    """The dense model with fewer experts. Compared by identity."""

    of: Mapping[nn.Module, Left] = field(default_factory=dict)

    __eq__, __hash__ = object.__eq__, object.__hash__

    def experts_of(self, mixture: MixtureOfExperts) -> Left:
        return self.of[mixture]


def with_fewer(
    request: Request, method: str, shrink: Callable[[MixtureOfExperts, RouterStatistics, int], Left]
) -> StudyPruning:
    """Every mixture as `shrink` leaves it, given how many experts stay; nothing else is pruned."""
    mixtures = mixtures_of_experts(request.model)
    if not mixtures:
        raise InputError(f"method {method} removes experts, and this model has none")
    if request.settings.head_ratio > 0:
        raise InputError(f"method {method} prunes no heads: leave the head ratio at 0")
    calibration, pruning = request.calibrated(method), request.pruning(candidate_width=0.0, retained_share=None)
    experts = len(next(iter(mixtures.values())).experts)
    per_token = next(iter(mixtures.values())).experts_per_token
    left = experts - round(pruning.ffn_ratio * experts)
    if not per_token <= left < experts:
        raise InputError(
            f"FFN ratio {pruning.ffn_ratio:.3g} leaves {left} of {experts} experts: method {method} leaves fewer than "
            f"all, and no fewer than the {per_token} that a token is sent to"
        )
    share = (experts - left) / experts
    found: dict[nn.Module, Left] = {}
    found |= {mixture: shrink(mixture, calibration.routers[name], left) for name, mixture in mixtures.items()}
    ratio = pruning.ratio * share / pruning.ffn_ratio
    none = request.pruning(prune_ratio=0.0, ffn_ratio=None, candidate_width=0.0, retained_share=None)
    return replace(none, ratio=ratio, ffn_ratio=share, settings=pruning.settings, rule=FewerExperts(0.0, 0.0, of=found))


def router_statistics(request: Request) -> StudyPruning:
    """The experts stay whose outputs count most, added up over the text; the router renormalises over those."""

    def shrink(mixture: MixtureOfExperts, router: RouterStatistics, left: int) -> Left:
        order = router.weights.sort(descending=True, stable=True).indices[:left].sort().values      # [G]
        gate = mixture.gate.empty_rows(left)
        gate.copy_rows(mixture.gate, order)
        return gate, [mixture.experts[index] for index in order.tolist()]

    return with_fewer(request, "router-statistics", shrink)


def uncurl(request: Request) -> StudyPruning:
    """Groups of experts with like router logits become one each; what was sent to one of a group goes to that.

    As in the paper: spectral clustering of router logits on the task's text, layer by layer; channels are put into the
    order of one expert before they are averaged, by how much each expert is used. Ours: clusters are joined two by two,
    channels matched greedily, and the router stays as it is.
    """

    def shrink(mixture: MixtureOfExperts, router: RouterStatistics, left: int) -> Left:
        networks = list(mixture.experts)
        for group in spectral_groups(router.likeness, left):
            merged = merge([mixture.experts[index] for index in group], router.weights[group])
            for index in group:
                networks[index] = merged
        return mixture.gate, networks

    return with_fewer(request, "uncurl", shrink)


def spectral_groups(likeness: Tensor, count: int) -> list[list[int]]:
    """So many groups of experts: the nearest two are joined again and again, in the space of the graph's first vectors.

    likeness [E, E], correlations
    """
    affinity = (1 + likeness.double()) / 2                                          # [E, E], from 0 to 1
    scale = affinity.sum(dim=1).rsqrt()
    vectors = torch.linalg.eigh(affinity * scale[:, None] * scale).eigenvectors[:, -count:]     # [E, G]
    points = F.normalize(vectors, dim=1)
    groups = [[index] for index in range(len(points))]
    while len(groups) > count:
        centres = torch.stack([points[group].mean(dim=0) for group in groups])
        apart = torch.cdist(centres, centres).fill_diagonal_(torch.inf)
        one, other = sorted(divmod(int(apart.argmin()), len(groups)))
        groups[one] = sorted(groups[one] + groups.pop(other))
    return groups


def merge(experts: Sequence[FeedForward], weights: Tensor) -> FeedForward:
    """The average of experts, the channels of each in the order of the one that is used most. weights [n]"""
    if len(experts) == 1:
        return experts[0]
    shares = (weights / weights.sum() if weights.sum() > 0 else torch.full_like(weights, 1 / len(weights))).tolist()
    channels = [channels_of(expert) for expert in experts]                          # n times [I, 3 H]
    first = channels[shares.index(max(shares))]
    in_order = [share * own[matched(first, own)] for share, own in zip(shares, channels, strict=True)]
    averaged = torch.stack(in_order).sum(dim=0)                                     # [I, 3 H]
    merged, dtype = deepcopy(experts[0]), experts[0].down_proj.values().dtype
    gate, up, down = averaged.to(dtype).chunk(3, dim=1)
    merged.gate_proj, merged.up_proj = Matrix.of(gate.contiguous(), None), Matrix.of(up.contiguous(), None)
    merged.down_proj = Matrix.of(down.T.contiguous(), None)
    merged.derived = {}
    return merged


def channels_of(ffn: FeedForward) -> Tensor:
    """What each channel is: its rows of gate and up and its column of down. float32 [I, 3 H]"""
    down = ffn.down_proj.values().T
    return torch.cat([ffn.gate_proj.values(), ffn.up_proj.values(), down], dim=1).float()


def matched(first: Tensor, other: Tensor) -> Tensor:
    """For each channel of one expert its own of another, the most alike of all pairs first. [I, 3 H] -> int64 [I]"""
    alike = F.normalize(first, dim=1) @ F.normalize(other, dim=1).T                 # [I, I]
    order = torch.empty(len(first), dtype=torch.int64, device=first.device)
    for _ in range(len(first)):
        one, its = divmod(int(alike.argmax()), len(first))
        order[one] = its
        alike[one, :] = alike[:, its] = -torch.inf
    return order
