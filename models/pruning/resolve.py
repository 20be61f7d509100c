"""Settings resolved for one model: the ratio of the feed-forward network, and the rule that partitions it.

The headline ratio is a share of a decoder layer's parameters. Only the feed-forward network (and, on request, the
heads) is pruned, so its own ratio is higher (POP, arXiv 2602.06822, Table 8).
"""

from dataclasses import dataclass

from models.pruning.partition import PartitionSizes, partition_sizes
from models.pruning.pop import POP
from models.pruning.pruning import Pruning
from models.pruning.settings import DEFAULT_PRUNE_RATIO, POPSettings, exact_share
from weights.errors import InputError


@dataclass(frozen=True)
class LayerWeights:
    """Weights of a decoder layer in matrices (norms, biases and embeddings do not count).

    attention        q, k, v and o projections
    ffn              the feed-forward network; of a mixture of experts, the experts one token is routed to
    head             weights of one query head in q_proj and o_proj
    head_groups      groups in which query heads are partitioned (see Attention.head_groups)
    heads_per_group  query heads of one group
    layers           number of layers of the model
    """

    attention: int
    ffn: int
    head: int
    head_groups: int
    heads_per_group: int
    layers: int


def resolve(settings: POPSettings, layer: LayerWeights) -> Pruning:
    """Compute r = (ratio * (P_attn + P_ffn) - removed head weights) / P_ffn  (POP, Table 8; heads are our extension).

    Raises InputError if the ratio needs more than the FFN has (r >= 1), or is below what the heads alone remove.
    """
    heads = partition_sizes(layer.heads_per_group, settings.head_ratio, settings.candidate_width)
    check_heads(settings.head_ratio, heads)
    off_heads = (heads.channels - heads.computed) * layer.head_groups * layer.head
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
        (ffn_ratio * layer.ffn + off_heads) / total, ffn_ratio, settings,
        POP(ffn_ratio, settings.candidate_width, settings.head_ratio),
        deepest(settings, layer.layers), settings.boundary_tokens,
    )


def check_heads(ratio: float, heads: PartitionSizes) -> None:
    """Raise InputError for a head ratio that turns off all heads of a group, or none. heads: sizes of one group"""
    if heads.computed == 0:
        raise InputError(f"head ratio {ratio} leaves no query head of {heads.channels} in a group; lower it")
    if ratio > 0 and heads.computed == heads.channels:
        raise InputError(
            f"head ratio {ratio} turns off none of the {heads.channels} query heads of a group; "
            f"raise it above {0.5 / heads.channels:.2g}, or leave it at 0"
        )


def deepest(settings: POPSettings, layers: int) -> tuple[int, ...]:
    """Choose the last floor(share * L) layers, which a prompt skips. Raises InputError for a share that skips none."""
    share = exact_share(settings.prefill_skip)
    count = int(share * layers)
    if share > 0 and count == 0:
        least = f"the smallest share that skips one is 1/{layers}" if layers > 1 else "there is no other"
        raise InputError(f"prefill skip {settings.prefill_skip} skips none of {layers} layers: {least}")
    return tuple(range(layers - count, layers))
