"""A decode step the slow way that can be read off: every weight is multiplied with, and what is off becomes zero.

It takes the partitions that a state holds and computes everything else anew: attention, scores, the choice among the
candidates. With the fast step it shares norms, rotary embedding and activation function, which golden tests hold.

B sequences, H hidden size, I FFN channels, N query heads, K key/value heads, S cache slots, D head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from builders import heads_partition
from slow_pop import slow_order
from torch import Tensor

from models.attention import Attention
from models.experts import MixtureOfExperts
from models.feed_forward import FeedForward
from models.layers import rotate
from models.llama import LlamaForCausalLM
from models.pruning.experts import PartitionedExperts
from models.pruning.partition import ChannelPartition
from models.state import DecodeState


def masked_decode(model: LlamaForCausalLM, tokens: Tensor, decided: DecodeState, state: DecodeState) -> Tensor:
    """One step. tokens int64 [B] -> logits [B, V]

    decided  holds the partitions, and which sequences still count
    state    holds the cache of these steps, with its heads in the model's own order; its partitions are not looked at
    """
    cache, x = state.cache, model.embed(tokens.unsqueeze(1))                        # [B, 1, H]
    position = cache.filled - cache.padding + cache.rope_delta                      # [B, 1]
    for layer, own, other in zip(model.model.layers, state.layers, decided.layers, strict=True):
        cos, sin = model.model.rotary(position, x.dtype, layer.self_attn.window)    # [B, 1, D]
        a = masked_attention(
            layer.self_attn, layer.input_layernorm(x), own.cache.keys, own.cache.values, heads_partition(other),
            decided.live[:, 0],
            cos, sin, cache.filled, cache.padding,
        )
        x = x + layer.after_attention(a)
        normed = layer.before_mlp(x)
        if isinstance(layer.mlp, MixtureOfExperts):
            y = masked_mixture(layer.mlp, normed, other.ffn, decided.live[:, 0])
        else:
            y = masked_network(layer.mlp, normed, other.ffn.partition, decided.live[:, 0])
        x = x + layer.after_mlp(y)
    cache.advance()
    return times(model.lm_head, model.model.norm(x[:, 0]))


def masked_network(ffn: FeedForward, x: Tensor, partition: ChannelPartition, live: Tensor) -> Tensor:
    """x [B, 1, H]; live bool [B], the rows that decide -> [B, 1, H]"""
    h = ffn.act(times(ffn.gate_proj, x)) * times(ffn.up_proj, x)                    # [B, 1, I]
    scores = h[live].square().sum(dim=(0, 1)).sqrt() * ffn.down_proj.weight.norm(dim=0)         # [I]
    return times(ffn.down_proj, h * on(scores, partition.retained, partition.candidate, partition.sizes.pick))


def masked_mixture(mixture: MixtureOfExperts, x: Tensor, active: PartitionedExperts, live: Tensor) -> Tensor:
    """Every expert on the rows that were sent to it, which decide together. x [B, 1, H] -> [B, 1, H]"""
    probabilities = times(mixture.gate, x[:, 0]).softmax(dim=-1)                    # [B, experts]
    weights, chosen = probabilities.topk(mixture.experts_per_token)
    if mixture.renormalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    y = torch.zeros_like(x)
    for index, expert in enumerate(mixture.experts):
        rows, places = (chosen == index).nonzero(as_tuple=True)
        if len(rows):
            own: Any = active.active[index]
            out = masked_network(expert, x[rows], own.partition, live[rows])        # [n, 1, H]
            y[rows] += weights[rows, places, None, None] * out
    if mixture.shared_expert is not None:
        shared: Any = active.shared
        out = masked_network(mixture.shared_expert, x, shared.partition, live)
        y = y + times(mixture.shared_expert_gate, x).sigmoid() * out
    return y


def masked_attention(
    attention: Attention, x: Tensor, keys: Tensor, values: Tensor, partition: ChannelPartition, live: Tensor,
    cos: Tensor, sin: Tensor, slot: int, padding: Tensor,
) -> Tensor:
    """x [B, 1, H]; keys, values [B, K, S, D]; live bool [B]; padding int64 [B, 1], slots on the left -> [B, 1, H]"""
    q, k, v = (
        times(projection, x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)            # [B, N or K, 1, D]
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if attention.q_norm is not None and attention.k_norm is not None:
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    keys[:, :, slot], values[:, :, slot] = k[:, :, 0], v[:, :, 0]
    repeats = attention.heads // attention.kv_heads
    seen_keys = keys[:, :, : slot + 1].repeat_interleave(repeats, dim=1)            # [B, N, slot + 1, D]
    seen_values = values[:, :, : slot + 1].repeat_interleave(repeats, dim=1)
    products = (q * seen_keys).sum(dim=-1) * attention.scale                        # [B, N, slot + 1]
    slots = torch.arange(slot + 1)
    hidden = slots < padding                                                        # [B, slot + 1]
    if attention.window is not None:
        hidden = hidden | (slots <= slot - attention.window)
    weights = products.masked_fill(hidden[:, None], -torch.inf).softmax(dim=-1)
    a = (weights.unsqueeze(-1) * seen_values).sum(dim=2)                            # [B, N, D]
    coordinates = a[live].square().sum(dim=0).sqrt() * attention.o_proj.weight.norm(dim=0).view(a.shape[1:])
    scores = coordinates.norm(dim=-1).view(attention.head_groups, -1)               # [groups, heads of one]
    kept = [
        on(of_group, retained, candidate, partition.sizes.pick)
        for of_group, retained, candidate in zip(scores, partition.retained, partition.candidate, strict=True)
    ]
    return times(attention.o_proj, (a * torch.cat(kept)[:, None]).flatten(1))[:, None]


def on(scores: Tensor, retained: Tensor, candidate: Tensor, pick: int) -> Tensor:
    """1 for what is retained and for the `pick` best candidates, 0 for the others. scores [I] -> [I]"""
    mask = torch.zeros_like(scores)
    mask[retained] = 1
    by_score = slow_order(scores[candidate].tolist())
    mask[candidate[by_score[:pick]]] = 1
    return mask


def times(matrix: Any, x: Tensor) -> Tensor:
    return F.linear(x, matrix.weight, matrix.bias)


def in_model_order(state: DecodeState, copy: DecodeState) -> None:
    """Copy a cache, undoing the order that pruned heads of multi-head attention give it."""
    copy.start(state.cache.filled, None, state.cache.rope_delta)
    copy.cache.padding.copy_(state.cache.padding)
    for source, target in zip(state.layers, copy.layers, strict=True):
        order = getattr(source.attention, "cache_order", None)
        back = slice(None) if order is None else order.argsort()
        target.cache.keys.copy_(source.cache.keys[:, back])
        target.cache.values.copy_(source.cache.values[:, back])
