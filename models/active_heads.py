"""The query heads that stay active, the same way as the channels of a feed-forward network. Off by default.

B batch, T rows, S cache slots, H hidden size, N query heads, K key/value heads, D head size, A resident heads
(retained, then candidate, group by group), G groups of query heads that are cut alike, C candidates per group.
"""

from typing import Any

import torch
from torch import Tensor

from models.clock import Clock
from models.matrix import tensor_bytes
from models.passes import View
from models.pruning.partition import head_scores, partition_channels, undecided
from models.pruning.rules import POP


class ActiveHeads:
    """The rows of q_proj and columns of o_proj that a decode step reads; keys and values are never pruned.

    Heads stand group by group, in each group retained before candidate. With grouped-query attention a group is the
    query heads of one key/value head; without it all heads form one group, and the cache keeps its heads in the
    partition's order so that those in use are a contiguous slice. The rows of k_proj and v_proj follow those of q_proj,
    so that one product gives all three.
    """

    def __init__(self, attention: Any, rule: POP, blind: bool = False, thin: bool = False) -> None:
        groups, heads = attention.head_groups, attention.heads // attention.head_groups
        device = attention.q_proj.weight.device
        self.view = View(attention.window, blind, thin)
        self.sizes = rule.head_sizes(heads)
        self.prunes = self.sizes.prunes
        self.partition = undecided(self.sizes, (groups,), device)
        self.whole = self.qkv = attention.together()                                # [(N + 2K) D, H], [(A + 2K) D, H]
        self.o = attention.o_proj                                                   # [H, A D]
        self.cache_order: Tensor | None = None                                      # [K] int64
        if self.prunes:
            rows, kv_rows = groups * self.sizes.resident * attention.head_dim, attention.kv_heads * attention.head_dim
            self.evidence = rule.new_evidence(attention, attention.heads * attention.head_dim, device)
            self.qkv = self.qkv.empty_rows(rows + 2 * kv_rows)
            self.o = self.o.empty_columns(rows)
            candidates = groups * self.sizes.candidate * attention.head_dim
            self.candidate_norms = attention.output_norms().new_empty(candidates)               # [G C D]
            if attention.kv_heads == attention.heads:           # none is shared: all are cut together
                self.cache_order = torch.arange(heads, device=device)

    def restart(self) -> None:
        """Forget the last prompt."""
        if self.prunes:
            self.evidence.restart()
        if self.cache_order is not None:
            torch.arange(len(self.cache_order), out=self.cache_order)

    def draw(self, attention: Any, keys: Tensor, values: Tensor, clock: Clock) -> None:
        """Cut the heads by the evidence there is, become the resident ones, and put the cache into their order."""
        with clock.phase("sort"):
            scores = head_scores(self.evidence.scores(attention.output_norms()), attention.head_dim)        # [N]
            self.partition = partition_channels(scores.view(attention.head_groups, -1), self.sizes)
        with clock.phase("copy"):
            resident = attention.coordinates(self.partition.resident)               # [A D]
            queries = attention.heads * attention.head_dim
            others = torch.arange(queries, self.whole.out_features, device=resident.device)     # of keys, values
            self.qkv.copy_rows(self.whole, torch.cat([resident, others]))
            self.o.copy_columns(attention.o_proj, resident)
            candidate = attention.coordinates(self.partition.candidate)             # [G C D]
            torch.index_select(attention.output_norms(), 0, candidate, out=self.candidate_norms)
            if self.cache_order is not None:
                moved = self.cache_order.argsort()[self.partition.order[0]]         # [K], where each head is now
                for buffer in (keys, values):
                    buffer.copy_(buffer[:, moved])
                self.cache_order.copy_(self.partition.order[0])

    def in_cache(self, heads: Tensor) -> Tensor:
        """All heads as the cache orders them. [B, N or K, T, D]"""
        return heads if self.cache_order is None else heads[:, self.cache_order]

    def in_model(self, heads: Tensor) -> Tensor:
        """The other way round, of the attention's output. [B, T, N, D]"""
        return heads if self.cache_order is None else heads[:, :, self.cache_order.argsort()]

    def in_use(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What of the cache the resident heads attend to. [B, K, S, D] each"""
        if self.cache_order is None:
            return keys, values
        return keys[:, : self.sizes.resident], values[:, : self.sizes.resident]

    def copied_bytes(self) -> int:
        """Memory that the copies take, in bytes."""
        return tensor_bytes(self) + self.qkv.held_bytes() + self.o.held_bytes() if self.prunes else 0
