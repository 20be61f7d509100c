"""Quantised blocks of .gguf files, read without dequantising: integers in groups that share a scale.

A block consists of a few scales and the numbers of 32 (K types: 256) neighbours in a row (format: ggml-common.h and
ggml-quants.c of llama.cpp). The gguf package dequantises every other type.

A reader first puts the bytes of all rows that have the same place in a block beside each other (`by_place`). Every
further operation then runs over long stretches of memory, with a processor's vector instructions.

out and in are the dimensions of a weight, N its blocks per row, G its groups per row.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from weights.groups import Groups, transposed

# Numbers that share a scale, in all four-bit types.
GROUP = 32


def by_place(raw: Tensor, rows: int, size: int) -> Tensor:
    """Order bytes by their place in a row, then by row. uint8 [bytes] of blocks of `size` -> [N, size, out]"""
    return transposed(raw.view(rows, -1)).view(-1, size, rows)


def low_and_high(numbers: Tensor) -> Tensor:
    """Return the low halves of the bytes, then the high ones. uint8 [..., n, out] -> [..., 2 n, out]"""
    return torch.stack([numbers & 15, numbers >> 4], dim=-3).flatten(-3, -2)


def fifth_bits(raw: Tensor) -> Tensor:
    """Return the bits of 4 bytes, lowest first, each as 16 or 0. uint8 [G, 4, out] -> [G, 32, out]"""
    bits = raw.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8).unsqueeze(1)      # [G, 4, 8, out]
    return ((bits & 1) << 4).flatten(1, 2)


def halves(raw: Tensor) -> Tensor:
    """Read pairs of bytes as half-precision numbers, in float32. uint8 [N, 2 n, out] -> float32 [N, n, out]"""
    low, high = raw.to(torch.int16).unflatten(1, (-1, 2)).unbind(2)
    return (high << 8 | low).view(torch.float16).float()


def scales_of_k(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and minimum of each group of Q4_K and Q5_K, d s and -e m.

    Bytes: 2 of d, 2 of e, 12 of s and m (6 bits each) of 8 groups. uint8 [N, 16, out] -> float32 [N, 8, out] each
    """
    pair, third = raw[:, 4:12].unflatten(1, (2, 4)), raw[:, 12:]                    # [N, 2, 4, out], [N, 4, out]
    # The first four groups have six bits in one byte each. The upper two bits of the others lie in these same bytes.
    others = torch.stack([third & 15, third >> 4], dim=1) | pair >> 2 & 48          # [N, 2, 4, out]
    factors = torch.cat([pair & 63, others], dim=2).float()                         # [N, 2, 8, out]
    scale, least = factors.mul_(halves(raw[:, :4]).unsqueeze(2)).unbind(1)
    return scale, -least


def groups_of(numbers: Tensor, scale: Tensor, minimum: Tensor) -> Groups:
    """Make Groups, stored by columns, of tensors [..., out] whose other dimensions are the places in a row."""
    return Groups(*(one.flatten(0, -2).t() for one in (numbers, scale, minimum)))


def read_q4_0(raw: Tensor, rows: int) -> Groups:
    """Read d (q - 8): 2 bytes of d, 16 of numbers. raw: uint8 [bytes] of `rows` rows, as in all readers"""
    blocks = by_place(raw, rows, 18)                                                # [G, 18, out]
    scale = halves(blocks[:, :2])                                                   # [G, 1, out]
    return groups_of(low_and_high(blocks[:, 2:]), scale, -8 * scale)


def read_q4_1(raw: Tensor, rows: int) -> Groups:
    """Read d q + m: 2 bytes of d, 2 of m, 16 of numbers."""
    blocks = by_place(raw, rows, 20)                                                # [G, 20, out]
    scale, minimum = halves(blocks[:, :4]).unbind(1)                                # [G, out]
    return groups_of(low_and_high(blocks[:, 4:]), scale, minimum)


def read_q4_k(raw: Tensor, rows: int) -> Groups:
    """Read d s q - e m: 16 bytes of scales for 8 groups of 32, 128 of numbers."""
    blocks = by_place(raw, rows, 144)                                               # [N, 144, out]
    numbers = low_and_high(blocks[:, 16:].unflatten(1, (4, 32)))                    # [N, 4, 64, out]
    return groups_of(numbers, *scales_of_k(blocks[:, :16]))


def read_q5_0(raw: Tensor, rows: int) -> Groups:
    """Read d (q - 16): 2 bytes of d, 4 of fifth bits, 16 of numbers."""
    blocks = by_place(raw, rows, 22)                                                # [G, 22, out]
    scale = halves(blocks[:, :2])                                                   # [G, 1, out]
    numbers = low_and_high(blocks[:, 6:]) | fifth_bits(blocks[:, 2:6])              # [G, 32, out]
    return groups_of(numbers, scale, -16 * scale)


def read_q5_1(raw: Tensor, rows: int) -> Groups:
    """Read d q + m: 2 bytes of d, 2 of m, 4 of fifth bits, 16 of numbers."""
    blocks = by_place(raw, rows, 24)                                                # [G, 24, out]
    scale, minimum = halves(blocks[:, :4]).unbind(1)                                # [G, out]
    numbers = low_and_high(blocks[:, 8:]) | fifth_bits(blocks[:, 4:8])              # [G, 32, out]
    return groups_of(numbers, scale, minimum)


def read_q5_k(raw: Tensor, rows: int) -> Groups:
    """Read Q4_K with 32 bytes of fifth bits before the numbers; each byte has one bit per group."""
    blocks = by_place(raw, rows, 176)                                               # [N, 176, out]
    low = low_and_high(blocks[:, 48:].unflatten(1, (4, 32))).unflatten(2, (2, 32)).flatten(1, 2)    # [N, 8, 32, out]
    bits = blocks[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8).view(8, 1, 1)               # [N, 8, 32, out]
    return groups_of(low | (bits & 1) << 4, *scales_of_k(blocks[:, :16]))


def read_q6_k(raw: Tensor, rows: int) -> Groups:
    """Read d s (q - 32): 128 bytes of low halves, 64 of two upper bits each, 16 of s for groups of 16, 2 of d."""
    blocks = by_place(raw, rows, 210)                                               # [N, 210, out]
    low = low_and_high(blocks[:, :128].unflatten(1, (2, 64)))                       # [N, 2, 128, out]
    bits = blocks[:, 128:192].unflatten(1, (2, 32))                                 # [N, 2, 32, out]
    upper = torch.stack([bits << 4, bits << 2, bits, bits >> 2], dim=2).bitwise_and_(48)            # [N, 2, 4, 32, out]
    scale = halves(blocks[:, 208:]) * blocks[:, 192:208].view(torch.int8)           # [N, 16, out]
    return groups_of(low.bitwise_or_(upper.flatten(2, 3)), scale, -32 * scale)


def read_q8_0(raw: Tensor, rows: int) -> Groups:
    """Read d q: 2 bytes of d, 32 of numbers from -128 to 127."""
    blocks = by_place(raw, rows, 34)                                                # [G, 34, out]
    scale = halves(blocks[:, :2])                                                   # [G, 1, out]
    return groups_of(blocks[:, 2:] ^ 128, scale, -128 * scale)


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
