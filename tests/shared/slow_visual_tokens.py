"""Visual tokens left out the slow way: Hugging Face's modules, no cache, every layer anew for every token.

Written from the methods' descriptions (FastV, arXiv 2403.06764; DivPrune, arXiv 2503.02175), sharing no code with the
engine. `body` is the language model inside a Hugging Face LLaVA.
"""

from typing import Any

import torch
from torch import Tensor


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def layer_by_hand(body: Any, layer: Any, x: Tensor, positions: list[int]) -> tuple[Tensor, Tensor]:
    """x [T, H], rows at these positions -> [T, H], and the attention weights [N, T, T]"""
    attention, window = layer.self_attn, getattr(body.config, "sliding_window", None)
    normed = layer.input_layernorm(x)
    q, k, v = (
        projection(normed).view(len(x), -1, attention.head_dim).transpose(0, 1)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    cos, sin = (one[0] for one in body.rotary_emb(x[None], torch.tensor([positions])))
    q, k = turn(q, cos, sin), turn(k, cos, sin)
    shared = len(q) // len(k)
    heads, weights = [], []
    for head in range(len(q)):
        scores = q[head] @ k[head // shared].T / attention.head_dim**0.5
        for row, position in enumerate(positions):
            for other, seen in enumerate(positions):
                if seen > position or (window is not None and seen <= position - window):
                    scores[row, other] = -torch.inf
        weights.append(scores.softmax(dim=-1))
        heads.append(weights[-1] @ v[head // shared])
    x = x + attention.o_proj(torch.cat(heads, dim=-1))
    return x + as_tensor(layer.mlp(layer.post_attention_layernorm(x)[None]))[0], torch.stack(weights)


def as_tensor(output: Any) -> Tensor:
    """What a network puts out, which a mixture returns beside its router's logits in some releases."""
    return output[0] if isinstance(output, tuple) else output


def furthest(features: Tensor, count: int) -> list[int]:
    """One after the other, the feature with the largest distance to the nearest that is chosen."""
    def distance(one: int, other: int) -> float:
        return 1 - float(torch.cosine_similarity(features[one], features[other], dim=0))

    everyone = range(len(features))
    nearest = [min(distance(one, other) for other in everyone if other != one) for one in everyone]
    chosen = [nearest.index(max(nearest))]
    while len(chosen) < count:
        nearest = [-1.0 if one in chosen else min(distance(one, other) for other in chosen) for one in everyone]
        chosen.append(nearest.index(max(nearest)))
    return chosen


@torch.inference_mode()
def slow_logits(
    model: Any, x: Tensor, pictures: list[range], new: list[int], kept: int, after: int | None
) -> tuple[Tensor, list[int]]:
    """Logits of the prompt's last token and of every new one, [1 + new, V]; and the rows of the prompt that stayed.

    x [T, H], the embedded prompt; pictures: the rows of each; after: the layer whose attention chooses, None: diversity
    does, before the first
    """
    body = model.model.language_model
    prompt = len(x)
    x = torch.cat([x, body.embed_tokens(torch.tensor(new, dtype=torch.int64))])
    positions = list(range(len(x)))
    stays, weights = positions, torch.empty(0)
    for index, layer in enumerate(body.layers):
        if index == (after or 0):
            chosen: list[int] = []
            for rows in pictures:
                if after is None:
                    chosen += [rows[one] for one in furthest(x[rows.start : rows.stop], kept)]
                else:
                    attended = weights.mean(dim=0)[prompt - 1]      # of the layer before
                    chosen += sorted(rows, key=lambda row: -float(attended[row]))[:kept]
            gone = {row for rows in pictures for row in rows} - set(chosen)
            stays = [row for row in positions if row not in gone]
            x, positions = x[stays], stays
        x, weights = layer_by_hand(body, layer, x, positions)
    logits = model.lm_head(body.norm(x))
    return logits[len(stays) - len(new) - 1 :], [row for row in stays if row < prompt]
