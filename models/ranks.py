"""The ranks that a model is split over: processes that torchrun has started, a share of every layer each.

A rank holds N / ranks query heads with their key/value heads, and I / ranks channels of every feed-forward network. Its
attention and its network put out parts of a sum, which the ranks add up: two sums a layer, and no others.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from weights.errors import InputError


@dataclass
class Ranks:
    """This rank among `size`. One process by itself is rank 0 of 1, and nothing here does anything.

    sum_s  seconds spent in sums so far, waiting for the other ranks included; compiled steps do not count theirs
    """

    rank: int = 0
    size: int = 1
    sum_s: float = 0.0

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, on every rank. Any shape, x is not to be used again."""
        if self.size == 1:
            return x
        x = x.contiguous()
        if torch.compiler.is_compiling():
            dist.all_reduce(x)
            return x
        began = time.perf_counter()
        dist.all_reduce(x)
        self.sum_s += time.perf_counter() - began
        return x

    def agreed(self, x: Tensor) -> Tensor:
        """Rank 0's x, on every rank."""
        if self.size > 1:
            dist.broadcast(x, 0)
        return x

    def joined(self, part: Tensor) -> Tensor:
        """All ranks' parts [n], one after the other -> [n ranks]"""
        if self.size == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    def own(self, whole: Tensor) -> Tensor:
        """The reverse: this rank's part of [n ranks] -> [n]"""
        return whole.chunk(self.size)[self.rank]

    def divided(self, sizes: dict[str, int]) -> dict[str, int]:
        """A rank's share of what a model has so many of. InputError for numbers that the ranks do not divide."""
        if uneven := [f"{count} {name.replace('_', ' ')}" for name, count in sizes.items() if count % self.size]:
            common = math.gcd(*sizes.values())
            fitting = ", ".join(str(number) for number in range(1, common + 1) if common % number == 0)
            raise InputError(
                f"{self.size} ranks cannot share {', '.join(uneven)} evenly; so many ranks could: {fitting}"
            )
        return {name: count // self.size for name, count in sizes.items()}


def ranks_here() -> Ranks:
    """Those of torch.distributed, where they have been joined (popengine/torchrun.py)."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks()


# Of a config: what ranks share. Experts and shared experts are networks too, and have channels of their own.
SHARED_FIELDS = (
    "num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size",
    "shared_expert_intermediate_size",
)


def shared_sizes(config: Any) -> dict[str, int]:
    return {name: getattr(config, name) for name in SHARED_FIELDS if getattr(config, name, 0)}
