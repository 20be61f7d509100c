"""Rules: how many channels stay, which, and what a candidate is worth at a step. Models never ask which rule it is.

The paper's rule stands here, and every other one (models/pruning/alternatives.py) changes some of its methods.

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
    channels_of_group,
    partition_channels,
    partition_sizes,
    retained_sizes,
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
    retained_share  of the channels that always run; None: what the candidates leave (the paper)
    groups      equal stretches of a network's channels that are cut alike, each by itself
    """

    ffn_ratio: float
    width: float
    head_ratio: float = 0.0
    min_tokens: int = 1
    prior: Prior | None = None
    retained_share: float | None = None
    groups: int = 1

    follows_prompt = True
    # The share of a prompt's rows that run ahead and decide for the others; a rule that has one chooses them (`probe`).
    probed = 0.0
    # A candidate's score is |look| * factor: which of "gate" (act(gate)), "up", "h" (their product) and "draft" (h from
    # copies of few bits) a step looks at, and for which of the first two besides h the prompt is watched, if the
    # factor needs it.
    looks_at, watches = "h", ""

    def with_prior(self, prior: Prior | None) -> "POP":
        return replace(self, prior=prior)

    def new_evidence(self, network: nn.Module, channels: int, device: torch.device, part: str = "h") -> Evidence:
        """Of a network, or of the heads of an attention, before any token. part: of act(gate) or up instead of h"""
        if self.prior is None or (network, part) not in self.prior.of:
            return Evidence(channels, device)
        return Evidence(channels, device, self.prior.of[network, part] * self.prior.tokens, self.prior.tokens)

    def sizes(self, network: Network) -> PartitionSizes:
        """Regions of one network. InputError for channels that the groups do not divide."""
        return self.sizes_of(channels_of_group(network.channels, self.groups)).times(self.groups)

    def sizes_of(self, channels: int) -> PartitionSizes:
        """Regions of one group of channels."""
        if self.retained_share is None or self.ffn_ratio == 0:
            return partition_sizes(channels, self.ffn_ratio, self.width)
        return retained_sizes(channels, self.ffn_ratio, self.retained_share, self.width)

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
