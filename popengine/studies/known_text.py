"""Decode steps of a text that is known in advance, all at once instead of one by one, with the same result.

B batch, T tokens, S cache slots, H hidden size, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.cache import KVCache
from models.llama import LlamaForCausalLM
from models.masks import Masks, visible
from models.passes import DecodePass, Slots, decode_pass, rotary_pairs, slots_in_cache
from models.state import DecodeState
from models.walks import decode_layers


def evaluate(model: LlamaForCausalLM, tokens: Tensor, state: DecodeState) -> Tensor:
    """Compute the logits of single decode steps (popengine/engine/run.py), with all tokens in one pass.

    Steps depend on each other only through the tokens and the cache. Each token chooses its own candidates, as its step
    would have done, and attends to the tokens before it. One sequence only: several would share their choice.

    tokens   int64 [T]
    state    of one sequence, prefilled, with room for T more tokens; afterwards the same as after the steps
    returns  [T, V]
    """
    state.cache.make_room(len(tokens))
    logits, waiting = [], tokens[:0]
    for token in tokens.split(1):
        if state.schedule.next_is_dense:
            logits.append(evaluate_steps(model, waiting, state))
            waiting = tokens[:0]
        dense, partitions = state.schedule.next_step()
        if dense:
            logits.append(model.dense_step(token, state, partitions))
        else:
            waiting = torch.cat([waiting, token])
    return torch.cat([*logits, evaluate_steps(model, waiting, state)])              # [T, V]


def evaluate_steps(model: LlamaForCausalLM, tokens: Tensor, state: DecodeState) -> Tensor:
    """Compute the logits of steps none of which is dense. tokens int64 [T] -> [T, V]"""
    x, rotary = model.embed(tokens[None]), model.model.rotary                       # [1, T, H]
    if not len(tokens):                     # packed matrices cannot multiply empty tensors
        return x.new_empty(0, model.config.vocab_size)
    step = decode_pass(rotary, x, state.cache, state.live, together=False)
    x = decode_layers(state.layers, x, step)
    state.cache.advance(len(tokens))
    return model.head(x, state.lm_head)[0]


def evaluate_branches(model: LlamaForCausalLM, texts: Sequence[Tensor], state: DecodeState) -> list[Tensor]:
    """Compute the logits of steps of several texts, each of which follows what the cache holds, in one pass.

    The weights are read once for all texts. A token attends to what the cache held and to its own text. None of the
    steps may be dense. Afterwards the cache holds all texts, so that it must go back.

    texts    int64 [T] each, at least one token in all
    state    of one sequence, prefilled, with room for all texts
    returns  [T, V] each
    """
    lengths = list(map(len, texts))
    branches = torch.repeat_interleave(torch.tensor(lengths)).to(model.device)      # [sum of T]
    offsets = torch.cat([torch.arange(length, device=model.device) for length in lengths])
    x = model.embed(torch.cat(list(texts))[None])                                   # [1, sum of T, H]
    state.cache.make_room(len(offsets))
    tokens, places = state.cache.length + offsets, state.cache.following(len(offsets))
    slots = slots_in_cache(state.cache, places)
    masks = branch_masks(state.cache, tokens, slots, branches, x.dtype)
    pairs = rotary_pairs(model.model.rotary, state.cache.maps, state.cache.positions(tokens), x.dtype)
    x = decode_layers(state.layers, x, DecodePass(pairs, masks, slots, state.live, together=False))
    state.cache.advance(len(offsets))
    return list(model.head(x, state.lm_head)[0].split(lengths))


def branch_masks(cache: KVCache, tokens: Tensor, slots: Slots, branches: Tensor, dtype: torch.dtype) -> Masks:
    """Compute masks under which a token attends to what the cache holds and to its own branch.

    tokens, branches int64 [T]: index and branch of each token; slots: those they fill -> float [B, 1, T, S] per pattern
    """
    masks: Masks = {}
    for pattern, own in slots.items():
        held = cache.maps[pattern].tokens.clone()                                   # [S] or [B, S]
        held[..., own] = tokens
        branch = tokens.new_full(held.shape[-1:], -1).index_copy(0, own, branches)  # [S]
        other = (branch >= 0) & (branch != branches[:, None])                       # [T, S]
        hidden = ~visible(tokens, held, cache.padding, pattern.window)[:, None] | other
        masks[pattern] = torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, -torch.inf)
    return masks
