"""Quantised blocks of .gguf files, read without dequantising: integers in groups that share a scale.

A block consists of a few scales and the numbers of 32 (K types: 256) neighbours in a row (format: ggml-common.h and
ggml-quants.c of llama.cpp). The gguf package dequantises every other type.

out and in are the dimensions of a weight, N its blocks per row, G its groups per row.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from weights.groups import Groups

# Numbers that share a scale, in all four-bit types.
GROUP = 32


def words(raw: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """Copy bytes as wider numbers, from any alignment, so that bit operations handle several bytes at once.

    A shift moves bits into a neighbouring byte; a mask must remove them. uint8 [..., n] -> [..., n / size]
    """
    return raw.clone(memory_format=torch.contiguous_format).view(dtype)


def in_each_byte(mask: int, size: int = 8) -> int:
    """Return the mask repeated in each byte of a word of `size` bytes."""
    return mask * ((1 << 8 * size) - 1) // 255      # in integers alone, which a compiled step can trace


def low_and_high(numbers: Tensor) -> Tensor:
    """Return the numbers in the low halves of the bytes, then those in the high halves. uint8 [..., n] -> [..., 2 n]"""
    both, low = words(numbers), in_each_byte(15)
    return torch.cat([both & low, both >> 4 & low], dim=-1).view(torch.uint8)


def fifth_bits(raw: Tensor) -> Tensor:
    """Return the bits of 4 bytes, lowest first, each as 16 or 0. uint8 [..., 4] -> [..., 32]"""
    bits = raw.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)                  # [..., 4, 8]
    return ((bits & 1) << 4).flatten(-2)


def halves(raw: Tensor) -> Tensor:
    """Read bytes as half-precision numbers, in float32. uint8 [..., 2 n] -> float32 [..., n]"""
    return words(raw, torch.float16).float()


def scales_of_k(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and minimum of each group of Q4_K and Q5_K, d s and -e m.

    Bytes: 2 of d, 2 of e, 12 of s and m (6 bits each) of 8 groups. uint8 [out, N, 16] -> float32 [out, G] each
    """
    low, upper, six = (in_each_byte(mask, 4) for mask in (15, 48, 63))
    pair, third = words(raw[..., 4:], torch.int32).split([2, 1], dim=-1)            # [out, N, 2], [out, N, 1]
    # The first four groups have six bits in one byte each. The upper two bits of the others lie in these same bytes.
    others = torch.cat([third, third >> 4], dim=-1) & low | pair >> 2 & upper       # [out, N, 2]
    factors = torch.stack([pair & six, others], dim=-1).view(torch.uint8)           # [out, N, 2, 8]
    scale, least = (halves(raw[..., :4]).unsqueeze(-1) * factors).unbind(-2)        # [out, N, 8]
    return scale.flatten(1), -least.flatten(1)


def read_q4_0(raw: Tensor, rows: int) -> Groups:
    """Read d (q - 8): 2 bytes of d, 16 of numbers. raw: uint8 [bytes] of `rows` rows, as in all readers"""
    blocks = raw.view(rows, -1, 18)                                                 # [out, G, 18]
    scale = halves(blocks[..., :2]).squeeze(-1)                                     # [out, G]
    return Groups(low_and_high(blocks[..., 2:]).flatten(1), scale, -8 * scale)


def read_q4_1(raw: Tensor, rows: int) -> Groups:
    """Read d q + m: 2 bytes of d, 2 of m, 16 of numbers."""
    blocks = raw.view(rows, -1, 20)                                                 # [out, G, 20]
    scale, minimum = halves(blocks[..., :4]).unbind(-1)                             # [out, G]
    return Groups(low_and_high(blocks[..., 4:]).flatten(1), scale.contiguous(), minimum.contiguous())


def read_q4_k(raw: Tensor, rows: int) -> Groups:
    """Read d s q - e m: 16 bytes of scales for 8 groups of 32, 128 of numbers."""
    blocks = raw.view(rows, -1, 144)                                                # [out, N, 144]
    numbers = low_and_high(blocks[..., 16:].unflatten(-1, (4, 32)))                 # [out, N, 4, 64]
    return Groups(numbers.flatten(1), *scales_of_k(blocks[..., :16]))


