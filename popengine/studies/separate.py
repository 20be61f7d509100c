"""A batch whose sequences each have a partition of their own, so that together they answer as each would alone.

A batch of the engine shares one partition and one choice at a step, because it reads each weight only once. A task's
answers must not depend on what else is asked. Here every sequence masks the whole matrices with its own partition: no
weight stays unread, so this is for measuring quality, and many answers at once take little longer than one.

B batch, T tokens, H hidden size, I FFN channels, C candidate channels.
"""

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from models.experts import MixtureOfExperts
from models.feed_forward import FeedForward
from models.llama import LlamaForCausalLM
from models.passes import DecodePass, PrefillPass
from models.pruning.active_weights import ActiveWeights, WholeWeights
from models.pruning.evidence import sum_of_squares
from models.pruning.interface import PrunedFFN
from models.pruning.partition import ChannelPartition, partition_channels
from models.pruning.pop import DenseFFN, PartitionedFFN
from models.state import DecodeState
from popengine.studies.resolve import StudyPruning
from popengine.studies.rules import AllChannels, StudyRule
from weights.errors import InputError


class SeparateFFN(PartitionedFFN):
    """One network under POP, where every sequence of a batch has its own evidence and its own partition.

    squares   float32 [B, I] (at first [1, I]), the sum of Eq. 2 for each sequence
    retained  bool [B, 1, I], the retained channels of each sequence
    """

    def __init__(self, ffn: FeedForward, rule: StudyRule) -> None:
        super().__init__(ffn, rule, WholeWeights(ffn))
        self.norms = ffn.down_norms()                                               # [I]
        self.restart()

    def restart(self) -> None:
        super().restart()
        self.squares = self.evidence.squares[None]

    def prefill(self, x: Tensor, rows: PrefillPass) -> Tensor:
        # One prompt after the other: the activations of a whole batch would be too large for the processor's caches.
        counted = [None] * len(x) if rows.counted is None else rows.counted.split(1)
        outputs, squares, orders = [], [], []
        for own, real, earlier in zip(x.split(1), counted, self.squares.expand(len(x), -1), strict=True):
            h = self.ffn.activation(own)                                            # [1, T, I]
            squares.append(earlier + sum_of_squares(h, real))
            if rows.partitions:
                orders.append(partition_channels(squares[-1].sqrt() * self.norms, self.sizes).order)
            if not rows.finish_dense:
                h = h.masked_fill(~mask(orders[-1][None, : self.sizes.active], self.sizes.channels), 0)
            outputs.append(self.ffn.down_proj(h))
        self.squares = torch.stack(squares)                                         # [B, I]
        if rows.partitions:
            self.use_partition(ChannelPartition(torch.stack(orders), self.sizes))
        return torch.cat(outputs)                                                   # [B, T, H]

    def use_partition(self, partition: ChannelPartition) -> None:
        """Run the next steps with this partition of every sequence, whose order is int64 [B, I]."""
        self.partition = partition
        self.candidate_norms = self.norms[partition.candidate][:, None]             # [B, 1, C]
        self.retained = mask(partition.retained, self.sizes.channels)

    def keep(self, rows: Tensor) -> None:
        """Keep these sequences of the batch alone. int64 [n]"""
        self.squares = self.squares[rows]
        self.use_partition(ChannelPartition(self.partition.order[rows], self.sizes))

    def decode(self, x: Tensor, step: DecodePass) -> Tensor:
        h = self.ffn.activation(x)                                                  # [B, T, I]
        candidates = self.partition.candidate[:, None].expand(-1, h.shape[1], -1)   # [B, T, C]
        scores = h.gather(-1, candidates).float().abs() * self.candidate_norms      # Eq. 3 for one token
        kept = self.retained.expand(h.shape).scatter(-1, candidates, self.partition.pick(scores))
        return self.ffn.down_proj(h.masked_fill(~kept, 0))


def mask(chosen: Tensor, channels: int) -> Tensor:
    """Return True for the chosen ones of so many channels, for each sequence. int64 [B, n] -> bool [B, 1, I]"""
    whole = torch.zeros(len(chosen), channels, dtype=torch.bool, device=chosen.device)
    return whole.scatter(-1, chosen, True)[:, None]


def keep_sequences(state: DecodeState, rows: Tensor) -> None:
    """Keep these sequences of a prefilled batch of texts alone: the others no longer run. int64 [n]"""
    cache = state.cache
    cache.padding, cache.rope_delta, state.live = cache.padding[rows], cache.rope_delta[rows], state.live[rows]
    state.schedule.live = len(rows)
    for layer in state.layers:
        layer.cache.keys, layer.cache.values = layer.cache.keys[rows], layer.cache.values[rows]
        if isinstance(layer.ffn, SeparateFFN):
            layer.ffn.keep(rows)


class Separate(StudyRule):
    """A rule whose networks partition every sequence of a batch by itself."""

    def new_ffn(self, ffn: FeedForward, weights: ActiveWeights | None = None) -> PrunedFFN:
        return SeparateFFN(ffn, self) if self.sizes(ffn).prunes else DenseFFN(ffn)

    def copying_saves(self, ffn: FeedForward) -> bool:
        return False


class SeparateAllChannels(Separate, AllChannels):
    """Every step of every sequence chooses among all channels."""


KINDS: dict[type, type[Separate]] = {StudyRule: Separate, AllChannels: SeparateAllChannels}


def separate(pruning: StudyPruning, model: LlamaForCausalLM) -> StudyPruning:
    """Return a pruning under which each sequence of a batch is pruned as if it were alone.

    The dense model, and masks that do not follow the prompt, are returned unchanged. Raises InputError for what has no
    such form.
    """
    rule: Any = pruning.rule
    if not rule.follows_prompt or (rule.ffn_ratio == 0 and rule.head_ratio == 0):
        return pruning
    settings, kind = pruning.settings, KINDS.get(type(rule))
    mixture = any(isinstance(layer.mlp, MixtureOfExperts) for layer in model.model.layers)
    problems = {
        "this rule": kind is None, "pruned heads": rule.head_ratio > 0, "experts": mixture,
        "dense steps after short prompts (--min-evidence 0 has none)": settings.min_evidence > 0,
        "dense steps": settings.dense_every is not None,
    }
    found = [name for name, there in problems.items() if there]
    if kind is None or found:
        raise InputError(f"answers cannot be generated together with {' and '.join(found)}: give --batch-size 1")
    return replace(pruning, rule=kind(**{one.name: getattr(rule, one.name) for one in fields(rule)}))
