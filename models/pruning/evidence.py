"""Scores of channels, from the squares of their activations over the tokens seen (POP, arXiv 2602.06822, Eq. 1-3).

B batch, T tokens, I channels, N heads, D head size.
"""

import torch
from torch import Tensor


class Evidence:
    """Accumulated squares of the activations of each channel of one network (POP, Eq. 1-3).

    Squares add up over tokens: a prompt in pieces, or a prompt and later steps, are evidence like one long prompt.

    squares  float32 [I];  tokens  number of tokens summed over
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        self.squares = torch.zeros(channels, dtype=torch.float32, device=device)
        self.tokens = 0

    def restart(self) -> None:
        """Forget all tokens."""
        self.squares.zero_()
        self.tokens = 0

    def add(self, h: Tensor, real: Tensor | None, tokens: int) -> None:
        """Add tokens. h [B, T, I], input of down_proj; real bool [B, T] or [B, 1], `tokens` of them True; None: all"""
        self.squares.add_(sum_of_squares(h, real))
        if tokens:
            self.tokens += tokens

    def scores(self, norms: Tensor) -> Tensor:
        """Score each channel (Eq. 3). norms float32 [I], of the columns of down_proj -> float32 [I]"""
        return self.squares.sqrt() * norms


def sum_of_squares(h: Tensor, real: Tensor | None = None) -> Tensor:
    """Sum squares over tokens. h [B, T, I]; real [B, T] or [B, 1], False: padding or ended sequence -> float32 [I]"""
    if real is not None:
        h = h.masked_fill(~real.unsqueeze(-1), 0)                           # [B, T, I]
    # square and sum separately: on a CPU vector_norm over the leading dimensions is ten times as slow.
    return h.float().square().sum(dim=(0, 1))


def channel_scores(h: Tensor, norms: Tensor, real: Tensor | None = None) -> Tensor:
    """Score each channel over these tokens alone (POP, Eq. 3). Arguments as for Evidence -> float32 [I]"""
    return sum_of_squares(h, real).sqrt() * norms


def head_scores(coordinates: Tensor, head_dim: int) -> Tensor:
    """Score query heads: l2 norm of the channel scores of each head's coordinates. [..., N D] -> [..., N]"""
    return torch.linalg.vector_norm(coordinates.unflatten(-1, (-1, head_dim)), dim=-1)
