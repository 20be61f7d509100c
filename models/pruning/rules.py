"""Rules: how many channels stay, which, and what a candidate is worth at a step. Models never ask which rule it is.

A new rule is a class here with its name in RULES (and among the choices of `PruningSettings.rule`), or, where channels
are ranked before any prompt, a StaticRule that popengine.methods makes.

B batch, T rows, I channels, C candidates, H hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from models.passes import DecodePass
from models.pruning.partition import (
    ChannelPartition,
    Evidence,
    PartitionSizes,
    all_channel_sizes,
    partition_channels,
    partition_sizes,
)


class Network(Protocol):
    """What a rule asks a feed-forward network for."""

    channels: int

    def down_norms(self) -> Tensor: ...

    def weight_scores(self) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Prior:
    """Mean squares of every channel on text that the model sampled itself, of its networks and attentions.

    tokens  how many tokens of evidence that is to count for. Equal to none but itself.
    """

    of: Mapping[tuple[nn.Module, str], Tensor]      # by network and part of it: "h", "gate", "up"
    tokens: int


@dataclass(frozen=True)
class POP:
    """Partition from the prompt, candidates chosen anew at every step (arXiv 2602.06822). Of width 0: frozen.

    ffn_ratio   share of FFN channels off at a decode step (r); head_ratio: of query heads
    width       candidates as a share of the channels
    min_tokens  with evidence of fewer tokens channels are cut by their weights alone
    prior       evidence before any token; None: there is none
    """

    ffn_ratio: float
    width: float
    head_ratio: float = 0.0
    min_tokens: int = 1
    prior: Prior | None = None

    follows_prompt = True
    # What of act(gate), up and their product h a candidate's score is computed from, and which part else is watched.
    looks_at, watches = "h", ""

    def with_prior(self, prior: Prior | None) -> "POP":
        return replace(self, prior=prior)

    def new_evidence(self, network: nn.Module, channels: int, device: torch.device, part: str = "h") -> Evidence:
        """Of a network, or of the heads of an attention, before any token. part: of act(gate) or up instead of h"""
        if self.prior is None or (network, part) not in self.prior.of:
            return Evidence(channels, device)
        return Evidence(channels, device, self.prior.of[network, part] * self.prior.tokens, self.prior.tokens)

    def sizes(self, network: Network) -> PartitionSizes:
        """Regions of one network."""
        return partition_sizes(network.channels, self.ffn_ratio, self.width)

    def head_sizes(self, heads: int) -> PartitionSizes:
        """Regions of one group of query heads."""
        return partition_sizes(heads, self.head_ratio, self.width)

    def partition(self, network: Network, evidence: Evidence, sizes: PartitionSizes) -> ChannelPartition:
        """Cut by falling importance over the tokens seen (Eq. 3)."""
        unseen = evidence.tokens < self.min_tokens
        scores = network.weight_scores() if unseen else evidence.scores(network.down_norms())       # [I]
        return partition_channels(scores, sizes)

    def factors(self, network: Network, watched: Evidence | None) -> Tensor:
        """What a step multiplies its look at each channel with to have the score: float32 [I]"""
        return network.down_norms()

    def candidate_scores(self, look: Tensor, factors: Tensor, step: DecodePass) -> Tensor:
        """What each candidate is worth at this step: its share of what down_proj puts out.

        look [B, T, C], factors [C] -> float32 [C] where rows decide together, else [B, T, C]
        """
        return step.scores(look, factors)

    def output_bias(self, network: Network) -> Tensor | None:
        """[H], added to what the network puts out in the place of its pruned channels; None: nothing"""
        return None


class AllChannels(POP):
    """The quality ceiling (POP, Table 6): every step chooses among all channels, and saves nothing but down_proj."""

    def sizes(self, network: Network) -> PartitionSizes:
        return all_channel_sizes(network.channels, self.ffn_ratio) if self.ffn_ratio > 0 else super().sizes(network)


class Up(AllChannels):
    """Cheaper: |up| alone, times what act(gate) usually is, so that only the chosen rows of gate are read.

    Every step chooses among all that is not retained.
    """

    looks_at, watches = "up", "gate"

    def factors(self, network: Network, watched: Evidence | None) -> Tensor:
        assert watched is not None
        usual = (watched.squares / max(1, watched.tokens)).sqrt()                   # [I], root mean square
        return network.down_norms() * (usual if watched.tokens else torch.ones_like(usual))


class Gate(Up):
    """The same the other way round: |act(gate)| times what up usually is (CATS, arXiv 2404.08763, has |act(gate)|)."""

    looks_at, watches = "gate", "up"


class CATS(AllChannels):
    """|act(gate)| alone (arXiv 2404.08763), with the best of each step in the place of a threshold."""

    looks_at = "gate"

    def factors(self, network: Network, watched: Evidence | None) -> Tensor:
        return torch.ones_like(network.down_norms())


class TEAL(AllChannels):
    """|h| alone, what feeds down_proj (arXiv 2408.14690); gate and up are computed in full, as POP does."""

    def factors(self, network: Network, watched: Evidence | None) -> Tensor:
        return torch.ones_like(network.down_norms())


@dataclass(frozen=True)
class StaticChannels:
    """Channels of one network that were chosen in advance. bias [H] as for `output_bias`."""

    partition: ChannelPartition
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class StaticRule:
    """Partitions decided before any prompt, for every network of one model. Equal to none but itself."""

    of: Mapping[nn.Module, StaticChannels]

    follows_prompt = False

    def with_prior(self, prior: Prior | None) -> "StaticRule":
        return self

    looks_at, watches = "h", ""

    def new_evidence(self, network: nn.Module, channels: int, device: torch.device, part: str = "h") -> Evidence:
        return Evidence(channels, device)       # which nobody asks

    def sizes(self, network: Network) -> PartitionSizes:
        return self.of[network].partition.sizes  # type: ignore[index]

    def head_sizes(self, heads: int) -> PartitionSizes:
        return partition_sizes(heads, 0.0, 0.0)

    def partition(self, network: Network, evidence: Evidence, sizes: PartitionSizes) -> ChannelPartition:
        return self.of[network].partition  # type: ignore[index]

    def factors(self, network: Network, watched: Evidence | None) -> Tensor:
        return network.down_norms()

    def candidate_scores(self, look: Tensor, factors: Tensor, step: DecodePass) -> Tensor:
        return step.scores(look, factors)       # of no candidates

    def output_bias(self, network: Network) -> Tensor | None:
        return self.of[network].bias  # type: ignore[index]


Rule = POP | StaticRule
RULES: dict[str, type[POP]] = {
    "pop": POP, "all-channels": AllChannels, "up": Up, "gate": Gate, "cats": CATS, "teal": TEAL,
}
