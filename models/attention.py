"""Grouped-query attention with its cache, and the heads of it that stay active.

Attention shows the three ways through that FeedForward has: `forward`, `prefill`, `decode`. Modules carry Hugging
Face's names.

B batch, T rows, S cache slots, H hidden size, N query heads, K key/value heads, D head size, A resident heads
(retained, then candidate, group by group), G groups of query heads that are cut alike, U heads per group.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.active_heads import ActiveHeads
from models.config import LlamaConfig
from models.layers import RMSNorm, rotate
from models.matrix import Matrix
from models.matrix_forms import stack
from models.passes import DecodePass, PrefillPass, View
from models.products import attend_cache, attend_prompt
from models.pruning.partition import head_scores


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; optional biases, q/k norms (Qwen3) and a sliding window."""

    def __init__(self, config: LlamaConfig, window: int | None) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.window, self.scale = config.head_dim, window, config.attention_scale
        hidden = config.hidden_size
        self.q_proj = Matrix(hidden, self.heads * self.head_dim, bias=config.qkv_bias)
        self.k_proj = Matrix(hidden, self.kv_heads * self.head_dim, bias=config.qkv_bias)
        self.v_proj = Matrix(hidden, self.kv_heads * self.head_dim, bias=config.qkv_bias)
        self.o_proj = Matrix(self.heads * self.head_dim, hidden, bias=config.output_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.query_key_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.query_key_norm else None
        # Heads are cut inside the group that shares a key/value head; without sharing, over all heads.
        self.head_groups = self.kv_heads if self.kv_heads < self.heads else 1
        self.norms: Tensor | None = None
        self.qkv: list[Matrix] = []         # in a list, so that it is no submodule: its weights have names already
        self.stacked_at = 0

    def together(self) -> Matrix:
        """q_proj, k_proj and v_proj as one matrix [(N + 2K) D, H], which they become parts of."""
        if self.stacked_at != self.q_proj.weight.data_ptr():                        # new, or moved since
            self.qkv = [stack([self.q_proj, self.k_proj, self.v_proj])]
            self.stacked_at = self.q_proj.weight.data_ptr()
        return self.qkv[0]

    def output_norms(self) -> Tensor:
        """l2 norm of each column of o_proj, float32 [N D]: constants of the weights, computed at first use."""
        if self.norms is None:
            self.norms = self.o_proj.column_norms()
        return self.norms

    def coordinates(self, in_groups: Tensor) -> Tensor:
        """The coordinates of heads, which are counted inside each group: int64 [G, n] -> [G n D]"""
        first = torch.arange(self.head_groups, device=in_groups.device) * (self.heads // self.head_groups)
        heads = (in_groups + first[:, None]).flatten()                              # [G n]
        return (heads[:, None] * self.head_dim + torch.arange(self.head_dim, device=heads.device)).flatten()

    def queries_keys_values(
        self, x: Tensor, qkv: Matrix, step: PrefillPass | DecodePass, view: View
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One product for all three, one rotation for the first two.

        x [B, T, H]; qkv [(A + 2K) D, H] -> q [B, A, T, D], k and v [B, K, T, D]
        """
        projected = qkv(x).unflatten(-1, (-1, self.head_dim))                       # [B, T, A + 2K, D]
        q, k, v = projected.tensor_split([-2 * self.kv_heads, -self.kv_heads], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=2)                 # [B, T, A + K, D]
        else:
            qk = projected[:, :, : -self.kv_heads]
        turned = rotate(qk.transpose(1, 2), *step.turns[view])                      # [B, A + K, T, D]
        q, k = turned.tensor_split([-self.kv_heads], dim=1)
        return q, k, v.transpose(1, 2)

    def forward(self, x: Tensor, step: PrefillPass) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)        # [B, N or K, T, D]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        view = View(self.window)
        q, k = rotate(q, *step.turns[view]), rotate(k, *step.turns[view])
        a = attend_prompt(q, k, v, step.masks[view], self.scale)                    # [B, T, N, D]
        return self.o_proj(a.flatten(2))

    def prefill(self, x: Tensor, keys: Tensor, values: Tensor, active: ActiveHeads, step: PrefillPass) -> Tensor:
        """Run the prompt and write its keys and values to the cache, [B, K, S, D]. x [B, T, H] -> [B, T, H]"""
        q, k, v = (active.in_cache(part) for part in self.queries_keys_values(x, active.whole, step, active.view))
        keys.index_copy_(2, step.slots[active.view], k)                             # [B, K, T, D]
        values.index_copy_(2, step.slots[active.view], v)
        a = active.in_model(step.attend(q, k, v, keys, values, active.view, self.scale)).flatten(2)     # [B, T, N D]
        if step.observe is not None:
            step.observe(self, a, step.rows, None, None)
        if active.prunes:
            step.see(active.evidence, a)
            if step.draws:
                active.draw(self, keys, values, step.clock)
        if step.finish_dense or not active.prunes:
            return self.o_proj(a)
        return active.o(a[..., self.coordinates(active.partition.resident)])

    def leave_keys_and_values(
        self, x: Tensor, keys: Tensor, values: Tensor, active: ActiveHeads, step: PrefillPass
    ) -> None:
        """Write the keys and values of rows that pass the layer by (Prefill-Only, arXiv 2602.03295). x [B, T, H]"""
        k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)        # [B, K, T, D]
            for projection in (self.k_proj, self.v_proj)
        )
        if self.k_norm is not None:
            k = self.k_norm(k)
        slots = step.slots[active.view]                                             # [T]
        keys.index_copy_(2, slots, active.in_cache(rotate(k, *step.turns[active.view])))
        values.index_copy_(2, slots, active.in_cache(v))

    def decode(self, x: Tensor, keys: Tensor, values: Tensor, active: ActiveHeads, step: DecodePass) -> Tensor:
        """Run rows: add their keys and values to the cache, attend with the resident heads. x [B, T, H]"""
        q, k, v = self.queries_keys_values(x, active.qkv, step, active.view)        # [B, A, T, D], [B, K, T, D]
        keys.index_copy_(2, step.slots[active.view], active.in_cache(k))
        values.index_copy_(2, step.slots[active.view], active.in_cache(v))
        a = attend_cache(q, *active.in_use(keys, values), step.masks[active.view], self.scale)      # [B, T, A, D]
        if active.sizes.decides:
            a = self.drop_losing_heads(a, active, step)
        return active.o(a.flatten(2))

    def drop_losing_heads(self, a: Tensor, active: ActiveHeads, step: DecodePass) -> Tensor:
        """Zero the candidate heads that are not kept at this step. a [B, T, A, D] -> the same"""
        grid = a.unflatten(2, (self.head_groups, -1))                               # [B, T, G, R + C, D]
        candidate = grid[..., active.sizes.retained :, :].flatten(2)                # [B, T, G C D]
        scores = head_scores(step.scores(candidate, active.candidate_norms), self.head_dim)     # [G C] or [B, T, G C]
        keep = active.partition.pick(scores.unflatten(-1, (self.head_groups, -1)))  # [..., G, C]
        on = F.pad(keep, (active.sizes.retained, 0), value=True)                    # [..., G, R + C]
        return a * on.flatten(-2).unsqueeze(-1)
