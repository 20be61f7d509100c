"""Gemma-3 (arXiv 2503.19786): the text model, and the model that reads pictures with SigLIP's tower.

Beside the Llama family: norms multiply by 1 + w, and stand before and behind attention and feed-forward network; every
sixth layer sees all of the text, the others a window, and the two kinds turn their queries and keys by different
frequencies; embeddings are scaled. The rows of a picture see each other both ways.

B batch, T rows, H hidden size of the language model, V vocabulary, F hidden size of the tower, P image tokens of a
picture.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.config import ConfigReader, FamilyDefaults, LlamaConfig, RopeConfig, read_decoder_fields, read_rope
from models.layers import RMSNorm, RotaryEmbedding
from models.llama import LlamaDecoderLayer, LlamaForCausalLM
from weights.errors import InputError
from weights.json_files import JsonObject

# What config.json may leave out (transformers' documented defaults): released checkpoints do.
TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
}  # fmt: skip
# Frequencies' base of layers that see all, and of those with a window.
GLOBAL_THETA, LOCAL_THETA = 1e6, 1e4
# Fields that say how a cache is held or repeat what others say.
UNUSED_FIELDS = ("cache_implementation", "_sliding_window_pattern", "hidden_act")


@dataclass(frozen=True)
class Gemma3TextConfig(LlamaConfig):
    """LlamaConfig and what Gemma adds. rope is that of layers that see all of the text.

    local_rope             of layers with a window
    query_pre_attn_scalar  products of queries and keys are divided by its root
    """

    local_rope: RopeConfig = field(default_factory=RopeConfig)
    query_pre_attn_scalar: float = 256

    @property
    def attention_scale(self) -> float:
        return self.query_pre_attn_scalar**-0.5


def read_gemma3_text_config(raw: Mapping[str, Any], where: str = "config.json") -> Gemma3TextConfig:
    """Gemma3TextConfig from a parsed config.json of a text model, or from the text_config of one that reads pictures.

    Raises InputError for a field of the wrong type and for a feature that is not implemented.
    """
    given = JsonObject(raw, where)
    given.text("model_type", "gemma3_text", ("gemma3_text",))
    ropes = given.section("rope_parameters")
    unknown = ropes.raw.keys() - {"full_attention", "sliding_attention"}
    if unknown:
        raise InputError(f"{ropes.where}: {', '.join(sorted(unknown))} is not a kind of layer that Gemma-3 has")
    # Older checkpoints say rope_theta and rope_scaling of the layers that see all, rope_local_base_freq of the others.
    of_all = {"rope_theta": given.number("rope_theta", GLOBAL_THETA), **ropes.section("full_attention").raw}
    of_window = {"rope_theta": given.number("rope_local_base_freq", LOCAL_THETA)}
    of_window |= ropes.section("sliding_attention").raw
    of_all |= given.section("rope_scaling").raw
    fields = ConfigReader(
        TEXT_DEFAULTS | {name: value for name, value in raw.items() if value is not None}
        | {"rope_parameters": of_all, "rope_scaling": None}, where,
    )
    fields.read.update(("rope_theta", "rope_local_base_freq", *UNUSED_FIELDS))
    values = read_decoder_fields(fields, "gemma3_text", FamilyDefaults())
    local = ConfigReader({"rope_parameters": of_window}, where)
    return Gemma3TextConfig(
        **values | {"hidden_act": fields.text("hidden_activation")},
        local_rope=read_rope(local, LOCAL_THETA, values["max_position_embeddings"]),
        query_pre_attn_scalar=fields.number("query_pre_attn_scalar", None),
        unknown_fields=fields.finish(),
    )


class Gemma3RMSNorm(RMSNorm):
    """Times 1 + w, in float32 to the end."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * (1 + self.weight.float())).to(x.dtype)


class Gemma3RotaryEmbedding(nn.Module):
    """cos and sin for given positions, by what a layer sees."""

    def __init__(self, config: Gemma3TextConfig) -> None:
        super().__init__()
        self.of_all = RotaryEmbedding(config.rope, config.head_dim)
        self.of_window = RotaryEmbedding(config.local_rope, config.head_dim)

    def forward(self, positions: Tensor, dtype: torch.dtype, window: int | None) -> tuple[Tensor, Tensor]:
        """positions int64 [B, T]; window of the layers it is for -> cos, sin [B, T, D]"""
        return (self.of_all if window is None else self.of_window)(positions, dtype)


class Gemma3DecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: Gemma3TextConfig, index: int) -> None:
        super().__init__(config, index)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn.q_norm = Gemma3RMSNorm(config.head_dim, eps)
        self.self_attn.k_norm = Gemma3RMSNorm(config.head_dim, eps)
        self.input_layernorm = Gemma3RMSNorm(hidden, eps)
        self.post_attention_layernorm = Gemma3RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm = Gemma3RMSNorm(hidden, eps)
        self.post_feedforward_layernorm = Gemma3RMSNorm(hidden, eps)

    def attended(self, a: Tensor) -> Tensor:
        return self.post_attention_layernorm(a)

    def before_mlp(self, x: Tensor) -> Tensor:
        return self.pre_feedforward_layernorm(x)

    def after_mlp(self, y: Tensor) -> Tensor:
        return self.post_feedforward_layernorm(y)


class Gemma3ForCausalLM(LlamaForCausalLM):
    config: Gemma3TextConfig
    read_config = staticmethod(read_gemma3_text_config)
    layer_class = Gemma3DecoderLayer  # type: ignore[assignment]  # takes the wider config

    def __init__(self, config: Gemma3TextConfig) -> None:
        super().__init__(config)
        self.model.norm = Gemma3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.model.rotary = Gemma3RotaryEmbedding(config)  # type: ignore[assignment]  # called alike

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens int64 [B, T] -> [B, T, H], times the root of H as the dtype rounds it (55.5 in bfloat16 for 55.4)"""
        x = super().embed(tokens)
        return x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype, device=x.device)
