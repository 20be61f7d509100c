"""Partition-guided Online Pruning of one feed-forward network (POP, arXiv 2602.06822, section 3): the method itself.

`PartitionedFFN` runs in place of a FeedForward. `prefill` runs the prompt and partitions the channels; `decode`
computes the retained and candidate channels of a step and finishes the retained ones and the picked candidates. `POP`
holds the parameters and builds one such object per layer. Another method is another class with the same two methods
(popengine/studies).

B batch, T tokens, H hidden size, I FFN channels, R retained, C candidate and P pruned channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Attention, CachedAttention
from models.blocks import BlockNorms, FeedForwardBlock, PrunedBlock, Sublayer
from models.feed_forward import FeedForward
from models.matrices.plain import Matrix, take_columns, tensor_bytes
from models.passes import DecodePass, PrefillPass
from models.pruning.active_weights import (
    LEAST_SAVED,
    ActiveWeights,
    AnyMatrix,
    LookedUpWeights,
    WholeWeights,
    channel_bytes,
    down_by_columns,
)
from models.pruning.evidence import Evidence
from models.pruning.interface import Experts, PrunedFFN
from models.pruning.partition import (
    PartitionSizes,
    channels_of_group,
    partition_channels,
    partition_sizes,
    undecided,
)


class PartitionedFFN:
    """One network under POP: the prompt gives a partition, every step chooses among its candidates."""

    def __init__(self, ffn: FeedForward, rule: "POP", weights: ActiveWeights) -> None:
        self.ffn, self.rule, self.sizes, self.act = ffn, rule, rule.sizes(ffn), ffn.act
        self.use(weights)
        self.partition = undecided(self.sizes, (), ffn.device)
        self.evidence = rule.new_evidence(ffn, ffn.channels, ffn.device)
        self.candidate_norms = ffn.down_norms()[: self.sizes.candidate].clone()     # [C]

    def use(self, weights: ActiveWeights) -> None:
        self.weights, weights.held = weights, None
        self.gate, self.up, self.down = weights.gate, weights.up, weights.down      # [R + C, H] twice, [H, R + C]

    def prefill(self, x: Tensor, rows: PrefillPass) -> Tensor:
        return self.finish_prompt(self.ffn.activation(x), rows)

    def finish_prompt(self, h: Tensor, rows: PrefillPass) -> Tensor:
        """Run the rest of a prompt from the activation h: evidence, partition, down_proj. [B, T, I] -> [B, T, H]"""
        rows.see(self.evidence, h)                                                  # the sum of Eq. 2
        if rows.partitions:
            rows.repartition(self)                                                  # Eq. 3 and section 3.2
        if rows.finish_dense:
            return self.ffn.down_proj(h)
        return self.down(take_columns(h, self.partition.active))                    # [B, T, R + C] -> [B, T, H]

    def sort_channels(self) -> None:
        partition = partition_channels(self.rule.scores(self.ffn, self.evidence), self.sizes)
        copied = self.weights.held                      # since the prompt began
        self.partition = partition if copied is None else partition.in_places_of(copied)
        torch.index_select(self.ffn.down_norms(), 0, self.partition.candidate, out=self.candidate_norms)

    def copy_weights(self) -> None:
        self.weights.fill(self.ffn, self.partition)

    def decode(self, x: Tensor, step: DecodePass) -> Tensor:
        h = self.act(self.gate(x)) * self.up(x)                                     # [B, T, R + C]
        return self.down.multiply_kept(h, self.kept(h, step), self.sizes.computed)  # [B, T, H]

    def kept(self, h: Tensor, step: DecodePass) -> Tensor:
        """Choose the active channels that a step keeps. h [B, T, R + C] -> bool [R + C] or [B, T, R + C]"""
        scores = step.scores(h[..., self.sizes.retained :], self.candidate_norms)   # Eq. 3: [C] or [B, T, C]
        return F.pad(self.partition.pick(scores), (self.sizes.retained, 0), value=True)         # [..., R + C]

    def restart(self) -> None:
        self.evidence.restart()
        self.weights.held = None

    def count(self, tokens: int) -> None:
        self.evidence.tokens += tokens

    def copied_bytes(self) -> int:
        return tensor_bytes(self) + self.weights.held_bytes() if self.weights.held_bytes() else 0


class FrozenFFN(PartitionedFFN):
    """A partition without candidates: every step runs the retained channels."""

    def decode(self, x: Tensor, step: DecodePass) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class DenseFFN(PartitionedFFN):
    """The whole network with nothing pruned: it needs no evidence, no norms of its weights and no copies."""

    def __init__(self, ffn: FeedForward) -> None:
        self.ffn, self.rule = ffn, POP(0.0, 0.0)
        self.sizes = self.rule.sizes(ffn)
        self.use(WholeWeights(ffn))
        self.partition, self.evidence = undecided(self.sizes, (), ffn.device), Evidence(ffn.channels, ffn.device)

    def prefill(self, x: Tensor, rows: PrefillPass) -> Tensor:
        return self.ffn(x)

    def decode(self, x: Tensor, step: DecodePass) -> Tensor:
        return self.ffn(x)

    def sort_channels(self) -> None:
        pass

    def copy_weights(self) -> None:
        pass


@dataclass(frozen=True)
class POP:
    """The parameters of the method; builds what runs in place of each network (arXiv 2602.06822).

    ffn_ratio       share of FFN channels off at a decode step (r); head_ratio: of query heads
    width           candidates as a share of the channels (the paper's gamma); 0 freezes the prompt's mask
    min_tokens      networks that saw fewer tokens are scored by their weights alone
    groups          number of equal groups of channels that are partitioned independently, as in tensor parallelism
    """

    ffn_ratio: float
    width: float
    head_ratio: float = 0.0
    min_tokens: int = 1
    groups: int = 1

    # True if partitions depend on the prompt; a static mask does not.
    follows_prompt = True

    def new_ffn(self, ffn: FeedForward, weights: ActiveWeights | None = None) -> PrunedFFN:
        """Build what runs in place of one network. weights: buffers to reuse; None: new, if copying saves bytes."""
        sizes = self.sizes(ffn)
        if not sizes.prunes:
            return DenseFFN(ffn)
        return (PartitionedFFN if sizes.decides else FrozenFFN)(ffn, self, weights or self.new_weights(ffn))

    def experts_of(self, mixture: Experts) -> tuple[Matrix, Sequence[FeedForward]]:
        """Return the router of a mixture and the experts that run."""
        return mixture.gate, mixture.experts

    def new_block(self, layer: BlockNorms, ffn: PrunedBlock) -> Sublayer:
        """Build the residual block around what runs in place of a layer's network."""
        return FeedForwardBlock(layer, ffn)

    def new_attention(self, attention: Attention) -> CachedAttention:
        """Build what runs in place of an attention all of whose heads run."""
        return CachedAttention(attention)

    def new_head(self, lm_head: Matrix, once: Callable[[str, Callable[[], Any]], Any]) -> AnyMatrix:
        """Build what steps multiply with in place of the output projection. once: keeps constants of its weights"""
        return lm_head

    def new_weights(self, ffn: FeedForward) -> ActiveWeights:
        """Allocate weights for the active channels of a network: copies, or views if copies save too little."""
        sizes = self.sizes(ffn)
        if not sizes.copied:
            return WholeWeights(ffn, down_by_columns(ffn))
        return (ActiveWeights if self.copying_saves(ffn) else LookedUpWeights)(ffn, sizes.active)

    def new_evidence(self, network: nn.Module, channels: int, device: torch.device) -> Evidence:
        """Create empty evidence for a network, or for the heads of an attention."""
        return Evidence(channels, device)

    def scores(self, ffn: FeedForward, evidence: Evidence) -> Tensor:
        """Score each channel over the tokens seen (Eq. 3): float32 [I]."""
        return ffn.weight_scores() if evidence.tokens < self.min_tokens else evidence.scores(ffn.down_norms())

    def sizes(self, ffn: FeedForward) -> PartitionSizes:
        """Compute the region sizes of one network. Raises InputError if the groups do not divide its channels."""
        return self.group_sizes(channels_of_group(ffn.channels, self.groups)).times(self.groups)

    def group_sizes(self, channels: int) -> PartitionSizes:
        """Compute the region sizes of one group of channels."""
        return partition_sizes(channels, self.ffn_ratio, self.width)

    def head_sizes(self, heads: int) -> PartitionSizes:
        """Compute the region sizes of one group of query heads."""
        return partition_sizes(heads, self.head_ratio, self.width)

    def copying_saves(self, ffn: FeedForward) -> bool:
        """Return True if a step on copies of the active channels reads so much less that copying them pays.

        A mask that does not follow the prompt is copied once, so that any saving pays.
        """
        sizes = self.sizes(ffn)
        columns = sizes.computed if ffn.down_proj.reads_chosen_columns(1) else sizes.active
        read = channel_bytes(ffn, sizes.active, columns)
        least = LEAST_SAVED * read if self.follows_prompt else 0
        return not sizes.copied or channel_bytes(ffn) - read >= least

    def step_bytes(self, ffn: FeedForward, rows: int) -> int:
        """Compute the bytes of weights of one network that a step of `rows` tokens reads."""
        sizes = self.sizes(ffn)
        if not sizes.prunes or not self.copying_saves(ffn):
            return channel_bytes(ffn)
        down = ffn.down_proj if sizes.copied else down_by_columns(ffn)
        columns = sizes.computed if down.reads_chosen_columns(rows) else sizes.active
        return channel_bytes(ffn, sizes.active, None if columns == ffn.channels and not sizes.copied else columns)

    def attention_bytes(self, attention: Any, rows: int) -> int:
        """Compute the bytes of weights of one attention that a step of `rows` tokens reads."""
        heads = self.head_sizes(attention.heads // attention.head_groups)
        queries = heads.active * attention.head_groups * attention.head_dim
        keys_and_values: int = attention.k_proj.read_bytes() + attention.v_proj.read_bytes()
        outputs: int = attention.o_proj.read_bytes(columns=queries if heads.prunes else None)
        return keys_and_values + attention.q_proj.read_bytes(rows=queries) + outputs

    def head_bytes(self, lm_head: Matrix, rows: int) -> int:
        """Compute the bytes of the output projection that a step of `rows` tokens reads."""
        return lm_head.read_bytes()

    def form_bytes(self, model: Any) -> int:
        """Compute the bytes of other forms of whole weights that steps need and that the model does not have yet."""
        return 0

    def prompt_weights(self, ffn: FeedForward, finish_dense: bool) -> int:
        """Count the weights of one network that each prompt token is multiplied with."""
        active = self.sizes(ffn).active
        down = active if not finish_dense and ffn.down_proj.copying_pays(active) else ffn.channels
        return (2 * ffn.channels + down) * ffn.down_proj.out_features
