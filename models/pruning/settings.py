"""What the user asks for (PruningSettings) and what it means for one model (Pruning).

The headline ratio is a share of a decoder layer's parameters, but only the feed-forward network (and, on request, the
heads) give anything up, so their own ratio is higher (POP, arXiv 2602.06822, Table 8).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from models.pruning.partition import PartitionSizes, StaticChannels, all_channel_sizes, partition_sizes
from weights.errors import InputError

PREFILL_MODES = ("pruned", "dense")
UNSEEN_EXPERT_MODES = ("weights", "dense")
SCORED_TOKENS = ("all", "text")
DEFAULT_PRUNE_RATIO = 0.2


@dataclass(frozen=True, eq=False)
class StaticPartitions:
    """Partitions decided before any prompt, for every feed-forward network of one model (in a mixture: every expert).

    Two of them are equal only if they are the same object.
    """

    of: Mapping[nn.Module, StaticChannels]


@dataclass(frozen=True)
class PruningSettings:
    """How much to prune, and how.

    prune_ratio      share of a decoder layer's parameters, 0 <= ratio < 1; 0 is the dense model. Default 0.2
    ffn_ratio        instead of prune_ratio: the share of FFN channels off at a decode step (r), 0 <= r < 1
    candidate_width  candidates as a share of the channels (the paper's gamma), 0 .. 2; 0 freezes the prefill's mask
    head_ratio       share of query heads off at a decode step, 0 <= ratio < 1; counts towards prune_ratio
    prefill          "pruned": the prompt is finished on the channels that stay (the paper);
                     "dense": on all of them, so that prompt and first token are the dense model's
    all_channels     the quality ceiling (paper, Table 6): every step chooses among all channels, and nothing is saved
                     but down_proj
    in_place         no copy of the active weights: every prompt reorders the channels of the loaded weights instead,
                     which leaves what they compute as it is. One run at a time; not for mixtures of experts
    unseen_experts   what becomes of an expert that fewer than min_tokens prompt tokens were routed to: "weights" cuts
                     it by scores from its weights alone, so that the budget still holds; "dense" leaves it whole
    scored_tokens    prompt tokens that count in the scores: "all", or "text" without the image tokens
    static           partitions to use instead of those that the prompt would make (see popengine.methods.by_name); the ratio
                     and the width should be those they were made for
    """

    prune_ratio: float | None = None
    ffn_ratio: float | None = None
    candidate_width: float = 0.1
    head_ratio: float = 0.0
    prefill: Literal["pruned", "dense"] = "pruned"
    all_channels: bool = False
    in_place: bool = False
    unseen_experts: Literal["weights", "dense"] = "weights"
    min_tokens: int = 1
    scored_tokens: Literal["all", "text"] = "all"
    static: StaticPartitions | None = None

    def __post_init__(self) -> None:
        if self.prune_ratio is not None and self.ffn_ratio is not None:
            raise InputError("give a prune ratio or an FFN ratio, not both")
        for name, below in (("prune_ratio", 1), ("ffn_ratio", 1), ("head_ratio", 1)):
            value = getattr(self, name)
            if value is not None and not 0 <= value < below:
                raise InputError(f"{name.replace('_', ' ')} must be at least 0 and below {below}, not {value}")
        if not 0 <= self.candidate_width <= 2:
            raise InputError(f"candidate width must be between 0 and 2, not {self.candidate_width}")
        if self.prefill not in PREFILL_MODES:
            raise InputError(f"prefill must be one of {', '.join(PREFILL_MODES)}, not {self.prefill!r}")
        if self.unseen_experts not in UNSEEN_EXPERT_MODES:
            raise InputError(
                f"unseen experts must be one of {', '.join(UNSEEN_EXPERT_MODES)}, not {self.unseen_experts!r}"
            )
        if self.min_tokens < 1:
            raise InputError(f"min tokens must be at least 1, not {self.min_tokens}")
        if self.scored_tokens not in SCORED_TOKENS:
            raise InputError(f"scored tokens must be one of {', '.join(SCORED_TOKENS)}, not {self.scored_tokens!r}")


DENSE = PruningSettings(prune_ratio=0.0)


@dataclass(frozen=True)
class LayerWeights:
    """Weights of a decoder layer in matrices (norms, biases and embeddings do not count).

    attention  q, k, v and o projections
    ffn        the feed-forward network; of a mixture of experts, the experts one token is routed to
    head       what one query head adds to q_proj and o_proj
    heads      query heads, and the size of the group they are cut in (see head_groups)
    """

    attention: int
    ffn: int
    head: int
    head_groups: int
    heads_per_group: int


@dataclass(frozen=True)
class Pruning:
    """PruningSettings made concrete for one model.

    ratio      share of a decoder layer's parameters that a decode step leaves out (the headline ratio)
    ffn_ratio  share of FFN channels that do not finish a decode step (r)
    """

    ratio: float
    ffn_ratio: float
    candidate_width: float
    head_ratio: float
    prefill: Literal["pruned", "dense"]
    all_channels: bool
    in_place: bool = False
    unseen_experts: Literal["weights", "dense"] = "weights"
    min_tokens: int = 1
    scored_tokens: Literal["all", "text"] = "all"
    static: StaticPartitions | None = None

    def sizes(self, channels: int) -> PartitionSizes:
        """Regions of an FFN of `channels` channels."""
        if self.all_channels and self.ffn_ratio > 0:
            return all_channel_sizes(channels, self.ffn_ratio)
        return partition_sizes(channels, self.ffn_ratio, self.candidate_width)

    def head_sizes(self, heads_per_group: int) -> PartitionSizes:
        """Regions of one group of query heads."""
        return partition_sizes(heads_per_group, self.head_ratio, self.candidate_width)


def resolve(settings: PruningSettings, layer: LayerWeights) -> Pruning:
    """r = (ratio * (P_attn + P_ffn) - removed head weights) / P_ffn  (POP, Table 8; heads are our extension).

    Raises InputError when the ratio asks for more than the FFN has (r >= 1), or for less than the heads alone remove.
    """
    heads = partition_sizes(layer.heads_per_group, settings.head_ratio, settings.candidate_width)
    if heads.active == 0:
        raise InputError(
            f"head ratio {settings.head_ratio} leaves no query head of {layer.heads_per_group} in a group; lower it"
        )
    if settings.head_ratio > 0 and heads.active == heads.channels:
        raise InputError(
            f"head ratio {settings.head_ratio} turns off none of the {layer.heads_per_group} query heads of a group; "
            f"raise it above {0.5 / layer.heads_per_group:.2g}, or leave it at 0"
        )
    off_heads = (heads.channels - heads.active) * layer.head_groups * layer.head
    total = layer.attention + layer.ffn
    if settings.ffn_ratio is not None:
        ffn_ratio = settings.ffn_ratio
    else:
        wanted = DEFAULT_PRUNE_RATIO if settings.prune_ratio is None else settings.prune_ratio
        ffn_ratio = (wanted * total - off_heads) / layer.ffn
        if ffn_ratio >= 1:
            raise InputError(
                f"prune ratio {wanted} is more than the feed-forward networks hold: "
                f"it must stay below {(layer.ffn + off_heads) / total:.3f} for this model"
            )
        if ffn_ratio < 0:
            raise InputError(
                f"head ratio {settings.head_ratio} alone removes {off_heads / total:.3f} of a layer, "
                f"more than the prune ratio {wanted}; raise the prune ratio or lower the head ratio"
            )
    return Pruning(
        ratio=(ffn_ratio * layer.ffn + off_heads) / total,
        ffn_ratio=ffn_ratio,
        candidate_width=settings.candidate_width,
        head_ratio=settings.head_ratio,
        prefill=settings.prefill,
        all_channels=settings.all_channels,
        in_place=settings.in_place,
        unseen_experts=settings.unseen_experts,
        min_tokens=settings.min_tokens,
        scored_tokens=settings.scored_tokens,
        static=settings.static,
    )
