"""Numbers of four bits in groups: what several formats of checkpoints keep their matrices as, in one form.

out and in are the sides of a weight [out, in], g the size of a group of neighbours in a row, G = in / g groups.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weights.errors import InputError


@dataclass(frozen=True)
class Groups:
    """w = scale * number + minimum, a scale and a minimum for each group.

    numbers  uint8 [out, in], 0 to 15; scale, minimum  float32 [out, G]
    """

    numbers: Tensor
    scale: Tensor
    minimum: Tensor

    @property
    def size(self) -> int:
        """Of a group."""
        return self.numbers.shape[1] // self.scale.shape[1]

    def part(self, index: tuple[Any, ...], name: str) -> "Groups":
        """At an index of slices of the two sides, () for all. InputError where columns are not whole groups."""
        if not index:
            return self
        rows, columns = index
        first, last, _ = columns.indices(self.numbers.shape[1])
        if first % self.size or last % self.size:
            raise InputError(
                f"{name}: a part of {last - first} columns is not whole groups of {self.size}: "
                "use weights int8 or plain"
            )
        of_groups = slice(first // self.size, last // self.size)
        return Groups(self.numbers[index], self.scale[rows, of_groups], self.minimum[rows, of_groups])

    def values(self) -> Tensor:
        """float32 [out, in]"""
        grouped = self.numbers.unflatten(1, (-1, self.size)).float()                # [out, G, g]
        return torch.addcmul(self.minimum.unsqueeze(-1), grouped, self.scale.unsqueeze(-1)).flatten(1)


def group(weight: Tensor, size: int) -> Groups:
    """The nearest numbers of four bits, from the least of each group to its largest. weight [out, in], in % size == 0

    Scales and minima are rounded to bfloat16 first, as products read them, so that the numbers make up for it.
    """
    grouped = weight.float().unflatten(1, (-1, size))                               # [out, G, g]
    least, most = grouped.aminmax(dim=-1, keepdim=True)                             # [out, G, 1]
    scale = ((most - least) / 15).bfloat16().float()
    middle = (least + 8 * scale).bfloat16().float()     # which is what a product adds: its numbers are -8 to 7
    minimum = middle - 8 * scale
    numbers = ((grouped - minimum) / torch.where(scale > 0, scale, 1)).round_().clamp_(0, 15)
    return Groups(numbers.to(torch.uint8).flatten(1), scale.squeeze(-1), minimum.squeeze(-1))
