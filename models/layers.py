"""Small parts that every language model shares: embedding, RMSNorm, rotary positions, activation functions.

B batch, T tokens, D head size.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import RopeConfig
from models.rope import rotary_frequencies
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
    """Return the activation function of a config's hidden_act. Raises InputError if it is not implemented."""
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise InputError(f"config.json: hidden_act {name!r} is not implemented; implemented are {known}")
    return ACTIVATIONS[name]


class DerivedConstants(nn.Module):
    """A module with constants that derive from its weights, such as norms of columns: each computed at first use."""

    def __init__(self) -> None:
        super().__init__()
        self.derived: dict[str, Any] = {}

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a constant of the weights by its name; `make` computes it at first use."""
        if name not in self.derived:
            self.derived[name] = make()
        return self.derived[name]


class Embedding(nn.Embedding):
    """nn.Embedding, without initial values on the meta device (see Matrix)."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32, for sums of squares; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """weight * x / rms(x) over the last dimension, normalised in float32 or wider. x [..., size] -> [..., size]"""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class RotaryEmbedding(nn.Module):
    """cos and sin for given positions. The frequencies follow from the config and are not in checkpoints."""

    frequencies: Tensor

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        super().__init__()
        self.scale, self.streams = rope.attention_factor, list(rope.streams)
        # On the CPU even while the model is built on the meta device: these are values, not only a shape.
        with torch.device("cpu"):
            self.register_buffer("frequencies", rotary_frequencies(rope, head_dim), persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype, window: int | None = None) -> tuple[Tensor, Tensor]:
        """Compute cos and sin in float32. positions [B, T], or of pictures [3, B, T] -> cos, sin [B, T, D]

        window  attention window of the layers; unused here, other families choose their frequencies by it
        """
        wide = positions[..., None] if positions.dim() == 2 else positions[self.streams].movedim(0, -1)
        angles = wide.float() * self.frequencies                                    # [B, T, D/2]
        angles = torch.cat([angles, angles], dim=-1)                                # [B, T, D]
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of coordinates (j, j + D/2) by its angle. x [B, heads, T, D]; cos, sin [B, T, D]."""
    first, second = x.chunk(2, dim=-1)                                              # [B, heads, T, D/2] each
    first_cos, second_cos = cos.unsqueeze(1).chunk(2, dim=-1)                       # [B, 1, T, D/2] each
    first_sin, second_sin = sin.unsqueeze(1).chunk(2, dim=-1)
    return torch.cat([first * first_cos - second * first_sin, second * second_cos + first * second_sin], dim=-1)
