"""POP for query heads (our extension, off by default): the same partition, with heads as channels.

The score of a head is the l2 norm of the channel scores of its coordinates before o_proj. Keys and values are never
pruned.

B batch, T tokens, S cache slots, H hidden size, N query heads, K key/value heads, D head size, G groups of query heads
with equal region sizes, R retained and C candidate heads per group, A = G (R + C) active heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import Attention, CachedAttention
from models.cache import LayerCache
from models.layers import rotate
from models.matrices.plain import tensor_bytes
from models.matrices.products import attend_cache
from models.passes import DecodePass, PrefillPass
from models.pruning.evidence import head_scores
from models.pruning.partition import partition_channels, undecided
from models.pruning.pop import POP


class PartitionedAttention(CachedAttention):
    """An attention whose steps run its retained heads and the candidate heads that the step keeps.

    Active heads are ordered by group, retained before candidate. With grouped-query attention a group is the query
    heads of one key/value head. Without it all heads form one group, and the cache stores its heads in the partition's
    order, so that the active heads are a contiguous slice.
    """

    def __init__(self, attention: Attention, rule: POP) -> None:
        super().__init__(attention)
        groups, heads = attention.head_groups, attention.heads // attention.head_groups
        device, head_dim = attention.q_proj.weight.device, attention.head_dim
        self.sizes = rule.head_sizes(heads)
        self.partition = undecided(self.sizes, (groups,), device)
        self.evidence = rule.new_evidence(attention, attention.heads * head_dim, device)
        rows = groups * self.sizes.active * head_dim
        self.active_qkv = self.qkv.empty_rows(rows + 2 * attention.kv_heads * head_dim)     # [(A + 2K) D, H]
        self.active_o = attention.o_proj.empty_columns(rows)                        # [H, A D]
        self.candidate_norms = attention.output_norms()[: groups * self.sizes.candidate * head_dim].clone()    # [G C D]
        self.cache_order: Tensor | None = None                                      # int64 [K]
        if attention.kv_heads == attention.heads:
            self.cache_order = torch.arange(heads, device=device)

    def prefill(self, x: Tensor, cache: LayerCache, rows: PrefillPass) -> Tensor:
        q, k, v = (
            self.in_cache(part) for part in self.attention.queries_keys_values(x, self.qkv, rows, cache.pattern)
        )
        cache.write(k, v, rows.slots[cache.pattern])
        a = self.in_model(rows.attend(q, k, v, cache, self.attention.scale)).flatten(2)     # [B, T, N D]
        rows.see(self.evidence, a)
        if rows.partitions:
            rows.repartition(self)
            self.reorder(cache)
        if rows.finish_dense:
            return self.attention.o_proj(a)
        return self.active_o(a[..., self.coordinates(self.partition.active)])

    def sort_channels(self) -> None:
        """Partition the heads by all evidence so far."""
        attention = self.attention
        scores = head_scores(self.evidence.scores(attention.output_norms()), attention.head_dim)        # [N]
        self.partition = partition_channels(scores.view(attention.head_groups, -1), self.sizes)

    def copy_weights(self) -> None:
        """Copy the weights of the active heads."""
        attention = self.attention
        active = self.coordinates(self.partition.active)                            # [A D]
        queries = attention.heads * attention.head_dim
        keys_values = torch.arange(queries, self.qkv.out_features, device=active.device)
        self.active_qkv.copy_rows(self.qkv, torch.cat([active, keys_values]))
        self.active_o.copy_columns(attention.o_proj, active)
        candidate = self.coordinates(self.partition.candidate)                      # [G C D]
        torch.index_select(attention.output_norms(), 0, candidate, out=self.candidate_norms)

    def reorder(self, cache: LayerCache) -> None:
        """Move the active heads to the front of the cache, if every query head has its own keys and values."""
        if self.cache_order is None:
            return
        moved = self.cache_order.argsort()[self.partition.order[0]]                 # [K], current place of each head
        for buffer in (cache.keys, cache.values):
            buffer.copy_(buffer[:, moved])
        self.cache_order.copy_(self.partition.order[0])

    def decode(self, x: Tensor, cache: LayerCache, step: DecodePass) -> Tensor:
        q, k, v = self.attention.queries_keys_values(x, self.active_qkv, step, cache.pattern)      # [B, A, T, D], ...
        cache.write(self.in_cache(k), self.in_cache(v), step.slots[cache.pattern])
        a = attend_cache(q, *self.in_use(cache), step.masks[cache.pattern], self.attention.scale)      # [B, T, A, D]
        if self.sizes.decides:
            a = a * self.kept_heads(a, step).unsqueeze(-1)
        return self.active_o(a.flatten(2))

    def kept_heads(self, a: Tensor, step: DecodePass) -> Tensor:
        """Choose the active heads that this step keeps. a [B, T, A, D] -> bool [A] or [B, T, A]"""
        groups, head_dim = self.attention.head_groups, self.attention.head_dim
        candidate = a.unflatten(2, (groups, -1))[..., self.sizes.retained :, :].flatten(2)      # [B, T, G C D]
        scores = head_scores(step.scores(candidate, self.candidate_norms), head_dim)            # [..., G C]
        keep = self.partition.pick(scores.unflatten(-1, (groups, -1)))              # [..., G, C]
        return F.pad(keep, (self.sizes.retained, 0), value=True).flatten(-2)        # [..., G (R + C)]

    def write_keys_and_values(self, x: Tensor, cache: LayerCache, rows: PrefillPass) -> None:
        k = rotate(self.attention.keys(x), *rows.rotary[cache.pattern])                 # [B, K, T, D]
        cache.write(self.in_cache(k), self.in_cache(self.attention.values(x)), rows.slots[cache.pattern])

    def coordinates(self, in_groups: Tensor) -> Tensor:
        """Return the coordinates of heads, given by their index within each group. int64 [G, n] -> [G n D]"""
        groups, head_dim = self.attention.head_groups, self.attention.head_dim
        first = torch.arange(groups, device=in_groups.device) * (self.attention.heads // groups)
        heads = (in_groups + first[:, None]).flatten()                              # [G n]
        return (heads[:, None] * head_dim + torch.arange(head_dim, device=heads.device)).flatten()

    def in_cache(self, heads: Tensor) -> Tensor:
        """Reorder all heads from the model's order to the cache's. [B, N or K, T, D]"""
        return heads if self.cache_order is None else heads[:, self.cache_order]

    def in_model(self, heads: Tensor) -> Tensor:
        """Reorder all heads of an attention's output from the cache's order to the model's. [B, T, N, D]"""
        return heads if self.cache_order is None else heads[:, :, self.cache_order.argsort()]

    def in_use(self, cache: LayerCache) -> tuple[Tensor, Tensor]:
        """Return the keys and values that the active heads attend to. [B, K, S, D] each, fewer heads without groups"""
        if self.cache_order is None:
            return cache.keys, cache.values
        return cache.keys[:, : self.sizes.active], cache.values[:, : self.sizes.active]

    def restart(self) -> None:
        self.evidence.restart()
        if self.cache_order is not None:
            torch.arange(len(self.cache_order), out=self.cache_order)

    def copied_bytes(self) -> int:
        return tensor_bytes(self) + self.active_qkv.held_bytes() + self.active_o.held_bytes()
