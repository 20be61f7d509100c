"""Packed matrices: eight bits with a scale per row, four bits in groups, and an embedding of eight bits.

A step multiplies with the packed numbers as they are, through PyTorch's own packed products. Those fall behind when
there are many rows (a prompt), which multiply with what the numbers stand for instead, unpacked a stretch at a time, so
that a stretch is still in the processor's cache when it is read. docs/packed.md has the figures.

Activations are bfloat16 (float16 works too); with float32 ones, which the packed products multiply ten times as slowly,
every product unpacks.

in and out are the sides of a weight [out, in], g the size of a group, G = in / g groups of a row; T rows.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.matrices.plain import Matrix, share_storage
from models.matrices.products import fused_gemv, is_fused, row_count
from weights.errors import InputError
from weights.groups import Groups, group

# Up to how many rows a packed product is faster than unpacking, and one that a compiler fuses faster than that
# (tools/measure_packed.py).
FEW_ROWS_WRITTEN_OUT, FEW_ROWS_INT8, FEW_ROWS_INT4 = 3, 8, 16
# PyTorch's product of eight bits reads rows by so many numbers at a time, past their end if need be.
PADDING = 16
# Sizes of groups that the product of four bits knows.
GROUP_SIZES = (256, 128, 64, 32)
# Columns whose halves lie side by side in a GroupedInt8Matrix.
HALVES = 16
# Of drafts: their activations, which packed products want in half precision, and their groups.
DRAFT_DTYPE, DRAFT_GROUP = torch.bfloat16, 32
# Weights of a stretch that is unpacked at once.
STRETCH = 1 << 21


class Int8Matrix(Matrix):
    """Whole numbers from -127 to 127 and a scale for each row: chosen rows and columns are copied as they are.

    weight  int8 [out, in], rows padded with zeros to a multiple of PADDING
    scale   [out], in the dtype of the activations
    """

    scale: Tensor

    @classmethod
    def packed(cls, weight: Tensor, scale: Tensor, columns: int, bias: Tensor | None) -> "Int8Matrix":
        made = cls.of(weight, bias)
        made.in_features, made.scale = columns, scale
        return made  # type: ignore[return-value]

    @classmethod
    def with_room(cls, rows: int, columns: int, like: Tensor, bias: Tensor | None) -> "Int8Matrix":
        """Numbers and scales yet to come. like: of the dtype of the activations, and on their device"""
        new = torch.zeros if columns % PADDING else torch.empty     # only padding has to be zeros
        weight = new(rows, -(-columns // PADDING) * PADDING, dtype=torch.int8, device=like.device)
        return cls.packed(weight, like.new_empty(rows), columns, bias)

    @classmethod
    def nearest(cls, values: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> "Int8Matrix":
        """The nearest there is to plain values [out, in]."""
        rows, columns = values.shape
        made = cls.with_room(rows, columns, torch.empty(0, dtype=dtype, device=values.device), bias)
        return made.fill(values.split(rows_at_once(columns)))

    def fill(self, stretches: Iterable[Tensor | Groups]) -> "Int8Matrix":
        """Become the nearest to plain values or to groups, stretches of rows [n, in] that are all of them together."""
        begin = 0
        for part in stretches:
            values = part.values() if isinstance(part, Groups) else part
            own = values.to(self.scale.device, torch.float32, copy=values is part)
            rows = slice(begin, begin + len(own))
            nearest_int8(own, self.numbers()[rows], self.scale[rows])
            begin = rows.stop
            del part, values, own       # before the next stretch is read: else both are in memory
        return self

    def numbers(self) -> Tensor:
        """int8 [out, in]"""
        return self.weight[:, : self.in_features]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]"""
        rows = row_count(x)
        if rows <= FEW_ROWS_WRITTEN_OUT and is_fused(x):
            y = fused_gemv(x, self.numbers()) * self.scale
        elif rows <= FEW_ROWS_INT8 and has_packed_products(x):
            padded = F.pad(x, (0, self.weight.shape[1] - self.in_features)).flatten(0, -2)
            y = torch.ops.aten._weight_int8pack_mm(padded, self.weight, self.scale).view(*x.shape[:-1], -1)
        else:
            parts = self.numbers().split(rows_at_once(self.in_features))
            y = torch.cat([F.linear(x, part.to(x.dtype)) for part in parts], dim=-1) * self.scale
        return y if self.bias is None else y + self.bias

    def reads_chosen_rows(self, rows: int) -> bool:
        return False            # gathered, a quarter of the bytes takes as long as all of them

    def empty_rows(self, rows: int) -> "Int8Matrix":
        return Int8Matrix.with_room(rows, self.in_features, self.scale, room_for_bias(self, rows))

    def empty_columns(self, columns: int) -> "Int8Matrix":
        return Int8Matrix.with_room(self.out_features, columns, self.scale, room_for_bias(self, self.out_features))

    def copy_rows(self, source: Matrix, rows: Tensor) -> None:
        assert isinstance(source, Int8Matrix)
        super().copy_rows(source, rows)
        torch.index_select(source.scale, 0, rows, out=self.scale)

    def copy_columns(self, source: Matrix, columns: Tensor) -> None:
        if isinstance(source, Int4Matrix):
            source.write_as_int8(columns, self.numbers(), self.scale)
        else:
            assert isinstance(source, Int8Matrix)
            self.numbers().copy_(source.weight.gather(1, columns.expand(source.out_features, -1)))
            self.scale.copy_(source.scale)
        if source.bias is not None:
            self.bias.copy_(source.bias)

    def values(self) -> Tensor:
        return self.numbers().to(self.scale.dtype) * self.scale.unsqueeze(1)

    def read_bytes(self, rows: int | None = None, columns: int | None = None) -> int:
        scales = self.out_features if rows is None else rows
        return super().read_bytes(rows, columns) + scales * self.scale.element_size()

    def kind(self) -> tuple[Any, ...]:
        return *super().kind(), self.scale.dtype

    @classmethod
    def stack(cls, matrices: Sequence[Matrix]) -> "Int8Matrix":
        whole = super().stack(matrices)
        whole.in_features = matrices[0].in_features
        whole.scale = torch.cat([matrix.scale for matrix in matrices if isinstance(matrix, Int8Matrix)])
        return whole  # type: ignore[return-value]


