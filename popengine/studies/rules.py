"""Rules beside the paper's: cheaper or other scores, and channels that were chosen before any prompt.

A new rule is a class here, with what it runs in place of a network (see models/pruning/pop.py), its name in RULES, and
its name in RULE_NAMES of popengine/studies/settings.py.

B batch, T tokens, H hidden size, I FFN channels, R retained, C candidate and A = R + C active channels, K picked.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.feed_forward import FeedForward
from models.matrices.packed import DRAFT_DTYPE, draft_of
from models.matrices.plain import Matrix
from models.matrices.products import places, row_count
from models.passes import DecodePass, PrefillPass
from models.pruning.active_weights import ActiveWeights, down_by_columns, down_bytes
from models.pruning.evidence import Evidence
from models.pruning.interface import PrunedFFN
from models.pruning.partition import ChannelPartition, PartitionSizes
from models.pruning.pop import POP, PartitionedFFN
from popengine.studies.evidence import Prior, PriorEvidence


@dataclass(frozen=True)
class StudyRule(POP):
    """POP with a prior, and with a retained share that does not depend on the width.

    prior           evidence before any token, or None
    retained_share  share of the channels that always run; None: the paper's sizes
    """

    prior: Prior | None = None
    retained_share: float | None = None

    def new_evidence(self, network: nn.Module, channels: int, device: torch.device, part: str = "h") -> Evidence:
        """Create evidence that starts from the prior, if there is one. part: "h", "gate" or "up" of the network"""
        if self.prior is None or (network, part) not in self.prior.of:
            return Evidence(channels, device)
        return PriorEvidence(self.prior.of[network, part] * self.prior.tokens, self.prior.tokens, device)

    def group_sizes(self, channels: int) -> PartitionSizes:
        if self.retained_share is None or self.ffn_ratio == 0:
            return super().group_sizes(channels)
        return retained_sizes(channels, self.ffn_ratio, self.retained_share, self.width)


def retained_sizes(channels: int, ratio: float, share: float, width: float = 1.0) -> PartitionSizes:
    """Compute sizes for a given retained share, so that picks need not be half of the candidates.

    share  share of all channels that always run; 0 is the all-channel variant (POP, Table 6)
    width  candidates as a share of all channels, at most all channels that are not retained
    """
    active = round((1 - ratio) * channels)
    retained = min(round(share * channels), active)
    pick = active - retained
    candidate = max(pick, min(round(width * channels), channels - retained)) if pick else 0
    return PartitionSizes(retained, candidate, channels - retained - candidate, pick)


class AllChannels(StudyRule):
    """The quality ceiling (POP, Table 6): every step chooses among all channels, and saves only in down_proj.

    Scored by |h_i| times the norm of down_proj's column i, as WINA (arXiv 2505.19427) does for down_proj. With a
    retained share the best channels by evidence always run, and a step chooses among all others.
    """

    def group_sizes(self, channels: int) -> PartitionSizes:
        if self.ffn_ratio == 0:
            return super().group_sizes(channels)
        return retained_sizes(channels, self.ffn_ratio, self.retained_share or 0.0)


class Chooser(PartitionedFFN):
    """A network whose steps score candidates before computing all of h, so that they read only rows of kept channels.

    If this reads less (one token, weights stored by rows), `decode_chosen` runs the step. Otherwise the step reads
    every active row and keeps the same candidates. Subclasses define `look`, the values that candidates are scored by.
    """

    def look(self, x: Tensor) -> Tensor:
        """Compute the values that the step scores candidates by. x [B, T, H] -> [B, T, A]"""
        raise NotImplementedError

    def decode_chosen(self, x: Tensor, step: DecodePass) -> Tensor:
        """Run a step that reads rows of the kept channels alone. x [1, 1, H] -> [1, 1, H]"""
        raise NotImplementedError

    def decode(self, x: Tensor, step: DecodePass) -> Tensor:
        if self.gate.reads_chosen_rows(row_count(x)):
            return self.decode_chosen(x, step)
        h = self.act(self.gate(x)) * self.up(x)                                     # [B, T, A]
        return self.down.multiply_kept(h, self.kept(self.look(x), step), self.sizes.computed)

    def kept_places(self, look: Tensor, step: DecodePass) -> Tensor:
        """Choose the channels that one token keeps, as indices into the active ones. look [1, 1, A] -> int64 [R + K]"""
        return places(self.kept(look, step).flatten(), self.sizes.computed)

    def finish(self, h: Tensor, kept: Tensor) -> Tensor:
        """Apply down_proj to one token's kept channels. h [1, 1, R + K], kept int64 [R + K] -> [1, 1, H]"""
        if self.down.reads_chosen_columns(1):
            return self.down.multiply_columns(h, kept)
        return self.down(h.new_zeros(1, 1, self.sizes.active).index_copy(-1, kept, h))


