"""A pruning: what a run of one model prunes, with every ratio resolved (models/pruning/resolve.py makes it)."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from models.blocks import PrunedBlock
from models.pruning.pop import POP
from models.pruning.prefill_only import PrefillOnly
from models.pruning.refresh import RefreshSchedule
from models.pruning.settings import SUBLAYERS, POPSettings
from models.slots import AttentionPattern
from models.walks import EveryLayer, Walk


@dataclass(frozen=True)
class Pruning:
    """Settings resolved for one model.

    ratio      share of the decoder layers' parameters that a decode step leaves out (the headline ratio)
    ffn_ratio  share of FFN channels that do not go through down_proj at a decode step (r), of the networks that run
    rule       builds what runs in place of every network
    skipped    the layers that a prompt skips (Prefill-Only), except for its last `boundary` tokens
    """

    ratio: float
    ffn_ratio: float
    settings: POPSettings
    rule: POP
    skipped: tuple[int, ...] = ()
    boundary: int = 1

    @property
    def walk(self) -> Walk:
        """The walk of a prompt through the layers."""
        return PrefillOnly(self.skipped, self.boundary) if self.skipped else EveryLayer()

    def pattern(self, layer: int, window: int | None) -> AttentionPattern:
        """Return the attention pattern of a layer."""
        return AttentionPattern(window)

    def sublayers(self, layer: int) -> tuple[str, ...]:
        """Return the residual blocks of a layer that run."""
        return SUBLAYERS

    def new_experts(self, mixture: nn.Module, standard: Callable[..., PrunedBlock]) -> PrunedBlock:
        """Build what runs in place of a mixture of experts: the standard class, unless a study brings another."""
        return standard(mixture, self.rule)

    def new_schedule(self, batch: int) -> RefreshSchedule:
        """Create the schedule of dense steps for a new prompt of `batch` sequences."""
        return RefreshSchedule(self.settings.min_evidence if self.follows_prompt else 0, batch)

    @property
    def cuts(self) -> bool:
        """True if channels or heads are off in the blocks that run."""
        return self.ffn_ratio > 0 or self.settings.head_ratio > 0

    @property
    def follows_prompt(self) -> bool:
        """True if evidence changes which channels or heads run."""
        return self.rule.follows_prompt and self.cuts

    def skipped_by(self, tokens: int) -> tuple[int, ...]:
        """Return the layers that a prompt of `tokens` tokens skips: none if it is all boundary."""
        return self.skipped if tokens > self.boundary else ()
