"""Other forms of a matrix: stored by columns, stacked from different kinds, chosen rows or columns without a copy.

in and out are the sides of a weight [out, in]; T rows.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.matrices.plain import FEW_ROWS, Matrix, put_columns, put_rows, take_columns
from models.matrices.products import add_up_columns, add_up_for_each, kept, places, row_count, stretches


class ColumnMatrix(Matrix):
    """A Matrix stored column by column, for eager products of a few rows on a CPU. float32 and bfloat16 only."""

    threads: int

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> "ColumnMatrix":
        made: ColumnMatrix = super().of(weight, bias)  # type: ignore[assignment]
        made.threads = torch.get_num_threads()        # compiled code cannot call this
        return made

    @classmethod
    def from_rows(cls, matrix: Matrix) -> "ColumnMatrix":
        """Store a row-major matrix by columns; its values and its (possibly shared) parameter stay the same."""
        matrix.weight.data = matrix.weight.data.t().contiguous().t()
        return cls.of(matrix.weight, matrix.bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = row_count(x)
        if rows > FEW_ROWS[self.weight.dtype]:
            return F.linear(x, self.weight, self.bias)
        if rows == 1:
            y = add_up_columns(self.weight.t(), kept(stretches, self.in_features, 1)[0], x.flatten(), self.threads)
        else:
            y = add_up_for_each(self.weight.t(), x.flatten(0, -2))                  # [T, out]
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)

    def reads_chosen_columns(self, rows: int) -> bool:
        return rows == 1

    def multiply_columns(self, x: Tensor, columns: Tensor) -> Tensor:
        y = add_up_columns(self.weight.t(), columns, x.flatten(), self.threads)     # [out]
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)

    def multiply_kept(self, x: Tensor, keep: Tensor, count: int) -> Tensor:
        if row_count(x) > 1:
            return super().multiply_kept(x, keep, count)
        columns = places(keep.flatten(), count)                                     # [count]
        return self.multiply_columns(x[..., columns], columns)

    def reads_chosen_rows(self, rows: int) -> bool:
        return False            # a row is scattered over all columns

    def empty(self, rows: int, columns: int) -> Matrix:
        bias = None if self.bias is None else self.bias.new_empty(rows)
        return type(self).of(self.weight.new_empty(columns, rows).t(), bias)

    def copy_rows(self, source: Matrix, rows: Tensor, changed: Tensor | None = None) -> None:
        put_columns(self.weight.t(), source.weight.t(), rows, changed)
        if source.bias is not None:
            torch.index_select(source.bias, 0, rows, out=self.bias)

    def copy_columns(self, source: Matrix, columns: Tensor, changed: Tensor | None = None) -> None:
        put_rows(self.weight.t(), source.weight.t(), columns, changed)
        if source.bias is not None:
            self.bias.copy_(source.bias)


class RowMatrix(Matrix):
    """A Matrix stored row by row, for eager products of one row by torch.mv on a CPU. float32 and bfloat16 only."""

    @classmethod
    def from_rows(cls, matrix: Matrix) -> "Matrix":
        """Return a matrix of the same, possibly shared, parameter."""
        return cls.of(matrix.weight, matrix.bias)

    def forward(self, x: Tensor) -> Tensor:
        if row_count(x) > 1 or torch.compiler.is_compiling():
            return super().forward(x)
        y = torch.mv(self.weight, x.flatten())                                      # [out]
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)

    def reads_chosen_rows(self, rows: int) -> bool:
        return False            # an eager product copies chosen rows first


def has_columns(matrix: Matrix) -> bool:
    """Return True if `by_columns` makes a copy, of which a CPU can read chosen columns alone."""
    by_rows = type(matrix) in (Matrix, RowMatrix)
    return by_rows and matrix.weight.device.type == "cpu" and matrix.weight.dtype in FEW_ROWS


def by_columns(matrix: Matrix) -> Matrix:
    """Return a copy stored by columns if a CPU can then read chosen columns alone, else the matrix itself."""
    if not has_columns(matrix):
        return matrix
    return ColumnMatrix.of(matrix.weight.t().contiguous().t(), matrix.bias)


class MixedMatrix(Matrix):
    """Matrices of different kinds that multiply the same input; their outputs are concatenated.

    A compact copy drops rows of the first part only and shares the other parts.
    """

    def __init__(self, parts: Sequence[Matrix], borrowed: Sequence[Matrix] = ()) -> None:
        """parts: matrices [out, in] with the same `in`; borrowed: further parts, owned by another matrix"""
        nn.Module.__init__(self)
        self.own, self.parts = tuple(parts), (*parts, *borrowed)                    # in tuples: no submodules
        self.in_features = self.parts[0].in_features
        self.out_features = sum(part.out_features for part in self.parts)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by every part. x [..., in] -> [..., out]"""
        return torch.cat([part(x) for part in self.parts], dim=-1)

    def multiply_kept(self, x: Tensor, keep: Tensor, count: int) -> Tensor:
        return torch.cat([part.multiply_kept(x, keep, count) for part in self.parts], dim=-1)

    def empty_rows(self, rows: int) -> "MixedMatrix":
        first, *others = self.parts
        return MixedMatrix([first.empty_rows(rows - sum(part.out_features for part in others))], others)

    def copy_rows(self, source: Matrix, rows: Tensor, changed: Tensor | None = None) -> None:
        """Copy the given rows of `source`, which end with every row of all parts but the first. int64 [out]"""
        assert isinstance(source, MixedMatrix)
        self.parts[0].copy_rows(source.parts[0], rows[: self.parts[0].out_features])

    def values(self) -> Tensor:
        return torch.cat([part.values() for part in self.parts])

    def held_bytes(self) -> int:
        return sum(part.held_bytes() for part in self.own)


