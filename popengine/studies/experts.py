"""Fewer experts in every mixture, chosen from router statistics on a text: the task's text, for a single task.

router-statistics  removes the experts with the least routing weight (pruning by activation, for UNCURL's authors)
uncurl             merges experts with similar router logits (UNCURL, arXiv 2409.01483)

A token is still routed to the same number of experts: a step reads the same bytes, but the model is smaller. The FFN
ratio is the share of experts removed. It removes as many parameters as methods that prune channels, rounded to whole
experts.

E experts of a mixture, G experts left, I channels of one expert, H hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.experts import MixtureOfExperts
from models.feed_forward import FeedForward
from models.matrices.plain import Matrix
from models.pruning.pop import POP
from popengine.studies.activations import mixtures_of_experts
from popengine.studies.calibration import RouterStatistics
from popengine.studies.request import Request
from popengine.studies.resolve import StudyPruning
from weights.errors import InputError

# The router of a mixture with fewer experts, and the network for each of its outputs.
Left = tuple[Matrix, Sequence[FeedForward]]


@dataclass(frozen=True, eq=False)
class FewerExperts(POP):
    """The dense model with fewer experts. Compared by identity."""

    of: Mapping[nn.Module, Left] = field(default_factory=dict)

    __eq__, __hash__ = object.__eq__, object.__hash__

    def experts_of(self, mixture: Any) -> Left:
        return self.of[mixture]


def with_fewer(
    request: Request, method: str, shrink: Callable[[MixtureOfExperts, RouterStatistics, int], Left]
) -> StudyPruning:
    """Apply `shrink` to every mixture, with the number of experts to keep; nothing else is pruned.

    Raises InputError for a model without experts, for a head ratio, and for a ratio that keeps too few or all experts.
    """
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
    """Keep the experts with the largest sum of routing weights; the router renormalises over them."""

    def shrink(mixture: MixtureOfExperts, router: RouterStatistics, left: int) -> Left:
        order = router.weights.sort(descending=True, stable=True).indices[:left].sort().values      # [G]
        gate = mixture.gate.empty_rows(left)
        gate.copy_rows(mixture.gate, order)
        return gate, [mixture.experts[index] for index in order.tolist()]

    return with_fewer(request, "router-statistics", shrink)


def uncurl(request: Request) -> StudyPruning:
    """Merge groups of experts with similar router logits; tokens of any expert of a group go to the merged one.

    As in the paper: spectral clustering of router logits on the task's text, layer by layer. Channels are permuted to
    the order of one expert, then averaged with weights by use of each expert. Ours: clusters are merged in pairs,
    channels are matched greedily, and the router is unchanged.
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
    """Cluster experts into `count` groups by merging the nearest two, in the space of the graph's leading eigenvectors.

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
    """Average experts, with the channels of each permuted to the order of the most used expert. weights [n]"""
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
    """Concatenate each channel's rows of gate and up and its column of down. float32 [I, 3 H]"""
    down = ffn.down_proj.values().T
    return torch.cat([ffn.gate_proj.values(), ffn.up_proj.values(), down], dim=1).float()


def matched(first: Tensor, other: Tensor) -> Tensor:
    """Match each channel of one expert with one of another, most similar pairs first. [I, 3 H] -> int64 [I]"""
    alike = F.normalize(first, dim=1) @ F.normalize(other, dim=1).T                 # [I, I]
    order = torch.empty(len(first), dtype=torch.int64, device=first.device)
    for _ in range(len(first)):
        one, its = divmod(int(alike.argmax()), len(first))
        order[one] = its
        alike[one, :] = alike[:, its] = -torch.inf
    return order
