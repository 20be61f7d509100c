"""Grouped-query attention with rotary positions, and its run over an explicit cache.

`Attention` holds the weights and the dense forward. `CachedAttention` runs a prompt and steps over one layer's cache;
pruning query heads is another class with the same methods (models/pruning/heads.py). Modules have Hugging Face's
names.

B batch, T tokens, S cache slots, H hidden size, N query heads, K key/value heads, D head size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from models.cache import LayerCache
from models.config import LlamaConfig
from models.layers import DerivedConstants, RMSNorm, rotate
from models.matrices.forms import stack
from models.matrices.plain import Matrix
from models.matrices.products import attend_cache, attend_prompt
from models.passes import DecodePass, PrefillPass
from models.slots import AttentionPattern


class Attention(DerivedConstants):
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
        # Heads are partitioned within the group that shares a key/value head; without sharing, over all heads.
        self.head_groups = self.kv_heads if self.kv_heads < self.heads else 1
        self.qkv: list[Matrix] = []         # in a list, so that it is no submodule: its weights are named already
        self.stacked_at = -1                # no tensor's address (0 is that of a tensor without storage)

    def forward(self, x: Tensor, rows: PrefillPass) -> Tensor:
        """Compute attention among the given tokens, without a cache. x [B, T, H] -> [B, T, H]"""
        pattern = AttentionPattern(self.window)
        q = rotate(self.queries(x), *rows.rotary[pattern])                          # [B, N, T, D]
        k = rotate(self.keys(x), *rows.rotary[pattern])                             # [B, K, T, D]
        a = attend_prompt(q, k, self.values(x), rows.masks[pattern], self.scale)    # [B, T, N, D]
        return self.o_proj(a.flatten(2))

    def queries(self, x: Tensor) -> Tensor:
        """Compute the queries before rotation. x [B, T, H] -> [B, N, T, D]"""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return q if self.q_norm is None else self.q_norm(q)

    def keys(self, x: Tensor) -> Tensor:
        """Compute the keys before rotation. x [B, T, H] -> [B, K, T, D]"""
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return k if self.k_norm is None else self.k_norm(k)

    def values(self, x: Tensor) -> Tensor:
        """Compute the values. x [B, T, H] -> [B, K, T, D]"""
        return self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def queries_keys_values(
        self, x: Tensor, qkv: Callable[[Tensor], Tensor], rows: PrefillPass | DecodePass, pattern: AttentionPattern
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute all three by one product, and rotate queries and keys together. `qkv` holds A of the N query heads.

        x [B, T, H]; qkv [(A + 2K) D, H] -> q [B, A, T, D], k and v [B, K, T, D]
        """
        projected = qkv(x).unflatten(-1, (-1, self.head_dim))                       # [B, T, A + 2K, D]
        q, k, v = projected.tensor_split([-2 * self.kv_heads, -self.kv_heads], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=2)                 # [B, T, A + K, D]
        else:
            qk = projected[:, :, : -self.kv_heads]
        rotated = rotate(qk.transpose(1, 2), *rows.rotary[pattern])                 # [B, A + K, T, D]
        q, k = rotated.tensor_split([-self.kv_heads], dim=1)
        return q, k, v.transpose(1, 2)

    def together(self) -> Matrix:
        """Return q_proj, k_proj and v_proj as one matrix [(N + 2K) D, H], which they become parts of."""
        if self.stacked_at != self.q_proj.weight.data_ptr():                        # not stacked yet, or moved since
            self.qkv = [stack([self.q_proj, self.k_proj, self.v_proj])]
            self.derived.clear()
            self.stacked_at = self.q_proj.weight.data_ptr()
        return self.qkv[0]

    def output_norms(self) -> Tensor:
        """Return the l2 norm of each column of o_proj, float32 [N D], computed at first use."""
        norms: Tensor = self.once("output norms", self.o_proj.column_norms)
        return norms


class CachedAttention:
    """The attention of one layer over its cache, with all of its heads."""

    def __init__(self, attention: Attention) -> None:
        self.attention, self.qkv = attention, attention.together()                  # [(N + 2K) D, H]

    def prefill(self, x: Tensor, cache: LayerCache, rows: PrefillPass) -> Tensor:
        """Run tokens of a prompt and write their keys and values. x [B, T, H] -> [B, T, H]"""
        q, k, v = self.attention.queries_keys_values(x, self.qkv, rows, cache.pattern)     # [B, N, T, D], [B, K, T, D]
        cache.write(k, v, rows.slots[cache.pattern])
        a = rows.attend(q, k, v, cache, self.attention.scale)                       # [B, T, N, D]
        return self.attention.o_proj(a.flatten(2))

    def decode(self, x: Tensor, cache: LayerCache, step: DecodePass) -> Tensor:
        """Run tokens of a step: write their keys and values, attend to the cache. x [B, T, H] -> [B, T, H]"""
        q, k, v = self.attention.queries_keys_values(x, self.qkv, step, cache.pattern)
        cache.write(k, v, step.slots[cache.pattern])
        mask = step.masks[cache.pattern]                                            # [B, 1, T, S]
        a = attend_cache(q, cache.keys, cache.values, mask, self.attention.scale)   # [B, T, N, D]
        return self.attention.o_proj(a.flatten(2))

    def write_keys_and_values(self, x: Tensor, cache: LayerCache, rows: PrefillPass) -> None:
        """Write keys and values of tokens that skip this attention. x [B, T, H]"""
        k = rotate(self.attention.keys(x), *rows.rotary[cache.pattern])             # [B, K, T, D]
        cache.write(k, self.attention.values(x), rows.slots[cache.pattern])

    def restart(self) -> None:
        """Forget the last prompt."""

    def copied_bytes(self) -> int:
        """Return the memory of the copies of active heads, in bytes."""
        return 0
