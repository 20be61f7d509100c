"""The products of one row that compete, per weight format, and the choice of the fastest.

Which product is fastest depends on the processor, so it is measured: of eager steps when a model is loaded, of compiled
steps when they are first made (popengine/engine/choices.py). All candidates compute the same product.
docs/measurements/products.md has the figures, and the products that win nowhere.

out and in are the sides of a weight [out, in].
"""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models.matrices.forms import ColumnMatrix, RowMatrix
from models.matrices.packed import Int4Matrix, Int8Matrix
from models.matrices.plain import Matrix
from models.matrices.products import fused_gemv

# A product, with one of several weights of a shape that a number chooses; and candidates by name.
Call = Callable[[int], Tensor]
Calls = dict[str, Call]
# Candidates by weight format; the first is the default.
# Eager: the class of matrix with this layout and product.
PLAIN: dict[str, type[ColumnMatrix] | type[RowMatrix]] = {"columns added up": ColumnMatrix, "torch.mv": RowMatrix}
EAGER: dict[str, Mapping[str, type[Matrix]]] = {
    "float32": PLAIN,
    "bfloat16": PLAIN,
    "int8": {"packed": Int8Matrix},
    "int4": {"packed": Int4Matrix},
}
# Compiled: `streams` of a matrix (models/matrices/plain.py).
WRITTEN_OUT = {"8 streams": 8, "4 streams": 4, "2 streams": 2, "1 stream": 1}
COMPILED: dict[str, dict[str, int]] = {
    "float32": WRITTEN_OUT,
    "bfloat16": WRITTEN_OUT,
    "int8": {"8 streams": 8, "packed": 0},
    "int4": {"packed": 0},
}
# Formats whose compiled product is chosen for each shape: of their candidates only one needs the compiler.
PER_SHAPE = {"int8"}
# A candidate replaces the default if its time is below this share of the default's: noise must change no choice.
CLEARLY = 0.9
# The time of this thread on a processor, which other programs do not lengthen; elsewhere this clock is too coarse.
CLOCK = time.thread_time if time.get_clock_info("thread_time").resolution <= 1e-6 else time.perf_counter
# Least and most rounds of a measurement.
LEAST_ROUNDS, MOST_ROUNDS = 4, 16
# Most bytes of a weight that one timed product reads: of a larger weight a stretch of rows stands for the whole.
MOST_BYTES = 1 << 25


def format_of(matrix: Matrix) -> str | None:
    """Return the weight format of a matrix, as the tables name it; None if only one product is known for it."""
    if isinstance(matrix, Int4Matrix):
        return "int4"
    if isinstance(matrix, Int8Matrix):
        return "int8"
    if type(matrix) not in (Matrix, *PLAIN.values()):
        return None
    name = str(matrix.weight.dtype).removeprefix("torch.")
    return name if name in EAGER else None


def stretches_of(weight: Tensor) -> Sequence[Tensor]:
    """Split a weight into stretches of equal size, at most MOST_BYTES each, for timing: contiguous [n, in].

    Of a weight stored by columns the same memory is read as rows. The values are then in other places, which changes no
    time.
    """
    rows, columns = weight.shape
    stored = (weight if weight.is_contiguous() else weight.t()).reshape(rows, columns)
    most = max(1, MOST_BYTES // (columns * weight.element_size()))
    each = min(rows, max(1, most // 64) * 64)
    return [part for part in stored.split(each) if len(part) == each]


def eager_calls(weights: Sequence[Tensor]) -> Calls:
    """Return the eager candidates of a plain format for weights of one shape, contiguous [n, in].

    Columns are timed on the same memory, read as a weight by columns.
    """
    rows, columns = weights[0].shape
    matrices: dict[str, list[Matrix]] = {
        "columns added up": [ColumnMatrix.of(one.reshape(columns, rows).t(), None) for one in weights],
        "torch.mv": [RowMatrix.of(one, None) for one in weights],
    }
    x = torch.ones(1, columns, dtype=weights[0].dtype)
    return {name: multiplying(matrices[name], x) for name in PLAIN}


def packed_calls(matrices: Sequence[Matrix]) -> Calls:
    """Return the eager product of packed matrices of one shape, which has no competitor."""
    return {"packed": multiplying(matrices, torch.ones(1, matrices[0].in_features, dtype=torch.bfloat16))}


def multiplying(matrices: Sequence[Matrix], x: Tensor) -> Call:
    """Return the product of x with the matrix that a number chooses."""
    return lambda number: matrices[number % len(matrices)](x)


def compiled_calls(kind: str, weights: Sequence[Tensor], options: dict[str, Any]) -> Calls:
    """Return the compiled candidates of a format, for weights of one shape. options: of the compiler"""
    # The candidates are versions of one function to the compiler.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
    dtype = torch.bfloat16 if kind == "int8" else weights[0].dtype
    x, scale = torch.ones(1, weights[0].shape[1], dtype=dtype), torch.ones(len(weights[0]), dtype=dtype)

    def call(streams: int) -> Call:
        def written_out(weight: Tensor) -> Tensor:
            return fused_gemv(x, weight, streams)

        def packed(weight: Tensor) -> Any:
            return torch.ops.aten._weight_int8pack_mm(x, weight, scale)

        run = torch.compile(written_out, dynamic=False, fullgraph=True, options=options) if streams else packed
        return lambda number: run(weights[number % len(weights)])

    return {name: call(streams) for name, streams in COMPILED[kind].items()}


@torch.inference_mode()
def in_turns(
    calls: Calls, seconds: float, clock: Callable[[], float] = CLOCK
) -> dict[str, list[float]]:
    """Time functions in turns, and return the seconds of every call by name. seconds: about as long as this may take

    Every call has another number, so that functions that choose a weight by it find none of theirs in a cache.
    """
    numbers = itertools.count()
    for call in calls.values():
        call(next(numbers))                 # a first call prepares
    times: dict[str, list[float]] = {name: [] for name in calls}
    began = clock()
    for number in range(MOST_ROUNDS):
        if number >= LEAST_ROUNDS and clock() - began > seconds:
            break
        for name, call in calls.items():
            start = clock()
            call(next(numbers))
            times[name].append(clock() - start)
    return times


def fastest(times: dict[str, list[float]]) -> str:
    """Return the name of the fastest candidate: the first, unless another is clearly faster in minimum and median."""
    default = next(iter(times))

    def is_clear(name: str) -> bool:
        return all(of(times[name]) < CLEARLY * of(times[default]) for of in (min, statistics.median))

    return min(filter(is_clear, times), key=lambda name: min(times[name]), default=default)
