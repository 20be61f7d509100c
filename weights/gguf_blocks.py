"""The blocks of four-bit numbers that .gguf files hold, read as they are: Q4_0, Q4_1 and Q4_K.

A block is a few scales and the numbers of 32 (Q4_K: 256) neighbours in a row (the format's own description:
ggml-common.h and ggml-quants.c of llama.cpp). Everything else a file may hold is dequantised by the gguf package.

out and in are the sides of a weight, N its blocks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from weights.groups import Groups

# Numbers that share a scale, in all of them.
GROUP = 32


def low_and_high(numbers: Tensor) -> Tensor:
    """Two numbers of each byte: those of the low halves, then those of the high. uint8 [..., n] -> [..., 2 n]"""
    return torch.cat([numbers & 15, numbers >> 4], dim=-1)


def halves(raw: Tensor) -> Tensor:
    """Bytes as half-precision numbers, in float32. uint8 [..., 2 n] -> float32 [..., n]"""
    return raw.contiguous().view(torch.float16).float()


def read_q4_0(raw: Tensor, shape: tuple[int, ...]) -> Groups:
    """d (q - 8): 2 bytes of d, 16 of numbers. raw uint8 [bytes], shape (out, in)"""
    blocks = raw.view(shape[0], -1, 18)                                             # [out, G, 18]
    scale = halves(blocks[..., :2]).squeeze(-1)                                     # [out, G]
    return Groups(low_and_high(blocks[..., 2:]).flatten(1), scale, -8 * scale)


def read_q4_1(raw: Tensor, shape: tuple[int, ...]) -> Groups:
    """d q + m: 2 bytes of d, 2 of m, 16 of numbers."""
    blocks = raw.view(shape[0], -1, 20)                                             # [out, G, 20]
    scale, minimum = halves(blocks[..., :4]).unbind(-1)                             # [out, G]
    return Groups(low_and_high(blocks[..., 4:]).flatten(1), scale.contiguous(), minimum.contiguous())


def read_q4_k(raw: Tensor, shape: tuple[int, ...]) -> Groups:
    """d s q - e m: 2 bytes of d, 2 of e, 12 of s and m (6 bits each) for 8 groups of 32, 128 of numbers."""
    blocks = raw.view(shape[0], -1, 144)                                            # [out, N, 144]
    d, e = halves(blocks[..., :4]).split(1, dim=-1)                                 # [out, N, 1]
    first, second, third = blocks[..., 4:16].split(4, dim=-1)                       # [out, N, 4]
    # The first four groups have their six bits in one byte; of the others the upper two lie in the first four's bytes.
    scale = torch.cat([first & 63, (third & 15) | (first >> 6 << 4)], dim=-1)       # [out, N, 8]
    least = torch.cat([second & 63, (third >> 4) | (second >> 6 << 4)], dim=-1)
    numbers = low_and_high(blocks[..., 16:].unflatten(-1, (4, 32)))                 # [out, N, 4, 64]
    return Groups(numbers.flatten(1), (d * scale).flatten(1), (-e * least).flatten(1))


FOUR_BIT_TYPES: dict[str, Callable[[Tensor, tuple[int, ...]], Groups]] = {
    "Q4_0": read_q4_0, "Q4_1": read_q4_1, "Q4_K": read_q4_k,
}
