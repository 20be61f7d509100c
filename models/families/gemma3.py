"""Gemma-3 (arXiv 2503.19786): the text model, and the model that reads pictures with SigLIP's tower.

Differences from the Llama family: norms multiply by 1 + w, and come before and after attention and feed-forward
network. Every sixth layer attends to the whole text, the others to a window, and the two kinds have different rotary
frequencies. Embeddings are scaled. The tokens of a picture attend to each other both ways.

B batch, T tokens, H hidden size of the language model, V vocabulary, F hidden size of the tower, P image tokens of a
picture.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import LlamaConfig, RopeConfig
from models.families.clip import VisionConfig, VisionTower, read_vision_config
from models.families.llava import LlavaForConditionalGeneration
from models.families.picture_model import Grid, PictureConfig, PictureModel
from models.layers import RMSNorm, RotaryEmbedding, at_least_float32
from models.llama import LlamaDecoderLayer, LlamaForCausalLM
from models.passes import PictureRows
from models.pruning.active_weights import AnyMatrix
from models.read_config import ConfigReader, FamilyDefaults, read_decoder_fields, read_rope, refuse_rope_outside
from weights.errors import InputError
from weights.json_files import JsonObject

# Defaults of fields that released checkpoints leave out of config.json (transformers' documented ones).
TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
}  # fmt: skip
# Base of rotary frequencies in layers that attend to the whole text, and in layers with a window.
GLOBAL_THETA, LOCAL_THETA = 1e6, 1e4
# Fields about the cache of other implementations, and fields that repeat others.
UNUSED_FIELDS = ("cache_implementation", "_sliding_window_pattern", "hidden_act")


@dataclass(frozen=True)
class Gemma3TextConfig(LlamaConfig):
    """LlamaConfig with Gemma's fields. rope is that of layers that attend to the whole text.

    local_rope             RoPE of layers with a window
    query_pre_attn_scalar  products of queries and keys are divided by its square root
    final_logit_softcapping  soft bound of logits (tanh); None: no bound, as in all released models
    """

    local_rope: RopeConfig = field(default_factory=RopeConfig)
    query_pre_attn_scalar: float = 256
    final_logit_softcapping: float | None = None

    @property
    def context(self) -> int:
        """Maximum tokens of a sequence. max_position_embeddings already includes scaling (factor 8: 131,072)."""
        return self.max_position_embeddings

    @property
    def attention_scale(self) -> float:
        return self.query_pre_attn_scalar**-0.5


def read_gemma3_text_config(raw: Mapping[str, Any], where: str = "config.json") -> Gemma3TextConfig:
    """Read a Gemma3TextConfig from a text model's parsed config.json, or from the text_config of one with pictures.

    Raises InputError for a field of the wrong type and for a feature that is not implemented.
    """
    given = JsonObject(raw, where)
    given.text("model_type", "gemma3_text", ("gemma3_text",))
    ropes = given.section("rope_parameters")
    unknown = ropes.raw.keys() - {"full_attention", "sliding_attention"}
    if unknown:
        raise InputError(f"{ropes.where}: {', '.join(sorted(unknown))} is not a kind of layer that Gemma-3 has")
    # Older checkpoints have rope_theta and rope_scaling for layers without a window, rope_local_base_freq for others.
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
    cap = None if fields.get("final_logit_softcapping") is None else fields.number("final_logit_softcapping", None)
    return Gemma3TextConfig(
        **values | {"hidden_act": fields.text("hidden_activation")},
        local_rope=read_rope(local, LOCAL_THETA, values["max_position_embeddings"]),
        query_pre_attn_scalar=fields.number("query_pre_attn_scalar", None),
        final_logit_softcapping=cap,
        unknown_fields=fields.finish(),
    )


class Gemma3RMSNorm(RMSNorm):
    """RMSNorm that multiplies by 1 + w, computed in float32 up to the result."""

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * (1 + at_least_float32(self.weight))).to(x.dtype)


class Gemma3RotaryEmbedding(nn.Module):
    """cos and sin for given positions, with frequencies that depend on the layer's window."""

    def __init__(self, config: Gemma3TextConfig) -> None:
        super().__init__()
        self.of_all = RotaryEmbedding(config.rope, config.head_dim)
        self.of_window = RotaryEmbedding(config.local_rope, config.head_dim)

    def forward(self, positions: Tensor, dtype: torch.dtype, window: int | None) -> tuple[Tensor, Tensor]:
        """Compute cos and sin. positions int64 [B, T]; window: of the layers -> cos, sin [B, T, D]"""
        return (self.of_all if window is None else self.of_window)(positions, dtype)


