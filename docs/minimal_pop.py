"""POP and Prefill-Only Pruning in one file: a Llama-architecture Hugging Face folder in, text out.

    python docs/minimal_pop.py DIR --prompt "Once upon a time" --ratio 0.4 --width 0.1 --skip 2 -n 48

POP           Partition-guided Online Pruning, arXiv 2602.06822. The prompt sorts the channels of every feed-forward
              network (FFN) into retained, candidate and pruned ones; each decode step chooses among the candidates.
Prefill-Only  Prefill-Only Pruning, arXiv 2602.03295. The prompt skips the deepest layers; decode steps run them all.

The file reads top to bottom: POP, Prefill-Only, the Llama around them, loading. One sequence, no batch. It imports
torch, safetensors and tokenizers only. docs/how_it_works.md walks through it.

T tokens of this pass, S tokens in the cache, L layers, V vocabulary, H hidden size, I FFN channels,
N query heads, K key/value heads, G = N / K query heads per key/value head, D head size,
R retained, C candidate, P pruned channels.
"""

import argparse
import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import linear, silu

# --- POP: how many channels


@dataclass(frozen=True)
class Sizes:
    """How many channels of an FFN are retained, candidate and pruned, and how many candidates a step picks."""

    retained: int
    candidate: int
    pruned: int
    pick: int


def ffn_ratio(ratio: float, config: SimpleNamespace) -> float:
    """Share r of the FFN channels to leave out, for `ratio` of a decoder layer's weights (POP, Table 8).

    Attention stays whole, so r is larger than ratio. Norms, biases and embeddings do not count.
    """
    heads = config.num_attention_heads + config.num_key_value_heads
    attention = 2 * config.hidden_size * heads * config.head_dim                            # q and o, k and v
    ffn = 3 * config.hidden_size * config.intermediate_size                                 # gate, up, down
    r = ratio * (attention + ffn) / ffn
    if not 0 <= r < 1:
        raise ValueError(f"the ratio must be at least 0 and below {ffn / (attention + ffn):.3f} for this model")
    return r


def partition_sizes(channels: int, r: float, width: float) -> Sizes:
    """Sizes for a share r of the channels off at every step. width: candidates / channels (the paper's gamma)."""
    active = round((1 - r) * channels)                      # channels that finish a step
    pick = min(round(width * channels / 2), active, channels - active)
    return Sizes(retained=active - pick, candidate=2 * pick, pruned=channels - active - pick, pick=pick)


# --- POP: which channels


def channel_scores(h: Tensor, norms: Tensor) -> Tensor:
    """POP, Eq. 1-3: score_i = ||W_down[:, i]|| * ||h[:, i]||. h [T, I], norms [I] of the columns of W_down -> [I]"""
    return norms * h.norm(dim=0)


class FFN:
    """A gated FFN, y = down(silu(gate(x)) * up(x)). After `prefill` it runs on the channels that the prompt left."""

    def __init__(self, weights: dict[str, Tensor], sizes: Sizes) -> None:
        self.w, self.sizes = weights, sizes
        self.norms = weights["down_proj.weight"].norm(dim=0)                                # [I]

    def prefill(self, x: Tensor) -> Tensor:
        """All prompt tokens in parallel. Fixes the partition until the next prompt. x [T, H] -> [T, H]"""
        w, retained, resident = self.w, self.sizes.retained, self.sizes.retained + self.sizes.candidate
        h = silu(project(x, w, "gate_proj")) * project(x, w, "up_proj")                     # [T, I]
        order = channel_scores(h, self.norms).argsort(descending=True, stable=True)         # [I]       Eq. 1-3
        # The best R channels, then the next C, both in ascending order. The others are not read until the next prompt.
        kept = torch.cat([order[:retained].sort().values, order[retained:resident].sort().values])  # [R + C]
        rows = {name: tensor[kept] for name, tensor in w.items() if not name.startswith("down_proj")}
        self.active = w | rows | {"down_proj.weight": w["down_proj.weight"][:, kept]}       # [R + C, H], [H, R + C]
        self.candidate_norms = self.norms[kept[retained:]]                                  # [C]
        return project(h[:, kept], self.active, "down_proj")                                # [T, H]

    def decode(self, x: Tensor) -> Tensor:
        """One step: this token's own h decides which candidates finish. x [1, H] -> [1, H]"""
        w, retained = self.active, self.sizes.retained
        h = silu(project(x, w, "gate_proj")) * project(x, w, "up_proj")                     # [1, R + C]
        scores = channel_scores(h[:, retained:], self.candidate_norms)                      # [C]       Eq. 1-3
        picked = scores.argsort(descending=True, stable=True)[: self.sizes.pick]            # [C / 2]
        mask = torch.zeros_like(h)                                                          # [1, R + C]
        mask[:, :retained] = 1
        mask[:, retained + picked] = 1
        return project(h * mask, w, "down_proj")                                            # [1, H]


