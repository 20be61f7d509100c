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

from models.experts import MixtureOfExperts
from models.pruning.partition import ChannelPartition, Evidence, PartitionSizes, partition_channels
from models.pruning.resolve import Pruning
from models.pruning.rules import POP, Network
from popengine.methods.request import Request
from weights.errors import InputError

# Of a prompt's rows, as the probe.
PROBED = 0.1


@dataclass(frozen=True, eq=False)
class Probed(POP):
    """history: mean squares of every network's channels over a calibration text, float32 [I].

    Equal to none but itself.
    """

    history: Mapping[nn.Module, Tensor] = field(default_factory=dict)

    probed = PROBED
    __eq__, __hash__ = object.__eq__, object.__hash__

    def probe(self, x: Tensor, counted: Tensor | None) -> Tensor:
        """The rows of largest norm. x [B, T, H]; counted bool [B, T], None: all -> int64 [n], of B T"""
        norms = x.float().norm(dim=-1)                                              # [B, T]
        if counted is not None:
            norms = norms.masked_fill(~counted, -1)
        rows = norms.numel() if counted is None else int(counted.sum())
        return norms.flatten().topk(max(1, math.ceil(PROBED * rows))).indices

    def partition(self, network: Network, evidence: Evidence, sizes: PartitionSizes) -> ChannelPartition:
        seen, usual = evidence.squares / max(1, evidence.tokens), self.history[network]  # type: ignore[index]
        fused = (seen.square() + usual.square()) / (seen + usual).clamp(min=1e-30)  # [I]
        return partition_channels(fused.sqrt() * network.down_norms(), sizes)


def probe_pruning(request: Request) -> Pruning:
    """A probe of the prompt, fused with calibration, fixes the channels of prompt and steps (arXiv 2502.15618)."""
    calibration = request.calibrated("probe-pruning")
    if any(isinstance(layer.mlp, MixtureOfExperts) for layer in request.model.model.layers):
        raise InputError("method probe-pruning probes networks that every token passes, and this model has experts")
    if request.settings.prefill == "dense":
        raise InputError("method probe-pruning computes the prompt pruned: leave --prefill at pruned")
    pruning = request.pruning(
        candidate_width=0.0, retained_share=None, rule="pop", prior=0, min_evidence=0, dense_every=None,
        redraw_every=None, redraw_on_drift=None,
    )
    history: dict[nn.Module, Tensor] = {
        ffn: calibration.moments[name].mean_square for name, ffn in request.networks.items()
    }
    rule = pruning.rule
    return replace(pruning, rule=Probed(rule.ffn_ratio, 0.0, rule.head_ratio, groups=rule.groups, history=history))
