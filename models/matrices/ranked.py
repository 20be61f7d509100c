"""Matrices and embeddings of which every rank holds a part (models/ranks.py). Only these communicate in a forward pass.

o_proj and down_proj hold some columns of the whole, so their products are partial sums; the output projection and the
embedding hold some rows. `share_out` puts these classes into a loaded model; a single process has none of them.

in and out are the sides of a weight [out, in]; V vocabulary, H hidden size.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from models.matrices.plain import Matrix
from models.ranks import Ranks


class RankMatrix(Matrix):
    """A rank's part of a matrix. Everything but a product is a question to the part.

    part   the matrix that this rank holds; ranks: the ranks that hold the others
    """

    def __init__(self, part: Matrix, ranks: Ranks) -> None:
        nn.Module.__init__(self)
        self.part, self.ranks = part, ranks
        self.in_features, self.out_features = part.in_features, part.out_features

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.part.weight

    @property
    def bias(self) -> Any:
        return self.part.bias

    @bias.setter
    def bias(self, value: Any) -> None:
        self.part.bias = value

    def values(self) -> Tensor:
        return self.part.values()

    def column_norms(self) -> Tensor:
        return self.part.column_norms()

    def row_norms(self) -> Tensor:
        return self.part.row_norms()

    def read_bytes(self, rows: int | None = None, columns: int | None = None) -> int:
        return self.part.read_bytes(rows, columns)

    def held_bytes(self) -> int:
        return self.part.held_bytes()

    def kind(self) -> tuple[Any, ...]:
        return type(self), *self.part.kind()


class SummedMatrix(RankMatrix):
    """Some columns of a matrix: a product sums over all ranks, and every rank gets the sum."""

    def forward(self, x: Tensor) -> Tensor:
        return self.ranks.add_up(self.part(x))

    def reads_chosen_columns(self, rows: int) -> bool:
        return self.part.reads_chosen_columns(rows)

    def multiply_columns(self, x: Tensor, columns: Tensor) -> Tensor:
        return self.ranks.add_up(self.part.multiply_columns(x, columns))

    def multiply_kept(self, x: Tensor, keep: Tensor, count: int) -> Tensor:
        return self.ranks.add_up(self.part.multiply_kept(x, keep, count))

    def empty_columns(self, columns: int) -> "SummedMatrix":
        return SummedMatrix(self.part.empty_columns(columns), self.ranks)

    def copying_pays(self, columns: int) -> bool:
        return self.part.copying_pays(columns)

    def copy_columns(self, source: Matrix, columns: Tensor, changed: Tensor | None = None) -> None:
        assert isinstance(source, SummedMatrix)
        self.part.copy_columns(source.part, columns, changed)

    def in_form(self, make: Callable[[Matrix], Matrix]) -> Matrix:
        return SummedMatrix(make(self.part), self.ranks)


class JoinedMatrix(RankMatrix):
    """Some rows of a matrix: a product joins the outputs of all ranks. rows: of the whole matrix"""

    def __init__(self, part: Matrix, ranks: Ranks, rows: int) -> None:
        super().__init__(part, ranks)
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        return self.ranks.join_rows(self.part(x), self.rows)


class RankEmbedding(nn.Module):
    """Some rows of an embedding: tokens of other ranks are zero here, and the ranks add up. int64 [...] -> [..., H]"""

    def __init__(self, part: nn.Module, ranks: Ranks, rows: int) -> None:
        super().__init__()
        self.part, self.ranks, self.own = part, ranks, ranks.stretch(rows)

    def forward(self, tokens: Tensor) -> Tensor:
        elsewhere = (tokens < self.own.start) | (tokens >= self.own.stop)           # [...]
        x = self.part((tokens - self.own.start).masked_fill(elsewhere, 0))
        return self.ranks.add_up(x.masked_fill(elsewhere.unsqueeze(-1), 0))
