"""The parts every language model here is made of: linear layers, RMSNorm, rotary positions, activation functions, and
what a pass hands to every layer.

B batch, T prompt tokens, S cache slots, D head size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.clock import Clock
from models.config import RopeConfig
from weights.errors import InputError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
}


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise InputError(f"config.json: hidden_act {name!r} is not implemented; implemented are {known}")
    return ACTIVATIONS[name]


@dataclass
class PrefillStep:
    """What every layer needs to run the prompt.

    cos, sin  [B, T, D]  rotary embedding of the positions
    masks     by attention window: bool [B, 1, T, T], True where a query may look; None means causal and nothing else
    counted   bool [B, T], tokens that count in the scores; None: all
    finish_dense  down_proj and o_proj run on all channels (prefill "dense"), not only on the resident ones
    """

    cos: Tensor
    sin: Tensor
    masks: dict[int | None, Tensor | None]
    counted: Tensor | None
    finish_dense: bool
    clock: Clock


@dataclass
class DecodeStep:
    """What every layer needs to run one more token.

    cos, sin  [B, 1, D]; masks by attention window: float [B, 1, 1, S], 0 where the token may look and -inf elsewhere
    slot      [1]     int64, the cache slot this token fills
    live      [B, 1]  bool, False for sequences that have ended: they do not count when candidates are picked
    """

    cos: Tensor
    sin: Tensor
    masks: dict[int | None, Tensor]
    slot: Tensor
    live: Tensor


class Linear(nn.Linear):
    """nn.Linear, without initial values while the model is laid out on the meta device.

    There is nothing to fill there, and PyTorch would import its compiler to find that out: two seconds of loading.
    """

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Embedding(nn.Embedding):
    """nn.Embedding, without initial values on the meta device, as Linear."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotary_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Angle per position of each of the D/2 pairs of coordinates, float32 [D/2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents                                       # [D/2]
    if rope.rope_type == "linear":
        return frequencies / rope.factor
    if rope.rope_type == "factors":
        return frequencies / torch.tensor(rope.factors)
    if rope.rope_type == "llama3":
        # Wavelengths beyond the original context are stretched by `factor`, short ones are left, with a ramp between.
        turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
        return (1 - kept) * frequencies / rope.factor + kept * frequencies
    if rope.rope_type == "yarn":
        return yarn_frequencies(rope, head_dim, frequencies)
    return frequencies


def yarn_frequencies(rope: RopeConfig, head_dim: int, frequencies: Tensor) -> Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): interpolate slow pairs, keep fast ones, with a ramp between."""

    def pair_with(turns: float) -> float:
        """Index of the pair of coordinates that makes `turns` full turns over the original context."""
        wavelengths = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = high - low if high != low else 0.001
    stretched = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return frequencies / rope.factor * stretched + frequencies * (1 - stretched)


class RotaryEmbedding(nn.Module):
    """cos and sin for given positions. Its frequencies follow from the config and are no part of a checkpoint."""

    frequencies: Tensor

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        super().__init__()
        self.scale = rope.attention_factor
        # On the CPU even while the model is being laid out on the meta device: these are values, not a shape.
        with torch.device("cpu"):
            self.register_buffer("frequencies", rotary_frequencies(rope, head_dim), persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [B, T] -> cos, sin [B, T, D], computed in float32."""
        angles = positions[..., None].float() * self.frequencies                    # [B, T, D/2]
        angles = torch.cat([angles, angles], dim=-1)                                # [B, T, D]
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of coordinates (j, j + D/2) by its angle. x [B, heads, T, D]; cos, sin [B, T, D]."""
    first, second = x.chunk(2, dim=-1)                                              # [B, heads, T, D/2] each
    first_cos, second_cos = cos.unsqueeze(1).chunk(2, dim=-1)                       # [B, 1, T, D/2] each
    first_sin, second_sin = sin.unsqueeze(1).chunk(2, dim=-1)
    return torch.cat([first * first_cos - second * first_sin, second * second_cos + first * second_sin], dim=-1)
