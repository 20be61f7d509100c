"""Partitions of channels: scores, sizes and the ChannelPartition (POP, arXiv 2602.06822, section 3).

A *channel* is one intermediate dimension of a gated feed-forward network, or one attention head. Prefill makes every
channel *retained* (always runs), *candidate* (decided again at every decode step) or *pruned* (never read until the
next partition).

B batch, T tokens, I channels, R retained, C candidate, P pruned channels, N heads, D head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.matrices.products import keep_best
from weights.errors import InputError


@dataclass(frozen=True)
class PartitionSizes:
    """Number of channels in each region, and of candidates that a decode step keeps."""

    retained: int
    candidate: int
    pruned: int
    pick: int
    groups: int = 1                 # equal consecutive groups of channels, partitioned independently

    def times(self, groups: int) -> "PartitionSizes":
        """Return the sizes of `groups` groups of channels, if these are the sizes of one group."""
        return PartitionSizes(
            groups * self.retained, groups * self.candidate, groups * self.pruned, groups * self.pick, groups
        )

    @property
    def channels(self) -> int:
        return self.retained + self.candidate + self.pruned

    @property
    def computed(self) -> int:
        """Channels that go through down_proj at a decode step: retained and picked."""
        return self.retained + self.pick

    @property
    def active(self) -> int:
        """Channels of which a decode step reads gate and up: retained and candidate. Of down it may read fewer."""
        return self.retained + self.candidate

    @property
    def prunes(self) -> bool:
        """True if any channel is ever off."""
        return self.retained < self.channels

    @property
    def copied(self) -> bool:
        """True if steps need copies: active channels are fewer than all, or in another order."""
        return self.prunes and self.candidate < self.channels

    @property
    def decides(self) -> bool:
        """True if a decode step has candidates to choose from."""
        return self.pick < self.candidate


def channels_of_group(channels: int, groups: int) -> int:
    """Return the channels per group. Raises InputError if the groups do not divide a network's channels."""
    if channels % groups:
        raise InputError(f"{channels} channels of a network cannot be cut in {groups} equal groups")
    return channels // groups


def partition_sizes(channels: int, ratio: float, width: float) -> PartitionSizes:
    """Compute region sizes for `ratio` of the channels off at a decode step (POP, section 3.2).

    ratio  share of channels that do not finish a decode step, 0 <= ratio < 1
    width  candidates as a share of all channels (the paper's gamma), limited to what the sizes allow
    """
    active = round((1 - ratio) * channels)
    pick = min(round(width * channels / 2), active, channels - active)
    return PartitionSizes(
        retained=active - pick, candidate=2 * pick, pruned=channels - active - pick, pick=pick
    )


@dataclass(frozen=True)
class ChannelPartition:
    """The three regions of one network (layer or expert) or of one layer's heads, fixed until the next partition.

    order  int64 [..., I]: retained channels, then candidates, then pruned channels. Indices ascend within each region
           when a prompt is partitioned. Leading dimensions are independent groups of equal sizes (one per key/value
           head if the channels are attention heads).
    """

    order: Tensor
    sizes: PartitionSizes

    @property
    def retained(self) -> Tensor:
        return self.order[..., : self.sizes.retained]

    @property
    def candidate(self) -> Tensor:
        return self.order[..., self.sizes.retained : self.sizes.active]

    @property
    def pruned(self) -> Tensor:
        return self.order[..., self.sizes.active :]

    @property
    def active(self) -> Tensor:
        """Retained then candidate channels: the rows a decode step reads, in the order it reads them."""
        return self.order[..., : self.sizes.active]

    def in_places_of(self, before: "ChannelPartition") -> "ChannelPartition":
        """Return the same regions in another order: a channel that was in its region before keeps its place.

        So only the weights of the other channels have to be copied. One group of channels: int64 [I]
        """
        region = torch.empty_like(self.order, dtype=torch.int8)                     # [I], of each channel
        places = torch.arange(self.sizes.channels, device=region.device)
        of_place = (places >= self.sizes.retained).to(torch.int8) + (places >= self.sizes.active)
        region[self.order] = of_place
        stays = region[before.order] == of_place                                    # [I], by place
        arrives = torch.ones_like(stays)                                            # [I], by channel
        arrives[before.order[stays]] = False
        order = before.order.clone()
        order[~stays] = self.order[arrives[self.order]]     # both in the order of the regions
        return ChannelPartition(order, self.sizes)

    def pick(self, candidate_scores: Tensor) -> Tensor:
        """Choose the candidates that this decode step keeps (ties: the earlier candidate).

        candidate_scores [..., C] float32, in the order of `candidate` -> bool [..., C] with `sizes.pick` True
        """
        return keep_best_of_each(candidate_scores, self.sizes)

    def __repr__(self) -> str:
        groups = "x".join(map(str, self.order.shape[:-1]))
        sizes = self.sizes
        return (
            f"ChannelPartition({groups + ' groups of ' if groups else ''}{sizes.channels} channels: "
            f"{sizes.retained} retained, {sizes.candidate} candidate (pick {sizes.pick}), {sizes.pruned} pruned)"
        )


def partition_channels(scores: Tensor, sizes: PartitionSizes) -> ChannelPartition:
    """Partition channels into regions by falling score (ties: lower channel first).

    scores [..., I] float32, I == sizes.channels; leading dimensions are partitioned independently, in equal sizes.
    """
    if scores.shape[-1] != sizes.channels:
        raise ValueError(f"scores of {scores.shape[-1]} channels cannot be cut into regions of {sizes.channels}")
    each = scores.unflatten(-1, (sizes.groups, -1))                                 # [..., G, I / G]
    by_score = each.sort(dim=-1, descending=True, stable=True).indices
    region = torch.zeros_like(by_score, dtype=torch.int8)                           # 0 retained
    retained, active = sizes.retained // sizes.groups, sizes.active // sizes.groups
    region.scatter_(-1, by_score[..., retained:active], 1)                          # candidate
    region.scatter_(-1, by_score[..., active:], 2)                                  # pruned
    return ChannelPartition(region.flatten(-2).sort(dim=-1, stable=True).indices, sizes)    # [..., I]


def keep_best_of_each(scores: Tensor, sizes: PartitionSizes) -> Tensor:
    """Pick the best candidates, the same number in each group. scores [..., C] -> bool [..., C]"""
    if sizes.groups == 1:
        return keep_best(scores, sizes.pick)
    return keep_best(scores.unflatten(-1, (sizes.groups, -1)), sizes.pick // sizes.groups).flatten(-2)


def undecided(sizes: PartitionSizes, groups: tuple[int, ...], device: torch.device) -> ChannelPartition:
    """Return a placeholder partition without scores: channels in their own order.

    Its sizes are the final ones, because a step compiled now also runs after channels are partitioned.
    """
    return ChannelPartition(torch.arange(sizes.channels, device=device).expand(*groups, sizes.channels), sizes)