class FactorFFN(Chooser):
    """A network scored by one factor of h, times the norm and the root mean square of the other factor in the prompt.

    watched  evidence of the other factor
    """

    other = "gate"

    def __init__(self, ffn: FeedForward, rule: StudyRule, weights: ActiveWeights) -> None:
        super().__init__(ffn, rule, weights)
        self.watched = rule.new_evidence(ffn, ffn.channels, ffn.device, self.other)

    def prefill(self, x: Tensor, rows: PrefillPass) -> Tensor:
        gate, up = self.act(self.ffn.gate_proj(x)), self.ffn.up_proj(x)             # [B, T, I]
        rows.see(self.watched, gate if self.other == "gate" else up)
        return self.finish_prompt(gate * up, rows)

    def sort_channels(self) -> None:
        super().sort_channels()
        if self.watched.tokens:
            usual = (self.watched.squares / self.watched.tokens).sqrt()             # [I], root mean square
            self.candidate_norms.mul_(usual[self.partition.candidate])

    def restart(self) -> None:
        super().restart()
        self.watched.restart()

    def count(self, tokens: int) -> None:
        super().count(tokens)
        self.watched.tokens += tokens


class UpFFN(FactorFFN):
    """A network scored by |up|."""

    def look(self, x: Tensor) -> Tensor:
        return self.up(x)

    def decode_chosen(self, x: Tensor, step: DecodePass) -> Tensor:
        up = self.up(x)                                                             # [1, 1, A]
        kept = self.kept_places(up, step)                                           # [R + K]
        return self.finish(self.act(self.gate.multiply_rows(x, kept)) * up[..., kept], kept)


class GateFFN(FactorFFN):
    """A network scored by |act(gate)|."""

    other = "up"

    def look(self, x: Tensor) -> Tensor:
        return self.act(self.gate(x))

    def decode_chosen(self, x: Tensor, step: DecodePass) -> Tensor:
        gate = self.look(x)                                                         # [1, 1, A]
        kept = self.kept_places(gate, step)                                         # [R + K]
        return self.finish(gate[..., kept] * self.up.multiply_rows(x, kept), kept)


class CATSFFN(GateFFN):
    """A network scored by |act(gate)| alone, without norms."""

    def prefill(self, x: Tensor, rows: PrefillPass) -> Tensor:
        return PartitionedFFN.prefill(self, x, rows)

    def sort_channels(self) -> None:
        super().sort_channels()
        self.candidate_norms.fill_(1.0)


class DraftFFN(Chooser):
    """A network scored by h of int4 copies of gate_proj and up_proj, of which a step reads every row."""

    def __init__(self, ffn: FeedForward, rule: POP, weights: ActiveWeights) -> None:
        super().__init__(ffn, rule, weights)
        self.drafts = drafts_of(ffn)
        self.channels = self.partition.active.clone()                             # int64 [A], at a fixed address

    def look(self, x: Tensor) -> Tensor:
        gate, up = (draft(x.to(DRAFT_DTYPE)) for draft in self.drafts)              # [B, T, I]
        return (self.act(gate) * up)[..., self.channels]                            # [B, T, A]

    def sort_channels(self) -> None:
        super().sort_channels()
        self.channels.copy_(self.partition.active)

    def decode_chosen(self, x: Tensor, step: DecodePass) -> Tensor:
        kept = self.kept_places(self.look(x), step)                                 # [R + K]
        return self.finish(self.act(self.gate.multiply_rows(x, kept)) * self.up.multiply_rows(x, kept), kept)


def drafts_of(ffn: FeedForward) -> tuple[Matrix, Matrix]:
    """Return int4 copies of gate_proj and up_proj, made at first use."""
    made: tuple[Matrix, Matrix] = ffn.once("drafts", lambda: (draft_of(ffn.gate_proj), draft_of(ffn.up_proj)))
    return made


class ChooseFirst(AllChannels):
    """A rule whose steps score candidates before they read the weights of the kept channels."""

    in_place: type[Chooser]

    def new_ffn(self, ffn: FeedForward, weights: ActiveWeights | None = None) -> PrunedFFN:
        if not self.sizes(ffn).decides:
            return super().new_ffn(ffn, weights)
        return self.in_place(ffn, self, weights or self.new_weights(ffn))

    def copying_saves(self, ffn: FeedForward) -> bool:
        return True                     # chosen rows need weights stored by rows

    def step_bytes(self, ffn: FeedForward, rows: int) -> int:
        sizes = self.sizes(ffn)
        if not sizes.decides or not ffn.gate_proj.reads_chosen_rows(rows):
            return super().step_bytes(ffn, rows)
        first, second = self.rows_read(sizes)
        down = ffn.down_proj if sizes.copied else down_by_columns(ffn)
        columns = sizes.computed if down.reads_chosen_columns(rows) else sizes.active
        factors = ffn.gate_proj.read_bytes(rows=first) + ffn.up_proj.read_bytes(rows=second)
        whole = columns == ffn.channels and not sizes.copied
        return factors + down_bytes(ffn, None if whole else columns)

    def rows_read(self, sizes: PartitionSizes) -> tuple[int, int]:
        """Return how many rows a step reads of the factor that scores, and of the other factor."""
        return sizes.active, sizes.computed