class Gemma3DecoderLayer(LlamaDecoderLayer):
    """A decoder layer with norms before and after both blocks, and q/k norms."""

    def __init__(self, config: Gemma3TextConfig, index: int) -> None:
        super().__init__(config, index)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn.q_norm = Gemma3RMSNorm(config.head_dim, eps)
        self.self_attn.k_norm = Gemma3RMSNorm(config.head_dim, eps)
        self.input_layernorm = Gemma3RMSNorm(hidden, eps)
        self.post_attention_layernorm = Gemma3RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm = Gemma3RMSNorm(hidden, eps)
        self.post_feedforward_layernorm = Gemma3RMSNorm(hidden, eps)

    def after_attention(self, a: Tensor) -> Tensor:
        return self.post_attention_layernorm(a)

    def before_mlp(self, x: Tensor) -> Tensor:
        return self.pre_feedforward_layernorm(x)

    def after_mlp(self, y: Tensor) -> Tensor:
        return self.post_feedforward_layernorm(y)


class Gemma3ForCausalLM(LlamaForCausalLM):
    """The text model: Llama's with Gemma's norms and frequencies, scaled embeddings and a soft cap on logits."""

    config: Gemma3TextConfig
    layer_class = Gemma3DecoderLayer  # type: ignore[assignment]  # takes the wider config

    def __init__(self, config: Gemma3TextConfig) -> None:
        super().__init__(config)
        self.model.norm = Gemma3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.model.rotary = Gemma3RotaryEmbedding(config)  # type: ignore[assignment]  # called alike

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens, times the root of H as the dtype rounds it (bfloat16: 55.5). int64 [B, T] -> [B, T, H]"""
        x = super().embed(tokens)
        # On the host: a scalar argument of a kernel needs no copy to the device.
        return x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype)

    def head(self, x: Tensor, lm_head: AnyMatrix | None = None) -> Tensor:
        """Apply the final norm, the output projection and the soft cap. x [B, T, H] -> logits [B, T, V]"""
        logits, cap = super().head(x, lm_head), self.config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap


@dataclass(frozen=True)
class Gemma3Config(PictureConfig):
    """Configuration of tower, projector and language model. Field names are Hugging Face's.

    boi_token_index, eoi_token_index  tokens before and after those of a picture
    """

    text: Gemma3TextConfig
    vision: VisionConfig
    image_token_index: int
    boi_token_index: int
    eoi_token_index: int
    mm_tokens_per_image: int
    unknown_fields: tuple[str, ...] = ()

    @property
    def tokens_per_image(self) -> int:
        return self.mm_tokens_per_image

    @property
    def pooled(self) -> int:
        """Side of the square of patches whose mean is one image token."""
        return self.vision.image_size // self.vision.patch_size // math.isqrt(self.mm_tokens_per_image)


def read_gemma3_config(raw: Mapping[str, Any], where: str = "config.json") -> Gemma3Config:
    """Read a Gemma3Config from a parsed config.json; missing fields get Gemma-3's defaults.

    Raises InputError for a field of the wrong type, for another tower, and if the tokens do not divide the patches.
    """
    fields = ConfigReader(raw, where)
    text, vision = fields.section("text_config"), fields.section("vision_config")
    vision.text("model_type", "siglip_vision_model", ("siglip_vision_model",))
    tied = fields.boolean("tie_word_embeddings", True)      # text_config's does not count
    of_tower = read_vision_config({**vision.raw, "model_type": "siglip_vision_model"}, vision.where)
    tokens, side = fields.integer("mm_tokens_per_image", 256), of_tower.image_size // of_tower.patch_size
    if math.isqrt(tokens) ** 2 != tokens or side % math.isqrt(tokens):
        raise InputError(
            f"{where}: mm_tokens_per_image ({tokens}) must be a square of a number that divides the {side} patches on "
            "a side of a picture"
        )
    of_text = read_gemma3_text_config({**text.raw, "tie_word_embeddings": tied}, text.where)
    refuse_rope_outside(fields, of_text.rope)
    return Gemma3Config(
        text=of_text,
        vision=of_tower,
        image_token_index=fields.integer("image_token_index", fields.integer("image_token_id", 262_144, 0), 0),
        boi_token_index=fields.integer("boi_token_index", fields.integer("boi_token_id", 255_999, 0), 0),
        eoi_token_index=fields.integer("eoi_token_index", fields.integer("eoi_token_id", 256_000, 0), 0),
        mm_tokens_per_image=tokens,
        unknown_fields=fields.finish(),
    )


class Gemma3VisionTower(VisionTower):
    """SigLIP's whole tower, including the LayerNorm after its layers."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config, (-1,))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Compute the last hidden state. pixel_values [pictures, 3, Y, X] -> [pictures, patches, F]"""
        return self.post_layernorm(super().forward(pixel_values))


