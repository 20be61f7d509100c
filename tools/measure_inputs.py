"""Time products that leave out inputs, in bfloat16 and int8 on one thread, in turns: python tools/measure_inputs.py

The shapes are those of Qwen2.5-Coder-1.5B. Times are processor time, and each product reads another weight than the
one before, so that no cache holds it. docs/measurements/other_methods.md has the figures.
"""

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from models.compiled import CPU_OPTIONS
from models.matrices.candidates import compiled_calls, in_turns
from models.matrices.forms import ColumnMatrix
from models.matrices.products import best_places
from popengine.studies.input_sparsity import ChosenInputs

SHAPES = {"gate or up": (8960, 1536), "down": (1536, 8960), "q, k and v": (2048, 1536), "o": (1536, 1536)}
SHARES = (0.2, 0.3, 0.35, 0.5, 0.6)
SECONDS = 20.0
# Bytes of all weights of a shape.
WEIGHT_BYTES = 400_000_000


def in_bfloat16(rows: int, columns: int) -> dict[str, Callable[[int], Tensor]]:
    """Return what is timed for a weight of this shape, by its name. The argument chooses one of several weights."""
    weights = [torch.randn(rows, columns, dtype=torch.bfloat16) for _ in range(WEIGHT_BYTES // (2 * rows * columns))]
    by_columns = [ColumnMatrix.of(weight.t().contiguous().t(), None) for weight in weights]
    x, norms = torch.randn(1, 1, columns, dtype=torch.bfloat16), torch.rand(columns)
    timed: dict[str, Callable[[int], Tensor]] = {
        "torch.mv": lambda number: torch.mv(weights[number % len(weights)], x.flatten()),
        "compiled": compiled_calls("bfloat16", weights, CPU_OPTIONS)["8 streams"],
        "by columns": lambda number: by_columns[number % len(weights)](x),
    }
    for share in SHARES:
        chosen = [ChosenInputs(matrix, round((1 - share) * columns), norms) for matrix in by_columns]
        timed[f"{share:g} left out"] = partial(lambda chosen, number: chosen[number % len(chosen)](x), chosen)
    kept = round(0.7 * columns)
    timed["choosing"] = lambda _: best_places((x.float().abs() * norms).flatten(), kept)
    return timed


def in_int8(rows: int, columns: int) -> dict[str, Callable[[int], Tensor]]:
    """Return the same for int8: products of dense steps, and FBGEMM's bag of bytes, which popengine does not use."""
    count = WEIGHT_BYTES // (rows * columns)
    weights = [torch.randint(-127, 128, (rows, columns), dtype=torch.int8) for _ in range(count)]
    # Each row of a bag's table ends with its scale and its least value in float32.
    ends = torch.tensor([1.0, -128.0]).view(torch.uint8).expand(columns, -1)
    tables = [torch.cat([(weight.t().short() + 128).byte(), ends], dim=1) for weight in weights]
    dense = compiled_calls("int8", weights, CPU_OPTIONS)
    timed: dict[str, Callable[[int], Tensor]] = {"PyTorch's product": dense["packed"], "compiled": dense["8 streams"]}

    def bag(kept: int, number: int) -> Tensor:
        chosen, x = torch.arange(kept) * columns // kept, torch.ones(kept)
        return torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            tables[number % len(tables)], chosen, torch.zeros(1, dtype=torch.int64), per_sample_weights=x
        )

    assert torch.equal(bag(columns, 0)[0], weights[0].float().sum(dim=1)), "a bag adds up all columns"
    timed["bag"] = partial(bag, columns)
    for share in SHARES:
        timed[f"{share:g} left out"] = partial(bag, round((1 - share) * columns))
    return timed


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    for candidates, (product, shape) in itertools.product((in_bfloat16, in_int8), SHAPES.items()):
        least = {name: min(times) for name, times in in_turns(candidates(*shape), SECONDS).items()}
        said = ", ".join(f"{name} {seconds * 1000:.2f}" for name, seconds in least.items())
        print(f"{product} {candidates.__name__}: {said}")


if __name__ == "__main__":
    main()
