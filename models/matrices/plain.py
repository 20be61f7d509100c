"""Matrices that layers multiply with. Only this package decides how weights are stored and multiplied.

A layer uses its matrix and never its weight. A matrix multiplies (one row, a few or many), makes compact copies of
chosen rows or columns, and knows its norms and the bytes that a step reads. Another form of weights (by columns,
packed) is another class (models/matrices/forms.py, packed.py), put in its place by `replace_matrices`.

in and out are the sides of a weight [out, in]; B batch, T rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.matrices.products import STREAMS, fused_gemv, fused_gemv_rows, is_fused, row_count
from models.ranks import ALONE

# Most rows for which our own product is faster than the library's (tools/measure_products.py).
FEW_ROWS = {torch.float32: 8, torch.bfloat16: 3}
# Most rows for which the library's float32 product is faster with the weight on the left.
WEIGHT_FIRST_ROWS = 32


class Matrix(nn.Linear):
    """y = x W^T + b, W [out, in] stored row by row.

    A loaded matrix holds parameters like any nn.Linear; a compact copy holds plain tensors.

    ranks    the ranks that hold the other parts of this matrix (models/matrices/ranked.py)
    streams  rows that compiled products of one row read at once; 0: PyTorch's packed product, if there is one
    """

    ranks = ALONE
    streams = STREAMS

    def reset_parameters(self) -> None:
        # Nothing to fill on the meta device; PyTorch would import its compiler only to find that out.
        if not self.weight.is_meta:
            super().reset_parameters()

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> "Matrix":
        """Make a matrix of these tensors, without a copy. weight [out, in], bias [out]"""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.out_features, made.in_features = weight.shape
        made.weight, made.bias = weight, bias  # type: ignore[assignment]
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Compute x W^T + b. x [..., in] -> [..., out]"""
        rows = row_count(x)
        if rows > WEIGHT_FIRST_ROWS or not is_fused(x):
            return F.linear(x, self.weight, self.bias)
        if rows <= FEW_ROWS.get(x.dtype, 1):
            y = fused_gemv(x, self.weight, self.streams)
        elif x.dtype == torch.float32:
            y = (self.weight @ x.flatten(0, -2).t()).t().reshape(*x.shape[:-1], -1)
        else:
            return F.linear(x, self.weight, self.bias)
        return y if self.bias is None else y + self.bias

    def reads_chosen_columns(self, rows: int) -> bool:
        """Return True if `multiply_columns` reads the chosen columns alone for `rows` rows of x, and is faster."""
        return False

    def multiply_columns(self, x: Tensor, columns: Tensor) -> Tensor:
        """Multiply by the given columns alone. x [..., k]; columns int64 [k] -> [..., out]"""
        y = x @ self.values()[:, columns].t()
        return y if self.bias is None else y + self.bias

    def multiply_kept(self, x: Tensor, keep: Tensor, count: int) -> Tensor:
        """Multiply with the kept inputs, as if the others were 0.

        x [..., in]; keep bool [in] or [..., in], `count` of them True in each row -> [..., out]
        """
        return self(x.masked_fill(~keep, 0))

    def reads_chosen_rows(self, rows: int) -> bool:
        """Return True if `multiply_rows` reads the chosen rows alone for `rows` rows of x, and is faster."""
        return rows == 1

    def multiply_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """Compute the outputs of the given rows alone. x [..., in]; rows int64 [k] -> [..., k]"""
        y = fused_gemv_rows(x, self.values(), rows, self.streams) if is_fused(x) else F.linear(x, self.values()[rows])
        return y if self.bias is None else y + self.bias[rows]

    def empty_rows(self, rows: int) -> "Matrix":
        """Allocate an uninitialised compact copy of `rows` rows, with a bias if this matrix has one."""
        return self.empty(rows, self.in_features)

    def empty_columns(self, columns: int) -> "Matrix":
        """Allocate an uninitialised compact copy of `columns` columns, with a bias if this matrix has one."""
        return self.empty(self.out_features, columns)

    def empty(self, rows: int, columns: int) -> "Matrix":
        bias = None if self.bias is None else self.bias.new_empty(rows)
        made = type(self).of(self.weight.new_empty(rows, columns), bias)
        made.set_streams(self.streams)
        return made

    def set_streams(self, streams: int) -> None:
        """Set the rows that compiled products of one row read at once (see `streams`)."""
        if streams != self.streams:         # an attribute of its own is part of the name of a package
            self.streams = streams

    def copying_pays(self, columns: int) -> bool:
        """Return True if a compact copy of so many columns saves enough at each step to be worth its time."""
        return True

    def copy_rows(self, source: "Matrix", rows: Tensor, changed: Tensor | None = None) -> None:
        """Copy the given rows of `source`, which allocated this matrix, and their biases.

        rows     int64 [out]
        changed  int64 [n], places in `rows` that differ from those of the last copy: the others need not be copied.
                 None: all
        """
        put_rows(self.weight, source.weight, rows, changed)
        if source.bias is not None:
            torch.index_select(source.bias, 0, rows, out=self.bias)

    def copy_columns(self, source: "Matrix", columns: Tensor, changed: Tensor | None = None) -> None:
        """Copy the given columns of `source`, which allocated this matrix, and its bias.

        columns int64 [in]; changed as for `copy_rows`
        """
        put_columns(self.weight, source.weight, columns, changed)
        if source.bias is not None:
            self.bias.copy_(source.bias)

    def values(self) -> Tensor:
        """Return the weight as plain numbers [out, in], for computations that run once."""
        return self.weight

    def column_norms(self) -> Tensor:
        """Compute the l2 norm of each column, float32 [in]."""
        return torch.linalg.vector_norm(self.values().float(), dim=0)

    def row_norms(self) -> Tensor:
        """Compute the l2 norm of each row, float32 [out]."""
        return torch.linalg.vector_norm(self.values().float(), dim=1)

    def read_bytes(self, rows: int | None = None, columns: int | None = None) -> int:
        """Compute the bytes that a product reads of `rows` rows and `columns` columns (None: all), without biases."""
        out = self.out_features if rows is None else rows
        return out * (self.in_features if columns is None else columns) * self.weight.element_size()

    def held_bytes(self) -> int:
        """Return the memory of the weight and the bias, in bytes."""
        return tensor_bytes(self)

    def in_form(self, make: Callable[["Matrix"], "Matrix"]) -> "Matrix":
        """Return this matrix in another form, which `make` stores it in; a rank's part keeps its sum over ranks."""
        return make(self)

    def kind(self) -> tuple[Any, ...]:
        """Return class, dtype, groups and presence of a bias: matrices of equal kind can be stacked."""
        return type(self), self.weight.dtype, self.bias is not None

    @classmethod
    def stack(cls, matrices: Sequence["Matrix"]) -> "Matrix":
        """Stack matrices of one kind into one. They become parts of it and keep their values."""
        bias = matrices[0].bias
        made = cls.of(
            share_storage([matrix.weight for matrix in matrices]),
            None if bias is None else share_storage([matrix.bias for matrix in matrices]),
        )
        made.set_streams(matrices[0].streams)
        return made


