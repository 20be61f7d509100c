"""The gated feed-forward network and the weights of it that stay active.

FeedForward shows three ways through: `forward` is the dense network that golden tests hold to Hugging Face, `prefill`
runs the prompt and decides which channels stay (POP, arXiv 2602.06822, section 3), `decode` runs what follows on the
channels that stayed. Modules carry Hugging Face's names.

B batch, T rows, H hidden size, I FFN channels, R retained, C candidate and A = R + C resident channels, K of the
candidates chosen.
"""

from typing import Any

import torch
from torch import Tensor, nn

from models.clock import Clock
from models.layers import activation_function
from models.matrix import Matrix, take_columns, tensor_bytes
from models.matrix_forms import ChosenColumns, ChosenRows, by_columns
from models.packed import DRAFT_DTYPE, draft_of
from models.passes import DecodePass, PrefillPass
from models.products import places, row_count
from models.pruning.partition import undecided
from models.pruning.rules import POP

# A matrix, or chosen rows or columns of one: what a step multiplies with.
AnyMatrix = Any


class ActiveFeedForward:
    """What decode steps read of one network, and the evidence that it was chosen by.

    Rows stand in the order retained, candidate, in buffers that are filled once per prompt. With nothing to prune they
    are the module's own matrices. Without `copies` they are looked up in the module's own at every step.
    """

    def __init__(self, ffn: "FeedForward", rule: POP, copies: bool = True) -> None:
        self.rule, self.sizes, self.copies = rule, rule.sizes(ffn), copies
        self.multiplies_whole = not copies or not self.sizes.prunes     # whatever is chosen, all is read
        self.prunes = self.sizes.prunes
        self.follows_prompt = self.prunes and rule.follows_prompt
        self.partition = undecided(self.sizes, (), ffn.device)
        self.evidence = rule.new_evidence(ffn, ffn.channels, ffn.device)
        self.watched = rule.new_evidence(ffn, ffn.channels, ffn.device, rule.watches) if rule.watches else None
        self.gate: AnyMatrix = ffn.gate_proj                                        # [A, H]
        self.up: AnyMatrix = ffn.up_proj                                            # [A, H]
        self.down: AnyMatrix = ffn.down_proj                                        # [H, A]
        self.drafts = ffn.drafts() if self.prunes and rule.looks_at == "draft" else ()
        if self.prunes and not self.sizes.copied:
            self.candidate_factors = ffn.down_norms().clone()                       # [C]
            self.copies = False                                                     # all are resident, in their order
            self.down = ffn.down_by_columns()
        elif self.prunes:
            resident = self.sizes.resident
            self.gate = ffn.gate_proj.empty_rows(resident) if copies else ChosenRows(ffn.gate_proj)
            self.up = ffn.up_proj.empty_rows(resident) if copies else ChosenRows(ffn.up_proj)
            self.down = ffn.down_proj.empty_columns(resident) if copies else ChosenColumns(ffn.down_proj)
            self.candidate_factors = ffn.down_norms().new_empty(self.sizes.candidate)           # [C]
        if self.prunes and not rule.follows_prompt:
            self.draw(ffn, Clock(ffn.device))
            bias = rule.output_bias(ffn)
            if bias is not None:
                self.down.bias = bias if self.down.bias is None else self.down.bias + bias

    def draw(self, ffn: "FeedForward", clock: Clock) -> None:
        """Let the rule cut the channels by the evidence there is, and become the resident ones."""
        with clock.phase("sort"):
            self.partition = self.rule.partition(ffn, self.evidence, self.sizes)
            factors = self.rule.factors(ffn, self.watched)                          # [I]
            torch.index_select(factors, 0, self.partition.candidate, out=self.candidate_factors)
        if self.gate is not ffn.gate_proj:
            with clock.phase("copy"):
                resident = self.partition.resident                                  # [A]
                self.gate.copy_rows(ffn.gate_proj, resident)
                self.up.copy_rows(ffn.up_proj, resident)
                self.down.copy_columns(ffn.down_proj, resident)

    def restart(self) -> None:
        """Forget the last prompt."""
        self.evidence.restart()
        if self.watched is not None:
            self.watched.restart()

    def count(self, tokens: int) -> None:
        """Tokens whose squares a compiled step has added to the evidence."""
        self.evidence.tokens += tokens
        if self.watched is not None:
            self.watched.tokens += tokens

    def copied_bytes(self) -> int:
        """Memory that the copies take, in bytes."""
        if not self.prunes or not self.copies:
            return 0
        return tensor_bytes(self) + sum(matrix.held_bytes() for matrix in (self.gate, self.up, self.down))


