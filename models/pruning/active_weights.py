"""The weights that a step multiplies with: copies of the active channels, views of the whole matrices, or these.

H hidden size, R retained and C candidate channels.
"""

from functools import partial
from typing import Any

from models.feed_forward import FeedForward
from models.matrices.forms import ChosenColumns, ChosenRows, by_columns
from models.matrices.plain import Matrix
from models.pruning.partition import ChannelPartition

# A matrix that a step multiplies with: a compact copy, or a view that selects from the whole.
AnyMatrix = Any
# Bytes that a step must save per byte that it still reads, or else nothing is copied. To copy a byte takes as long as
# to read up to 9 in a step, and an answer has some 128 steps: 8 / 128 (docs/measurements/packed.md).
LEAST_SAVED = 1 / 16
# Largest share of changed channels at which copying them alone is faster than copying all (packed.md, as above).
FEW_CHANGED = 1 / 4


class ActiveWeights:
    """Compact copies of the active channels' weights, in buffers allocated once and filled at every partition.

    Where a copy of down_proj's columns would save too little, a step multiplies with the whole down_proj.

    held  the partition of the last copy since the prompt began; None: there is none, or the device is no CPU and would
          have to wait to count what changed
    """

    gate: AnyMatrix
    up: AnyMatrix
    down: AnyMatrix
    held: ChannelPartition | None = None

    def __init__(self, ffn: FeedForward, channels: int) -> None:
        self.gate, self.up = ffn.gate_proj.empty_rows(channels), ffn.up_proj.empty_rows(channels)
        pays = ffn.down_proj.copying_pays(channels)
        self.down = ffn.down_proj.empty_columns(channels) if pays else view_of_columns(ffn.down_proj, channels)
        self.kinds = kinds_of(ffn)

    def fill(self, ffn: FeedForward, partition: ChannelPartition) -> None:
        """Copy the weights of the active channels, in their order, or of those alone that are new."""
        channels = partition.active                                                 # [R + C]
        changed = None if self.held is None else (channels != self.held.active).nonzero().flatten()     # [n]
        if changed is not None and len(changed) > FEW_CHANGED * len(channels):
            changed = None
        self.gate.copy_rows(ffn.gate_proj, channels, changed)
        self.up.copy_rows(ffn.up_proj, channels, changed)
        self.down.copy_columns(ffn.down_proj, channels, changed)
        self.held = partition if channels.device.type == "cpu" else None

    def fits(self, ffn: FeedForward) -> bool:
        """Return True if these buffers can hold the channels of another network: its matrices are of the same kinds."""
        return self.kinds == kinds_of(ffn)

    def held_bytes(self) -> int:
        """Return the memory of the copies, in bytes."""
        return sum(matrix.held_bytes() for matrix in (self.gate, self.up, self.down))


class LookedUpWeights(ActiveWeights):
    """No copies: a step multiplies with the whole matrices and drops inactive channels."""

    def __init__(self, ffn: FeedForward, channels: int) -> None:
        self.gate, self.up = ChosenRows(ffn.gate_proj, channels), ChosenRows(ffn.up_proj, channels)
        self.down = view_of_columns(ffn.down_proj, channels)


class WholeWeights(ActiveWeights):
    """The network's own matrices, if every channel is active: there is nothing to copy."""

    def __init__(self, ffn: FeedForward, down: Matrix | None = None) -> None:
        self.gate, self.up, self.down = ffn.gate_proj, ffn.up_proj, ffn.down_proj if down is None else down

    def fill(self, ffn: FeedForward, partition: ChannelPartition) -> None:
        pass

    def held_bytes(self) -> int:
        return 0


def view_of_columns(matrix: Matrix, columns: int) -> AnyMatrix:
    """Make what multiplies with chosen columns of a matrix without a copy."""
    return matrix.in_form(partial(ChosenColumns, columns=columns))  # type: ignore[arg-type]  # multiplies alike


def down_by_columns(ffn: FeedForward) -> Matrix:
    """Return down_proj in a layout that reads chosen columns alone: a copy if the weight is stored by rows."""
    made: Matrix = ffn.once("down by columns", lambda: ffn.down_proj.in_form(by_columns))
    return made


def channel_bytes(ffn: FeedForward, rows: int | None = None, columns: int | None = None) -> int:
    """Compute the bytes that a step reads of `rows` rows of gate and up and `columns` columns of down; None: all."""
    return ffn.gate_proj.read_bytes(rows=rows) + ffn.up_proj.read_bytes(rows=rows) + down_bytes(ffn, columns)


def down_bytes(ffn: FeedForward, columns: int | None) -> int:
    """Compute the bytes that a step reads of `columns` columns of down: the whole matrix if copying does not pay."""
    pays = columns is not None and ffn.down_proj.copying_pays(columns)
    return ffn.down_proj.read_bytes(columns=columns if pays else None)


def kinds_of(ffn: FeedForward) -> list[object]:
    """Return the storage kinds of the three matrices of a network."""
    return [matrix.kind() for matrix in (ffn.gate_proj, ffn.up_proj, ffn.down_proj)]