class Up(ChooseFirst):
    """Scored by |up| times the prompt's root mean square of act(gate); a step reads only the kept rows of gate."""

    in_place = UpFFN


class Gate(ChooseFirst):
    """Scored by |act(gate)| times the prompt's root mean square of up; a step reads only the kept rows of up."""

    in_place = GateFFN


class CATS(ChooseFirst):
    """Scored by |act(gate)| alone (arXiv 2404.08763), with the best channels of each step instead of a threshold."""

    in_place = CATSFFN


class Draft(ChooseFirst):
    """Scored in full from int4 copies of gate_proj and up_proj; a step reads only the kept rows of the weights.

    Our own rule; docs/results.md has its cost.
    """

    in_place = DraftFFN

    def rows_read(self, sizes: PartitionSizes) -> tuple[int, int]:
        return sizes.computed, sizes.computed

    def step_bytes(self, ffn: FeedForward, rows: int) -> int:
        drafts = sum(draft.read_bytes() for draft in drafts_of(ffn)) if self.sizes(ffn).decides else 0
        return super().step_bytes(ffn, rows) + drafts


class GLASS(StudyRule):
    """Partitions channels by the mean of two ranks: the prompt's scores and the prior's (arXiv 2508.14302).

    The prior is kept out of the sums and always weighs one half, whatever its number of tokens. Heads are ranked by
    the prompt alone.
    """

    def new_evidence(self, network: nn.Module, channels: int, device: torch.device, part: str = "h") -> Evidence:
        return Evidence(channels, device)

    def scores(self, ffn: FeedForward, evidence: Evidence) -> Tensor:
        usual = None if self.prior is None else self.prior.of.get((ffn, "h"))
        if usual is None:               # an expert that the sampled text never reached
            return super().scores(ffn, evidence)
        ranks = rank_by_score(usual.sqrt() * ffn.down_norms(), self.groups)         # [I]
        if evidence.tokens >= self.min_tokens:
            ranks = ranks + rank_by_score(evidence.scores(ffn.down_norms()), self.groups)
        return -ranks.float()


def rank_by_score(scores: Tensor, groups: int = 1) -> Tensor:
    """Rank each channel in its group by falling score, from 0 (ties: lower channel first). [I] -> int64 [I]"""
    return scores.view(groups, -1).sort(descending=True, stable=True).indices.argsort().flatten()


@dataclass(frozen=True)
class StaticChannels:
    """Channels of one network that were chosen in advance.

    bias  [H], added to the network's output in place of its pruned channels; None: nothing
    """

    partition: ChannelPartition
    bias: Tensor | None = None


class StaticFFN(PartitionedFFN):
    """A network with a fixed partition, which no prompt changes."""

    def __init__(self, ffn: FeedForward, rule: POP, weights: ActiveWeights, chosen: StaticChannels) -> None:
        super().__init__(ffn, rule, weights)
        self.partition = chosen.partition
        weights.fill(ffn, chosen.partition)
        if chosen.bias is not None:
            self.down.bias = chosen.bias if self.down.bias is None else self.down.bias + chosen.bias

    def prefill(self, x: Tensor, rows: PrefillPass) -> Tensor:
        return self.ffn(x) if rows.finish_dense else self.down(self.act(self.gate(x)) * self.up(x))

    def sort_channels(self) -> None:
        pass

    def copy_weights(self) -> None:
        pass

    def decode(self, x: Tensor, step: DecodePass) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


@dataclass(frozen=True, eq=False)
class StaticRule(POP):
    """Channels chosen before any prompt, for every network of one model. Compared by identity."""

    ffn_ratio: float = 0.0
    width: float = 0.0
    of: Mapping[nn.Module, StaticChannels] = field(default_factory=dict)

    follows_prompt = False
    __eq__, __hash__ = object.__eq__, object.__hash__

    def sizes(self, ffn: FeedForward) -> PartitionSizes:
        return self.of[ffn].partition.sizes

    def new_ffn(self, ffn: FeedForward, weights: ActiveWeights | None = None) -> PrunedFFN:
        if not self.sizes(ffn).prunes:
            return super().new_ffn(ffn)
        return StaticFFN(ffn, self, weights or self.new_weights(ffn), self.of[ffn])


RULES: dict[str, type[StudyRule]] = {
    "pop": StudyRule, "all-channels": AllChannels, "up": Up, "gate": Gate, "cats": CATS, "glass": GLASS,
    "draft": Draft,
}