# --- Prefill-Only: which layers a prompt runs


def prefill(model: "Llama", tokens: list[int], skip: int) -> Tensor:
    """Runs the prompt; all its tokens but the last skip the deepest `skip` layers. Returns the logits after it, [V].

    Prefill-Only, Eq. 14, 15: a skipped layer still leaves keys and values of every prompt token, from its own norm
    and projections of the last kept layer's output. The last token, the boundary, runs through it in full, as if it
    were the first decode step.
    """
    for layer in model.layers:
        layer.attention.clear()
    x = model.embed(tokens)                                                                 # [T, H]
    kept = len(model.layers) - skip
    for layer in model.layers[:kept]:
        x = layer.prefill(x)                                                                # [T, H]
    context, x = x[:-1], x[-1:]                                                             # [T - 1, H], [1, H]
    for layer in model.layers[kept:]:
        layer.attention.append_keys_values(layer.norm("input_layernorm", context))           #           Eq. 14, 15
        x = layer.prefill(x)                                                                # [1, H]    the boundary
    return model.logits(x)


def decode(model: "Llama", token: int) -> Tensor:
    """One step: one token through all layers, on the active channels. Returns the logits after it, [V]."""
    x = model.embed([token])                                                                # [1, H]
    for layer in model.layers:
        x = layer.decode(x)                                                                 # [1, H]
    return model.logits(x)


@torch.inference_mode()
def generate(model: "Llama", prompt: list[int], count: int, skip: int, stop: Collection[int] = ()) -> list[int]:
    """At most `count` greedy tokens; one of `stop` ends them."""
    new = [int(prefill(model, prompt, skip).argmax())]
    while len(new) < count and new[-1] not in stop:
        new.append(int(decode(model, new[-1]).argmax()))
    return new


# --- Llama, as both papers find it


