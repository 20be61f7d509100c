"""Which channels run: scores, sizes and the ChannelPartition (POP, arXiv 2602.06822, section 3).

A *channel* is one intermediate dimension of a gated feed-forward network (or, further down, one attention head).
After prefill every channel is one of three: *retained* (always runs), *candidate* (re-decided at every decode step)
or *pruned* (never read again until partitions are drawn anew).

B batch, T tokens, I channels, R retained, C candidate, P pruned channels, N heads, D head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.matrices.products import keep_best
from weights.errors import InputError


class Evidence:
    """What has been seen of the channels of one network: the sum of squares of each one's activation (POP, Eq. 1-3).

    It adds up over tokens, so that a prompt in pieces, or a prompt and later steps, are evidence like one long prompt.

    squares  float32 [I];  tokens  how many tokens they are of
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        self.squares = torch.zeros(channels, dtype=torch.float32, device=device)
        self.tokens = 0

    def restart(self) -> None:
        """Forget all tokens."""
        self.squares.zero_()
        self.tokens = 0

    def add(self, h: Tensor, real: Tensor | None, tokens: int) -> None:
        """h [B, T, I], what feeds down_proj; real bool [B, T] or [B, 1] (None: all are real), `tokens` of them True."""
        self.squares.add_(sum_of_squares(h, real))
        if tokens:
            self.tokens += tokens

    def scores(self, norms: Tensor) -> Tensor:
        """Importance of each channel. norms float32 [I], of the columns of down_proj -> float32 [I]"""
        return self.squares.sqrt() * norms


def sum_of_squares(h: Tensor, real: Tensor | None = None) -> Tensor:
    """h [B, T, I], real [B, T] or [B, 1], False where a token is padding or its sequence has ended -> float32 [I]"""
    if real is not None:
        h = h.masked_fill(~real.unsqueeze(-1), 0)                           # [B, T, I]
    # Squares and sum one by one: on a CPU vector_norm over the leading dimensions is ten times as slow.
    return h.float().square().sum(dim=(0, 1))


def channel_scores(h: Tensor, norms: Tensor, real: Tensor | None = None) -> Tensor:
    """Importance of each channel over these tokens alone (POP, Eq. 3). As for Evidence -> float32 [I]"""
    return sum_of_squares(h, real).sqrt() * norms


def head_scores(coordinates: Tensor, head_dim: int) -> Tensor:
    """Importance of query heads: l2 norm of the channel scores of each one's coordinates. [..., N D] -> [..., N]"""
    return torch.linalg.vector_norm(coordinates.unflatten(-1, (-1, head_dim)), dim=-1)


@dataclass(frozen=True)
class PartitionSizes:
    """How many channels each region holds, and how many candidates a decode step keeps."""

    retained: int
    candidate: int
    pruned: int
    pick: int
    groups: int = 1                 # equal stretches of the channels that are cut alike, each by itself

    def times(self, groups: int) -> "PartitionSizes":
        """Of so many groups of channels, where these are the sizes of one."""
        return PartitionSizes(
            groups * self.retained, groups * self.candidate, groups * self.pruned, groups * self.pick, groups
        )

    @property
    def channels(self) -> int:
        return self.retained + self.candidate + self.pruned

    @property
    def computed(self) -> int:
        """Channels that finish a decode step: retained and picked."""
        return self.retained + self.pick

    @property
    def active(self) -> int:
        """Channels whose weights a decode step reads: retained and candidate."""
        return self.retained + self.candidate

    @property
    def prunes(self) -> bool:
        """Whether any channel is ever off."""
        return self.retained < self.channels

    @property
    def copied(self) -> bool:
        """Whether the active channels are a choice of all, or in another order, and so copied."""
        return self.prunes and self.candidate < self.channels

    @property
    def decides(self) -> bool:
        """Whether a decode step has something to choose."""
        return self.pick < self.candidate


def channels_of_group(channels: int, groups: int) -> int:
    """InputError where a network's channels are not so many equal groups."""
    if channels % groups:
        raise InputError(f"{channels} channels of a network cannot be cut in {groups} equal groups")
    return channels // groups


def partition_sizes(channels: int, ratio: float, width: float) -> PartitionSizes:
    """Sizes of the regions for `ratio` of the channels off at a decode step (POP, section 3.2).

    ratio  share of channels that do not finish a decode step, 0 <= ratio < 1
    width  candidates as a share of all channels (the paper's gamma); as wide as the sizes allow at most
    """
    active = round((1 - ratio) * channels)
    pick = min(round(width * channels / 2), active, channels - active)
    return PartitionSizes(
        retained=active - pick, candidate=2 * pick, pruned=channels - active - pick, pick=pick
    )


@dataclass(frozen=True)
class ChannelPartition:
    """The three regions of one layer (or expert, or the heads of one layer), fixed until the next is drawn.

    order  int64 [..., I]: the retained channels, then the candidates, then the pruned ones, indices ascending inside
           each region. Leading dimensions are independent groups that are cut alike (one per key/value head when the
           channels are attention heads).
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

    def pick(self, candidate_scores: Tensor) -> Tensor:
        """Which candidates this decode step keeps (ties: the earlier candidate).

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
    """Cut channels into regions by falling score (ties: lower channel first).

    scores [..., I] float32, I == sizes.channels; leading dimensions are cut independently and alike.
    """
    if scores.shape[-1] != sizes.channels:
        raise ValueError(f"scores of {scores.shape[-1]} channels cannot be cut into regions of {sizes.channels}")
    each = scores.unflatten(-1, (sizes.groups, -1))                                 # [..., G, I / G]
    by_score = each.sort(dim=-1, descending=True, stable=True).indices
    region = torch.zeros_like(by_score, dtype=torch.int8)                           # 0 retained
    retained, active = sizes.retained // sizes.groups, sizes.active // sizes.groups
    region.scatter_(-1, by_score[..., retained:active], 1)                        # candidate
    region.scatter_(-1, by_score[..., active:], 2)                                # pruned
    return ChannelPartition(region.flatten(-2).sort(dim=-1, stable=True).indices, sizes)    # [..., I]


def keep_best_of_each(scores: Tensor, sizes: PartitionSizes) -> Tensor:
    """The candidates that are picked, of each group as many. scores [..., C] -> bool [..., C]"""
    if sizes.groups == 1:
        return keep_best(scores, sizes.pick)
    return keep_best(scores.unflatten(-1, (sizes.groups, -1)), sizes.pick // sizes.groups).flatten(-2)


def undecided(sizes: PartitionSizes, groups: tuple[int, ...], device: torch.device) -> ChannelPartition:
    """Regions of these sizes before there is anything to rank by: every channel in its own place.

    The sizes are the final ones, because a step that is compiled now is run after the partition is drawn.
    """
    return ChannelPartition(torch.arange(sizes.channels, device=device).expand(*groups, sizes.channels), sizes)
