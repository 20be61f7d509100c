"""Tensor parallelism: several processes ("ranks") that hold a share of a model each (arXiv 1909.08053, section 3).

A rank has its share of the attention heads and of every network's channels, so what its o_proj and down_proj put out
is a part of a sum: two sums over all ranks in every layer, which stand where they happen (models/llama.py). Of the
vocabulary it has some rows. Norms, routers and vision towers are whole everywhere.

A model is laid out for one rank by a config of that rank's heads and channels. Whoever started the processes has
joined them before (popengine/engine/distributed.py); with one process nothing here imports or does anything.

V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weights.errors import InputError


@dataclass(frozen=True)
class Ranks:
    """index: which of `count` ranks this process is"""

    index: int = 0
    count: int = 1

    def stretch(self, size: int) -> slice:
        """This rank's of so many things that lie in a row."""
        return slice(size * self.index // self.count, size * (self.index + 1) // self.count)

    def add_up(self, part: Tensor) -> Tensor:
        """The sum of what each rank has. In the place of `part` where there are several, the same everywhere."""
        if self.count > 1:
            part = part.contiguous()
            torch.distributed.all_reduce(part)
        return part

    def join(self, part: Tensor) -> Tensor:
        """What each rank has of as many as every other, side by side. [..., n] -> [..., ranks n]"""
        return self.join_rows(part, self.count * part.shape[-1])

    def join_rows(self, part: Tensor, size: int) -> Tensor:
        """What each rank has of `size` outputs, side by side. [..., rows of this rank] -> [..., size]"""
        if self.count == 1:
            return part
        most = -(-size // self.count)
        padded = F.pad(part, (0, most - part.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.count)]
        torch.distributed.all_gather(parts, padded)
        owned = (Ranks(index, self.count).stretch(size) for index in range(self.count))
        return torch.cat([one[..., : own.stop - own.start] for one, own in zip(parts, owned, strict=True)], dim=-1)


ALONE = Ranks()
# What a config counts that is shared out. Each of them must divide, or a rank would have half a head.
SHARED = {
    "num_key_value_heads": "key/value heads", "num_attention_heads": "query heads",
    "intermediate_size": "channels of a feed-forward network", "moe_intermediate_size": "channels of an expert",
    "shared_expert_intermediate_size": "channels of the shared expert",
}


def share_of(config: Any, ranks: Ranks) -> Any:
    """The config of one rank's share of a language model. InputError for numbers that the ranks do not divide."""
    counts = {name: getattr(config, name) for name in SHARED if getattr(config, name, 0)}
    for name, count in counts.items():
        if count % ranks.count:
            could = [str(ranks) for ranks in range(1, 65) if not any(one % ranks for one in counts.values())]
            raise InputError(
                f"{count} {SHARED[name]} cannot be shared out over {ranks.count} ranks; {', '.join(could)} "
                f"{'ranks are' if len(could) > 1 else 'rank is'} possible with this model"
            )
    return replace(config, ranks=ranks, **{name: count // ranks.count for name, count in counts.items()})
