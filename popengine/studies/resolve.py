"""Settings of studies resolved for one model: Pruning with every rule, and with fewer tokens of pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from models.blocks import PrunedBlock
from models.passes import ImageSpan
from models.pruning.pruning import Pruning
from models.pruning.refresh import RefreshSchedule
from models.pruning.resolve import LayerWeights, resolve
from models.pruning.settings import ATTENTION, MLP, SUBLAYERS, exact_share
from models.slots import AttentionPattern
from models.walks import Walk
from popengine.studies.chosen_layers import skipped_layers
from popengine.studies.evidence import Prior
from popengine.studies.input_shares import InputShares
from popengine.studies.input_sparsity import InputChoice, InputSparsity
from popengine.studies.left_out import Half, check_halves, read_halves
from popengine.studies.refresh import RegularRefresh
from popengine.studies.rules import RULES
from popengine.studies.settings import WIDTH_RULES, PruningSettings
from popengine.studies.skip_controls import ForgetSkipped, ForgottenPrompt
from popengine.studies.skipped_layers import names_layers, written_layers
from popengine.studies.unseen_experts import SparingExperts
from popengine.studies.visual_tokens import DroppedTokens, DropVisualTokens
from weights.errors import InputError


@dataclass(frozen=True)
class StudyPruning(Pruning):
    """Pruning with every rule and with the studies' changes of a run.

    left_out   halves of layers that neither prompts nor steps run
    forgets    a control: no token attends to the prompt's keys and values in layers that the prompt skipped
    why_dense  reason for replacing the recommended pruning by the dense model; "": not replaced
    """

    settings: PruningSettings
    left_out: tuple[Half, ...] = ()
    forgets: bool = False
    why_dense: str = ""

    def sublayers(self, layer: int) -> tuple[str, ...]:
        return tuple(part for part in SUBLAYERS if (layer, part) not in self.left_out)

    def new_experts(self, mixture: nn.Module, standard: Callable[..., PrunedBlock]) -> PrunedBlock:
        spares = self.rule.follows_prompt and self.settings.unseen_experts == "dense"
        return super().new_experts(mixture, SparingExperts if spares else standard)

    def new_schedule(self, batch: int) -> RefreshSchedule:
        every = self.settings.dense_every
        if every is None or not self.follows_prompt:
            return super().new_schedule(batch)
        return RegularRefresh(self.settings.min_evidence, batch, every, self.settings.redraw_every)

    def with_prior(self, prior: Prior | None) -> "StudyPruning":
        """Return this pruning with a prior; unchanged if it is None."""
        return self if prior is None else replace(self, rule=replace(self.rule, prior=prior))  # type: ignore[call-arg]

    @property
    def walk(self) -> Walk:
        if self.forgets:
            return ForgetSkipped(self.skipped, self.boundary)
        walk, first = super().walk, self.thin_from
        return walk if first is None else DropVisualTokens(walk, first, self)

    def pattern(self, layer: int, window: int | None) -> AttentionPattern:
        if self.forgets and layer in self.skipped:
            return AttentionPattern(window, ForgottenPrompt)
        return AttentionPattern(window, DroppedTokens) if self.is_thin(layer) else AttentionPattern(window)

    def dropped_rows(self, spans: Sequence[ImageSpan], lengths: Sequence[int]) -> int:
        """Compute by how many tokens the longest prompt shrinks, given all pictures and lengths of prompts."""
        left = list(lengths)
        for span in spans:
            left[span.sequence] -= span.length - self.visual_tokens(span.length)
        return max(lengths) - max(left)

    @property
    def thin_from(self) -> int | None:
        """The first layer without the dropped picture tokens; None: none are dropped."""
        settings = self.settings
        by_layer = settings.visual_tokens_layer if settings.visual_tokens_by == "attention" else 0
        return None if settings.visual_tokens == "all" else by_layer

    def is_thin(self, layer: int) -> bool:
        """Return True if a layer runs without the dropped picture tokens."""
        return self.thin_from is not None and layer >= self.thin_from

    def visual_tokens(self, of_picture: int) -> int:
        """Return how many of a picture's tokens are kept. Raises InputError if none would be."""
        wanted = self.settings.visual_tokens
        if wanted == "all":
            return of_picture
        kept = int(exact_share(wanted) * (of_picture if exact_share(wanted) < 1 else 1))
        if kept == 0:
            raise InputError(f"visual tokens {wanted} leaves none of the {of_picture} tokens of a picture; raise it")
        return min(kept, of_picture)

    def dropped_tokens(self, spans: Sequence[ImageSpan]) -> int:
        """Count the dropped tokens of these pictures."""
        return sum(span.length - self.visual_tokens(span.length) for span in spans)

    def uncounted(self, spans: Sequence[ImageSpan]) -> int:
        """Count the dropped tokens of these pictures that would count as evidence."""
        return self.dropped_tokens(spans) if self.settings.scored_tokens == "all" else 0


