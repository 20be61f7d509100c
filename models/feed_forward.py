"""The gated feed-forward network: its weights and the dense forward.

`FeedForward.forward` is the dense network that golden tests compare with Hugging Face. Online pruning builds, per
layer, an object with `prefill(x, rows)` and `decode(x, step)` from these weights (models/pruning/pop.py). Modules have
Hugging Face's names.

B batch, T tokens, H hidden size, I FFN channels.
"""

import torch
from torch import Tensor

from models.layers import DerivedConstants, activation_function
from models.matrices.plain import Matrix


class FeedForward(DerivedConstants):
    """down_proj(act(gate_proj x) * up_proj x); channel i is row i of gate and up and column i of down."""

    def __init__(self, hidden_size: int, channels: int, act: str, bias: bool) -> None:
        super().__init__()
        self.channels = channels
        self.gate_proj = Matrix(hidden_size, channels, bias=bias)
        self.up_proj = Matrix(hidden_size, channels, bias=bias)
        self.down_proj = Matrix(channels, hidden_size, bias=bias)
        self.act = activation_function(act)

    def forward(self, x: Tensor) -> Tensor:
        """Run the dense network. x [..., H] -> [..., H]"""
        return self.down_proj(self.activation(x))

    def activation(self, x: Tensor) -> Tensor:
        """Compute the input of down_proj, h = act(gate x) * up x. x [..., H] -> [..., I]"""
        return self.act(self.gate_proj(x)) * self.up_proj(x)

    @property
    def device(self) -> torch.device:
        return self.down_proj.weight.device

    def down_norms(self) -> Tensor:
        """Return the l2 norm of each column of down_proj, float32 [I]."""
        return self.once("down norms", self.down_proj.column_norms)

    def weight_scores(self) -> Tensor:
        """Score each channel by the weights alone, for a network that saw no token: float32 [I]."""
        return self.down_norms() * self.gate_proj.row_norms() * self.up_proj.row_norms()
