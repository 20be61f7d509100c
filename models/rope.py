"""Frequencies of rotary positions, and their scaling for long contexts."""

import math

import torch
from torch import Tensor

from models.config import RopeConfig


def rotary_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Compute the angle per position of each of the D/2 pairs of coordinates, float32 [D/2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents                                       # [D/2]
    if rope.rope_type == "linear":
        return frequencies / rope.factor
    if rope.rope_type == "factors":
        return frequencies / torch.tensor(rope.factors)
    if rope.rope_type == "llama3":
        # Stretch wavelengths beyond the original context by `factor` and keep short ones, with a ramp between.
        turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
        return (1 - kept) * frequencies / rope.factor + kept * frequencies
    if rope.rope_type == "yarn":
        return yarn_frequencies(rope, head_dim, frequencies)
    return frequencies


def yarn_frequencies(rope: RopeConfig, head_dim: int, frequencies: Tensor) -> Tensor:
    """Interpolate slow pairs and keep fast ones, with a ramp between (YaRN, arXiv 2309.00071, section 3.2)."""

    def pair_with(turns: float) -> float:
        """Return the index of the pair of coordinates that makes `turns` full turns over the original context."""
        wavelengths = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = high - low if high != low else 0.001
    stretched = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return frequencies / rope.factor * stretched + frequencies * (1 - stretched)