def stack(matrices: Sequence[Matrix]) -> Matrix:
    """Stack matrices that multiply the same input into one. They become parts of it and keep their values.

    Neighbours of one kind become one product; several kinds become a MixedMatrix.
    """
    alike = [list(run) for _, run in groupby(matrices, key=lambda matrix: matrix.kind())]
    stacked = [run[0] if len(run) == 1 else type(run[0]).stack(run) for run in alike]
    return stacked[0] if len(stacked) == 1 else MixedMatrix(stacked)


class ChosenRows(nn.Module):
    """Rows of another matrix without a copy: multiplies by the whole matrix and drops the other outputs.

    chosen  int64 [rows], at a fixed address
    """

    def __init__(self, whole: Matrix, rows: int) -> None:
        super().__init__()
        self.whole, self.chosen = whole, torch.arange(rows, device=whole.weight.device)

    def copy_rows(self, source: Matrix, rows: Tensor, changed: Tensor | None = None) -> None:
        self.chosen.copy_(rows)

    def forward(self, x: Tensor) -> Tensor:
        return take_columns(self.whole(x), self.chosen)

    def reads_chosen_columns(self, rows: int) -> bool:
        return self.whole.reads_chosen_columns(rows)

    def multiply_columns(self, x: Tensor, columns: Tensor) -> Tensor:
        return take_columns(self.whole.multiply_columns(x, columns), self.chosen)

    def multiply_kept(self, x: Tensor, keep: Tensor, count: int) -> Tensor:
        return take_columns(self.whole.multiply_kept(x, keep, count), self.chosen)

    def reads_chosen_rows(self, rows: int) -> bool:
        return False

    def held_bytes(self) -> int:
        return 0


class ChosenColumns(nn.Module):
    """Columns of another matrix without a copy: multiplies by the whole matrix, with zeros for other inputs.

    chosen  int64 [columns], at a fixed address
    bias    [out], added to that of the whole matrix; None: nothing
    """

    def __init__(self, whole: Matrix, columns: int) -> None:
        super().__init__()
        self.whole, self.in_features, self.out_features = whole, whole.in_features, whole.out_features
        self.chosen = torch.arange(columns, device=whole.weight.device)
        self.bias: Tensor | None = None

    def copy_columns(self, source: Matrix, columns: Tensor, changed: Tensor | None = None) -> None:
        self.chosen.copy_(columns)

    def forward(self, x: Tensor) -> Tensor:
        spread = x.new_zeros(*x.shape[:-1], self.in_features).index_copy_(-1, self.chosen, x)
        y: Tensor = self.whole(spread)
        return y if self.bias is None else y + self.bias

    def multiply_kept(self, x: Tensor, keep: Tensor, count: int) -> Tensor:
        return self(x.masked_fill(~keep, 0))

    def reads_chosen_columns(self, rows: int) -> bool:
        return False

    def held_bytes(self) -> int:
        return 0