class FeedForward(nn.Module):
    """down_proj(act(gate_proj x) * up_proj x); channel i is row i of gate and up and column i of down."""

    def __init__(self, hidden_size: int, channels: int, act: str, bias: bool) -> None:
        super().__init__()
        self.channels = channels
        self.gate_proj = Matrix(hidden_size, channels, bias=bias)
        self.up_proj = Matrix(hidden_size, channels, bias=bias)
        self.down_proj = Matrix(channels, hidden_size, bias=bias)
        self.act = activation_function(act)
        self.norms: Tensor | None = None
        self.made_drafts: tuple[Matrix, Matrix] | None = None
        self.made_by_columns: tuple[Matrix] | None = None

    @property
    def device(self) -> torch.device:
        return self.down_proj.weight.device

    def down_norms(self) -> Tensor:
        """l2 norm of each column of down_proj, float32 [I]: constants of the weights, computed at first use."""
        if self.norms is None:
            self.norms = self.down_proj.column_norms()
        return self.norms

    def weight_scores(self) -> Tensor:
        """Importance of each channel from the weights alone, where no token was seen to judge by: float32 [I]"""
        return self.down_norms() * self.gate_proj.row_norms() * self.up_proj.row_norms()

    def activation(self, x: Tensor) -> Tensor:
        """x [..., H] -> h [..., I], what down_proj reads."""
        return self.act(self.gate_proj(x)) * self.up_proj(x)

    def copying_saves(self, rule: POP) -> bool:
        """Whether compact copies of the resident channels read no more than the whole: of down_proj's columns in four
        bits the copy has eight, and where nearly all are resident, that is more."""
        sizes = rule.sizes(self)
        if not sizes.copied or rule.looks_at != "h":
            return True
        factors = (self.gate_proj, self.up_proj)
        copied = sum(matrix.read_bytes(rows=sizes.resident) for matrix in factors)
        copied += self.down_proj.read_bytes(columns=sizes.resident)
        return copied <= sum(matrix.read_bytes() for matrix in (*factors, self.down_proj))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(x))

    def prefill(self, x: Tensor, active: ActiveFeedForward, step: PrefillPass) -> Tensor:
        """Run the prompt, decide from it which channels stay, and copy their weights. x [B, T, H] -> [B, T, H]

        An observer is told the network, h, which rows of the batch it is of, and its two factors.
        """
        gate, up = self.act(self.gate_proj(x)), self.up_proj(x)                     # [B, T, I]
        h = gate * up
        if step.observe is not None:
            step.observe(self, h, step.rows, gate, up)
        if active.follows_prompt:
            step.see(active.evidence, h)
            if active.watched is not None:
                step.see(active.watched, gate if active.rule.watches == "gate" else up)
            if step.draws:
                active.draw(self, step.clock)
        if step.finish_dense or not active.prunes:
            return self.down_proj(h)
        return active.down(take_columns(h, active.partition.resident))

    def prefill_probed(self, x: Tensor, active: ActiveFeedForward, step: PrefillPass, probe: Tensor) -> Tensor:
        """Run a prompt on the channels that few of its rows decide for (Probe Pruning, arXiv 2502.15618).

        x [B, T, H]; probe int64 [n], rows of all sequences -> [B, T, H]
        """
        if active.follows_prompt:
            with step.clock.phase("scores"):
                active.evidence.add(self.activation(x.flatten(0, 1)[None, probe]), None, len(probe))
            active.draw(self, step.clock)
        return active.down(self.act(active.gate(x)) * active.up(x))

    def decode(self, x: Tensor, active: ActiveFeedForward, step: DecodePass) -> Tensor:
        """Run rows on the resident channels, less the candidates that lose at this step. x [B, T, H] -> [B, T, H]

        An observer is told the network, its partition and which candidates each row keeps, bool [..., C].
        """
        sizes, rows = active.sizes, row_count(x)
        looks_first = active.rule.looks_at != "h" and active.gate.reads_chosen_rows(rows)
        drafts = active.rule.looks_at == "draft"
        if sizes.decides and looks_first and step.observe is None:
            return self.decode_drafted(x, active, step) if drafts else self.decode_chosen(x, active, step)
        gate, up = self.act(active.gate(x)), active.up(x)                           # [B, T, A]
        h = gate * up
        if sizes.decides:
            retained, candidate = h.split([sizes.retained, sizes.candidate], dim=-1)
            looks = {"h": h, "gate": gate, "up": up}
            look = self.drafted(x, active) if drafts else looks[active.rule.looks_at][..., sizes.retained :]
            scores = active.rule.candidate_scores(look, active.candidate_factors, step)         # [C] or [B, T, C]
            if active.down.reads_chosen_columns(rows) and step.observe is None:
                staying = self.staying(scores, active)                              # [R + K]
                return active.down.multiply_columns(h[..., staying], staying)
            keep = active.partition.pick(scores)                                    # [C] or [B, T, C]
            h = torch.cat([retained, candidate.masked_fill(~keep, 0)], dim=-1)      # [B, T, A]
        if step.observe is not None:
            step.observe(self, active.partition, keep if sizes.decides else h[..., :0].bool())
        return active.down(h)

    def decode_chosen(self, x: Tensor, active: ActiveFeedForward, step: DecodePass) -> Tensor:
        """The same of one row where one factor decides: of the other only the chosen rows are read. x [1, 1, H]"""
        by_gate = active.rule.looks_at == "gate"
        first, second = (active.gate, active.up) if by_gate else (active.up, active.gate)
        look = self.act(first(x)) if by_gate else first(x)                          # [1, 1, A]
        scores = active.rule.candidate_scores(look[..., active.sizes.retained :], active.candidate_factors, step)
        staying = self.staying(scores, active)                                      # [R + K]
        other = second.multiply_rows(x, staying)                                    # [1, 1, R + K]
        return self.finish(look[..., staying] * (other if by_gate else self.act(other)), staying, active)

    def decode_drafted(self, x: Tensor, active: ActiveFeedForward, step: DecodePass) -> Tensor:
        """The same of one row where drafts decide: of both factors only the chosen rows are read. x [1, 1, H]"""
        scores = active.rule.candidate_scores(self.drafted(x, active), active.candidate_factors, step)
        staying = self.staying(scores, active)                                      # [R + K]
        gate, up = active.gate.multiply_rows(x, staying), active.up.multiply_rows(x, staying)   # [1, 1, R + K]
        return self.finish(self.act(gate) * up, staying, active)

    def drafted(self, x: Tensor, active: ActiveFeedForward) -> Tensor:
        """What drafts say of the candidates. x [B, T, H] -> h [B, T, C]"""
        gate, up = (draft(x.to(DRAFT_DTYPE)) for draft in active.drafts)            # [B, T, I]
        return (self.act(gate) * up)[..., active.partition.candidate]

    def drafts(self) -> tuple[Matrix, Matrix]:
        """Copies of gate_proj and up_proj to score with, made at first use; in a tuple they are no submodules."""
        if self.made_drafts is None:
            self.made_drafts = draft_of(self.gate_proj), draft_of(self.up_proj)
        return self.made_drafts

    def down_by_columns(self) -> Matrix:
        """down_proj as what reads chosen columns alone, for rules that choose among all: if need be a copy."""
        if self.made_by_columns is None:
            self.made_by_columns = (by_columns(self.down_proj),)
        return self.made_by_columns[0]

    def finish(self, h: Tensor, staying: Tensor, active: ActiveFeedForward) -> Tensor:
        """down_proj of one row's chosen channels, places among the resident: h [1, 1, k], int64 [k] -> [1, 1, H]"""
        if active.down.reads_chosen_columns(1):
            return active.down.multiply_columns(h, staying)
        return active.down(h.new_zeros(1, 1, active.sizes.resident).index_copy(-1, staying, h))

    def staying(self, scores: Tensor, active: ActiveFeedForward) -> Tensor:
        """The retained and the chosen channels, as places among the resident. scores [..., C] -> int64 [R + K]"""
        retained = torch.arange(active.sizes.retained, device=scores.device)        # [R]
        keep = active.partition.pick(scores.flatten())                              # [C]
        chosen = active.sizes.retained + places(keep, active.sizes.pick)            # [K]
        return torch.cat([retained, chosen])
