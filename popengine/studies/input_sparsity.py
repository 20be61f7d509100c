"""Input sparsity: after the prompt, every product reads only the inputs with the largest score (TEAL, WINA).

The score of input j is |x_j| (TEAL, arXiv 2408.14690), or |x_j| times the l2 norm of column j of the weight (WINA,
arXiv 2505.19427). An input that is left out counts as 0, so its column need not be read. Each token chooses its own
inputs. It combines with POP: the partition chooses rows of gate_proj and up_proj, and of these a step reads the columns
of the chosen inputs. Prompts, and dense steps while evidence is gathered, run whole.

B batch, T tokens, H hidden size, R retained and C candidate channels, N query heads, K key/value heads, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from models.attention import Attention, CachedAttention
from models.cache import LayerCache
from models.feed_forward import FeedForward
from models.matrices.forms import by_columns, has_columns
from models.matrices.plain import Matrix, take_columns
from models.matrices.products import attend_cache, best_places, keep_best, row_count
from models.passes import DecodePass
from models.pruning.active_weights import ActiveWeights, AnyMatrix
from models.pruning.interface import PrunedFFN
from models.pruning.pop import DenseFFN, PartitionedFFN
from popengine.studies.input_shares import InputShares
from popengine.studies.rules import StudyRule


class ChosenInputs:
    """A matrix that multiplies with the inputs of largest score, as if the others were 0.

    matrix  what multiplies, [out, in]
    count   number of inputs that each row keeps (ties: the earlier input)
    norms   float32 [in], the l2 norms of the columns (WINA); None: |x_j| alone is the score (TEAL)
    """

    def __init__(self, matrix: AnyMatrix, count: int, norms: Tensor | None) -> None:
        self.matrix, self.count, self.norms = matrix, count, norms

    def __call__(self, x: Tensor) -> Tensor:
        """Compute x W^T + b with the kept inputs. x [..., in] -> [..., out]"""
        scores = x.float().abs() if self.norms is None else x.float().abs() * self.norms        # [..., in]
        y: Tensor
        if self.matrix.reads_chosen_columns(row_count(x)):
            columns = best_places(scores.flatten(), self.count)                     # [count]
            y = self.matrix.multiply_columns(take_columns(x, columns), columns)
        else:
            y = self.matrix.multiply_kept(x, keep_best(scores, self.count), self.count)
        return y

    def multiply_kept(self, x: Tensor, keep: Tensor, count: int) -> Tensor:
        """Multiply with the inputs of largest score among `count` given ones, at least as many as this matrix keeps."""
        return self(x.masked_fill(~keep, 0))


@dataclass(frozen=True)
class InputChoice:
    """The parameters of the method.

    shares    of the inputs that are left out, by kind of product
    weighted  True for WINA's score, False for TEAL's
    """

    shares: InputShares
    weighted: bool

    def kept(self, kind: str, inputs: int) -> int:
        """Return how many of `inputs` inputs a product of this kind keeps, at least one."""
        left_out: float = getattr(self.shares, kind)
        return max(1, round((1 - left_out) * inputs))

    def of(
        self, kind: str, matrix: AnyMatrix, inputs: int, most: int, norms: Callable[[], Tensor],
        once: Callable[[str, Callable[[], Any]], Any],
    ) -> AnyMatrix:
        """Return a matrix that chooses among its inputs; the matrix itself if it keeps all `most` that reach it.

        inputs  of the whole matrix: the share is of these
        norms   computes the norms of the columns
        once    keeps what is made of a whole matrix: a copy stored by columns, if it is stored by rows
        """
        count = self.kept(kind, inputs)
        if count >= most:
            return matrix
        if has_columns(matrix):
            matrix = once(by_columns_name(kind), lambda: by_columns(matrix))
        return ChosenInputs(matrix, count, norms() if self.weighted else None)

    def of_factors(self, ffn: FeedForward, weights: ActiveWeights) -> tuple[AnyMatrix, AnyMatrix]:
        """Return gate and up, or copies of some of their rows, with chosen inputs. Norms are of all rows."""
        hidden, once = ffn.down_proj.out_features, ffn.once
        gate_norms = partial(once, "gate norms", ffn.gate_proj.column_norms)
        up_norms = partial(once, "up norms", ffn.up_proj.column_norms)
        return (
            self.of("gate", weights.gate, hidden, hidden, gate_norms, once),
            self.of("up", weights.up, hidden, hidden, up_norms, once),
        )


class SparseDenseFFN(DenseFFN):
    """A network with nothing pruned, whose steps choose the inputs of its three products."""

    def __init__(self, ffn: FeedForward, choice: InputChoice) -> None:
        super().__init__(ffn)
        self.step_gate, self.step_up = choice.of_factors(ffn, self.weights)
        self.step_down = choice.of("down", self.down, ffn.channels, ffn.channels, ffn.down_norms, ffn.once)

    def decode(self, x: Tensor, step: DecodePass) -> Tensor:
        return self.step_down(self.ffn.act(self.step_gate(x)) * self.step_up(x))


class SparseFFN(PartitionedFFN):
    """A network under POP, whose steps also choose the inputs of their products.

    down_proj keeps, of the channels that POP finishes, those with the largest score: at most its share of all channels.
    """

    rule: "InputSparsity"

    def use(self, weights: ActiveWeights) -> None:
        super().use(weights)
        ffn, choice = self.ffn, self.rule.inputs
        self.step_gate, self.step_up = choice.of_factors(ffn, weights)
        self.active_norms = ffn.down_norms()[: self.sizes.active].clone()           # [R + C]
        self.step_down = choice.of(
            "down", self.down, ffn.channels, self.sizes.computed, lambda: self.active_norms, ffn.once
        )

    def copy_weights(self) -> None:
        super().copy_weights()
        torch.index_select(self.ffn.down_norms(), 0, self.partition.active, out=self.active_norms)

    def decode(self, x: Tensor, step: DecodePass) -> Tensor:
        h = self.act(self.step_gate(x)) * self.step_up(x)                           # [B, T, R + C]
        if not self.sizes.decides:
            return self.step_down(h)
        return self.step_down.multiply_kept(h, self.kept(h, step), self.sizes.computed)         # [B, T, H]


class SparseAttention(CachedAttention):
    """An attention whose steps choose the inputs of its two products: q, k and v together, and o_proj."""

    def __init__(self, attention: Attention, choice: InputChoice) -> None:
        super().__init__(attention)
        hidden, heads = self.qkv.in_features, attention.o_proj.in_features
        once, norms = attention.once, partial(attention.once, "qkv norms", self.qkv.column_norms)
        self.step_qkv = choice.of("qkv", self.qkv, hidden, hidden, norms, once)
        self.step_o = choice.of("o", attention.o_proj, heads, heads, attention.output_norms, once)

    def decode(self, x: Tensor, cache: LayerCache, step: DecodePass) -> Tensor:
        q, k, v = self.attention.queries_keys_values(x, self.step_qkv, step, cache.pattern)
        cache.write(k, v, step.slots[cache.pattern])
        mask = step.masks[cache.pattern]                                            # [B, 1, T, S]
        a = attend_cache(q, cache.keys, cache.values, mask, self.attention.scale)   # [B, T, N, D]
        return self.step_o(a.flatten(2))


@dataclass(frozen=True)
class InputSparsity(StudyRule):
    """POP, or with an FFN ratio of 0 the dense model, whose steps choose the inputs of every product."""

    inputs: InputChoice = field(kw_only=True)

    def new_ffn(self, ffn: FeedForward, weights: ActiveWeights | None = None) -> PrunedFFN:
        if not self.sizes(ffn).prunes:
            return SparseDenseFFN(ffn, self.inputs)
        return SparseFFN(ffn, self, weights or self.new_weights(ffn))

    def new_weights(self, ffn: FeedForward) -> ActiveWeights:
        weights = super().new_weights(ffn)
        if not weights.held_bytes():
            return weights
        for name in ("gate", "up", "down"):
            if getattr(self.inputs.shares, name):
                setattr(weights, name, by_columns(getattr(weights, name)))          # still empty
        return weights

    def new_attention(self, attention: Attention) -> CachedAttention:
        return SparseAttention(attention, self.inputs)

    def step_bytes(self, ffn: FeedForward, rows: int) -> int:
        sizes, hidden = self.sizes(ffn), ffn.down_proj.out_features
        copies = sizes.prunes and self.copying_saves(ffn)
        active = sizes.active if copies else None
        read = self.read_bytes(ffn.gate_proj, self.inputs.kept("gate", hidden), rows, active)
        read += self.read_bytes(ffn.up_proj, self.inputs.kept("up", hidden), rows, active)
        down = ffn.down_proj
        if reads_columns(down, rows):
            return read + down.read_bytes(columns=min(sizes.computed, self.inputs.kept("down", ffn.channels)))
        return read + down.read_bytes(columns=sizes.active if copies and sizes.copied else None)

    def new_head(self, lm_head: Matrix, once: Callable[[str, Callable[[], Any]], Any]) -> AnyMatrix:
        hidden, norms = lm_head.in_features, partial(once, "head norms", lm_head.column_norms)
        return self.inputs.of("head", lm_head, hidden, hidden, norms, once)

    def attention_bytes(self, attention: Any, rows: int) -> int:
        kept, o_proj = self.inputs.kept, attention.o_proj
        of_qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        return self.read_bytes(o_proj, kept("o", o_proj.in_features), rows) + sum(
            self.read_bytes(matrix, kept("qkv", matrix.in_features), rows) for matrix in of_qkv
        )

    def head_bytes(self, lm_head: Matrix, rows: int) -> int:
        return self.read_bytes(lm_head, self.inputs.kept("head", lm_head.in_features), rows)

    def form_bytes(self, model: Any) -> int:
        products = [(model, "head", [model.lm_head])]
        for module in model.modules():
            if isinstance(module, Attention):
                products.append((module, "qkv", [module.q_proj, module.k_proj, module.v_proj]))
                products.append((module, "o", [module.o_proj]))
            elif isinstance(module, FeedForward) and not (self.sizes(module).copied and self.copying_saves(module)):
                products += [(module, kind, [getattr(module, f"{kind}_proj")]) for kind in ("gate", "up", "down")]
        return sum(
            matrix.read_bytes() for owner, kind, matrices in products for matrix in matrices
            if getattr(self.inputs.shares, kind) and has_columns(matrix) and by_columns_name(kind) not in owner.derived
        )

    def read_bytes(self, matrix: Matrix, columns: int, rows: int, active: int | None = None) -> int:
        """Compute the bytes that a step of `rows` tokens reads of `active` rows of a matrix (None: all)."""
        read = columns if columns < matrix.in_features and reads_columns(matrix, rows) else None
        return matrix.read_bytes(rows=active, columns=read)


def by_columns_name(kind: str) -> str:
    """Return the name under which a module keeps the copy by columns of a product of this kind."""
    return f"{kind} by columns"


def reads_columns(matrix: Matrix, rows: int) -> bool:
    """Return True if a matrix, or its copy by columns, reads chosen columns alone for `rows` rows of x."""
    return matrix.reads_chosen_columns(rows) or (rows == 1 and has_columns(matrix))
