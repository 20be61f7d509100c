"""What settings mean for one model: the ratio of the feed-forward network, and the rule that cuts it.

The headline ratio is a share of a decoder layer's parameters, but only the feed-forward network (and, on request, the
heads) give anything up, so their own ratio is higher (POP, arXiv 2602.06822, Table 8).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from models.cache import View
from models.passes import Stretch
from models.pruning.left_out import ATTENTION, HALVES, MLP, Half, check_halves, read_halves
from models.pruning.partition import partition_sizes
from models.pruning.pop import POP
from models.pruning.prefill_only import PrefillOnly
from models.pruning.settings import DEFAULT_PRUNE_RATIO, WIDTH_RULES, PruningSettings, exact_share
from models.walks import EveryLayer, Walk
from weights.errors import InputError


@dataclass(frozen=True)
class LayerWeights:
    """Weights of a decoder layer in matrices (norms, biases and embeddings do not count).

    attention  q, k, v and o projections
    ffn        the feed-forward network; of a mixture of experts, the experts one token is routed to
    head       what one query head adds to q_proj and o_proj
    heads      query heads, and the size of the group they are cut in (see Attention.head_groups)
    layers     how many layers the model has
    """

    attention: int
    ffn: int
    head: int
    head_groups: int
    heads_per_group: int
    layers: int


@dataclass(frozen=True)
class Pruning:
    """PruningSettings made concrete for one model.

    ratio      share of the decoder layers' parameters that a decode step leaves out (the headline ratio)
    ffn_ratio  share of FFN channels that do not finish a decode step (r), of the networks that run
    skipped    the layers that a prompt skips (Prefill-Only), all but its last `boundary` tokens
    left_out   halves of layers that neither prompts nor steps run
    """

    ratio: float
    ffn_ratio: float
    settings: PruningSettings
    rule: POP
    skipped: tuple[int, ...] = ()
    boundary: int = 1
    left_out: tuple[Half, ...] = ()

    @property
    def walk(self) -> Walk:
        """How a prompt walks through the layers."""
        return PrefillOnly(self.skipped, self.boundary) if self.skipped else EveryLayer()

    def view(self, layer: int, window: int | None) -> View:
        """What the rows of a layer see of its cache."""
        return View(window)

    def dropped_rows(self, spans: Sequence[Stretch], lengths: Sequence[int]) -> int:
        """How many rows shorter the longest prompt becomes on its way, given all pictures and lengths of prompts."""
        return 0

    @property
    def cuts(self) -> bool:
        """Whether channels or heads are off in what runs."""
        return self.ffn_ratio > 0 or self.settings.head_ratio > 0

    def halves(self, layer: int) -> tuple[str, ...]:
        """Those of a layer that run."""
        return tuple(part for part in HALVES if (layer, part) not in self.left_out)

    def skipped_by(self, tokens: int) -> tuple[int, ...]:
        """The layers that a prompt of so many tokens skips: one that is all boundary skips none."""
        return self.skipped if tokens > self.boundary else ()


def resolve(
    settings: PruningSettings, layer: LayerWeights, rules: Mapping[str, type[POP]] = MappingProxyType({"pop": POP})
) -> Pruning:
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
    check_retained_share(settings, ffn_ratio)
    rule = rules[settings.rule](
        ffn_ratio, settings.candidate_width, settings.head_ratio, settings.min_tokens,
        retained_share=settings.retained_share, groups=settings.groups,
    )
    left_out = check_halves(read_halves(str(settings.leave_out)), layer.layers)
    networks_left = 1 - sum(half.part == MLP for half in left_out) / layer.layers
    attentions_left = 1 - sum(half.part == ATTENTION for half in left_out) / layer.layers
    off = networks_left * ffn_ratio * layer.ffn + attentions_left * off_heads
    skipped = deepest(settings, layer.layers)
    return Pruning(
        share_of_halves(left_out, layer) + off / total, ffn_ratio, settings, rule, skipped, settings.boundary_tokens,
        left_out=left_out,
    )


def share_of_halves(halves: Sequence[Half], layer: LayerWeights) -> float:
    """What these hold of the parameters of all layers, which count as if they were alike."""
    weights = sum(layer.ffn if half.part == MLP else layer.attention for half in halves)
    return weights / (layer.layers * (layer.attention + layer.ffn))


def check_retained_share(settings: PruningSettings, ffn_ratio: float) -> None:
    """Raises InputError for a share that leaves nothing to pick, or fewer candidates than are to be picked."""
    if settings.retained_share is None or ffn_ratio == 0:
        return
    picked = 1 - ffn_ratio - settings.retained_share
    if picked <= 0:
        raise InputError(
            f"retained share {settings.retained_share} must stay below the {1 - ffn_ratio:.3g} of the channels that "
            "finish a step"
        )
    if settings.rule in WIDTH_RULES and settings.candidate_width < picked:
        raise InputError(
            f"candidate width {settings.candidate_width} is less than the {picked:.3g} of the channels that are picked "
            f"beside a retained share of {settings.retained_share}; raise it, to 1 for all others"
        )


def deepest(settings: PruningSettings, layers: int) -> tuple[int, ...]:
    """The last floor(share * L) layers, which a prompt skips. Raises InputError for a share that skips none."""
    share = exact_share(settings.prefill_skip)
    count = int(share * layers)
    if share > 0 and count == 0:
        least = f"the smallest share that skips one is 1/{layers}" if layers > 1 else "there is no other"
        raise InputError(f"prefill skip {settings.prefill_skip} skips none of {layers} layers: {least}")
    return tuple(range(layers - count, layers))
