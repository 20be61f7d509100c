"""Probe Pruning (arXiv 2502.15618) for the prompt: few of its rows run ahead, and decide which channels all others use.

As in the paper: the probe are the rows of largest norm in the residual stream; they run through gate and up; their mean
squares are fused with those of a calibration text, each weighed by its own size; a channel's score is the root of the
sum of squares of what it can give, which is POP's. Not as in the paper: heads are left alone (as by every method here
that is compared at equal channels); the calibration does not go on after it, and has one mean per channel, not one per
position; ratios are equal in all layers; steps keep the prompt's mask, where the paper probes at every batch.

B batch, T rows, H hidden size, I FFN channels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from models.blocks import BlockNorms, FeedForwardBlock, PrunedBlock, Sublayer
from models.clock import Clock, phase
from models.experts import MixtureOfExperts
from models.feed_forward import FeedForward
from models.passes import PrefillPass
from models.pruning.partition import Evidence
from models.pruning.pop import POP, ActiveWeights, FrozenFFN, PrunedFFN
from popengine.methods.request import Request
from popengine.studies.resolve import StudyPruning
from weights.errors import InputError

# Of a prompt's rows, as the probe.
PROBED = 0.1


@dataclass(frozen=True, eq=False)
class Probed(POP):
    """history: mean squares of every network's channels over a calibration text, float32 [I]. Compared by identity."""

    history: Mapping[nn.Module, Tensor] = field(default_factory=dict)

    __eq__, __hash__ = object.__eq__, object.__hash__

    def new_ffn(self, ffn: FeedForward, weights: ActiveWeights | None = None) -> PrunedFFN:
        if not self.sizes(ffn).prunes:
            return super().new_ffn(ffn)
        return ProbedFFN(ffn, self, weights or self.new_weights(ffn))

    def new_block(self, layer: BlockNorms, ffn: PrunedBlock) -> Sublayer:
        return ProbedBlock(layer, ffn)

    def scores(self, ffn: FeedForward, evidence: Evidence) -> Tensor:
        seen, usual = evidence.squares / max(1, evidence.tokens), self.history[ffn]
        fused = (seen.square() + usual.square()) / (seen + usual).clamp(min=1e-30)  # [I]
        return fused.sqrt() * ffn.down_norms()

    def prompt_weights(self, ffn: FeedForward, finish_dense: bool) -> int:
        of_row = 3 * self.sizes(ffn).resident * ffn.down_proj.out_features
        return of_row + round(PROBED * 2 * ffn.channels * ffn.down_proj.out_features)


class ProbedFFN(FrozenFFN):
    """A network whose prompt runs on the channels that its probe has chosen."""

    def probe(self, x: Tensor, clock: Clock | None) -> None:
        """Partition by what some rows show. x [n, H]"""
        with phase(clock, "scores"):
            self.evidence.add(self.ffn.activation(x[None]), None, len(x))
        self.repartition(clock)

    def prefill(self, x: Tensor, rows: PrefillPass) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class ProbedBlock(FeedForwardBlock):
    """Rows of largest norm in the residual stream run ahead through the network (arXiv 2502.15618)."""

    def prefill(self, x: Tensor, rows: PrefillPass) -> Tensor:
        normed = self.layer.before_mlp(x)                                           # [B, T, H]
        if isinstance(self.ffn, ProbedFFN):
            self.ffn.probe(normed.flatten(0, 1)[probe_rows(x, rows.counted)], rows.clock)
        return x + self.layer.after_mlp(self.ffn.prefill(normed, rows))


def probe_rows(x: Tensor, counted: Tensor | None) -> Tensor:
    """The rows of largest norm. x [B, T, H]; counted bool [B, T], None: all -> int64 [n], of B T"""
    norms = x.float().norm(dim=-1)                                                  # [B, T]
    if counted is not None:
        norms = norms.masked_fill(~counted, -1)
    rows = norms.numel() if counted is None else int(counted.sum())
    return norms.flatten().topk(max(1, math.ceil(PROBED * rows))).indices


def probe_pruning(request: Request) -> StudyPruning:
    """A probe of the prompt, fused with calibration, fixes the channels of prompt and steps (arXiv 2502.15618)."""
    calibration = request.calibrated("probe-pruning")
    if any(isinstance(layer.mlp, MixtureOfExperts) for layer in request.model.model.layers):
        raise InputError("method probe-pruning probes networks that every token passes, and this model has experts")
    if request.settings.prefill == "dense":
        raise InputError("method probe-pruning computes the prompt pruned: leave --prefill at pruned")
    pruning = request.pruning(
        candidate_width=0.0, retained_share=None, rule="pop", prior=0, min_evidence=0, dense_every=None,
        redraw_every=None,
    )
    history: dict[nn.Module, Tensor] = {
        ffn: calibration.moments[name].mean_square for name, ffn in request.networks.items()
    }
    rule = pruning.rule
    return replace(pruning, rule=Probed(rule.ffn_ratio, 0.0, rule.head_ratio, groups=rule.groups, history=history))