def resolve_study(settings: PruningSettings, layer: LayerWeights) -> StudyPruning:
    """Resolve settings with those of every study. Raises InputError as `resolve` does, and for unfit study settings.

    Layers that a gate study chose for the prompt to skip are named in the settings of the result.
    """
    if names_layers(settings.prefill_skip):
        skipped = skipped_layers(str(settings.prefill_skip), layer)
        settings = replace(settings, prefill_skip=written_layers(skipped))
        found = replace(resolve(replace(settings, prefill_skip=0.0), layer), skipped=tuple(sorted(skipped)))
    else:
        found = resolve(settings, layer)
    check_retained_share(settings, found.ffn_ratio)
    left_out = check_halves(read_halves(str(settings.leave_out)), layer.layers)
    check_visual_tokens(settings, left_out, layer.layers)
    inputs = settings.input_shares
    kind = RULES[settings.rule] if inputs is None else with_inputs(inputs, settings)
    rule = kind(
        found.ffn_ratio, settings.candidate_width, settings.head_ratio, settings.min_tokens, settings.groups,
        retained_share=settings.retained_share,
    )
    # Channels and heads are a share of what runs; left out halves count in full.
    networks_left = 1 - sum(half.part == MLP for half in left_out) / layer.layers
    attentions_left = 1 - sum(half.part == ATTENTION for half in left_out) / layer.layers
    total = layer.attention + layer.ffn
    channels = found.ffn_ratio * layer.ffn / total
    heads = found.ratio - channels
    if inputs is not None:
        channels, heads = inputs.of_network(found.ffn_ratio) * layer.ffn / total, input_weights(inputs, layer) / total
    ratio = share_of_halves(left_out, layer) + networks_left * channels + attentions_left * heads
    return StudyPruning(ratio, found.ffn_ratio, settings, rule, found.skipped, found.boundary, left_out)


def share_of_halves(halves: Sequence[Half], layer: LayerWeights) -> float:
    """Compute the share of all layers' parameters in these halves; layers count as equal."""
    weights = sum(layer.ffn if half.part == MLP else layer.attention for half in halves)
    return weights / (layer.layers * (layer.attention + layer.ffn))


def with_inputs(shares: InputShares, settings: PruningSettings) -> Callable[..., InputSparsity]:
    """Return the rule of input sparsity with these shares and the score of the settings."""
    return partial(InputSparsity, inputs=InputChoice(shares, weighted=settings.input_score == "wina"))


def input_weights(shares: InputShares, layer: LayerWeights) -> float:
    """Compute the number of an attention's weights that these shares of its inputs leave out."""
    of_outputs = layer.head * layer.head_groups * layer.heads_per_group / 2         # o_proj is as large as q_proj
    return shares.o * of_outputs + shares.qkv * (layer.attention - of_outputs)


def check_retained_share(settings: PruningSettings, ffn_ratio: float) -> None:
    """Raise InputError for a share that leaves nothing to pick, or fewer candidates than picks."""
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


def check_visual_tokens(settings: PruningSettings, left_out: Sequence[Half], layers: int) -> None:
    """Raise InputError for a layer that is the last, or whose attention is left out."""
    after = settings.visual_tokens_layer
    if settings.visual_tokens == "all" or settings.visual_tokens_by != "attention":
        return
    if after >= layers:
        raise InputError(
            f"visual tokens layer {after} leaves no layer after it: the model has {layers}, give {layers - 1} at most"
        )
    if (after - 1, ATTENTION) in left_out:
        raise InputError(f"visual tokens layer {after} chooses by an attention that is left out; give another layer")