class Int4Matrix(Matrix):
    """Numbers from 0 to 15 in groups along a row, each with a scale and with what 8 stands for.

    Chosen rows stay packed. Chosen columns break the groups, so a copy of columns is an Int8Matrix.

    weight  uint8 [blocks, in, block / 2], as this machine's product wants it (see `layout`); rows are padded to blocks
    groups  [G, out, 2], in the dtype of the activations: value = (number - 8) * groups[..., 0] + groups[..., 1]
    """

    groups: Tensor

    @classmethod
    def packed(cls, weight: Tensor, groups: Tensor, rows: int, bias: Tensor | None) -> "Int4Matrix":
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.out_features, made.in_features = rows, weight.shape[1]
        made.weight, made.bias, made.groups = weight, bias, groups  # type: ignore[assignment]
        return made

    @classmethod
    def of_groups(cls, given: Groups, dtype: torch.dtype, bias: Tensor | None = None) -> "Int4Matrix":
        rows, columns = given.numbers.shape
        made = cls.with_room(rows, columns, given.size, torch.empty(0, dtype=dtype), bias)
        return made.fill([given])

    @classmethod
    def with_room(cls, rows: int, columns: int, size: int, like: Tensor, bias: Tensor | None) -> "Int4Matrix":
        """Numbers and scales yet to come. size: of a group; wider ones than the product knows are several alike"""
        block, _ = layout()
        blocks = -(-rows // block)
        groups = columns // next(known for known in GROUP_SIZES if size % known == 0)
        # Rows that only fill a block are zeros; where there are none, every byte is about to be written.
        new = torch.zeros if rows % block else torch.empty
        weight = new(blocks, columns, block // 2, dtype=torch.uint8, device=like.device)
        return cls.packed(weight, like.new_zeros(groups, blocks * block, 2), rows, bias)

    def fill(self, stretches: Iterable[Groups]) -> "Int4Matrix":
        """Become what groups stand for, stretches of rows that are all of them together, whole blocks but the last."""
        block, halves = layout()
        begin = 0
        for part in stretches:
            rows = slice(begin, begin + len(part.numbers))
            missing = -len(part.numbers) % block                                    # only in the last
            numbers = F.pad(part.numbers, (0, 0, 0, missing)) if missing else part.numbers              # [rows, in]
            first = begin // block
            self.weight[first : first + len(numbers) // block] = pack(numbers.t(), block, halves)
            scale, middle = part.scale.t(), torch.add(part.minimum, part.scale, alpha=8).t()            # [G, rows]
            into = self.groups[:, rows].unflatten(0, (len(scale), -1))              # [G, times, rows, 2]
            into.copy_(torch.stack([scale, middle], dim=-1).unsqueeze(1))
            begin = rows.stop
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]"""
        if row_count(x) <= FEW_ROWS_INT4 and has_packed_products(x):
            width = self.weight.shape[1]
            packed, size = self.weight.view(-1, width // 2), width // len(self.groups)
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.flatten(0, -2), packed, size, self.groups)
            y = y.view(*x.shape[:-1], -1)
        else:
            y = torch.cat([x @ self.transposed(blocks) for blocks, _ in self.stretches()], dim=-1)
        y = y[..., : self.out_features]
        return y if self.bias is None else y + self.bias

    def transposed(self, blocks: slice = slice(None)) -> Tensor:
        """What the numbers of some blocks stand for: [in, rows] in the dtype of the activations."""
        numbers = self.numbers(blocks)                                              # [in, rows]
        rows = numbers.shape[1]
        first = (blocks.start or 0) * layout()[0]
        scale, middle = self.groups[:, first : first + rows].unbind(-1)             # [G, rows]
        least = torch.addcmul(middle, scale, torch.tensor(-8.0, dtype=scale.dtype)) # what 0 stands for
        grouped = numbers.to(scale.dtype).unflatten(0, (len(scale), -1))            # [G, g, rows]
        return torch.addcmul(least.unsqueeze(1), grouped, scale.contiguous().unsqueeze(1)).flatten(0, 1)

    def stretches(self) -> Iterator[tuple[slice, slice]]:
        """Blocks to unpack at once, one stretch after the other, and the rows that they are."""
        block, _ = layout()
        step = max(1, rows_at_once(self.weight.shape[1]) // block)
        for first in range(0, len(self.weight), step):
            yield slice(first, first + step), slice(first * block, (first + step) * block)

    def numbers(self, blocks: slice = slice(None), columns: Tensor | None = None) -> Tensor:
        """Those of some blocks and columns (None: all), unpacked and transposed: uint8 [in, rows]"""
        _, halves = layout()
        packed = self.weight[blocks] if columns is None else self.weight[blocks].index_select(1, columns)
        packed = packed.transpose(0, 1)                                             # [in, blocks, block / 2]
        return torch.stack([packed & 15, packed >> 4], dim=-2 if halves else -1).flatten(1)

    def reads_chosen_rows(self, rows: int) -> bool:
        return False

    def empty_rows(self, rows: int) -> "Int4Matrix":
        bias = room_for_bias(self, rows)
        return Int4Matrix.with_room(rows, self.in_features, self.in_features // len(self.groups), self.groups, bias)

    def empty_columns(self, columns: int) -> Int8Matrix:
        return Int8Matrix.with_room(self.out_features, columns, self.groups, room_for_bias(self, self.out_features))

    def copy_rows(self, source: Matrix, rows: Tensor) -> None:
        assert isinstance(source, Int4Matrix)
        place, above = places_of_rows(F.pad(rows, (0, self.groups.shape[1] - len(rows))))   # padding is dropped again
        step = max(1, STRETCH // source.groups.shape[1])
        for first in range(0, self.weight.shape[1], step):
            columns = slice(first, first + step)
            packed = source.weight[:, columns].transpose(1, 2).flatten(0, 1)        # [blocks * half, in]
            numbers = packed.index_select(0, place) >> above.unsqueeze(1) & 15      # [rows, in]
            self.weight[:, columns] = pack(numbers.t(), *layout())
        scales = pairs(source.groups)[:, rows]                                      # [G, rows]
        pairs(self.groups)[:, : self.out_features] = scales
        if source.bias is not None:
            torch.index_select(source.bias, 0, rows, out=self.bias)

    def write_as_int8(self, columns: Tensor, numbers: Tensor, scale: Tensor) -> None:
        """Fill int8 numbers [out, k] and scales [out] with the columns named, int64 [k].

        A row's scale comes from what its groups can stand for, so that no value has to be looked at before.
        """
        group_of = columns // (self.in_features // len(self.groups))                # [k]
        used = group_of.bincount(minlength=len(self.groups)) > 0                    # [G]
        for blocks, rows in self.stretches():
            step, middle = self.groups[:, rows].float().unbind(-1)                  # [G, rows]
            least = middle - 8 * step                                               # what 0 stands for
            most = torch.maximum(least.abs(), (least + 15 * step).abs())            # [G, rows]
            count = len(scale[rows])                                                # the last block may be padded
            scale[rows] = most[used].amax(dim=0)[:count] / 127
            factor = F.pad(scale[rows].float().clamp(min=1e-30).reciprocal(), (0, most.shape[1] - count))   # [rows]
            values = self.numbers(blocks, columns).float()                          # [k, rows]
            values.mul_((step * factor).index_select(0, group_of)).add_((least * factor).index_select(0, group_of))
            numbers[rows] = values.round_().clamp_(-127, 127).to(torch.int8).t()[:count]

    def values(self) -> Tensor:
        return self.transposed().t()[: self.out_features]

    def column_norms(self) -> Tensor:
        """As Matrix's, a block of rows at a time: unpacked at once, layers would leave 100 MB of holes in the heap."""
        squares = torch.zeros(self.in_features, device=self.weight.device)
        for block in range(len(self.weight)):
            values = self.transposed(slice(block, block + 1))                       # [in, rows], zeros where padded
            squares += torch.linalg.vector_norm(values, dim=1, dtype=torch.float32).square()
        return squares.sqrt()

    def read_bytes(self, rows: int | None = None, columns: int | None = None) -> int:
        out = self.out_features if rows is None else rows
        if columns is not None:
            return out * (columns + self.groups.element_size())
        return out * (self.weight.shape[1] // 2 + 2 * len(self.groups) * self.groups.element_size())

    def kind(self) -> tuple[Any, ...]:
        return *super().kind(), self.groups.dtype, len(self.groups)

    @classmethod
    def stack(cls, matrices: Sequence[Matrix]) -> "Int4Matrix":
        parts = [matrix for matrix in matrices if isinstance(matrix, Int4Matrix)]
        first, rows = parts[0], sum(part.out_features for part in parts)
        bias = None if first.bias is None else share_storage([part.bias for part in parts])
        groups = torch.cat([part.groups[:, : part.out_features] for part in parts], dim=1)
        if all(part.out_features == part.groups.shape[1] for part in parts):        # whole blocks
            return cls.packed(share_storage([part.weight for part in parts]), groups, rows, bias)
        width = first.weight.shape[1]
        whole = cls.with_room(rows, width, width // len(groups), groups, bias)
        numbers = torch.cat([part.numbers()[:, : part.out_features] for part in parts], dim=1)      # [in, rows]
        whole.weight.copy_(pack(F.pad(numbers, (0, whole.groups.shape[1] - rows)), *layout()))
        whole.groups[:, :rows] = groups
        return whole


class GroupedInt8Matrix(Int4Matrix):
    """Whole numbers of eight bits in groups of 16 or of 32 along a row: exactly what most kinds of .gguf files hold.

    PyTorch has no product for them, but a number is 16 h + l. Both halves are columns of an Int4Matrix of twice the
    width: 16 columns of h, then those of l, which multiply x and x / 16. Copies are as an Int4Matrix's.

    weight  uint8 [blocks, 2 in, block / 2]
    groups  [in / 16, out, 2]: of value = s (number - 128) + m the scale 16 s, and z = (8 s + m) 16 / 17: then
            (h - 8) 16 s + z and 1/16 of (l - 8) 16 s + z add up to the value
    """

    @classmethod
    def packed(cls, weight: Tensor, groups: Tensor, rows: int, bias: Tensor | None) -> "GroupedInt8Matrix":
        made = super().packed(weight, groups, rows, bias)
        made.in_features = weight.shape[1] // 2
        return made  # type: ignore[return-value]

    @classmethod
    def of_stretches(cls, rows: int, columns: int, like: Tensor, stretches: Iterable[Groups]) -> "GroupedInt8Matrix":
        """What groups stand for, stretches of rows as for Int4Matrix.fill."""
        made = cls.with_room(rows, 2 * columns, 2 * HALVES, like, None)
        return made.fill(in_halves(part) for part in stretches)  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        if row_count(x) <= FEW_ROWS_INT4 and has_packed_products(x):
            parts = x.unflatten(-1, (-1, 1, HALVES))                                # [..., in / 16, 1, 16]
            x = torch.cat([parts, parts / 16], dim=-2).flatten(-3)                  # [..., 2 in]
        return super().forward(x)

    def transposed(self, blocks: slice = slice(None)) -> Tensor:
        numbers = self.numbers(blocks)                                              # [2 in, rows]
        first = (blocks.start or 0) * layout()[0]
        return joined_values(numbers, self.groups[:, first : first + numbers.shape[1]])

    def rows(self, rows: Tensor) -> Tensor:
        """Some of the rows as plain numbers. int64 [n] -> [n, in]"""
        place, above = places_of_rows(rows)
        half = self.weight.shape[2]
        numbers = self.weight[place // half, :, place % half] >> above.unsqueeze(1) & 15            # [n, 2 in]
        return joined_values(numbers.t(), self.groups[:, rows]).t()

    def empty_rows(self, rows: int) -> "GroupedInt8Matrix":
        bias = room_for_bias(self, rows)
        return self.with_room(rows, self.weight.shape[1], 2 * HALVES, self.groups, bias)  # type: ignore[return-value]

    def write_as_int8(self, columns: Tensor, numbers: Tensor, scale: Tensor) -> None:
        for blocks, rows in self.stretches():
            values = self.transposed(blocks).index_select(0, columns).t()[: len(numbers[rows])]         # [rows, k]
            nearest_int8(values.to(torch.float32, copy=True), numbers[rows], scale[rows])

    @classmethod
    def stack(cls, matrices: Sequence[Matrix]) -> "GroupedInt8Matrix":
        whole = Int4Matrix.stack(matrices)
        return cls.packed(whole.weight, whole.groups, whole.out_features, whole.bias)


def joined_values(numbers: Tensor, groups: Tensor) -> Tensor:
    """What numbers of a GroupedInt8Matrix stand for. uint8 [2 in, rows], groups [in / 16, rows, 2] -> [in, rows]"""
    high, low = numbers.unflatten(0, (-1, 2, HALVES)).unbind(1)                     # [in / 16, 16, rows]
    wide, z = groups.unbind(-1)                                                     # [in / 16, rows]
    scale = wide / 16
    rest = (z.float() * 17 / 16 - 8 * scale.float()).to(scale.dtype)                # m
    signed = (high << 4 | low).to(scale.dtype) - 128                                # whole numbers, which bfloat16 has
    return torch.addcmul(rest.unsqueeze(1), signed, scale.unsqueeze(1)).flatten(0, 1)


def places_of_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Two rows share bytes in an Int4Matrix. Where each lies, and by how many bits it is above: int64, uint8 [n]

    A place counts the bytes of all blocks.
    """
    block, halves = layout()
    half, within = block // 2, rows % block
    place = rows // block * half + (within % half if halves else within // 2)
    return place, 4 * (within // half if halves else within % 2).to(torch.uint8)


def in_halves(given: Groups) -> Groups:
    """The groups of a GroupedInt8Matrix: numbers [out, 2 in], in groups of 32 that are 16 h and the l of the same."""
    size = given.size
    # As whole numbers around 0, as far as eight bits go (those of at most six bits can be moved by 192).
    zero = torch.where(given.scale == 0, 128, -given.minimum / given.scale).round().clamp(-64, 128)   # [out, G]
    rest = given.minimum + zero * given.scale                                       # [out, G]
    moved = given.numbers.unflatten(1, (-1, size)) + (128 - zero).to(torch.uint8).unsqueeze(-1)     # [out, G, g]
    parts = moved.view(len(moved), -1, 1, HALVES)                                   # [out, in / 16, 1, 16]
    numbers = torch.cat([parts >> 4, parts & 15], dim=2).flatten(1)                 # [out, 2 in]
    wide = 16 * given.scale
    minimum = (8 * given.scale + rest) * 16 / 17 - 8 * wide
    return Groups(numbers, *(one.repeat_interleave(size // HALVES, dim=1) for one in (wide, minimum)))


def draft_of(matrix: Matrix) -> Matrix:
    """A copy of few bits to score with: four, where the machine and the groups allow it, else eight."""
    if isinstance(matrix, Int4Matrix) and matrix.groups.dtype == DRAFT_DTYPE:
        return matrix
    four = matrix.weight.device.type == "cpu" and matrix.in_features % DRAFT_GROUP == 0
    values = matrix.values()
    bias = None if matrix.bias is None else matrix.bias.to(DRAFT_DTYPE)
    if four:
        return Int4Matrix.of_groups(group(values, DRAFT_GROUP), DRAFT_DTYPE, bias)
    return Int8Matrix.nearest(values, DRAFT_DTYPE, bias)


class Int8Embedding(nn.Module):
    """The rows of an Int8Matrix as embeddings. tokens int64 [...] -> [..., in]"""

    def __init__(self, matrix: Int8Matrix) -> None:
        super().__init__()
        self.numbers, self.scale = matrix.numbers(), matrix.scale

    def forward(self, tokens: Tensor) -> Tensor:
        return self.numbers[tokens].to(self.scale.dtype) * self.scale[tokens].unsqueeze(-1)


class GroupedInt8Embedding(nn.Module):
    """The rows of a GroupedInt8Matrix as embeddings. tokens int64 [...] -> [..., in]"""

    def __init__(self, matrix: GroupedInt8Matrix) -> None:
        super().__init__()
        self.matrix = (matrix,)             # in a tuple, so that it is no submodule a second time

    def forward(self, tokens: Tensor) -> Tensor:
        return self.matrix[0].rows(tokens.flatten()).unflatten(0, tokens.shape)


class StoredEmbedding(nn.Module):
    """Embeddings whose rows stay as a file has them until they are looked up. tokens int64 [...] -> [..., in]

    stored  uint8 [V, bytes of a row]
    read    makes Groups of the bytes of so many rows
    """

    def __init__(self, stored: Tensor, read: Callable[[Tensor, int], Groups], dtype: torch.dtype) -> None:
        super().__init__()
        self.stored, self.read, self.dtype = stored, read, dtype

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.stored[tokens.flatten()]                                        # [n, bytes of a row]
        return self.read(rows.flatten(), len(rows)).values().to(self.dtype).view(*tokens.shape, -1)


def has_packed_products(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype != torch.float32


def rows_at_once(columns: int, weights: int | None = None) -> int:
    """Rows that have about so many weights (None: STRETCH), in whole blocks of every layout."""
    return max(1, (weights or STRETCH) // columns // 64) * 64


def pairs(groups: Tensor) -> Tensor:
    """Two neighbouring scales as one integer, which is copied in a quarter of the time. [..., 2] -> [...]"""
    return groups.view(torch.int32 if groups.element_size() == 2 else torch.int64).squeeze(-1)


def room_for_bias(matrix: Matrix, rows: int) -> Tensor | None:
    return None if matrix.bias is None else matrix.bias.new_empty(rows)


def nearest_int8(values: Tensor, numbers: Tensor, scale: Tensor) -> None:
    """Fill int8 numbers [out, in] and scales [out] with the nearest to float32 values [out, in], which are overwritten.

    A scale is rounded before the numbers are taken, which then make up for it.
    """
    scale.copy_(torch.maximum(values.amax(dim=1), -values.amin(dim=1)) / 127)
    numbers.copy_(values.div_(scale.float().clamp(min=1e-30).unsqueeze(1)).round_().clamp_(-127, 127))


def pack(numbers: Tensor, block: int, halves: bool) -> Tensor:
    """Two numbers to a byte, block by block of rows. uint8 [in, rows] -> [blocks, in, block / 2]

    halves  whether a byte holds the same place of a block's two halves, or two neighbouring rows
    """
    blocks = numbers.unflatten(1, (-1, block)).transpose(0, 1)                      # [blocks, in, block]
    low, high = blocks.chunk(2, dim=-1) if halves else blocks.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.add(low, high, alpha=16)


@lru_cache(maxsize=1)
def layout() -> tuple[int, bool]:
    """Rows of a block and `halves` of `pack`, as this machine's int4 product wants them.

    That depends on the vector instructions PyTorch uses, so a matrix that it packs itself shows it.
    """
    numbers = torch.randint(0, 16, (64, 32), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    wanted = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 2).view(torch.uint8).flatten()
    for block in (64, 32):
        for halves in (True, False):
            if torch.equal(pack(numbers.t().to(torch.uint8), block, halves).flatten(), wanted):
                return block, halves
    raise InputError("this PyTorch packs numbers of four bits in an order that popengine does not know: use int8")
