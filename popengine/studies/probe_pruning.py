"""Probe Pruning (arXiv 2502.15618) for the prompt: a few of its tokens run first and decide the channels of the others.

As in the paper: the probe is the tokens of largest norm in the residual stream; they run through gate and up; their
mean squares are fused with those of a calibration text, each weighted by its own size; the score of a channel is POP's.
Differences from the paper: heads are not pruned (as in every method here that is compared at equal channels); the
calibration is not updated, and has one mean per channel, not one per position; ratios are equal in all layers; steps
keep the prompt's mask, while the paper probes every batch.

B batch, T tokens, H hidden size, I FFN channels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from models.blocks import BlockNorms, FeedForwardBlock, PrunedBlock, Sublayer
from models.experts import MixtureOfExperts
from models.feed_forward import FeedForward
from models.passes import PrefillPass
from models.pruning.active_weights import ActiveWeights
from models.pruning.evidence import Evidence
from models.pruning.interface import PrunedFFN
from models.pruning.pop import POP, FrozenFFN
from popengine.studies.request import Request
from popengine.studies.resolve import StudyPruning
from weights.errors import InputError

# Share of a prompt's tokens in the probe.
PROBED = 0.1


@dataclass(frozen=True, eq=False)
class Probed(POP):
    """The rule of Probe Pruning. Compared by identity.

    history  mean squares of every network's channels over a calibration text, float32 [I]
    """

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
        of_row = 3 * self.sizes(ffn).active * ffn.down_proj.out_features
        return of_row + round(PROBED * 2 * ffn.channels * ffn.down_proj.out_features)


class ProbedFFN(FrozenFFN):
    """A network whose prompt runs on the channels that its probe chose."""

    def probe(self, x: Tensor, rows: PrefillPass) -> None:
        """Partition by the activations of the probe. x [n, H]"""
        rows.part(None, len(x)).see(self.evidence, self.ffn.activation(x[None]))
        rows.repartition(self)

    def prefill(self, x: Tensor, rows: PrefillPass) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class ProbedBlock(FeedForwardBlock):
    """A block in which the tokens of largest norm in the residual stream run first (arXiv 2502.15618)."""

    def prefill(self, x: Tensor, rows: PrefillPass) -> Tensor:
        normed = self.layer.before_mlp(x)                                           # [B, T, H]
        if isinstance(self.ffn, ProbedFFN):
            self.ffn.probe(normed.flatten(0, 1)[probe_rows(x, rows.counted)], rows)
        return x + self.layer.after_mlp(self.ffn.prefill(normed, rows))


def probe_rows(x: Tensor, counted: Tensor | None) -> Tensor:
    """Choose the tokens of largest norm. x [B, T, H]; counted bool [B, T], None: all -> int64 [n], among B T"""
    norms = x.float().norm(dim=-1)                                                  # [B, T]
    if counted is not None:
        norms = norms.masked_fill(~counted, -1)
    rows = norms.numel() if counted is None else int(counted.sum())
    return norms.flatten().topk(max(1, math.ceil(PROBED * rows))).indices


def probe_pruning(request: Request) -> StudyPruning:
    """Choose the channels of prompt and steps by a probe, fused with calibration (arXiv 2502.15618)."""
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
