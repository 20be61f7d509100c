"""A matrix: what a layer multiplies with. How weights are stored and multiplied is decided here and nowhere else.

A layer asks its matrix and never looks at the weight. A matrix multiplies (one row, a few or many), becomes a compact
copy of chosen rows or columns of another, and knows its norms and what a step reads of it. Another form of weights
(packed, a device's share) is another class in models/matrix_forms.py, put in its place by `replace_matrices`.

in and out are the sides of a weight [out, in]; B batch, T rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.products import is_fused, row_count, written_out, written_out_rows

# Up to how many rows a product is written out or added up instead of left to a library (tools/measure_products.py).
FEW_ROWS = {torch.float32: 8, torch.bfloat16: 3}
# In float32 a library is faster with the weight to the left, up to so many rows.
WEIGHT_FIRST_ROWS = 32


class Matrix(nn.Linear):
    """y = x W^T + b, W [out, in] stored row by row.

    A parameter of its module like any nn.Linear when it is loaded; a compact copy holds plain tensors.
    """

    def reset_parameters(self) -> None:
        # There is nothing to fill on the meta device, and PyTorch would import its compiler to find that out.
        if not self.weight.is_meta:
            super().reset_parameters()

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> "Matrix":
        """A matrix of these tensors as they are. weight [out, in], bias [out]"""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.out_features, made.in_features = weight.shape
        made.weight, made.bias = weight, bias  # type: ignore[assignment]
        return made

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]"""
        rows = row_count(x)
        if rows > WEIGHT_FIRST_ROWS or not is_fused(x):
            return F.linear(x, self.weight, self.bias)
        if rows <= FEW_ROWS.get(x.dtype, 1):
            y = written_out(x, self.weight)
        elif x.dtype == torch.float32:
            y = (self.weight @ x.flatten(0, -2).t()).t().reshape(*x.shape[:-1], -1)
        else:
            return F.linear(x, self.weight, self.bias)
        return y if self.bias is None else y + self.bias

    def reads_chosen_columns(self, rows: int) -> bool:
        """Whether `multiply_columns` reads the chosen columns alone for so many rows, and is worth calling."""
        return False

    def multiply_columns(self, x: Tensor, columns: Tensor) -> Tensor:
        """The product with the columns named and no others. x [..., k], int64 [k] -> [..., out]"""
        y = x @ self.values()[:, columns].t()
        return y if self.bias is None else y + self.bias

    def multiply_kept(self, x: Tensor, keep: Tensor, count: int) -> Tensor:
        """The product with the inputs that are kept, as if the others were 0.

        x [..., in]; keep bool [in] or [..., in], `count` of them True in each row -> [..., out]
        """
        return self(x.masked_fill(~keep, 0))

    def reads_chosen_rows(self, rows: int) -> bool:
        """Whether `multiply_rows` reads the chosen rows alone for so many rows of x, and is worth calling."""
        return rows == 1

    def multiply_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """What the rows named put out, and no others. x [..., in], int64 [k] -> [..., k]"""
        y = written_out_rows(x, self.values(), rows) if is_fused(x) else F.linear(x, self.values()[rows])
        return y if self.bias is None else y + self.bias[rows]

    def empty_rows(self, rows: int) -> "Matrix":
        """Room for a compact copy of so many rows, uninitialised, with a bias if this has one."""
        return self.empty(rows, self.in_features)

    def empty_columns(self, columns: int) -> "Matrix":
        """The same of so many columns."""
        return self.empty(self.out_features, columns)

    def empty(self, rows: int, columns: int) -> "Matrix":
        bias = None if self.bias is None else self.bias.new_empty(rows)
        return type(self).of(self.weight.new_empty(rows, columns), bias)

    def copy_rows(self, source: "Matrix", rows: Tensor) -> None:
        """Become the rows named of the matrix that this was made room for, and their biases. int64 [out]"""
        torch.index_select(bits(source.weight), 0, rows, out=bits(self.weight))
        if source.bias is not None:
            torch.index_select(source.bias, 0, rows, out=self.bias)

    def copy_columns(self, source: "Matrix", columns: Tensor) -> None:
        """Become the columns named of the matrix that this was made room for, and its bias. int64 [in]"""
        torch.gather(bits(source.weight), 1, columns.expand(source.out_features, -1), out=bits(self.weight))
        if source.bias is not None:
            self.bias.copy_(source.bias)

    def values(self) -> Tensor:
        """The weight as plain numbers [out, in], for what is computed from it once."""
        return self.weight

    def column_norms(self) -> Tensor:
        """l2 norm of each column, float32 [in]"""
        return torch.linalg.vector_norm(self.values().float(), dim=0)

    def row_norms(self) -> Tensor:
        """l2 norm of each row, float32 [out]"""
        return torch.linalg.vector_norm(self.values().float(), dim=1)

    def read_bytes(self, rows: int | None = None, columns: int | None = None) -> int:
        """What a product reads of so many rows and columns (None: all), in bytes; biases do not count."""
        out = self.out_features if rows is None else rows
        return out * (self.in_features if columns is None else columns) * self.weight.element_size()

    def held_bytes(self) -> int:
        """Memory of the weight and the bias, in bytes."""
        return tensor_bytes(self)

    def kind(self) -> tuple[Any, ...]:
        """Class, dtype, groups and whether there is a bias: matrices that agree in this can become one."""
        return type(self), self.weight.dtype, self.bias is not None

    @classmethod
    def stack(cls, matrices: Sequence["Matrix"]) -> "Matrix":
        """One matrix of several of one kind, one below the other, which become parts of it and keep their values."""
        bias = matrices[0].bias
        return cls.of(
            share_storage([matrix.weight for matrix in matrices]),
            None if bias is None else share_storage([matrix.bias for matrix in matrices]),
        )


def replace_matrices(model: nn.Module, make: Callable[[Matrix], Matrix]) -> None:
    """Put what `make` makes of it in the place of every matrix of a model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is Matrix:
                setattr(parent, name, make(child))


def share_storage(parameters: Sequence[Tensor]) -> Tensor:
    """Make tensors of like layout parts of one, along the first dimension, and return it; their values stay."""
    first, sizes = parameters[0], [len(parameter) for parameter in parameters]
    # An inference tensor only if the parameters are (a model loaded during inference): training must be able to go on
    # with those that are not, and the two kinds do not mix.
    with torch.inference_mode(first.is_inference()), torch.no_grad():
        by_columns = first.dim() == 2 and not first.is_contiguous()
        shape = (first.shape[1], sum(sizes)) if by_columns else (sum(sizes), *first.shape[1:])
        together = first.new_empty(shape).t() if by_columns else first.new_empty(shape)
        for parameter, part in zip(parameters, together.split(sizes), strict=True):
            part.copy_(parameter)
            parameter.data = part
    return together


def bits(x: Tensor) -> Tensor:
    """Half-precision numbers as the integers with the same bits: on a CPU they are gathered 1.6 times as fast."""
    return x.view(torch.int16) if x.element_size() == 2 else x


def take_columns(h: Tensor, columns: Tensor) -> Tensor:
    """h [..., I] -> [..., A], the columns named. gather is index_select, but faster along the last dimension."""
    return bits(h).gather(-1, columns.expand(*h.shape[:-1], -1)).view(h.dtype)


def tensor_bytes(holder: Any) -> int:
    """Memory of the tensors that an object has for attributes, in bytes."""
    return sum(t.numel() * t.element_size() for t in vars(holder).values() if isinstance(t, Tensor))
