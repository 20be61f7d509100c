"""A prior: evidence about channels before any prompt, from text that the model sampled itself.

I FFN channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.pruning.evidence import Evidence


@dataclass(frozen=True, eq=False)
class Prior:
    """Mean squares of every channel on text that the model sampled itself. Compared by identity.

    of      float32 [I] by network (or attention) and part: "h", "gate" or "up"
    tokens  number of tokens of evidence that the prior counts as
    """

    of: Mapping[tuple[nn.Module, str], Tensor]
    tokens: int


class PriorEvidence(Evidence):
    """Evidence that starts from a prior. squares float32 [I], a sum over `tokens` tokens"""

    def __init__(self, squares: Tensor, tokens: int, device: torch.device) -> None:
        super().__init__(len(squares), device)
        self.prior, self.prior_tokens = squares, tokens
        self.restart()

    def restart(self) -> None:
        self.squares.copy_(self.prior)
        self.tokens = self.prior_tokens
