"""What runs in place of a feed-forward network, and what it is built from: the seam of every pruning method.

B batch, T tokens, H hidden size.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from models.feed_forward import FeedForward
from models.matrices.plain import Matrix
from models.passes import DecodePass, PrefillPass
from models.pruning.active_weights import ActiveWeights
from models.pruning.evidence import Evidence
from models.pruning.partition import ChannelPartition, PartitionSizes


class Experts(Protocol):
    """A mixture of experts (models/experts.py): its router and its networks."""

    gate: Matrix
    experts: Sequence[FeedForward]


class ScoringRule(Protocol):
    """The part of a method's parameters (POP in models/pruning/pop.py) that says how channels are scored.

    min_tokens  networks that saw fewer tokens are scored by their weights alone
    """

    @property
    def min_tokens(self) -> int: ...


class PrunedFFN(Protocol):
    """An object that runs in place of a feed-forward network.

    weights    the matrices that a step multiplies with
    sizes      number of channels in each region; partition: their indices
    evidence   accumulated squares of the channels' activations
    """

    ffn: FeedForward
    weights: ActiveWeights
    sizes: PartitionSizes
    partition: ChannelPartition
    evidence: Evidence

    @property
    def rule(self) -> ScoringRule:
        """The parameters of the method."""

    def prefill(self, x: Tensor, rows: PrefillPass) -> Tensor:
        """Run tokens of a prompt. x [B, T, H] -> [B, T, H]"""

    def decode(self, x: Tensor, step: DecodePass) -> Tensor:
        """Run the tokens of a step. x [B, T, H] -> [B, T, H]"""

    def sort_channels(self) -> None:
        """Partition the channels by all evidence so far."""

    def copy_weights(self) -> None:
        """Copy the weights of the active channels, which steps then multiply with."""

    def use(self, weights: ActiveWeights) -> None:
        """Multiply with these weights from the next partition on."""

    def restart(self) -> None:
        """Forget the last prompt."""

    def count(self, tokens: int) -> None:
        """Add to the token count of the evidence, after a compiled dense step has added the squares."""

    def copied_bytes(self) -> int:
        """Return the memory of copies of active weights, in bytes."""
