"""Grouped-query attention with its cache, and the heads of it that stay active.

Attention shows the three ways through that FeedForward has: `forward`, `prefill`, `decode`. Modules carry Hugging
Face's names.

B batch, T prompt tokens, S cache slots, H hidden size, N query heads, K key/value heads, D head size, A resident heads
(retained, then candidate, group by group), G groups of query heads that are cut alike, U heads per group.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import LlamaConfig
from models.layers import DecodeStep, Linear, PrefillStep, RMSNorm, rotate
from models.products import (
    column_norms,
    empty_like_layout,
    project,
    select_rows,
    share_storage,
    tensor_bytes,
    written_out,
)
from models.pruning.partition import ChannelPartition, PartitionSizes, head_scores, keep_everything, partition_channels


def attend_prompt(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of the prompt to itself. q [B, N, T, D]; k, v [B, K, T, D] -> [B, T, N, D]."""
    grouped = q.shape[1] != k.shape[1]
    a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return a.transpose(1, 2)                                                        # [B, T, N, D]


def attend_cache(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of one token to the cache. Slots not filled yet have weight 0.

    The query heads that share a key/value head stand as if they were its queries, so that nothing is repeated.

    q [B, N, 1, D], N a multiple of K; keys, values [B, K, S, D]; mask float [B, 1, 1, S] -> [B, 1, N, D]
    """
    batch, heads, _, head_dim = q.shape
    alone = written_out(q[:, 0])
    q = q.reshape(batch, keys.shape[1], -1, head_dim)                               # [B, K, N/K, D]
    if alone:
        products = q.unsqueeze(3).float() * keys.unsqueeze(2).float()               # [B, K, N/K, S, D]
        weights = (products.sum(dim=-1) * head_dim**-0.5 + mask).softmax(dim=-1)    # [B, K, N/K, S]
        a = (weights.unsqueeze(-1) * values.unsqueeze(2).float()).sum(dim=-2)       # [B, K, N/K, D]
        return a.to(q.dtype).reshape(batch, 1, heads, head_dim)
    a = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)              # [B, K, N/K, D]
    return a.reshape(batch, 1, heads, head_dim)


class ActiveHeads:
    """The rows of q_proj and columns of o_proj that a decode step reads; keys and values are never pruned.

    Heads stand group by group, in each group retained before candidate. With grouped-query attention a group is the
    query heads of one key/value head; without it all heads form one group, and the cache keeps its heads in the
    partition's order so that those in use are a contiguous slice. The rows of k_proj and v_proj follow those of q_proj,
    so that one product gives all three.
    """

    def __init__(self, attention: "Attention", sizes: PartitionSizes) -> None:
        self.sizes = sizes
        self.prunes = sizes.retained < sizes.channels
        self.o_bias = attention.o_proj.bias
        groups, weight, head_dim = attention.head_groups, attention.q_proj.weight, attention.head_dim
        self.heads = groups * sizes.resident                                        # A
        self.partition = keep_everything(sizes.channels, (groups,), weight.device)
        self.cache_order: Tensor | None = None                                      # [K] int64
        if self.prunes:
            rows, kv_rows = self.heads * head_dim, attention.kv_heads * head_dim
            self.qkv = empty_like_layout(weight, rows + 2 * kv_rows, weight.shape[1])           # [(A + 2K) D, H]
            self.qkv[rows:].copy_(torch.cat([attention.k_proj.weight, attention.v_proj.weight]))
            self.qkv_bias: Tensor | None = None                                     # [(A + 2K) D]
            if attention.q_proj.bias is not None:
                self.qkv_bias = weight.new_empty(rows + 2 * kv_rows)
                self.qkv_bias[rows:].copy_(torch.cat([attention.k_proj.bias, attention.v_proj.bias]))
            self.o = empty_like_layout(attention.o_proj.weight, weight.shape[1], rows)          # [H, A D]
            self.candidate_norms = weight.new_empty(groups, sizes.candidate, head_dim, dtype=torch.float32)  # [G, C, D]
            if groups == 1:
                self.cache_order = torch.arange(sizes.channels, device=weight.device)
        else:
            self.qkv, self.qkv_bias = attention.together()
            self.o = attention.o_proj.weight

    def copy_from(self, attention: "Attention", partition: ChannelPartition) -> None:
        """Fill the buffers with the rows and columns of the resident heads that `partition` names."""
        self.partition = partition
        q, o, head_dim = attention.q_proj, attention.o_proj, attention.head_dim
        rows = self.heads * head_dim
        resident = attention.flat_heads(partition.resident)                         # [A]
        coordinates = (resident[:, None] * head_dim + torch.arange(head_dim, device=resident.device)).flatten()
        select_rows(q.weight, coordinates, out=self.qkv[:rows])
        select_rows(o.weight.t(), coordinates, out=self.o.t())
        if self.qkv_bias is not None:
            torch.index_select(q.bias, 0, coordinates, out=self.qkv_bias[:rows])
        candidate = attention.flat_heads(partition.candidate)                       # [G C]
        torch.index_select(attention.output_norms(), 0, candidate, out=self.candidate_norms.flatten(0, 1))
        if self.cache_order is not None:
            self.cache_order.copy_(partition.order[0])

    def copied_bytes(self) -> int:
        """Memory that the copies take, in bytes."""
        return tensor_bytes(self) if self.prunes else 0


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; optional biases, q/k norms (Qwen3) and a sliding window."""

    def __init__(self, config: LlamaConfig, window: int | None) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.window = config.head_dim, window
        hidden = config.hidden_size
        self.q_proj = Linear(hidden, self.heads * self.head_dim, bias=config.qkv_bias)
        self.k_proj = Linear(hidden, self.kv_heads * self.head_dim, bias=config.qkv_bias)
        self.v_proj = Linear(hidden, self.kv_heads * self.head_dim, bias=config.qkv_bias)
        self.o_proj = Linear(self.heads * self.head_dim, hidden, bias=config.output_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.query_key_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.query_key_norm else None
        # Heads are cut inside the group that shares a key/value head; without sharing, over all heads.
        self.head_groups = self.kv_heads if self.kv_heads < self.heads else 1
        self.norms: Tensor | None = None
        self.qkv: Tensor | None = None

    def together(self) -> tuple[Tensor, Tensor | None]:
        """Weight [(N + 2K) D, H] and bias of q_proj, k_proj and v_proj as one, which they become parts of."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        if self.qkv is None or self.qkv.data_ptr() != self.q_proj.weight.data_ptr():    # new, or converted since
            self.qkv = share_storage([projection.weight for projection in projections])
            self.qkv_bias = None
            if self.q_proj.bias is not None:
                self.qkv_bias = share_storage([projection.bias for projection in projections])
        return self.qkv, self.qkv_bias

    def output_norms(self) -> Tensor:
        """l2 norm of each column of o_proj, float32 [N, D]: constants of the weights, computed at first use."""
        if self.norms is None:
            self.norms = column_norms(self.o_proj.weight).view(self.heads, self.head_dim)
        return self.norms

    def flat_heads(self, in_groups: Tensor) -> Tensor:
        """Head indices inside each group, [G, n], as indices into all heads, [G n]."""
        first = torch.arange(self.head_groups, device=in_groups.device) * (self.heads // self.head_groups)
        return (in_groups + first[:, None]).flatten()

    def rotated(self, projected: Tensor, norm: RMSNorm | None, step: PrefillStep | DecodeStep) -> Tensor:
        """[B, T, heads * D] -> [B, heads, T, D], normed if the model does so, turned by its position."""
        x = projected.unflatten(-1, (-1, self.head_dim))                            # [B, T, heads, D]
        if norm is not None:
            x = norm(x)
        return rotate(x.transpose(1, 2), step.cos, step.sin)

    def keys_and_values(self, x: Tensor, step: PrefillStep | DecodeStep) -> tuple[Tensor, Tensor]:
        """x [B, T, H] -> [B, K, T, D] each."""
        k = self.rotated(self.k_proj(x), self.k_norm, step)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return k, v

    def forward(self, x: Tensor, step: PrefillStep) -> Tensor:
        q = self.rotated(self.q_proj(x), self.q_norm, step)                         # [B, N, T, D]
        k, v = self.keys_and_values(x, step)                                        # [B, K, T, D]
        a = attend_prompt(q, k, v, step.masks[self.window])                         # [B, T, N, D]
        return self.o_proj(a.flatten(2))

    def prefill(self, x: Tensor, keys: Tensor, values: Tensor, active: ActiveHeads, step: PrefillStep) -> Tensor:
        """Run the prompt and write its keys and values to the cache, [B, K, S, D]. x [B, T, H] -> [B, T, H]"""
        q, k, v = self.queries_keys_values(x, *self.together(), step)               # [B, N, T, D], [B, K, T, D]
        a = attend_prompt(q, k, v, step.masks[self.window])                         # [B, T, N, D]
        if active.prunes:
            with step.clock.phase("scores"):
                scores = head_scores(a, self.output_norms(), step.counted)          # [N]
            with step.clock.phase("sort"):
                partition = partition_channels(scores.view(self.head_groups, -1), active.sizes)
            with step.clock.phase("copy"):
                active.copy_from(self, partition)
            if active.cache_order is not None:
                k, v = k[:, active.cache_order], v[:, active.cache_order]
        prompt = x.shape[1]
        keys[:, :, :prompt].copy_(k)
        values[:, :, :prompt].copy_(v)
        if not active.prunes or step.finish_dense:
            return self.o_proj(a.flatten(2))
        resident = a.index_select(2, self.flat_heads(active.partition.resident))    # [B, T, A, D]
        return F.linear(resident.flatten(2), active.o, active.o_bias)

    def queries_keys_values(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, step: PrefillStep | DecodeStep
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One product for all three, one rotation for the first two.

        x [B, T, H]; weight [(A + 2K) D, H], bias [(A + 2K) D] -> q [B, A, T, D], k and v [B, K, T, D]
        """
        qkv = project(x, weight, bias).unflatten(-1, (-1, self.head_dim))           # [B, T, A + 2K, D]
        q, k, v = qkv.tensor_split([-2 * self.kv_heads, -self.kv_heads], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=2)                 # [B, T, A + K, D]
        else:
            qk = qkv[:, :, : -self.kv_heads]
        turned = rotate(qk.transpose(1, 2), step.cos, step.sin)                     # [B, A + K, T, D]
        q, k = turned.tensor_split([-self.kv_heads], dim=1)
        return q, k, v.transpose(1, 2)

    def decode(self, x: Tensor, keys: Tensor, values: Tensor, active: ActiveHeads, step: DecodeStep) -> Tensor:
        """Run one token: add its key and value to the cache, attend with the resident heads. x [B, 1, H]"""
        q, k, v = self.queries_keys_values(x, active.qkv, active.qkv_bias, step)
        if active.cache_order is not None:
            k, v = k[:, active.cache_order], v[:, active.cache_order]
        keys.index_copy_(2, step.slot, k)
        values.index_copy_(2, step.slot, v)
        if active.cache_order is not None:
            keys, values = keys[:, : active.sizes.resident], values[:, : active.sizes.resident]
        a = attend_cache(q, keys, values, step.masks[self.window])                  # [B, 1, A, D]
        if active.sizes.pick < active.sizes.candidate:
            a = self.drop_losing_heads(a, active, step.live)
        return project(a.flatten(2), active.o, active.o_bias)

    def drop_losing_heads(self, a: Tensor, active: ActiveHeads, live: Tensor) -> Tensor:
        """Zero the candidate heads that are not picked at this step. a [B, 1, A, D] -> the same"""
        grid = a.unflatten(2, (self.head_groups, -1))                               # [B, 1, G, R + C, D]
        candidate = grid[..., active.sizes.retained :, :].flatten(2, 3)             # [B, 1, G C, D]
        scores = head_scores(candidate, active.candidate_norms.flatten(0, 1), live)             # [G C]
        keep = active.partition.pick(scores.view(self.head_groups, -1))             # [G, C]
        on = F.pad(keep, (active.sizes.retained, 0), value=True)                    # [G, R + C]
        return a * on.flatten()[:, None]

    def decode_masked(
        self, x: Tensor, keys: Tensor, values: Tensor, partition: ChannelPartition, step: DecodeStep
    ) -> Tensor:
        """The same step on the full weights, for reading and for tests: heads that are off are set to 0.

        The cache is in the model's own head order here.
        """
        q = self.rotated(self.q_proj(x), self.q_norm, step)                         # [B, N, 1, D]
        k, v = self.keys_and_values(x, step)
        keys.index_copy_(2, step.slot, k)
        values.index_copy_(2, step.slot, v)
        a = attend_cache(q, keys, values, step.masks[self.window])                  # [B, 1, N, D]
        scores = head_scores(a, self.output_norms(), step.live).view(self.head_groups, -1)      # [G, U]
        keep = partition.pick(scores.gather(-1, partition.candidate))               # [G, C]
        on = torch.zeros_like(scores, dtype=torch.bool)                             # [G, U]
        on.scatter_(-1, partition.retained, True)
        on.scatter_(-1, partition.candidate, keep)
        return self.o_proj((a * on.flatten()[:, None]).flatten(2))