def replace_matrices(model: nn.Module, make: Callable[[Matrix], Matrix]) -> None:
    """Replace every plain Matrix of a model by `make` of it."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is Matrix:
                setattr(parent, name, make(child))


def share_storage(parameters: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors of equal layout along the first dimension and make them views of the result; return it."""
    first, sizes = parameters[0], [len(parameter) for parameter in parameters]
    # The result is an inference tensor only if the parameters are (a model loaded during inference). Others must stay
    # trainable, and the two kinds do not mix.
    with torch.inference_mode(first.is_inference()), torch.no_grad():
        by_columns = first.dim() == 2 and not first.is_contiguous()
        shape = (first.shape[1], sum(sizes)) if by_columns else (sum(sizes), *first.shape[1:])
        together = first.new_empty(shape).t() if by_columns else first.new_empty(shape)
        for parameter, part in zip(parameters, together.split(sizes), strict=True):
            part.copy_(parameter)
            parameter.data = part
    return together


def bits(x: Tensor) -> Tensor:
    """View half-precision numbers as integers with the same bits, which a CPU gathers 1.6 times as fast."""
    return x.view(torch.int16) if x.element_size() == 2 else x


def in_words(rows: Tensor) -> bool:
    """Return True if rows [n, k] can be viewed as integers of eight bytes, which move faster."""
    size = rows.element_size()
    return rows.is_contiguous() and not (rows.shape[-1] * size % 8 or rows.storage_offset() * size % 8)


def put_rows(into: Tensor, source: Tensor, rows: Tensor, changed: Tensor | None) -> None:
    """Copy rows of one tensor into another. into [n, k], source [all, k]; rows and changed as for Matrix.copy_rows"""
    if changed is None:
        torch.index_select(bits(source), 0, rows, out=bits(into))
    else:
        both = into, source
        to, of = (one.view(torch.int64) for one in both) if all(map(in_words, both)) else map(bits, both)
        to.index_copy_(0, changed, of.index_select(0, rows[changed]))


def put_columns(into: Tensor, source: Tensor, columns: Tensor, changed: Tensor | None) -> None:
    """Copy columns of one tensor into another. into [k, n], source [k, all]; columns and changed as for `put_rows`"""
    if changed is None:
        torch.gather(bits(source), 1, columns.expand(len(source), -1), out=bits(into))
    else:       # in a fraction of the time of index_copy_
        found = bits(source).gather(1, columns[changed].expand(len(source), -1))
        bits(into).scatter_(1, changed.expand(len(source), -1), found)


def take_columns(h: Tensor, columns: Tensor) -> Tensor:
    """Select columns. h [..., I] -> [..., A]. gather is faster than index_select along the last dimension."""
    return bits(h).gather(-1, columns.expand(*h.shape[:-1], -1)).view(h.dtype)


def tensor_bytes(holder: Any) -> int:
    """Return the memory of the tensors among an object's attributes, in bytes."""
    return sum(t.numel() * t.element_size() for t in vars(holder).values() if isinstance(t, Tensor))
