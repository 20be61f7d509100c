"""Which channels run: scores, sizes and the ChannelPartition (POP, arXiv 2602.06822, section 3).

A *channel* is one intermediate dimension of a gated feed-forward network (or, further down, one attention head).
After prefill every channel is one of three: *retained* (always runs), *candidate* (re-decided at every decode step)
or *pruned* (never read again until the next prefill).

B batch, T tokens, I channels, R retained, C candidate, P pruned channels, N heads, D head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def channel_scores(h: Tensor, down_norms: Tensor, real: Tensor | None = None) -> Tensor:
    """Importance of each FFN channel over the tokens seen (POP, Eq. 3).

    h           [B, T, I]  activation that feeds down_proj, any float dtype
    down_norms  [I]        l2 norm of each column of down_proj, float32
    real        [B, T] or [B, 1], False where a token is padding or its sequence has ended; None: all are real
    returns     [I]        float32
    """
    if real is not None:
        h = h.masked_fill(~real.unsqueeze(-1), 0)                           # [B, T, I]
    # Squares, sum and root one by one: on a CPU vector_norm over the leading dimensions is ten times as slow.
    return h.float().square().sum(dim=(0, 1)).sqrt() * down_norms


def head_scores(a: Tensor, output_norms: Tensor, real: Tensor | None = None) -> Tensor:
    """Importance of each query head: its share of what reaches o_proj, per coordinate weighted by o_proj's column.

    The head's score is the l2 norm of the channel scores of its D coordinates.

    a             [B, T, N, D]  attention output before o_proj
    output_norms  [N, D]        l2 norm of each column of o_proj, float32
    real          [B, T] or [B, 1], as for channel_scores
    returns       [N]           float32
    """
    per_coordinate = channel_scores(a.flatten(2), output_norms.flatten(), real)     # [N * D]
    return torch.linalg.vector_norm(per_coordinate.view(output_norms.shape), dim=-1)


@dataclass(frozen=True)
class PartitionSizes:
    """How many channels each region holds, and how many candidates a decode step keeps."""

    retained: int
    candidate: int
    pruned: int
    pick: int

    @property
    def channels(self) -> int:
        return self.retained + self.candidate + self.pruned

    @property
    def active(self) -> int:
        """Channels that finish a decode step."""
        return self.retained + self.pick

    @property
    def resident(self) -> int:
        """Channels whose weights a decode step reads: retained and candidate."""
        return self.retained + self.candidate


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


def all_channel_sizes(channels: int, ratio: float) -> PartitionSizes:
    """The all-channel variant (POP, Table 6): every channel is a candidate, each step keeps the best `active`."""
    active = round((1 - ratio) * channels)
    return PartitionSizes(retained=0, candidate=channels, pruned=0, pick=active)


def best(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores along the last dimension, best first; of equal scores the earlier one.

    scores  [..., C] -> returns int64 [..., count]
    """
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def keep_best(scores: Tensor, count: int) -> Tensor:
    """True for the `count` highest scores along the last dimension; of equal scores the earlier one.

    scores  [..., C] -> returns bool [..., C]. Static in shape and free of data-dependent branches, so that it can
    stand in a compiled decode step.
    """
    if torch.compiler.is_compiling():
        # Rank by comparing every pair: C * C comparisons fuse into one loop, where a sort would be a call out of it.
        place = torch.arange(scores.shape[-1], device=scores.device)
        mine, other = scores.unsqueeze(-1), scores.unsqueeze(-2)                    # [..., C, 1], [..., 1, C]
        better = (other > mine) | ((other == mine) & (place[None, :] < place[:, None]))     # [..., C, C]
        return better.sum(dim=-1) < count
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best(scores, count), True)


@dataclass(frozen=True)
class ChannelPartition:
    """The three regions of one layer (or expert, or the heads of one layer), fixed from one prefill to the next.

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
        return self.order[..., self.sizes.retained : self.sizes.resident]

    @property
    def pruned(self) -> Tensor:
        return self.order[..., self.sizes.resident :]

    @property
    def resident(self) -> Tensor:
        """Retained then candidate channels: the rows a decode step reads, in the order it reads them."""
        return self.order[..., : self.sizes.resident]

    def pick(self, candidate_scores: Tensor) -> Tensor:
        """Which candidates this decode step keeps (ties: the earlier candidate).

        candidate_scores [..., C] float32, in the order of `candidate` -> bool [..., C] with `sizes.pick` True.
        """
        return keep_best(candidate_scores, self.sizes.pick)

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
    by_score = scores.sort(dim=-1, descending=True, stable=True).indices            # [..., I]
    region = torch.zeros_like(by_score, dtype=torch.int8)                           # [..., I], 0 retained
    region.scatter_(-1, by_score[..., sizes.retained : sizes.resident], 1)          # candidate
    region.scatter_(-1, by_score[..., sizes.resident :], 2)                         # pruned
    return ChannelPartition(region.sort(dim=-1, stable=True).indices, sizes)


@dataclass(frozen=True, eq=False)
class StaticChannels:
    """A partition of one feed-forward network that no prompt has a say in: what static pruning methods make.

    bias  [H] float, added to down_proj's output instead of what the pruned channels gave on average; None: nothing
    """

    partition: ChannelPartition
    bias: Tensor | None = None


def keep_everything(channels: int, groups: tuple[int, ...], device: torch.device) -> ChannelPartition:
    """The dense network as a partition: every channel retained, in its own place."""
    order = torch.arange(channels, device=device).expand(*groups, channels)
    return ChannelPartition(order, PartitionSizes(retained=channels, candidate=0, pruned=0, pick=0))
