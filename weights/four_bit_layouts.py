"""The layouts of GPTQ and AWQ: four-bit matrices in the safetensors files of the Hub.

X.weight [out, in] is replaced by X.qweight, X.qzeros, X.scales (and X.g_idx): eight numbers per int32, a scale and a
zero point for each group of neighbours in a row, w = scale (number - zero). Layouts that do not fit this exactly are
refused. Sources: AutoGPTQ (https://github.com/AutoGPTQ/AutoGPTQ), GPTQModel (https://github.com/ModelCloud/GPTQModel),
AutoAWQ (https://github.com/casper-hansen/AutoAWQ).

Version 1 of GPTQ stores each zero point minus one, in two variants. AutoGPTQ's kernels treat each four bits separately:
zero = (stored + 1) & 15. GPTQModel subtracts and adds 0x11111111 on the whole int32, so that a zero point of 0 borrows
from its neighbour. The two differ only beside a stored 15, and no file says which variant it uses. `borrow_evidence`
decides from the numbers: weights lie around 0, hence the numbers of a group lie around its zero point.

out and in are the dimensions of a weight, g the group size, G = in / g groups.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weights.entries import TensorEntry
from weights.errors import InputError
from weights.groups import Groups

# AWQ's order of eight neighbours in an int32, lowest bits first.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# Number that GPTQModel subtracts from eight zero points at once.
EIGHT_ONES = 0x11111111
# Bound on the groups of a matrix that are used as evidence.
MOST_EVIDENCE = 4096


@dataclass(frozen=True)
class Layout:
    """Storage layout of a checkpoint's matrices.

    method      "gptq" or "awq"
    less_one    zero points are stored minus one (version 1 of GPTQ)
    borrows     a stored zero point of 0 borrows from its neighbour
    group_size  group_size of config.json; None: not given; -1: a row is one group
    """

    method: str
    less_one: bool = False
    borrows: bool = False
    group_size: int | None = None

    def shape(self, qweight: TensorEntry) -> tuple[int, int]:
        """Return (out, in) of the matrix."""
        first, second = qweight.shape
        return (second, 8 * first) if self.method == "gptq" else (8 * second, first)

    def groups(self, qweight: Tensor, qzeros: Tensor, scales: Tensor, rows: slice = slice(None)) -> Groups:
        """Return some or all rows of a matrix.

        qweight int32 [in / 8, out] (AWQ: [in, out / 8]), qzeros int32 [G, out / 8], scales [G, out]
        """
        if self.method == "gptq":
            numbers = eight(qweight[:, rows].t())                                   # [rows, in]
            zeros = self.zeros(qzeros)                                              # [G, out]
        else:
            first, last, _ = rows.indices(8 * qweight.shape[1])
            eights = qweight[:, first // 8 : -(-last // 8)]                         # int32s that contain the rows
            numbers, zeros = in_awq_order(eights)[:, first % 8 :][:, : last - first].t(), in_awq_order(qzeros)
        scale = scales[:, rows].float().t().contiguous()                            # [rows, G]
        return Groups(numbers.contiguous(), scale, -scale * zeros[:, rows].t().float())

    def zeros(self, qzeros: Tensor) -> Tensor:
        """Unpack the zero points of GPTQ: int32 [G, out / 8] -> uint8 [G, out]"""
        if not self.less_one:
            return eight(qzeros)
        return eight(plus_eight_ones(qzeros)) if self.borrows else (eight(qzeros) + 1) & 15


def eight(packed: Tensor) -> Tensor:
    """Unpack four-bit numbers, lowest bits first: int32 [rows, n] -> uint8 [rows, 8 n]"""
    octets = packed.contiguous().view(torch.uint8)                                  # [rows, 4 n], lowest first
    return torch.stack([octets & 15, octets >> 4], dim=-1).flatten(1)


def in_awq_order(packed: Tensor) -> Tensor:
    """Unpack four-bit numbers in AWQ's order: int32 [n, out / 8] -> uint8 [n, out]"""
    return eight(packed).unflatten(1, (-1, 8))[..., torch.tensor(AWQ_ORDER).argsort()].flatten(1)


def plus_eight_ones(qzeros: Tensor) -> Tensor:
    """Add 0x11111111 modulo 2^32, as GPTQModel does. int32 -> int32"""
    return (qzeros.long() + EIGHT_ONES + 2**31).remainder(2**32).sub(2**31).int()


