"""Packed matrices: int8 with a scale per row, int4 in groups, and embeddings of eight bits.

A step multiplies by the packed integers through PyTorch's own packed products. These are slow for many rows (a prompt).
A prompt therefore multiplies by the dequantised values, unpacked one stretch of rows at a time, so that the stretch is
still in the processor's cache when it is read, in the dtype that the processor multiplies fast.
docs/measurements/packed.md has the figures.

Activations are bfloat16 (float16 works too). Packed products of float32 activations are ten times as slow, so with
float32 every product unpacks.

in and out are the sides of a weight [out, in], g the size of a group, G = in / g groups of a row; T rows.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.matrices.plain import Matrix, put_columns, share_storage
from models.matrices.products import fused_gemv, is_fused, product_dtype, row_count
from weights.errors import InputError
from weights.groups import Groups, by_rows, group, transposed

# Most rows for which a fused product is faster than a packed one, and a packed one (int8, int4) faster than unpacking
# (tools/measure_packed.py).
FEW_ROWS_WRITTEN_OUT, FEW_ROWS_INT8, FEW_ROWS_INT4 = 3, 12, 40
# PyTorch's int8 product reads this many numbers of a row at a time, possibly past the end of the row.
PADDING = 16
# Group sizes that the int4 product supports.
GROUP_SIZES = (256, 128, 64, 32)
# Number of columns whose high and low halves are adjacent in a GroupedInt8Matrix.
HALVES = 16
# Drafts: dtype of activations (packed products need half precision) and group size.
DRAFT_DTYPE, DRAFT_GROUP = torch.bfloat16, 32
# Number of weights that are unpacked at once (a stretch).
STRETCH = 1 << 21
# Number of weights that become float32 at once, to be quantised.
QUANTISED_AT_ONCE = 1 << 18
# Number of columns of an Int4Matrix whose chosen rows are copied at once: they fit into a processor's cache.
COPIED_AT_ONCE = 128
# Bytes that a step must save per byte of a copy of columns in int8. To compute such a byte takes as long as to read 30
# in a step, and an answer has some 128 steps: 30 / 128 (docs/measurements/packed.md).
LEAST_SAVED_AS_INT8 = 1 / 4
# The four lower bits of each of the eight bytes of a word, and the highest bit of each.
LOW_HALVES, SIGNS = 0x0F0F0F0F0F0F0F0F, ~0x7F7F7F7F7F7F7F7F


class Int8Matrix(Matrix):
    """Integers from -127 to 127 and a scale per row. Chosen rows and columns are copied without requantising.

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
        """Allocate numbers and scales, to be filled later. like: a tensor with the activations' dtype and device"""
        new = torch.zeros if columns % PADDING else torch.empty     # only padding must be zero
        weight = new(rows, -(-columns // PADDING) * PADDING, dtype=torch.int8, device=like.device)
        return cls.packed(weight, like.new_empty(rows), columns, bias)

    @classmethod
    def nearest(cls, values: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> "Int8Matrix":
        """Quantise plain values [out, in]."""
        rows, columns = values.shape
        made = cls.with_room(rows, columns, torch.empty(0, dtype=dtype, device=values.device), bias)
        return made.fill(values.split(rows_at_once(columns)))

    def fill(self, stretches: Iterable[Tensor | Groups]) -> "Int8Matrix":
        """Quantise plain values or groups, given as stretches of rows [n, in] that together are all rows.

        A few rows at a time become float32, so that they stay in a processor's cache.
        """
        begin, step = 0, max(1, QUANTISED_AT_ONCE // self.in_features)
        for part in stretches:
            given = part.by_rows() if isinstance(part, Groups) else part
            for first in range(0, len(part), step):
                own = slice(first, first + step)
                values = given.part(0, own).values() if isinstance(given, Groups) else given[own]
                values = values.to(self.scale.device, torch.float32, copy=given is part)
                rows = slice(begin + first, begin + first + len(values))
                nearest_int8(values, self.numbers()[rows], self.scale[rows])
            begin += len(part)
            del part, given, values     # before the next stretch is read: else both are in memory
        return self

    def numbers(self) -> Tensor:
        """Return the numbers without padding, int8 [out, in]."""
        return self.weight[:, : self.in_features]

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the packed numbers, or by unpacked stretches if there are many rows. x [..., in] -> [..., out]"""
        rows = row_count(x)
        if rows <= FEW_ROWS_WRITTEN_OUT and is_fused(x) and self.streams:
            y = fused_gemv(x, self.numbers(), self.streams) * self.scale
        elif rows <= FEW_ROWS_INT8 and has_packed_products(x):
            padded = F.pad(x, (0, self.weight.shape[1] - self.in_features)).flatten(0, -2)
            y = torch.ops.aten._weight_int8pack_mm(padded, self.weight, self.scale).view(*x.shape[:-1], -1)
        else:
            parts, wide = self.numbers().split(rows_at_once(self.in_features)), x.to(product_dtype(x))
            room = wide.new_empty(parts[0].shape)
            y = torch.cat([F.linear(wide, room[: len(part)].copy_(part)) for part in parts], dim=-1)
            y = (y * self.scale).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def reads_chosen_rows(self, rows: int) -> bool:
        return False            # gathering a quarter of the bytes takes as long as reading all

    def empty(self, rows: int, columns: int) -> Matrix:
        made = Int8Matrix.with_room(rows, columns, self.scale, room_for_bias(self, rows))
        made.set_streams(self.streams)
        return made

    def copy_rows(self, source: Matrix, rows: Tensor, changed: Tensor | None = None) -> None:
        assert isinstance(source, Int8Matrix)
        super().copy_rows(source, rows, changed)
        torch.index_select(source.scale, 0, rows, out=self.scale)

    def copy_columns(self, source: Matrix, columns: Tensor, changed: Tensor | None = None) -> None:
        if isinstance(source, Int4Matrix):
            source.write_as_int8(columns, self.numbers(), self.scale)
        else:
            assert isinstance(source, Int8Matrix)
            put_columns(self.numbers(), source.weight, columns, changed)
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
    """Integers from 0 to 15 in groups along a row, each group with a scale and the value of the integer 8.

    Chosen rows stay packed. Chosen columns break the groups, so a copy of columns is an Int8Matrix. The product of this
    matrix is PyTorch's.

    weight  uint8 [blocks, in, block / 2], in this machine's layout (see `layout`); rows are padded to blocks
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
        """Allocate numbers and scales, to be filled later. size: of a group; wide groups are split for the product"""
        block, _ = layout()
        blocks = -(-rows // block)
        groups = columns // next(known for known in GROUP_SIZES if size % known == 0)
        # Rows that pad a block are zero; without padding, every byte will be written.
        new = torch.zeros if rows % block else torch.empty
        weight = new(blocks, columns, block // 2, dtype=torch.uint8, device=like.device)
        return cls.packed(weight, like.new_zeros(groups, blocks * block, 2), rows, bias)

    def fill(self, stretches: Iterable[Groups]) -> "Int4Matrix":
        """Pack groups, given as stretches of rows that together are all rows; all but the last are whole blocks."""
        block, halves = layout()
        begin = 0
        for part in stretches:
            rows = slice(begin, begin + len(part))
            missing = -len(part) % block                                            # only in the last
            numbers = by_rows(part.numbers.t())                                     # [in, rows]
            numbers = F.pad(numbers, (0, missing)) if missing else numbers
            first = begin // block
            pack(numbers, block, halves, self.weight[first : first + numbers.shape[1] // block])
            scale, middle = part.scale.t(), torch.add(part.minimum, part.scale, alpha=8).t()            # [G, rows]
            both = torch.view_as_real(torch.complex(scale, middle))         # [G, rows, 2]; a stack takes thrice as long
            into = self.groups[:, rows].unflatten(0, (len(scale), -1))      # [G, times, rows, 2]
            into.copy_(both.unsqueeze(1))
            begin = rows.stop
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the packed numbers, or by unpacked stretches if there are many rows. x [..., in] -> [..., out]"""
        if self.multiplies_packed(x):
            width = self.weight.shape[1]
            packed, size = self.weight.view(-1, width // 2), width // len(self.groups)
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.flatten(0, -2), packed, size, self.groups)
            y = y.view(*x.shape[:-1], -1)
        else:
            y = self.multiply_unpacked(x)
        y = y[..., : self.out_features]
        return y if self.bias is None else y + self.bias

    def multiplies_packed(self, x: Tensor) -> bool:
        """Return True if the packed product is faster for x; its time grows with the rows. A compiler knows no other"""
        few = FEW_ROWS_INT4 * self.in_features // self.weight.shape[1]
        return has_packed_products(x) and (row_count(x) <= few or torch.compiler.is_compiling())

    def multiply_unpacked(self, x: Tensor) -> Tensor:
        """Multiply by a stretch of unpacked rows after the other. x [..., in] -> [..., rows], those of padding too"""
        wide = x.flatten(0, -2).to(product_dtype(x))                                # [T, in]
        y = wide.new_empty(len(wide), self.groups.shape[1])
        room: Tensor | None = None
        for blocks, rows in self.stretches():
            room = self.transposed(blocks, wide.dtype, room)
            torch.mm(wide, room, out=y[:, rows])
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def transposed(
        self, blocks: slice = slice(None), dtype: torch.dtype | None = None, room: Tensor | None = None
    ) -> Tensor:
        """Dequantise some blocks, transposed: [in, rows].

        dtype  to compute in; None: that of the activations
        room   a result for as many blocks or more, which is overwritten; None: new memory
        """
        block, halves = layout()
        packed = self.weight[blocks].view(torch.int64)
        count, first = len(packed) * block, (blocks.start or 0) * block
        scale, least = self.scales(self.groups[:, first : first + count].to(dtype or self.groups.dtype))   # [G, rows]
        if room is None:
            room = scale.new_empty(self.in_features, count)
        values = room.flatten()[: self.in_features * count].view(self.in_features, count)
        numbers = values.unflatten(1, (-1, 2, block // 2) if halves else (-1, block // 2, 2))
        parts = self.split(packed.transpose(0, 1).flatten(1))       # words change places faster than numbers
        for part, into in zip(parts, numbers.unbind(2 if halves else 3), strict=True):
            into.copy_(part.view_as(into))                                          # [in, blocks, block / 2]
        grouped = values.unflatten(0, (len(scale), -1))                             # [G, g, rows]
        torch.addcmul(least.unsqueeze(1), grouped, scale.unsqueeze(1), out=grouped)
        return values

    @staticmethod
    def split(packed: Tensor) -> tuple[Tensor, Tensor]:
        """Return the numbers in lower and in upper halves of bytes. int64 [in, words] -> 2 times uint8 [in, 8 words]"""
        return (packed & LOW_HALVES).view(torch.uint8), packed.view(torch.uint8) >> 4

    @staticmethod
    def scales(groups: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale of a number of `split`, and the value of 0. [G, rows, 2] -> [G, rows], [G, rows]"""
        both, bits = pairs(groups), 8 * groups.element_size()
        one = torch.int16 if bits == 16 else torch.int32
        scale, middle = both.to(one).view(groups.dtype), (both >> bits).to(one).view(groups.dtype)  # faster than unbind
        return scale, torch.sub(middle, scale, alpha=8)

    def stretches(self) -> Iterator[tuple[slice, slice]]:
        """Yield stretches to unpack at once: a slice of blocks, and the slice of rows in them."""
        block, _ = layout()
        step = max(1, rows_at_once(self.weight.shape[1]) // block)
        for first in range(0, len(self.weight), step):
            yield slice(first, first + step), slice(first * block, (first + step) * block)

    def numbers(self, blocks: slice = slice(None), columns: Tensor | None = None) -> Tensor:
        """Unpack the integers of some blocks and columns (None: all), transposed: uint8 [in, rows]"""
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

    def copying_pays(self, columns: int) -> bool:
        copied = self.read_bytes(columns=columns)
        return self.read_bytes() - copied >= LEAST_SAVED_AS_INT8 * copied

    def copy_rows(self, source: Matrix, rows: Tensor, changed: Tensor | None = None) -> None:
        assert isinstance(source, Int4Matrix)
        # All of them: two rows share each byte, and to replace a tenth takes as long as to copy all.
        block, halves = layout()
        shape = (-1, 2, block // 2) if halves else (-1, block // 2, 2)
        # Rows for the lower and for the upper half of each byte: their bytes in `source`, and their halves of these.
        padded = F.pad(rows, (0, self.groups.shape[1] - len(rows)))
        low, high = padded.view(shape).unbind(1 if halves else 2)                   # [blocks, block / 2]
        (low_place, low_above), (high_place, high_above) = places_of_rows(low), places_of_rows(high)
        for first in range(0, self.weight.shape[1], COPIED_AT_ONCE):
            columns = slice(first, first + COPIED_AT_ONCE)
            packed = transposed(source.weight[:, columns]).flatten(0, 1)            # [blocks * half, columns]
            # Words of eight bytes are shifted in a fifth of the time of bytes. Bits of a neighbour are masked out.
            lower = words(packed, low_place).bitwise_right_shift_(low_above).bitwise_and_(LOW_HALVES)
            upper = words(packed, high_place).bitwise_left_shift_(4 - high_above).bitwise_and_(~LOW_HALVES)
            both = upper.bitwise_or_(lower).view(torch.uint8)                       # [blocks * half, columns]
            self.weight[:, columns] = transposed(both.unflatten(0, low.shape))
        torch.gather(
            pairs(source.groups), 1, rows.expand(len(self.groups), -1), out=pairs(self.groups)[:, : self.out_features]
        )
        if source.bias is not None:
            torch.index_select(source.bias, 0, rows, out=self.bias)

    def write_as_int8(self, columns: Tensor, numbers: Tensor, scale: Tensor) -> None:
        """Fill int8 numbers [out, k] and scales [out] with the given columns, int64 [k].

        A row's scale comes from the range of its groups, so that the values are read only once.
        """
        group_of = columns // (self.in_features // len(self.groups))                # [k]
        used = group_of.bincount(minlength=len(self.groups)) > 0                    # [G]
        for blocks, rows in self.stretches():
            step, middle = self.groups[:, rows].float().unbind(-1)                  # [G, rows]
            least = middle - 8 * step                                               # the value of 0
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
        """Compute column norms block by block: unpacking all at once would leave 100 MB of holes in the heap."""
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
    """Eight-bit integers in groups of 16 or of 32 along a row, exactly as most kinds of .gguf files store them.

    PyTorch has no product for them, but a number is 16 h + l. Both halves are columns of an Int4Matrix of twice the
    width: 16 columns of h, then 16 of l, which multiply x and x / 16. Copies work as in Int4Matrix.

    weight  uint8 [blocks, 2 in, block / 2]
    groups  [in / 16, out, 2]: for value = s (number - 128) + m, the scale 16 s and z = (8 s + m) 16 / 17. Then
            (h - 8) 16 s + z and 1/16 of (l - 8) 16 s + z add up to the value
    """

    @classmethod
    def packed(cls, weight: Tensor, groups: Tensor, rows: int, bias: Tensor | None) -> "GroupedInt8Matrix":
        made = super().packed(weight, groups, rows, bias)
        made.in_features = weight.shape[1] // 2
        return made  # type: ignore[return-value]

    @classmethod
    def of_stretches(cls, rows: int, columns: int, like: Tensor, stretches: Iterable[Groups]) -> "GroupedInt8Matrix":
        """Pack groups, given as stretches of rows as for Int4Matrix.fill."""
        made = cls.with_room(rows, 2 * columns, 2 * HALVES, like, None)
        return made.fill(in_halves(part) for part in stretches)  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        if self.multiplies_packed(x):
            parts = x.unflatten(-1, (-1, 1, HALVES))                                # [..., in / 16, 1, 16]
            x = torch.cat([parts, parts / 16], dim=-2).flatten(-3)                  # [..., 2 in]
        return super().forward(x)

    @staticmethod
    def split(packed: Tensor) -> tuple[Tensor, Tensor]:
        """Return the numbers less 128 alike. int64 [2 in, words] -> 2 times int8 [in, 8 words]"""
        high, low = packed.unflatten(0, (-1, 2, HALVES)).unbind(1)                  # [in / 16, 16, words]
        lower = ((high & LOW_HALVES) << 4).bitwise_or_(low & LOW_HALVES).bitwise_xor_(SIGNS)
        upper = (high & ~LOW_HALVES).bitwise_or_(low >> 4 & LOW_HALVES).bitwise_xor_(SIGNS)
        return lower.flatten(0, 1).view(torch.int8), upper.flatten(0, 1).view(torch.int8)

    @staticmethod
    def scales(groups: Tensor) -> tuple[Tensor, Tensor]:
        wide, z = groups.unbind(-1)                                                 # [in / 16, rows]
        scale = wide / 16
        return scale, (z.float() * 17 / 16 - 8 * scale.float()).to(scale.dtype)     # and m

    def rows(self, rows: Tensor) -> Tensor:
        """Dequantise the given rows. int64 [n] -> [n, in]"""
        place, above = places_of_rows(rows)
        half = self.weight.shape[2]
        numbers = self.weight[place // half, :, place % half] >> above.to(torch.uint8) & 15         # [n, 2 in]
        high, low = numbers.unflatten(1, (-1, 2, HALVES)).unbind(2)                 # [n, in / 16, 16]
        scale, middle = (one.t().unsqueeze(-1) for one in self.scales(self.groups[:, rows]))    # [n, in / 16, 1]
        signed = (high << 4 | low).to(scale.dtype) - 128                            # exact in bfloat16
        return torch.addcmul(middle, signed, scale).flatten(1)

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


def places_of_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Locate rows of an Int4Matrix, two of which share each byte. int64 [...] -> int64 [n], int64 [n, 1]

    Returns the byte of each row, counted over all blocks, and the bits by which the row is shifted in it: 0 or 4.
    """
    rows = rows.flatten()
    block, halves = layout()
    half, within = block // 2, rows % block
    place = rows // block * half + (within % half if halves else within // 2)
    return place, 4 * (within // half if halves else within % 2).unsqueeze(1)


def words(packed: Tensor, rows: Tensor) -> Tensor:
    """Copy rows of bytes and view them as words of eight bytes. uint8 [all, n], int64 [rows] -> int64 [rows, n / 8]"""
    return packed.index_select(0, rows).view(torch.int64)


def in_halves(given: Groups) -> Groups:
    """Split groups into those of a GroupedInt8Matrix: numbers [out, 2 in], each group of 32 is 16 h and their 16 l."""
    size = given.size
    # Shift the integers towards 0, within eight bits (integers of at most six bits can be moved by 192).
    zero = torch.where(given.scale == 0, 128, -given.minimum / given.scale).round().clamp(-64, 128)   # [out, G]
    rest = given.minimum + zero * given.scale                                       # [out, G]
    moved = given.numbers.unflatten(1, (-1, size)) + (128 - zero).to(torch.uint8).unsqueeze(-1)     # [out, G, g]
    parts = moved.flatten(1).t().unflatten(0, (-1, HALVES))                         # [in / 16, 16, out]
    numbers = torch.stack([parts >> 4, parts & 15], dim=1).flatten(0, 2).t()        # [out, 2 in]
    wide = 16 * given.scale
    minimum = (8 * given.scale + rest) * 16 / 17 - 8 * wide
    return Groups(numbers, *(one.repeat_interleave(size // HALVES, dim=1) for one in (wide, minimum)))


def draft_of(matrix: Matrix) -> Matrix:
    """Make a low-bit copy to score with: four bits if device and width allow it, else eight."""
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
    """Embeddings whose rows stay as stored in the file until they are looked up. tokens int64 [...] -> [..., in]

    stored  uint8 [V, bytes of a row]
    read    converts the bytes of n rows to Groups
    """

    def __init__(self, stored: Tensor, read: Callable[[Tensor, int], Groups], dtype: torch.dtype) -> None:
        super().__init__()
        self.stored, self.read, self.dtype = stored, read, dtype
        self.width = read(stored[0], 1).values().shape[1]

    def forward(self, tokens: Tensor) -> Tensor:
        if not tokens.numel():
            return torch.empty(*tokens.shape, self.width, dtype=self.dtype)         # no row has no number of blocks
        rows = self.stored[tokens.flatten()]                                        # [n, bytes of a row]
        return self.read(rows.flatten(), len(rows)).values().to(self.dtype).view(*tokens.shape, self.width)


def has_packed_products(x: Tensor) -> bool:
    """Return True if PyTorch's packed products are fast for x: on a CPU, in half precision."""
    return x.device.type == "cpu" and x.dtype != torch.float32


def rows_at_once(columns: int, weights: int | None = None) -> int:
    """Return the number of rows with about `weights` weights (None: STRETCH), in whole blocks of every layout."""
    return max(1, (weights or STRETCH) // columns // 64) * 64


def pairs(groups: Tensor) -> Tensor:
    """View two neighbouring scales as one integer, which is copied in a quarter of the time. [..., 2] -> [...]"""
    return groups.view(torch.int32 if groups.element_size() == 2 else torch.int64).squeeze(-1)


def room_for_bias(matrix: Matrix, rows: int) -> Tensor | None:
    """Allocate a bias of `rows` numbers if the matrix has one."""
    return None if matrix.bias is None else matrix.bias.new_empty(rows)


def nearest_int8(values: Tensor, numbers: Tensor, scale: Tensor) -> None:
    """Fill int8 numbers [out, in] and scales [out] with the nearest to float32 values [out, in], which are overwritten.

    Numbers are computed from the rounded scale, so that they compensate for its rounding. A scale rounded to bfloat16
    is off by at most 1 / 256, so that no quotient rounds to more than 127. In float16 a small scale can be too small.
    """
    scale.copy_(torch.maximum(values.amax(dim=1), -values.amin(dim=1)) / 127)
    values.div_(scale.float().clamp(min=1e-30).unsqueeze(1)).round_()
    numbers.copy_(values.clamp_(-127, 127) if scale.dtype == torch.float16 else values)


def pack(numbers: Tensor, block: int, halves: bool, into: Tensor | None = None) -> Tensor:
    """Pack two numbers into each byte, per block of rows. uint8 [in, rows] -> [blocks, in, block / 2]

    halves  True: a byte holds the same place of a block's two halves; False: two neighbouring rows
    into    the result, which is overwritten; None: new memory
    """
    blocks = numbers.unflatten(1, (-1, block)).transpose(0, 1)                      # [blocks, in, block]
    low, high = blocks.chunk(2, dim=-1) if halves else blocks.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.add(low, high, alpha=16, out=into)


@lru_cache(maxsize=1)
def layout() -> tuple[int, bool]:
    """Return the rows of a block and `halves` of `pack` for this machine's int4 product.

    They depend on the vector instructions that PyTorch uses, so they are read off a matrix that PyTorch packs itself.
    """
    numbers = torch.randint(0, 16, (64, 32), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    wanted = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 2).view(torch.uint8).flatten()
    for block in (64, 32):
        for halves in (True, False):
            if torch.equal(pack(numbers.t().to(torch.uint8), block, halves).flatten(), wanted):
                return block, halves
    raise InputError("this PyTorch packs numbers of four bits in an order that popengine does not know: use int8")
