"""Rules beside the paper's: cheaper or other scores, and partitions that were decided before any prompt.

A new way to score or to cut is a class here with its name in RULES (and in RULE_NAMES of models/pruning/settings.py).

I FFN channels, H hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.pruning.partition import ChannelPartition, Evidence, PartitionSizes, partition_channels, retained_sizes
from models.pruning.rules import POP, Network, Prior


class AllChannels(POP):
    """The quality ceiling (POP, Table 6): every step chooses among all channels, and saves nothing but down_proj.

    |h_i| times the norm of down_proj's column i: that is what WINA (arXiv 2505.19427) does with what feeds down_proj.
    With a retained share the best by evidence always run, and a step chooses among all others.
    """

    def sizes_of(self, channels: int) -> PartitionSizes:
        if self.ffn_ratio == 0:
            return super().sizes_of(channels)
        return retained_sizes(channels, self.ffn_ratio, self.retained_share or 0.0)


class Up(AllChannels):
    """Cheaper: |up| alone, times what act(gate) usually is, so that only the chosen rows of gate are read."""

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


class Draft(AllChannels):
    """The full score from copies of gate_proj and up_proj in four bits; of the weights only what is chosen is read.

    Ours; docs/results.md has what it costs.
    """

    looks_at = "draft"


class GLASS(POP):
    """The ranks of the prompt's scores and of the prior's, half and half, cut the channels (arXiv 2508.14302).

    However many tokens a prior counts for, its half is a half: it is kept out of the sums. Heads have no second ranking
    and follow the prompt alone.
    """

    def new_evidence(self, network: nn.Module, channels: int, device: torch.device, part: str = "h") -> Evidence:
        return Evidence(channels, device)

    def partition(self, network: Network, evidence: Evidence, sizes: PartitionSizes) -> ChannelPartition:
        usual = None if self.prior is None else self.prior.of.get((network, "h"))  # type: ignore[arg-type]
        if usual is None:               # an expert that the model's own text never reached
            return super().partition(network, evidence, sizes)
        places = place_by_score(usual.sqrt() * network.down_norms(), self.groups)   # [I]
        if evidence.tokens >= self.min_tokens:
            places = places + place_by_score(evidence.scores(network.down_norms()), self.groups)
        return partition_channels(-places.float(), sizes)


def place_by_score(scores: Tensor, groups: int = 1) -> Tensor:
    """The place of each channel in its group by falling score, from 0 (ties: lower channel first).

    float32 [I] -> int64 [I]
    """
    return scores.view(groups, -1).sort(descending=True, stable=True).indices.argsort().flatten()


@dataclass(frozen=True)
class StaticChannels:
    """Channels of one network that were chosen in advance. bias [H] as for `output_bias`."""

    partition: ChannelPartition
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class StaticRule(POP):
    """Partitions decided before any prompt, for every network of one model. Equal to none but itself."""

    ffn_ratio: float = 0.0
    width: float = 0.0
    of: Mapping[nn.Module, StaticChannels] = field(default_factory=dict)

    follows_prompt = False
    __eq__, __hash__ = object.__eq__, object.__hash__

    def with_prior(self, prior: Prior | None) -> "StaticRule":
        return self

    def sizes(self, network: Network) -> PartitionSizes:
        return self.of[network].partition.sizes  # type: ignore[index]

    def partition(self, network: Network, evidence: Evidence, sizes: PartitionSizes) -> ChannelPartition:
        return self.of[network].partition  # type: ignore[index]

    def output_bias(self, network: Network) -> Tensor | None:
        return self.of[network].bias  # type: ignore[index]


RULES: dict[str, type[POP]] = {
    "pop": POP, "all-channels": AllChannels, "up": Up, "gate": Gate, "cats": CATS, "teal": TEAL,
    "glass": GLASS, "draft": Draft,
}
