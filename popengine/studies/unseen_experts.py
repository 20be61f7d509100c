"""Experts with few prompt tokens run whole, instead of being pruned by their weights alone.

B batch, T tokens, H hidden size.
"""

from dataclasses import replace

from torch import Tensor

from models.passes import PrefillPass
from models.pruning.active_weights import WholeWeights
from models.pruning.experts import PartitionedExperts
from models.pruning.interface import PrunedFFN
from models.pruning.pop import DenseFFN


class SparedFFN(DenseFFN):
    """An expert that runs whole for now, and gathers evidence for `later`."""

    def __init__(self, later: PrunedFFN) -> None:
        super().__init__(later.ffn)
        self.later = later

    def prefill(self, x: Tensor, rows: PrefillPass) -> Tensor:
        return self.later.prefill(x, replace(rows, partitions=False, finish_dense=True))


class SparingExperts(PartitionedExperts):
    """A mixture whose experts are pruned once `min_tokens` tokens of the prompt were routed to them."""

    def expect(self, tokens: list[int], of_prompt: bool) -> None:
        super().expect(tokens, of_prompt)
        for index, active in enumerate(self.active):
            if isinstance(active, SparedFFN) and not self.is_unseen(index):
                active.later.use(self.weights_for(index) or self.rule.new_weights(active.ffn))
                self.active[index] = active.later

    def of(self, index: int) -> PrunedFFN:
        active, ffn = self.active[index], self.experts[index]
        if active is not None or not self.is_unseen(index):
            return super().of(index)
        self.active[index] = active = SparedFFN(self.rule.new_ffn(ffn, WholeWeights(ffn)))
        return active

    def is_unseen(self, index: int) -> bool:
        """Return True if too few prompt tokens reached an expert to score its channels."""
        return self.prompt_tokens[index] < self.rule.min_tokens