class Gemma3MultiModalProjector(nn.Module):
    """Projector from patches to image tokens: means of squares of patches, normed, in the language model's size."""

    def __init__(self, config: Gemma3Config) -> None:
        super().__init__()
        size = config.vision.hidden_size
        self.mm_input_projection_weight = nn.Parameter(torch.empty(size, config.text.hidden_size))      # [F, H]
        self.mm_soft_emb_norm = Gemma3RMSNorm(size, config.vision.layer_norm_eps)
        self.pooled = config.pooled

    def forward(self, x: Tensor) -> Tensor:
        """Pool, norm and project. x [pictures, patches, F] -> [pictures, P, H]"""
        side = math.isqrt(x.shape[1])
        grid = x.transpose(1, 2).unflatten(2, (side, side))                         # [pictures, F, side, side]
        means = F.avg_pool2d(grid, self.pooled).flatten(2).transpose(1, 2)          # [pictures, P, F]
        return self.mm_soft_emb_norm(means) @ self.mm_input_projection_weight


class Gemma3ForConditionalGeneration(PictureModel):
    """Vision tower, projector and language model."""

    spellings = LlavaForConditionalGeneration.spellings
    ignored_keys = (r".*vision_tower\.(.*\.)?head\..*",)      # SigLIP's pooling head is unused

    def __init__(self, config: Gemma3Config) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = Gemma3VisionTower(config.vision)
        self.multi_modal_projector = Gemma3MultiModalProjector(config)
        self.language_model = Gemma3ForCausalLM(config.text)

    @property
    def mark(self) -> int:
        return self.config.boi_token_index

    @property
    def written_as(self) -> tuple[int | str, ...]:
        return "\n\n", self.mark, self.config.image_token_index, self.config.eoi_token_index, "\n\n"

    def encode_images(self, pixel_values: Tensor, grids: Sequence[Grid] = ()) -> Tensor:
        """Encode pictures as embeddings of the language model. pixel_values [pictures, 3, Y, X] -> [pictures, P, H]"""
        weight = self.multi_modal_projector.mm_input_projection_weight
        return self.multi_modal_projector(self.vision_tower(pixel_values.to(weight.dtype)))

    def place(
        self, tokens: Tensor, real: Tensor | None, features: Tensor | None, grids: Sequence[Grid] = (), kept: int = 0
    ) -> tuple[Tensor, PictureRows | None]:
        """Put pictures in place (see PictureModel). Consecutive image tokens belong to one picture."""
        is_image = self.is_image(tokens)                                            # [B, T]
        begins = is_image & ~F.pad(is_image, (1, 0))[:, :-1]                        # [B, T]
        blocks = torch.where(is_image, begins.cumsum(dim=1), -1)                    # [B, T]
        return self.embed(tokens[:, kept:], features), PictureRows(blocks=blocks) if is_image.any() else None
