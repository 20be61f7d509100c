"""How weights lie in memory, and how the product of one token with them is computed: where decoding spends its time.

A step reads every active weight once, so a product is as fast as the memory is read. PyTorch's own product of a single
row reads it at a third of its speed on a CPU. Two others take its place, each with a layout of its own: written out
inside torch.compile (weights stored by rows), and added up column by column in eager code (stored by columns).
docs/speed.md has the figures.

B batch, in and out the sides of a weight [out, in], K columns.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def written_out(x: Tensor) -> bool:
    """Whether products are written out as multiply and sum: one token, on a CPU, inside torch.compile.

    A library's matrix product of a single row reads weights at a third of the memory's speed, and so it does inside
    compiled code. The same product written out becomes one loop that Inductor fuses with its neighbours and that reads
    as fast as memory gives (figures in docs/speed.md). In eager code it would write every product to memory instead.
    """
    return torch.compiler.is_compiling() and x.device.type == "cpu" and x.shape[:-1].numel() == 1


def stored_by_columns(weight: Tensor) -> bool:
    """Whether a matrix [out, in] lies in memory column by column, as lay_columns_together leaves it."""
    return weight.stride(0) == 1 < weight.stride(1)


def adds_up_columns(x: Tensor, weight: Tensor) -> bool:
    """Whether a product is computed column by column: one token, on a CPU, eagerly, weights stored that way."""
    return x.device.type == "cpu" and x.shape[:-1].numel() == 1 and stored_by_columns(weight)


@lru_cache(maxsize=1024)
def stretches(count: int, parts: int) -> tuple[Tensor, Tensor]:
    """The indices below `count`, and where each of `parts` stretches of them begins: int64, on the CPU."""
    with torch.inference_mode(False):       # they outlive this call, and may next be needed outside inference
        return torch.arange(count), torch.arange(parts) * count // parts


def add_up_columns(weight: Tensor, columns: Tensor, factors: Tensor) -> Tensor:
    """sum over k of factors[k] * weight[:, columns[k]]: one token's product that reads the columns named and no others.

    That is what embedding_bag computes from a table of the columns. Each thread adds up a stretch of them, and so one
    token's product takes half the time of F.linear's (figures in docs/speed.md).

    weight [out, in], stored by columns, on the CPU; columns int64 [K]; factors [K] -> [out]
    """
    _, begins = stretches(len(columns), torch.get_num_threads())
    sums = F.embedding_bag(columns, weight.t(), offsets=begins, per_sample_weights=factors, mode="sum")
    return sums.sum(dim=0)


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear for decode steps, whichever way is fastest. x [B, 1, in], weight [out, in], bias [out] -> [B, 1, out]"""
    if written_out(x):
        row = x.flatten().float()                                                   # [in]
        # as_strided has Inductor keep the row, instead of computing it (a norm, say) anew for every row of the weight.
        y = (weight.float() * row.as_strided(row.shape, (1,))).sum(dim=-1).to(x.dtype)      # [out]
    elif adds_up_columns(x, weight):
        columns, _ = stretches(weight.shape[1], 1)
        y = add_up_columns(weight, columns, x.flatten())                            # [out]
    else:
        return F.linear(x, weight, bias)
    return (y if bias is None else y + bias).view(*x.shape[:-1], -1)


def lay_columns_together(linear: nn.Linear) -> None:
    """Store a weight [out, in] column by column instead of row by row, for add_up_columns; its values stay the same."""
    linear.weight.data = linear.weight.data.t().contiguous().t()


def empty_like_layout(weight: Tensor, rows: int, columns: int) -> Tensor:
    """An uninitialised [rows, columns] matrix, stored by columns if `weight` is."""
    return weight.new_empty(columns, rows).t() if stored_by_columns(weight) else weight.new_empty(rows, columns)


def share_storage(parameters: Sequence[Tensor]) -> Tensor:
    """Make matrices [rows, width] (or vectors) parts of one tensor, one below the other, and return it.

    They stay parameters of their own, with the values and the layout they had.
    """
    sizes = [len(parameter) for parameter in parameters]
    first = parameters[0]
    # An inference tensor only if the parameters are (a model loaded during inference): training must be able to go on
    # with those that are not, and the two kinds do not mix.
    with torch.inference_mode(first.is_inference()), torch.no_grad():
        if first.dim() == 1:
            together = first.new_empty(sum(sizes))
        else:
            together = empty_like_layout(first, sum(sizes), first.shape[1])
        for parameter, part in zip(parameters, together.split(sizes), strict=True):
            part.copy_(parameter)
            parameter.data = part
    return together


def bits(x: Tensor) -> Tensor:
    """Half-precision numbers as the integers with the same bits: on a CPU they are gathered 1.6 times as fast."""
    return x.view(torch.int16) if x.element_size() == 2 else x


def select_rows(weight: Tensor, rows: Tensor, out: Tensor) -> None:
    """out[i] = weight[rows[i]], whichever way the two (alike) are stored."""
    weight, out = bits(weight), bits(out)
    if stored_by_columns(weight):
        torch.gather(weight.t(), 1, rows.expand(weight.shape[1], -1), out=out.t())
    else:
        torch.index_select(weight, 0, rows, out=out)


def take_channels(h: Tensor, channels: Tensor) -> Tensor:
    """h [..., I] -> [..., A], the channels named. gather is index_select, but faster along the last dimension."""
    return bits(h).gather(-1, channels.expand(*h.shape[:-1], -1)).view(h.dtype)


def column_norms(weight: Tensor) -> Tensor:
    """l2 norm of each column, float32. weight [rows, columns] -> [columns]"""
    return torch.linalg.vector_norm(weight.float(), dim=0)


def tensor_bytes(holder: object) -> int:
    """Memory of the tensors that an object has for attributes, in bytes."""
    return sum(t.numel() * t.element_size() for t in vars(holder).values() if isinstance(t, Tensor))
