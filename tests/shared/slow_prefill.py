"""Prefill-Only pruning (arXiv 2602.03295) the straightforward slow way, twice.

`two_passes` takes the engine's modules and runs the prompt as the paper draws it: all tokens but the boundary through
the layers that are kept, then the boundary token by token through every layer, like decode steps. `SlowPrefillOnly`
does it with Hugging Face's own modules and shares no code with the engine.

B batch, T prompt tokens, K boundary tokens, H hidden size, V vocabulary.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention

from models.layers import rotate
from models.llama import LlamaForCausalLM
from models.passes import PictureRows, decode_pass, prefill_pass, rotary_pairs
from models.pruning.pruning import Pruning
from models.slots import AttentionPattern
from models.state import DecodeState


def two_passes(
    model: LlamaForCausalLM, x: Tensor, pruning: Pruning, skipped: tuple[int, ...], boundary: int,
    real: Tensor | None = None, capacity: int = 64, pictures: PictureRows | None = None,
) -> tuple[Tensor, DecodeState]:
    """Of the dense model or one with a static mask: evidence would come in two pieces.

    x [B, T, H], T > K; real [B, T], none of the boundary padding; pictures: what the rows have because of pictures
    -> logits [B, V] after the prompt, and the state
    """
    positions = torch.arange(x.shape[1])[None] if pictures is None else pictures.positions
    added = [torch.zeros_like(x)] * len(model.model.layers)
    if pictures is not None:
        added[: len(pictures.added)] = pictures.added
    first, last = x[:, :-boundary], x[:, -boundary:]                                # [B, T - K, H], [B, K, H]
    state = model.new_state(len(x), capacity, pruning)
    real = None if real is None else real[:, :-boundary]
    state.start(first.shape[1], real, None if pictures is None else pictures.rope_delta)
    given = PictureRows() if real is not None else PictureRows(positions[..., :-boundary])
    step = prefill_pass(model.model.rotary, state.cache.maps, first, real, given)
    step.finish_dense = pruning.settings.prefill == "dense"
    for index, (layer, own) in enumerate(zip(model.model.layers, state.layers, strict=True)):
        if index not in skipped:
            first = own.prefill(first, step) + added[index][:, :-boundary]
            continue
        attention = layer.self_attn
        heads = (len(x), -1, attention.kv_heads, attention.head_dim)
        normed = layer.input_layernorm(first)
        k, v = attention.k_proj(normed).view(heads), attention.v_proj(normed).view(heads)       # [B, T - K, heads, D]
        k = k if attention.k_norm is None else attention.k_norm(k)
        own.cache.keys[:, :, : first.shape[1]] = rotate(k.transpose(1, 2), *step.rotary[own.cache.pattern])
        own.cache.values[:, :, : first.shape[1]] = v.transpose(1, 2)
    for index, out in zip(range(first.shape[1], x.shape[1]), last.split(1, dim=1), strict=True):      # [B, 1, H]
        one = decode_pass(model.model.rotary, out, state.cache, state.live, together=True)
        if pictures is not None:
            own_positions = positions[..., index : index + 1]
            one.rotary = rotary_pairs(model.model.rotary, state.cache.maps, own_positions, out.dtype)
        for own, more in zip(state.layers, added, strict=True):
            out = own.decode(out, one) + more[:, index : index + 1]
        state.cache.advance()
    return model.head(out)[:, 0], state


def without_keys(model: LlamaForCausalLM, tokens: Tensor, kept: int, first: int) -> Tensor:
    """The control in which skipped layers keep nothing of the rows before the boundary: those layers know of no row
    before it at all. The whole text at once, without a cache.

    tokens int64 [1, T]; first: the first row of the boundary -> logits of it and what follows [1, T - first, V]
    """
    x = model.embed(tokens)
    step = prefill_pass(model.model.rotary, map(AttentionPattern, model.config.windows), x, None)
    for layer in model.model.layers[:kept]:
        x = layer(x, step)
    x = x[:, first:]
    masks = {pattern: None if mask is None else mask[..., first:, first:] for pattern, mask in step.masks.items()}
    turns = {pattern: (cos[:, first:], sin[:, first:]) for pattern, (cos, sin) in step.rotary.items()}
    step = replace(step, rotary=turns, masks=masks)
    for layer in model.model.layers[kept:]:
        x = layer(x, step)
    return model.head(x)


class SlowPrefillOnly:
    """Greedy generation with a Hugging Face model of the Llama family; its last `skipped` layers skip the prompt.

    body  the language model of one with pictures, which must all stand before the boundary
    """

    def __init__(self, model: Any, skipped: int, boundary: int, body: Any = None) -> None:
        self.model, self.boundary, self.body = model, boundary, body or model.model
        self.kept = len(self.body.layers) - skipped

    @torch.inference_mode()
    def generate(
        self, prompt: list[int], count: int, positions: Tensor | None = None, **prompt_inputs: Any
    ) -> list[int]:
        body, cache = self.body, DynamicCache()
        layers = body.layers
        first, last = torch.tensor([prompt[: -self.boundary]]), torch.tensor([prompt[-self.boundary :]])
        reached: list[Tensor] = []
        hook = layers[self.kept - 1].register_forward_hook(lambda *told: reached.append(first_of(told[-1])))
        body.layers = layers[: self.kept]
        self.model.model(first, past_key_values=cache, use_cache=True, **prompt_inputs)
        body.layers = layers
        hook.remove()
        (x,) = reached                                                              # [1, T - K, H]
        positions = torch.arange(x.shape[1])[None] if positions is None else positions[..., : x.shape[1]]
        for layer in layers[self.kept :]:
            attention, normed = layer.self_attn, layer.input_layernorm(x)
            kinds = [attention.layer_type] if isinstance(attention, Gemma3Attention) else []
            cos, sin = body.rotary_emb(x, positions, *kinds)                        # [1, T - K, D]
            heads = (1, x.shape[1], -1, attention.head_dim)
            k, v = attention.k_proj(normed).view(heads), attention.v_proj(normed).view(heads)
            k = attention.k_norm(k) if hasattr(attention, "k_norm") else k
            k, v = k.transpose(1, 2), v.transpose(1, 2)                             # [1, heads, T - K, D]
            half = k.shape[-1] // 2
            turned = k * cos[:, None] + torch.cat([-k[..., half:], k[..., :half]], dim=-1) * sin[:, None]
            cache.update(turned, v, attention.layer_idx)
        new: list[int] = []
        while len(new) < count:
            out = self.model(last, past_key_values=cache, use_cache=True)
            new.append(int(out.logits[0, -1].argmax()))
            last = torch.tensor([new[-1:]])
        return new


def first_of(output: Any) -> Tensor:
    """A layer's hidden state, which some releases of transformers return in a tuple."""
    return output[0] if isinstance(output, tuple) else output