def read_q5_0(raw: Tensor, rows: int) -> Groups:
    """Read d (q - 16): 2 bytes of d, 4 of fifth bits, 16 of numbers."""
    blocks = raw.view(rows, -1, 22)                                                 # [out, G, 22]
    scale = halves(blocks[..., :2]).squeeze(-1)                                     # [out, G]
    numbers = low_and_high(blocks[..., 6:]) | fifth_bits(blocks[..., 2:6])          # [out, G, 32]
    return Groups(numbers.flatten(1), scale, -16 * scale)


def read_q5_1(raw: Tensor, rows: int) -> Groups:
    """Read d q + m: 2 bytes of d, 2 of m, 4 of fifth bits, 16 of numbers."""
    blocks = raw.view(rows, -1, 24)                                                 # [out, G, 24]
    scale, minimum = halves(blocks[..., :4]).unbind(-1)                             # [out, G]
    numbers = low_and_high(blocks[..., 8:]) | fifth_bits(blocks[..., 4:8])          # [out, G, 32]
    return Groups(numbers.flatten(1), scale.contiguous(), minimum.contiguous())


def read_q5_k(raw: Tensor, rows: int) -> Groups:
    """Read Q4_K with 32 bytes of fifth bits before the numbers; each byte has one bit per group."""
    blocks = raw.view(rows, -1, 176)                                                # [out, N, 176]
    low = low_and_high(blocks[..., 48:].unflatten(-1, (4, 32))).unflatten(-1, (2, 32))      # [out, N, 4, 2, 32]
    bits = blocks[..., None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None]  # [out, N, 8, 32]
    numbers = low.flatten(2, 3) | (bits & 1) << 4                                   # [out, N, 8, 32]
    return Groups(numbers.flatten(1), *scales_of_k(blocks[..., :16]))


def read_q6_k(raw: Tensor, rows: int) -> Groups:
    """Read d s (q - 32): 128 bytes of low halves, 64 of two upper bits each, 16 of s for groups of 16, 2 of d."""
    blocks = raw.view(rows, -1, 210)                                                # [out, N, 210]
    low = low_and_high(blocks[..., :128].unflatten(-1, (2, 64)))                    # [out, N, 2, 128]
    bits = words(blocks[..., 128:192].unflatten(-1, (2, 32)))                       # [out, N, 2, 4]
    upper = torch.cat([bits << 4, bits << 2, bits, bits >> 2], dim=-1) & in_each_byte(48)           # [out, N, 2, 16]
    scale = (halves(blocks[..., 208:]) * blocks[..., 192:208].view(torch.int8)).flatten(1)
    return Groups((low | upper.view(torch.uint8)).flatten(1), scale, -32 * scale)


def read_q8_0(raw: Tensor, rows: int) -> Groups:
    """Read d q: 2 bytes of d, 32 of numbers from -128 to 127."""
    blocks = raw.view(rows, -1, 34)                                                 # [out, G, 34]
    scale = halves(blocks[..., :2]).squeeze(-1)                                     # [out, G]
    return Groups((blocks[..., 2:] ^ 128).flatten(1), scale, -128 * scale)


READERS: dict[str, Callable[[Tensor, int], Groups]] = {
    "Q4_0": read_q4_0, "Q4_1": read_q4_1, "Q4_K": read_q4_k, "Q5_0": read_q5_0, "Q5_1": read_q5_1, "Q5_K": read_q5_k,
    "Q6_K": read_q6_k, "Q8_0": read_q8_0,
}
# Numbers and bytes per block.
BLOCKS = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q4_K": (256, 144), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q5_K": (256, 176),
    "Q6_K": (256, 210), "Q8_0": (32, 34),
}
FOUR_BIT_TYPES = ("Q4_0", "Q4_1", "Q4_K")


def stored_size(kind: str, numbers: int) -> int:
    """Return the bytes that `numbers` numbers take in this format."""
    block, size = BLOCKS[kind]
    return numbers // block * size
