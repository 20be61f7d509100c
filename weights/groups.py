"""Integers in groups: the common form of matrices from several checkpoint formats.

out and in are the dimensions of a weight [out, in], g the group size in a row, G = in / g groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """A matrix w = scale * number + minimum, with one scale and minimum per group.

    numbers  uint8 [out, in], 0 to 15 if four-bit; scale, minimum  float32 [out, G]

    All three may be stored by rows or by columns.
    """

    numbers: Tensor
    scale: Tensor
    minimum: Tensor

    @property
    def size(self) -> int:
        """Group size."""
        return self.numbers.shape[1] // self.scale.shape[1]

    def __len__(self) -> int:
        return len(self.numbers)

    def part(self, dim: int, own: slice) -> "Groups":
        """Return some rows (dim 0), or some columns (dim 1) that begin and end at group boundaries."""
        if dim == 0:
            return Groups(self.numbers[own], self.scale[own], self.minimum[own])
        groups = slice(own.start // self.size, own.stop // self.size)
        return Groups(self.numbers[:, own], self.scale[:, groups], self.minimum[:, groups])

    def values(self) -> Tensor:
        """Return the weights, float32 [out, in], stored by rows."""
        own = self.by_rows()
        grouped = own.numbers.unflatten(1, (-1, self.size)).float()                 # [out, G, g]
        return grouped.mul_(own.scale.unsqueeze(-1)).add_(own.minimum.unsqueeze(-1)).flatten(1)

    def by_rows(self) -> "Groups":
        """Return the same matrix, stored by rows."""
        return Groups(by_rows(self.numbers), by_rows(self.scale), by_rows(self.minimum))


def by_rows(matrix: Tensor) -> Tensor:
    """Return a matrix that is stored by columns stored by rows, and any other as it is. [n, m] -> [n, m]"""
    return matrix if matrix.is_contiguous() else transposed(matrix.t())


def transposed(matrices: Tensor) -> Tensor:
    """Transpose the last two dimensions in memory. [..., n, m] -> [..., m, n]

    PyTorch copies a transposed matrix number by number. To shuffle the channels of a picture, one pixel for each
    matrix, moves the same numbers, for uint8 and float32 with vector instructions: bytes in a third to a tenth of the
    time.
    """
    *others, rows, columns = matrices.shape
    if 1 in (rows, columns) or torch.compiler.is_compiling():
        return matrices.transpose(-2, -1).contiguous()
    pixels = matrices.reshape(1, 1, -1, rows * columns).permute(0, 3, 1, 2)         # channels last in memory
    return torch.native_channel_shuffle(pixels, rows).permute(0, 2, 3, 1).view(*others, columns, rows)


def group(weight: Tensor, size: int, bits: int = 4) -> Groups:
    """Round to the nearest numbers of so many bits, from the minimum of each group to its maximum.

    weight [out, in], in % size == 0. Scales and minima are rounded to bfloat16 first, as products read them, so that
    the numbers compensate for that rounding.
    """
    highest, half = 2**bits - 1, 2 ** (bits - 1)
    grouped = weight.float().unflatten(1, (-1, size))                               # [out, G, g]
    # aminmax takes eight times as long as amin and amax together.
    least, most = grouped.amin(dim=-1, keepdim=True), grouped.amax(dim=-1, keepdim=True)            # [out, G, 1]
    scale = ((most - least) / highest).bfloat16().float()
    middle = (least + half * scale).bfloat16().float()    # the offset that a product adds: its numbers are signed
    minimum = middle - half * scale
    numbers = (grouped - minimum).div_(torch.where(scale > 0, scale, 1)).round_().clamp_(0, highest)
    return Groups(numbers.to(torch.uint8).flatten(1), scale.squeeze(-1), minimum.squeeze(-1))
