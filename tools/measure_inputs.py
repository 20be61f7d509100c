"""Time products that leave out inputs, in bfloat16 on one thread, in turns: python tools/measure_inputs.py

The shapes are those of Qwen2.5-Coder-1.5B. Times are processor time, and each product reads another weight than the
one before, so that no cache holds it. docs/measurements/other_methods.md has the figures.
"""

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


def candidates(rows: int, columns: int) -> dict[str, Callable[[int], Tensor]]:
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


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    for product, shape in SHAPES.items():
        least = {name: min(times) for name, times in in_turns(candidates(*shape), SECONDS).items()}
        print(product, ", ".join(f"{name} {seconds * 1000:.2f}" for name, seconds in least.items()), sep=": ")


if __name__ == "__main__":
    main()
