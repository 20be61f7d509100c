"""Tensor parallelism: several processes ("ranks") hold a share of a model each (arXiv 1909.08053, section 3).

A rank has its share of the attention heads and of every network's channels. The outputs of its o_proj and down_proj
are partial sums, which these matrices add up over all ranks (models/matrices/ranked.py). Each rank holds some rows of
the vocabulary. Norms, routers and vision towers are replicated.

The model of one rank is built from a config with that rank's heads and channels. The process group must exist already
(popengine/engine/distributed.py). With one process, nothing is imported or communicated.

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
    """This process's `index` among `count` ranks."""

    index: int = 0
    count: int = 1

    def stretch(self, size: int) -> slice:
        """Return this rank's slice of `size` consecutive items."""
        return slice(size * self.index // self.count, size * (self.index + 1) // self.count)

    def add_up(self, part: Tensor) -> Tensor:
        """Sum the parts of all ranks; every rank gets the sum. With several ranks, `part` may be overwritten."""
        if self.count > 1:
            part = part.contiguous()
            torch.distributed.all_reduce(part)
        return part

    def join(self, part: Tensor) -> Tensor:
        """Concatenate parts of equal size from all ranks. [..., n] -> [..., ranks n]"""
        return self.join_rows(part, self.count * part.shape[-1])

    def join_rows(self, part: Tensor, size: int) -> Tensor:
        """Concatenate each rank's slice of `size` outputs. [..., rows of this rank] -> [..., size]"""
        if self.count == 1:
            return part
        most = -(-size // self.count)
        padded = F.pad(part, (0, most - part.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.count)]
        torch.distributed.all_gather(parts, padded)
        owned = (Ranks(index, self.count).stretch(size) for index in range(self.count))
        return torch.cat([one[..., : own.stop - own.start] for one, own in zip(parts, owned, strict=True)], dim=-1)


ALONE = Ranks()
# Config fields that are divided among the ranks. Each must be divisible, or a rank would have half a head.
SHARED = {
    "num_key_value_heads": "key/value heads", "num_attention_heads": "query heads",
    "intermediate_size": "channels of a feed-forward network", "moe_intermediate_size": "channels of an expert",
    "shared_expert_intermediate_size": "channels of the shared expert",
}


def share_of(config: Any, ranks: Ranks) -> Any:
    """Return the config of one rank's share of a language model. Raises InputError for counts they do not divide."""
    counts = {name: getattr(config, name) for name in SHARED if getattr(config, name, 0)}
    for name, count in counts.items():
        if count % ranks.count:
            could = [str(ranks) for ranks in range(1, 65) if not any(one % ranks for one in counts.values())]
            raise InputError(
                f"{count} {SHARED[name]} cannot be shared out over {ranks.count} ranks; {', '.join(could)} "
                f"{'ranks are' if len(could) > 1 else 'rank is'} possible with this model"
            )
    return replace(config, ranks=ranks, **{name: count // ranks.count for name, count in counts.items()})
