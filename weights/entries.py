"""What a checkpoint says about one tensor before its data is read."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TensorEntry:
    """Shape and dtype of a tensor as `read` will return it (quantised .gguf tensors are read as float32)."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count
