"""Recording: wrappers around what runs in place of a network, which run the same code and report what it computed.

B batch, T tokens, H hidden size, I FFN channels, C candidates.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from models.attention import CachedAttention
from models.cache import LayerCache
from models.experts import MixtureOfExperts
from models.feed_forward import FeedForward
from models.passes import DecodePass, PrefillPass
from models.pruning.active_weights import ActiveWeights
from models.pruning.experts import PartitionedExperts
from models.pruning.interface import PrunedFFN
from models.pruning.partition import ChannelPartition
from models.pruning.pop import POP, DenseFFN
from models.pruning.pruning import Pruning
from models.state import DecodeState

AnyPruning = TypeVar("AnyPruning", bound=Pruning)
# Called after every step with the network, its partition, and the candidates that each token kept, bool [..., C].
Picks = Callable[[FeedForward, ChannelPartition, Tensor], None]


@dataclass(frozen=True)
class RecordedPartition(ChannelPartition):
    """A partition that keeps a list of its picks."""

    kept: list[Tensor] = field(default_factory=list)

    def pick(self, candidate_scores: Tensor) -> Tensor:
        self.kept.append(super().pick(candidate_scores))
        return self.kept[-1]


class RecordedFFN:
    """Runs another object's prefill and decode, and reports the picks of every step."""

    def __init__(self, inner: PrunedFFN, told: Picks) -> None:
        self.inner, self.told = inner, told

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def decode(self, x: Tensor, step: DecodePass) -> Tensor:
        partition = self.inner.partition
        self.inner.partition = recorded = RecordedPartition(partition.order, partition.sizes)
        y = self.inner.decode(x, step)
        self.inner.partition = partition
        self.told(self.inner.ffn, partition, recorded.kept[0] if recorded.kept else x.new_empty(0).bool())
        return y


class RecordedRule:
    """Wraps a rule and records its networks; everything else is the rule's own."""

    def __init__(self, rule: POP, told: Picks) -> None:
        self.rule, self.told = rule, told

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rule, name)

    def new_ffn(self, ffn: FeedForward, weights: ActiveWeights | None = None) -> RecordedFFN:
        return RecordedFFN(self.rule.new_ffn(ffn, weights), self.told)


def recorded(pruning: AnyPruning, told: Picks) -> AnyPruning:
    """Return the pruning with recorded steps. told: called with the picks of every step"""
    return replace(pruning, rule=RecordedRule(pruning.rule, told))  # type: ignore[arg-type]


class WatchedFFN(DenseFFN):
    """The dense network, which reports h and its two factors for a prompt, [B, T, I] each."""

    def __init__(self, ffn: FeedForward, watch: "Watch") -> None:
        super().__init__(ffn)
        self.watch = watch

    def prefill(self, x: Tensor, rows: PrefillPass) -> Tensor:
        return self.run(x, None)

    def run(self, x: Tensor, of: Tensor | None) -> Tensor:
        """Run and report. x [B, T, H] -> [B, T, H]; of int64 [T]: batch indices of an expert's tokens, None: all"""
        gate, up = self.ffn.act(self.ffn.gate_proj(x)), self.ffn.up_proj(x)             # [B, T, I]
        self.watch.network(self.ffn, gate * up, gate, up, of)
        return self.ffn.down_proj(gate * up)


class WatchedExperts(PartitionedExperts):
    """A dense mixture of experts, which reports its input and what each of its experts computes."""

    def __init__(self, mixture: MixtureOfExperts, rule: POP, watch: "Watch") -> None:
        super().__init__(mixture, rule)
        self.watch = watch
        self.watched = [WatchedFFN(expert, watch) for expert in self.experts]
        self.watched_shared = None if mixture.shared_expert is None else WatchedFFN(mixture.shared_expert, watch)

    def prefill(self, x: Tensor, rows: PrefillPass) -> Tensor:
        self.watch.mixture(self.mixture, x)
        routing, shared = self.mixture.route(x.flatten(0, 1), self.gate), self.watched_shared
        of_experts = routing.segments(torch.arange(x[..., 0].numel(), device=x.device))             # E times [n]
        return self.mixture.spread(
            x, routing, lambda index, own: self.watched[index].run(own[None], of_experts[index])[0],
            None if shared is None else lambda x: shared.run(x, None),
        )


class WatchedAttention(CachedAttention):
    """The dense attention, which reports the input of o_proj, [B, T, N D]."""

    def __init__(self, inner: CachedAttention, watch: "Watch") -> None:
        super().__init__(inner.attention)
        self.watch = watch

    def prefill(self, x: Tensor, cache: LayerCache, rows: PrefillPass) -> Tensor:
        q, k, v = self.attention.queries_keys_values(x, self.qkv, rows, cache.pattern)
        cache.write(k, v, rows.slots[cache.pattern])
        a = rows.attend(q, k, v, cache, self.attention.scale).flatten(2)
        self.watch.heads(self.attention, a)
        return self.attention.o_proj(a)


class Watch:
    """Callbacks of a dense prompt. A study overrides those it needs."""

    def network(self, ffn: FeedForward, h: Tensor, gate: Tensor, up: Tensor, rows: Tensor | None) -> None:
        """Receive h and its factors [B, T, I]; rows int64 [T]: batch indices of an expert's tokens, None: all"""

    def mixture(self, mixture: MixtureOfExperts, x: Tensor) -> None:
        """Receive the input of a mixture of experts, x [B, T, H]"""

    def heads(self, attention: Any, a: Tensor) -> None:
        """Receive the input of o_proj, a [B, T, N D]"""


def watched(state: DecodeState, watch: Watch) -> DecodeState:
    """Replace the networks and attentions of a dense state by watched ones, and return the state."""
    for layer in state.layers:
        ffn = layer.ffn
        if isinstance(ffn, PartitionedExperts):
            layer.ffn = WatchedExperts(ffn.mixture, ffn.rule, watch)
        else:
            layer.ffn = WatchedFFN(ffn.ffn, watch)  # type: ignore[attr-defined]
        layer.attention = WatchedAttention(layer.attention, watch)
        attention, network = layer.sublayers
        attention.attention, network.ffn = layer.attention, layer.ffn  # type: ignore[attr-defined]
    return state
