"""The gated feed-forward network and the weights of it that stay active.

FeedForward shows three ways through: `forward` is the dense network that golden tests hold to Hugging Face, `prefill`
runs the prompt and decides which channels stay (POP, arXiv 2602.06822, section 3), `decode` runs one token on the
channels that stayed. Modules carry Hugging Face's names.

B batch, T prompt tokens, H hidden size, I FFN channels, R retained, C candidate and A = R + C resident channels, K of
the candidates picked.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import DecodeStep, Linear, PrefillStep, activation_function
from models.products import (
    add_up_columns,
    adds_up_columns,
    column_norms,
    empty_like_layout,
    project,
    select_rows,
    stored_by_columns,
    stretches,
    take_channels,
    tensor_bytes,
)
from models.pruning.partition import (
    ChannelPartition,
    PartitionSizes,
    StaticChannels,
    best,
    channel_scores,
    keep_everything,
    partition_channels,
)
from models.pruning.settings import Pruning


class ActiveFeedForward:
    """The weights of one FFN that a decode step reads, in buffers that are filled once per prompt.

    Rows stand in the order retained, candidate. With nothing to prune they are the module's own weights, uncopied.
    With `static` channels they are filled here and now, and prompts change nothing. With `in_place` they are the first
    rows of the module's own weights, which every prompt puts into a new order.
    """

    def __init__(
        self, ffn: "FeedForward", sizes: PartitionSizes, static: StaticChannels | None = None, in_place: bool = False
    ) -> None:
        self.sizes, self.static, self.in_place = sizes, static, in_place
        self.prunes = sizes.retained < sizes.channels
        self.down_bias: Tensor | None = ffn.down_proj.bias
        self.partition = keep_everything(sizes.channels, (), ffn.down_proj.weight.device)
        if self.prunes and in_place:
            self.look_at_first_rows(ffn)
        elif self.prunes:
            rows, weight = sizes.resident, ffn.gate_proj.weight
            self.gate = empty_like_layout(weight, rows, weight.shape[1])            # [A, H]
            self.up = empty_like_layout(weight, rows, weight.shape[1])              # [A, H]
            self.down = empty_like_layout(ffn.down_proj.weight, weight.shape[1], rows)          # [H, A]
            self.gate_bias = None if ffn.gate_proj.bias is None else weight.new_empty(rows)     # [A]
            self.up_bias = None if ffn.up_proj.bias is None else weight.new_empty(rows)         # [A]
            self.candidate_norms = weight.new_empty(sizes.candidate, dtype=torch.float32)       # [C]
        else:
            self.gate, self.gate_bias = ffn.gate_proj.weight, ffn.gate_proj.bias
            self.up, self.up_bias = ffn.up_proj.weight, ffn.up_proj.bias
            self.down = ffn.down_proj.weight
        if static is not None and self.prunes:
            self.hold(ffn, static.partition)
            if static.bias is not None:
                self.down_bias = static.bias if self.down_bias is None else self.down_bias + static.bias

    def hold(self, ffn: "FeedForward", partition: ChannelPartition) -> None:
        """From now on be the weights of the resident channels that `partition` names."""
        if self.in_place:
            ffn.reorder(partition.order)
            self.partition = ChannelPartition(torch.arange(self.sizes.channels, device=self.gate.device), self.sizes)
            self.look_at_first_rows(ffn)
        else:
            self.copy_from(ffn, partition)

    def look_at_first_rows(self, ffn: "FeedForward") -> None:
        rows = self.sizes.resident
        self.gate, self.up = ffn.gate_proj.weight[:rows], ffn.up_proj.weight[:rows]             # [A, H]
        self.down = ffn.down_proj.weight[:, :rows]                                              # [H, A]
        self.gate_bias = None if ffn.gate_proj.bias is None else ffn.gate_proj.bias[:rows]      # [A]
        self.up_bias = None if ffn.up_proj.bias is None else ffn.up_proj.bias[:rows]            # [A]
        self.candidate_norms = ffn.down_norms()[self.sizes.retained : rows]                     # [C]

    def copy_from(self, ffn: "FeedForward", partition: ChannelPartition) -> None:
        """Fill the buffers with the resident rows (columns of down_proj) that `partition` names."""
        self.partition = partition
        resident = partition.resident                                               # [A]
        select_rows(ffn.gate_proj.weight, resident, out=self.gate)
        select_rows(ffn.up_proj.weight, resident, out=self.up)
        select_rows(ffn.down_proj.weight.t(), resident, out=self.down.t())
        torch.index_select(ffn.down_norms(), 0, partition.candidate, out=self.candidate_norms)
        if self.gate_bias is not None:
            torch.index_select(ffn.gate_proj.bias, 0, resident, out=self.gate_bias)
        if self.up_bias is not None:
            torch.index_select(ffn.up_proj.bias, 0, resident, out=self.up_bias)

    def copied_bytes(self) -> int:
        """Memory that the copies take, in bytes."""
        return tensor_bytes(self) if self.prunes and not self.in_place else 0


class FeedForward(nn.Module):
    """down_proj(act(gate_proj x) * up_proj x); channel i is row i of gate and up and column i of down."""

    def __init__(self, hidden_size: int, channels: int, act: str, bias: bool) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, channels, bias=bias)
        self.up_proj = Linear(hidden_size, channels, bias=bias)
        self.down_proj = Linear(channels, hidden_size, bias=bias)
        self.act = activation_function(act)
        self.norms: Tensor | None = None

    def down_norms(self) -> Tensor:
        """l2 norm of each column of down_proj, float32 [I]: constants of the weights, computed at first use."""
        if self.norms is None:
            self.norms = column_norms(self.down_proj.weight)
        return self.norms

    def activation(self, x: Tensor) -> Tensor:
        """x [B, T, H] -> h [B, T, I], what down_proj reads."""
        return self.act(self.gate_proj(x)) * self.up_proj(x)

    def new_active(self, pruning: Pruning) -> ActiveFeedForward:
        """Buffers for the weights that decode steps read under this pruning."""
        static = None if pruning.static is None else pruning.static.of[self]
        return ActiveFeedForward(self, self.sizes(pruning), static, pruning.in_place)

    def sizes(self, pruning: Pruning) -> PartitionSizes:
        """Regions of this network: alike in all of a model, unless static partitions say otherwise."""
        if pruning.static is not None:
            return pruning.static.of[self].partition.sizes
        return pruning.sizes(self.gate_proj.out_features)

    def weight_count(self) -> int:
        """Weights that the prune ratio is a share of."""
        return 3 * self.gate_proj.weight.numel()

    def read_weight_count(self, pruning: Pruning) -> int:
        """Weights that one token's decode step reads: retained and candidate channels of every matrix.

        Where products add up columns, down_proj's of the candidates that lose are left out.
        """
        sizes = self.sizes(pruning)
        finishing = sizes.active if stored_by_columns(self.down_proj.weight) else sizes.resident
        return self.gate_proj.in_features * (2 * sizes.resident + finishing)

    def copy_bytes(self, pruning: Pruning) -> int:
        """Memory that the active copies will take, in bytes; with nothing to prune there are none."""
        sizes = self.sizes(pruning)
        copied = sizes.retained < sizes.channels and not pruning.in_place
        copies = 3 * self.gate_proj.in_features * sizes.resident if copied else 0
        return copies * self.gate_proj.weight.element_size()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(x))

    def prefill(self, x: Tensor, active: ActiveFeedForward, step: PrefillStep) -> Tensor:
        """Run the prompt, decide from it which channels stay, and copy their weights. x [B, T, H] -> [B, T, H]"""
        h = self.activation(x)                                                      # [B, T, I]
        if not active.prunes:
            return self.down_proj(h)
        partition = active.partition if active.static is not None else self.partition_by(h, active.sizes, step)
        # Finished before `hold`, which may put the weights into another order than that of h.
        dense = self.down_proj(h) if step.finish_dense else None                    # [B, T, H]
        if active.static is None:
            with step.clock.phase("copy"):
                active.hold(self, partition)
        if dense is not None:
            return dense
        return F.linear(take_channels(h, partition.resident), active.down, active.down_bias)

    def partition_by(self, h: Tensor, sizes: PartitionSizes, step: PrefillStep) -> ChannelPartition:
        """Score the prompt's activation and cut the channels. h [B, T, I]"""
        with step.clock.phase("scores"):
            scores = channel_scores(h, self.down_norms(), step.counted)             # [I]
        with step.clock.phase("sort"):
            return partition_channels(scores, sizes)

    def reorder(self, order: Tensor) -> None:
        """Put the channels into another order, int64 [I], in place: what the network computes stays the same."""
        for rows in (self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight.t()):
            reordered = torch.empty_like(rows)
            select_rows(rows, order, out=reordered)
            rows.copy_(reordered)
        for linear in (self.gate_proj, self.up_proj):
            if linear.bias is not None:
                linear.bias.copy_(linear.bias[order])
        self.norms = self.down_norms()[order]

    def decode(self, x: Tensor, active: ActiveFeedForward, step: DecodeStep) -> Tensor:
        """Run one token on the resident channels, less the candidates that lose at this step. x [B, 1, H]"""
        gate = project(x, active.gate, active.gate_bias)                            # [B, 1, A]
        up = project(x, active.up, active.up_bias)                                  # [B, 1, A]
        h = self.act(gate) * up                                                     # [B, 1, A]
        if active.sizes.pick < active.sizes.candidate:
            retained, candidate = h.split([active.sizes.retained, active.sizes.candidate], dim=-1)
            scores = channel_scores(candidate, active.candidate_norms, step.live)   # [C]
            if adds_up_columns(h, active.down):
                return self.finish_gathered(h, scores, active)
            keep = active.partition.pick(scores)                                    # [C]
            h = torch.cat([retained, candidate.masked_fill(~keep, 0)], dim=-1)      # [B, 1, A]
        return project(h, active.down, active.down_bias)

    def finish_gathered(self, h: Tensor, scores: Tensor, active: ActiveFeedForward) -> Tensor:
        """down_proj on the retained and the picked channels alone: columns of the losing ones are not even read.

        h [1, 1, A]; scores of the candidates, [C] -> [1, 1, H]
        """
        retained, _ = stretches(active.sizes.retained, 1)                           # [R]
        picked = active.sizes.retained + best(scores, active.sizes.pick)            # [K]
        channels = torch.cat([retained, picked])                                    # [R + K]
        y = add_up_columns(active.down, channels, h.flatten()[channels])            # [H]
        return (y if active.down_bias is None else y + active.down_bias).view(1, 1, -1)

    def decode_masked(self, x: Tensor, partition: ChannelPartition, live: Tensor) -> Tensor:
        """The same step on the full weights, for reading and for tests: channels that are off are set to 0.

        x [B, 1, H]; live [B, 1] bool -> [B, 1, H]
        """
        h = self.activation(x)                                                      # [B, 1, I]
        scores = channel_scores(h, self.down_norms(), live)                         # [I]
        picked = partition.candidate[partition.pick(scores[partition.candidate])]
        on = torch.zeros_like(scores, dtype=torch.bool)                             # [I]
        on[partition.retained] = True
        on[picked] = True
        return self.down_proj(h * on)
