"""Whole numbers in groups: what several formats of checkpoints keep their matrices as, in one form.

out and in are the sides of a weight [out, in], g the size of a group of neighbours in a row, G = in / g groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """w = scale * number + minimum, a scale and a minimum for each group.

    numbers  uint8 [out, in], of four bits 0 to 15; scale, minimum  float32 [out, G]
    """

    numbers: Tensor
    scale: Tensor
    minimum: Tensor

    @property
    def size(self) -> int:
        """Of a group."""
        return self.numbers.shape[1] // self.scale.shape[1]

    def part(self, dim: int, own: slice) -> "Groups":
        """Some rows (dim 0), or some columns (1) that begin and end with groups."""
        if dim == 0:
            return Groups(self.numbers[own], self.scale[own], self.minimum[own])
        groups = slice(own.start // self.size, own.stop // self.size)
        return Groups(self.numbers[:, own], self.scale[:, groups], self.minimum[:, groups])

    def values(self) -> Tensor:
        """float32 [out, in]"""
        grouped = self.numbers.unflatten(1, (-1, self.size)).float()                # [out, G, g]
        return grouped.mul_(self.scale.unsqueeze(-1)).add_(self.minimum.unsqueeze(-1)).flatten(1)


def group(weight: Tensor, size: int) -> Groups:
    """The nearest numbers of four bits, from the least of each group to its largest. weight [out, in], in % size == 0

    Scales and minima are rounded to bfloat16 first, as products read them, so that the numbers make up for it.
    """
    grouped = weight.float().unflatten(1, (-1, size))                               # [out, G, g]
    # aminmax takes eight times as long as both together.
    least, most = grouped.amin(dim=-1, keepdim=True), grouped.amax(dim=-1, keepdim=True)            # [out, G, 1]
    scale = ((most - least) / 15).bfloat16().float()
    middle = (least + 8 * scale).bfloat16().float()     # which is what a product adds: its numbers are -8 to 7
    minimum = middle - 8 * scale
    numbers = (grouped - minimum).div_(torch.where(scale > 0, scale, 1)).round_().clamp_(0, 15)
    return Groups(numbers.to(torch.uint8).flatten(1), scale.squeeze(-1), minimum.squeeze(-1))
