"""What a checkpoint says about one tensor before its data is read."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TensorEntry:
    """Shape and dtype of a tensor as `read` will return it (quantised tensors are read as float32).

    stored  what a quantised tensor is kept as, for people; None: it is not quantised
    groups  the size of its groups, where `read_groups` gives it as numbers of four bits, as it is kept; 0: it is none
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: str | None = None
    groups: int = 0

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count
