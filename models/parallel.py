"""A continuation that is known in advance, evaluated in one pass instead of step by step, with the same result.

Decode steps depend on each other only through the tokens (known here) and the cache. So every layer can run all
steps at once, if each position picks its own candidates from its own activations, as its step would have done, and
attends to the prompt's slots and to the steps before it. Tests hold this to the steps themselves.

One prompt at a time: with several, each would have its own partition, and no weights to share.

T steps, S cache slots, H hidden size, A resident channels, C candidates, N query heads, K key/value heads, D head
size, G groups of query heads, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import ActiveHeads, Attention
from models.feed_forward import ActiveFeedForward, FeedForward
from models.layers import DecodeStep
from models.llama import LlamaForCausalLM
from models.mixtral import ActiveExperts, MixtureOfExperts
from models.pruning.partition import ChannelPartition, keep_best
from models.state import DecodeState, LayerState

# Called with the network, its partition, and which candidates each of its n tokens picked, bool [n, C].
PickObserver = Callable[[FeedForward, ChannelPartition, Tensor], None]


def decode_in_parallel(
    model: LlamaForCausalLM, tokens: Tensor, state: DecodeState, observe: PickObserver | None = None
) -> Tensor:
    """The logits of `model.decode(tokens[0])`, `model.decode(tokens[1])`, ... after `model.prefill`, in one pass.

    tokens   int64 [T]
    state    of one sequence, prefilled, with room for T more tokens; afterwards as the steps would have left it
    observe  is told every pick; None: nobody asks
    returns  [T, V]
    """
    steps = len(tokens)
    x = model.embed(tokens[None])                                                   # [1, T, H]
    step = parallel_step(model, x, state)
    for layer, own in zip(model.model.layers, state.layers, strict=True):
        x = x + attention_steps(layer.self_attn, layer.input_layernorm(x), own, step)
        x = x + mlp_steps(layer.mlp, layer.post_attention_layernorm(x), own.ffn, observe)
    for _ in range(steps):
        state.cache.make_room()
        state.cache.advance()
    return model.lm_head(model.model.norm(x[0]))                                    # [T, V]


def parallel_step(model: LlamaForCausalLM, x: Tensor, state: DecodeState) -> DecodeStep:
    """Positions, slots and masks of T steps at once: `slot` [T], masks by window bool [T, S], True where visible."""
    cache = state.cache
    slots = torch.arange(cache.filled, cache.filled + x.shape[1], device=x.device)  # [T]
    if int(slots[-1]) >= cache.capacity:
        raise ValueError(f"{x.shape[1]} steps after {cache.filled} tokens do not fit {cache.capacity} slots")
    cos, sin = model.model.rotary(slots[None] - cache.padding, x.dtype)             # [1, T, D]
    masks = {}
    for window in set(model.config.windows):
        seen = (cache.slots <= slots[:, None]) & (cache.slots >= cache.padding[0])  # [T, S]
        if window is not None:
            seen = seen & (cache.slots > slots[:, None] - window)
        masks[window] = seen
    return DecodeStep(cos, sin, masks, slots, state.live)


def attention_steps(attention: Attention, x: Tensor, state: LayerState, step: DecodeStep) -> Tensor:
    """`Attention.decode`, T times. x [1, T, H] -> [1, T, H]"""
    active = state.heads
    q, k, v = attention.queries_keys_values(x, active.qkv, active.qkv_bias, step)   # [1, A, T, D], [1, K, T, D]
    if active.cache_order is not None:
        k, v = k[:, active.cache_order], v[:, active.cache_order]
    state.keys.index_copy_(2, step.slot, k)
    state.values.index_copy_(2, step.slot, v)
    keys, values = state.keys, state.values
    if active.cache_order is not None:
        keys, values = keys[:, : active.sizes.resident], values[:, : active.sizes.resident]
    mask = step.masks[attention.window]                                             # [T, S]
    a = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=q.shape[1] != keys.shape[1])
    a = a.transpose(1, 2)                                                           # [1, T, A, D]
    if active.sizes.pick < active.sizes.candidate:
        a = drop_losing_heads(attention, a, active)
    return F.linear(a.flatten(2), active.o, active.o_bias)


def drop_losing_heads(attention: Attention, a: Tensor, active: ActiveHeads) -> Tensor:
    """Zero, at each position, the candidate heads that it does not pick. a [1, T, A, D] -> the same"""
    grid = a.unflatten(2, (attention.head_groups, -1))                              # [1, T, G, R + C, D]
    candidate = grid[..., active.sizes.retained :, :].float() * active.candidate_norms      # [1, T, G, C, D]
    keep = keep_best(torch.linalg.vector_norm(candidate, dim=-1), active.sizes.pick)        # [1, T, G, C]
    on = F.pad(keep, (active.sizes.retained, 0), value=True)                        # [1, T, G, R + C]
    return a * on.flatten(2).unsqueeze(-1)


def mlp_steps(
    mlp: FeedForward | MixtureOfExperts, x: Tensor, active: ActiveFeedForward | ActiveExperts,
    observe: PickObserver | None,
) -> Tensor:
    """The `decode` of a feed-forward network or a mixture of experts, T times. x [1, T, H] -> [1, T, H]"""
    if isinstance(mlp, FeedForward):
        assert isinstance(active, ActiveFeedForward)
        return feed_forward_steps(mlp, x[0], active, observe)[None]
    assert isinstance(active, ActiveExperts)
    routing = mlp.route(x[0])
    outputs = [
        expert_steps(mlp, index, tokens, active, observe)                           # [n, H]
        for index, tokens in enumerate(routing.segments(x[0]))
    ]
    y = routing.combine(outputs)[None]                                              # [1, T, H]
    if mlp.shared_expert is None or active.shared is None:
        return y
    return y + mlp.gated(x, feed_forward_steps(mlp.shared_expert, x[0], active.shared, observe)[None])


def expert_steps(
    mixture: MixtureOfExperts, index: int, x: Tensor, active: ActiveExperts, observe: PickObserver | None
) -> Tensor:
    """The tokens that go to one expert, each a step of its own. x [n, H] -> [n, H]"""
    expert = mixture.experts[index]
    active.picks[index] += len(x)
    if not len(x):
        return x
    if active.left_dense(index):
        return expert(x)
    weights = active.weights(index, expert)
    if weights is None:
        alive = torch.ones(1, 1, dtype=torch.bool, device=x.device)
        partition = active.partition(index, expert)
        return torch.cat([expert.decode_masked(token[None, None], partition, alive)[0] for token in x])
    return feed_forward_steps(expert, x, weights, observe)


def feed_forward_steps(
    ffn: FeedForward, x: Tensor, active: ActiveFeedForward, observe: PickObserver | None
) -> Tensor:
    """`FeedForward.decode` of one token, n times: each row of x [n, H] picks for itself. -> [n, H]"""
    sizes = active.sizes
    h = ffn.act(F.linear(x, active.gate, active.gate_bias)) * F.linear(x, active.up, active.up_bias)    # [n, A]
    keep = torch.ones(len(x), sizes.candidate, dtype=torch.bool, device=x.device)   # [n, C]
    if sizes.pick < sizes.candidate:
        retained, candidate = h.split([sizes.retained, sizes.candidate], dim=-1)
        keep = keep_best(candidate.float().abs() * active.candidate_norms, sizes.pick)      # [n, C]
        h = torch.cat([retained, candidate.masked_fill(~keep, 0)], dim=-1)          # [n, A]
    if observe is not None:
        observe(ffn, active.partition, keep)
    return F.linear(h, active.down, active.down_bias)
