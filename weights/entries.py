"""Description of one tensor of a checkpoint, known before its data is read."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TensorEntry:
    """Shape and dtype of a tensor as `read` returns it (quantised tensors are read as float32).

    stored  storage format of a quantised tensor, for people; None: not quantised
    groups  group size of a four-bit tensor, which `read_groups` returns as it is stored; 0: any other tensor
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