def borrow_evidence(qweight: Tensor, qzeros: Tensor) -> float:
    """Return a number above 0 if a matrix's zero points seem to borrow, below 0 if not, 0 without evidence.

    The sum runs over groups whose zero point differs between the two readings. Each group adds its squared distance
    from the mean number to the zero point without a borrow, minus that with one. Groups with a stored 15 are left
    out, because AutoGPTQ's packer fills the rest of an int32 with them.

    qweight int32 [in / 8, out], qzeros int32 [G, out / 8]
    """
    stored, borrowed = eight(qzeros), eight(plus_eight_ones(qzeros))                # [G, out]
    alone = (stored + 1) & 15
    group, row = torch.nonzero((borrowed != alone) & (stored != 15))[:MOST_EVIDENCE].unbind(1)      # [n] each
    if not len(group):
        return 0.0
    size = len(qweight) // len(qzeros)              # int32s per group
    words = qweight[group[:, None] * size + torch.arange(size), row[:, None]]       # [n, size]
    mean = eight(words).float().mean(dim=1)                                         # [n]
    return float(((mean - alone[group, row]).square() - (mean - borrowed[group, row]).square()).sum())


def find_layout(config: Mapping[str, Any], path: Path) -> Layout | None:
    """Read the quantisation settings of config.json. Raises InputError for an unsupported kind."""
    about = config.get("quantization_config")
    if about is None:
        return None
    method = about.get("quant_method") if isinstance(about, dict) else None
    if method not in ("gptq", "awq"):
        raise InputError(
            f"{path} is quantised ({str(method)[:40]!r}); only GPTQ and AWQ with 4 bits and .gguf files are supported: "
            "use the checkpoint that is not quantised, with --weights int8 or int4"
        )
    bits, version = about.get("bits"), about.get("version", "gemm")
    if bits != 4:
        raise InputError(f"{path} is quantised to {bits!r} bits by {method}; only 4 are read")
    if method == "awq" and str(version).lower() != "gemm":
        raise InputError(f"{path} has the AWQ layout {str(version)[:40]!r}; only 'gemm' is read")
    size = about.get("group_size")
    if size is not None and (type(size) is not int or (size < 1 and size != -1)):
        raise InputError(f"{path}: quantization_config.group_size is {size!r}, not a number of columns or -1")
    # GPTQModel's `dynamic` gives modules different group sizes.
    less_one = method == "gptq" and about.get("checkpoint_format") != "gptq_v2"
    return Layout(method, less_one, group_size=None if about.get("dynamic") else size)


def matrix_entry(
    name: str, layout: Layout, entries: Mapping[str, TensorEntry], read: Callable[[str], Tensor], path: Path
) -> TensorEntry:
    """Return the entry of a matrix stored as name.qweight, .qzeros and .scales. InputError if they do not fit."""
    if f"{name}.weight" in entries:
        raise InputError(f"{path} holds both {name}.weight and {name}.qweight: remove the one that is not meant")
    parts = [entries.get(f"{name}.{part}") for part in ("qweight", "qzeros", "scales")]
    if any(part is None or len(part.shape) != 2 for part in parts):
        raise InputError(f"{path}: {name} lacks one of qweight, qzeros and scales, or their two dimensions")
    qweight, qzeros, scales = (part for part in parts if part is not None)
    out, columns = layout.shape(qweight)
    count = scales.shape[0]
    sound = (
        qweight.dtype == qzeros.dtype == torch.int32 and scales.dtype.is_floating_point and count > 0
        and scales.shape[1] == out == 8 * qzeros.shape[1] and qzeros.shape[0] == count and columns % count == 0
    )
    if not sound:
        shapes = ", ".join(f"{list(part.shape)} {part.dtype}" for part in (qweight, qzeros, scales))
        raise InputError(f"{path}: qweight, qzeros and scales of {name} do not fit each other: {shapes}")
    size = columns // count
    said = layout.group_size
    if said is not None and size != (columns if said == -1 else min(said, columns)):
        raise InputError(
            f"{path}: config.json has group_size {said}, but {name}.scales has {count} groups for {columns} columns, "
            f"that is groups of {size}"
        )
    if f"{name}.g_idx" in entries:
        in_order = torch.arange(columns, dtype=torch.int32) // size
        if not torch.equal(read(f"{name}.g_idx").to(torch.int32), in_order):
            raise InputError(
                f"{path}: the groups of {name} are not neighbours (desc_act), which int4 products cannot read; "
                "take a checkpoint made without desc_act"
            )
    return TensorEntry((out, columns), torch.float32, layout.method.upper(), groups=size)
