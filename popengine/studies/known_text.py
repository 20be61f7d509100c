"""Decode steps of a text that is known in advance, all at once instead of one by one, with the same result.

T tokens, H hidden size, V vocabulary.
"""

import torch
from torch import Tensor

from models.llama import LlamaForCausalLM
from models.passes import decode_pass
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
    return model.head(x)[0]