def project(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """x [T, in] -> [T, out], with a bias where the checkpoint has one."""
    return linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def rotary_frequencies(rope: dict[str, Any], head_dim: int) -> Tensor:
    """Angle per position of each pair of coordinates. float32 [D / 2]"""
    frequencies = rope["rope_theta"] ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope["rope_type"] == "llama3":
        # Turns within the original context: few are slowed down by `factor`, many stay, with a ramp between.
        turns = frequencies * rope["original_max_position_embeddings"] / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        stays = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = stays * frequencies + (1 - stays) * frequencies / rope["factor"]
    return frequencies


def rotate(x: Tensor, start: int, frequencies: Tensor) -> Tensor:
    """Rotary position embedding of heads at positions start, start + 1, ... x [T, heads, D] -> [T, heads, D]"""
    positions = torch.arange(start, start + len(x), dtype=torch.float32)
    angles = torch.outer(positions, frequencies)[:, None]                                   # [T, 1, D / 2]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)                                                      # [T, heads, D / 2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight            # [T, H]


class Attention:
    """Grouped-query attention over a cache of keys and values."""

    def __init__(self, weights: dict[str, Tensor], config: SimpleNamespace) -> None:
        self.w, self.heads, self.kv_heads = weights, config.num_attention_heads, config.num_key_value_heads
        self.frequencies = rotary_frequencies(config.rope, config.head_dim)
        self.empty = weights["k_proj.weight"].new_empty(0, self.kv_heads, config.head_dim)

    def clear(self) -> None:
        self.keys = self.values = self.empty

    def append_keys_values(self, x: Tensor) -> None:
        """x [T, H]: normed hidden states of the tokens after those in the cache."""
        k, v = (project(x, self.w, name).unflatten(-1, (self.kv_heads, -1)) for name in ("k_proj", "v_proj"))
        self.keys = torch.cat([self.keys, rotate(k, len(self.keys), self.frequencies)])     # [S, K, D]
        self.values = torch.cat([self.values, v])                                           # [S, K, D]

    def __call__(self, x: Tensor) -> Tensor:
        """The T tokens see the cache and each other, never a later one. x [T, H], normed -> [T, H]"""
        past = len(self.keys)
        self.append_keys_values(x)
        q = project(x, self.w, "q_proj").unflatten(-1, (self.heads, -1))                    # [T, N, D]
        q = rotate(q, past, self.frequencies).unflatten(1, (self.kv_heads, -1))             # [T, K, G, D]
        scores = torch.einsum("tkgd,skd->kgts", q, self.keys) / math.sqrt(q.shape[-1])      # [K, G, T, S]
        later = torch.ones(len(x), len(self.keys), dtype=torch.bool).triu(past + 1)         # [T, S]
        weights = scores.masked_fill(later, -torch.inf).softmax(dim=-1)                     # [K, G, T, S]
        mixed = torch.einsum("kgts,skd->tkgd", weights, self.values)                        # [T, K, G, D]
        return project(mixed.flatten(1), self.w, "o_proj")                                  # [T, H]


class Layer:
    """A decoder layer: attention, then the FFN. Each reads the normed hidden state, and its output is added to it."""

    def __init__(self, weights: dict[str, Tensor], config: SimpleNamespace, sizes: Sizes) -> None:
        self.w, self.eps = weights, config.rms_norm_eps
        self.attention, self.ffn = Attention(below(weights, "self_attn."), config), FFN(below(weights, "mlp."), sizes)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return rms_norm(x, self.w[f"{name}.weight"], self.eps)                              # [T, H]

    def prefill(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm("input_layernorm", x))                             # [T, H]
        return x + self.ffn.prefill(self.norm("post_attention_layernorm", x))

    def decode(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm("input_layernorm", x))                             # [1, H]
        return x + self.ffn.decode(self.norm("post_attention_layernorm", x))


class Llama:
    """A whole model. config: HF's names; weights: every tensor of the checkpoint, HF's names; ratio, width: POP's"""

    def __init__(self, config: SimpleNamespace, weights: dict[str, Tensor], ratio: float, width: float) -> None:
        sizes = partition_sizes(config.intermediate_size, ffn_ratio(ratio, config), width)
        self.embedding, self.eps = weights["model.embed_tokens.weight"], config.rms_norm_eps        # [V, H]
        self.norm_weight = weights["model.norm.weight"]                                     # [H]
        self.lm_head = weights.get("lm_head.weight", self.embedding)                        # [V, H], tied if absent
        each = (below(weights, f"model.layers.{index}.") for index in range(config.num_hidden_layers))
        self.layers = [Layer(own, config, sizes) for own in each]

    def embed(self, tokens: list[int]) -> Tensor:
        return self.embedding[torch.tensor(tokens)]                                         # [T, H]

    def logits(self, x: Tensor) -> Tensor:
        return linear(rms_norm(x[-1], self.norm_weight, self.eps), self.lm_head)            # [V]


def below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


# --- Loading, and the command line


def read_config(raw: dict[str, Any]) -> SimpleNamespace:
    """The fields of config.json, with what may be left out. ValueError for what this file does not compute."""
    raw = {name: value for name, value in raw.items() if value is not None}
    rope = raw.get("rope_parameters", raw.get("rope_scaling", {}))
    rope = {"rope_type": rope.get("type", "default"), "rope_theta": raw.get("rope_theta", 10000.0)} | rope
    heads = raw["num_attention_heads"]
    usual = {"num_key_value_heads": heads, "head_dim": raw["hidden_size"] // heads, "rms_norm_eps": 1e-6}
    config = SimpleNamespace(**usual | {"hidden_act": "silu", "eos_token_id": []} | raw | {"rope": rope})
    if (raw["model_type"], config.hidden_act) != ("llama", "silu") or rope["rope_type"] not in ("default", "llama3"):
        raise ValueError("config.json: only model_type llama, hidden_act silu, rope_type default and llama3 are known")
    return config


def load(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[SimpleNamespace, dict[str, Tensor]]:
    """config.json, and the tensors of one *.safetensors file or of several."""
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    return read_config(json.loads((folder / "config.json").read_text("utf-8"))), weights


def main() -> None:
    parser = argparse.ArgumentParser(description="POP and Prefill-Only Pruning of a Llama, in one file")
    parser.add_argument("folder", metavar="DIR", type=Path, help="config.json, *.safetensors, tokenizer.json")
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="encoded as it stands, without a chat template")
    parser.add_argument("--ratio", metavar="R", type=float, default=0.2, help="share of a layer's weights to prune")
    parser.add_argument("--width", metavar="W", type=float, default=0.1, help="candidates, as a share of the channels")
    parser.add_argument("--skip", metavar="n", type=int, default=0, help="deepest layers that the prompt skips")
    parser.add_argument("-n", metavar="COUNT", type=int, default=48, help="new tokens at most")
    flags = parser.parse_args()
    try:
        tokenizer = Tokenizer.from_str((flags.folder / "tokenizer.json").read_text("utf-8"))
        prompt = tokenizer.encode(flags.prompt).ids
        config, weights = load(flags.folder)
        model = Llama(config, weights, flags.ratio, flags.width)
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{flags.folder}: {error}{' is missing' if isinstance(error, KeyError) else ''}")
    if not prompt or flags.n < 1 or flags.width < 0 or not 0 <= flags.skip < len(model.layers):
        parser.error(f"give a prompt, -n of 1 or more, a width of 0 or more, and a skip below {len(model.layers)}")
    end = config.eos_token_id
    print(tokenizer.decode(generate(model, prompt, flags.n, flags.skip, end if isinstance(end, list) else [end])))


if __name__ == "__main__":
    main()
