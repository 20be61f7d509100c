"""The vision towers of LLaVA models: CLIP's (arXiv 2103.00020) and SigLIP's (arXiv 2303.15343).

They differ in three details: SigLIP has no class token, no LayerNorm before its layers, and a bias on its patches.
Only the part that LLaVA reads is built: layers beyond the deepest one that is read, the LayerNorm after them and the
pooling heads are in the checkpoints but unused.

B pictures, C colour channels, Y rows and X columns of pixels, P patches (and the class token, where there is one),
H hidden size, I channels of the feed-forward network, N heads, D head size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Embedding, activation_function
from models.read_config import MOST_LAYERS, ConfigReader
from weights.errors import InputError


@dataclass(frozen=True)
class VisionConfig:
    """Configuration of a vision tower. Field names are Hugging Face's if it has the field."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float
    class_token: bool
    pre_layernorm: bool
    patch_bias: bool
    unknown_fields: tuple[str, ...] = ()

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def positions(self) -> int:
        return self.patches + self.class_token

    @property
    def blocks(self) -> int:
        """Number of blocks with matrices of their own."""
        return self.num_hidden_layers

    @property
    def sides(self) -> tuple[int, ...]:
        """Sizes of the dimensions that its tensors have."""
        return self.hidden_size, self.intermediate_size, self.patch_size, self.positions


# Per model type, defaults of a vision_config (transformers' documented ones), and properties that the type fixes.
FAMILIES: dict[str, dict[str, Any]] = {
    "clip_vision_model": {
        "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
        "class_token": True, "pre_layernorm": True, "patch_bias": False,
    },
    "siglip_vision_model": {
        "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
        "class_token": False, "pre_layernorm": False, "patch_bias": True,
    },
}  # fmt: skip

# Fields of the tower's training and of parts that LLaVA does not use.
UNUSED_FIELDS = ("projection_dim", "vocab_size", "initializer_factor", "vision_use_head", "dropout")


def read_vision_config(raw: Mapping[str, Any], where: str = "config.json: vision_config") -> VisionConfig:
    """Read a VisionConfig from a parsed vision_config; missing fields get the family's defaults.

    Raises InputError for a field of the wrong type and for another kind of tower.
    """
    fields = ConfigReader(raw, where)
    model_type = fields.text("model_type", "clip_vision_model", FAMILIES)
    family = FAMILIES[model_type]
    fields.read.update(UNUSED_FIELDS)
    config = VisionConfig(
        hidden_size=fields.integer("hidden_size", 768),
        intermediate_size=fields.integer("intermediate_size", 3072),
        num_hidden_layers=fields.integer("num_hidden_layers", 12, most=MOST_LAYERS),
        num_attention_heads=fields.integer("num_attention_heads", 12),
        num_channels=fields.integer("num_channels", 3),
        image_size=fields.integer("image_size", 224),
        patch_size=fields.integer("patch_size", family["patch_size"]),
        hidden_act=fields.text("hidden_act", family["hidden_act"]),
        layer_norm_eps=fields.number("layer_norm_eps", family["layer_norm_eps"]),
        class_token=family["class_token"],
        pre_layernorm=family["pre_layernorm"],
        patch_bias=family["patch_bias"],
        unknown_fields=fields.finish(),
    )
    if config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"{where}: hidden_size ({config.hidden_size}) must be a multiple of num_attention_heads "
            f"({config.num_attention_heads})"
        )
    if config.num_channels != 3:
        raise InputError(f"{where}: num_channels must be 3 (pictures are read as RGB), not {config.num_channels}")
    if config.patch_size > config.image_size:
        raise InputError(
            f"{where}: patch_size ({config.patch_size}) must not be larger than image_size ({config.image_size})"
        )
    return config


class VisionEmbeddings(nn.Module):
    """One vector per patch of pixels, after the class token if there is one, plus learned positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(
            config.num_channels,
            config.hidden_size,
            kernel_size=config.patch_size,
            stride=config.patch_size,
            bias=config.patch_bias,
        )
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size)) if config.class_token else None
        self.position_embedding = Embedding(config.positions, config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed the patches of pictures. pixel_values [B, C, Y, X] -> [B, P, H]"""
        x = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # [B, P, H]
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
        return x + self.position_embedding.weight


class VisionAttention(nn.Module):
    """Attention in which every patch attends to every patch."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, N, P, D]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        a = F.scaled_dot_product_attention(q, k, v)  # [B, N, P, D]
        return self.out_proj(a.transpose(1, 2).flatten(2))  # [B, P, H]


class VisionMLP(nn.Module):
    """Feed-forward network of a vision layer: two linear layers with an activation between them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = activation_function(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))  # [B, P, I] between the two


class VisionLayer(nn.Module):
    """A vision layer: attention and feed-forward network, each after a LayerNorm."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionEncoder(nn.Module):
    """Container of the vision layers, named as in checkpoints."""

    def __init__(self, config: VisionConfig, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(layers))


class VisionTower(nn.Module):
    """Vision tower: computes the hidden states of pictures that LLaVA reads.

    read: indices of the hidden states, as in transformers: 0 is the input of the first layer, i the output of layer i,
    and negative numbers count from the last layer (-1). Raises InputError for one that the tower does not have.
    """

    def __init__(self, config: VisionConfig, read: Sequence[int]) -> None:
        super().__init__()
        states = config.num_hidden_layers + 1
        for index in read:
            if not -states <= index < states:
                raise InputError(
                    f"config.json: vision_feature_layer {index} is outside the vision tower's "
                    f"{config.num_hidden_layers} layers ({-states} .. {states - 1})"
                )
        self.read = tuple(index % states for index in read)
        self.embeddings = VisionEmbeddings(config)
        # The missing e is in every checkpoint's names.
        self.pre_layrnorm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.pre_layernorm else nn.Identity()
        )
        self.encoder = VisionEncoder(config, max(self.read))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Compute hidden states. pixel_values [B, C, Y, X] -> [B, P, H per hidden state read, concatenated]"""
        states = [self.pre_layrnorm(self.embeddings(pixel_values))]  # [B, P, H] each
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
        return torch.cat([states[index] for index in self.read], dim=-1)
