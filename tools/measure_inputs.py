"""Time products that leave out inputs, in bfloat16 on one thread, in turns: python tools/measure_inputs.py

The shapes are those of Qwen2.5-Coder-1.5B. docs/measurements/other_methods.md has the figures.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from models.matrices.forms import ColumnMatrix
from models.matrices.plain import Matrix
from models.matrices.products import keep_best, places
from popengine.studies.input_sparsity import ChosenInputs

SHAPES = {"gate or up": (8960, 1536), "down": (1536, 8960), "q, k and v": (2048, 1536), "o": (1536, 1536)}
SHARES = (0.2, 0.3, 0.5, 0.6)
TURNS = 60


def candidates(rows: int, columns: int) -> dict[str, Callable[[], Tensor]]:
    """Return what is timed for a weight of this shape, by its name."""
    weight, x = torch.randn(rows, columns, dtype=torch.bfloat16), torch.randn(1, 1, columns, dtype=torch.bfloat16)
    by_rows, by_columns = Matrix.of(weight, None), ColumnMatrix.of(weight.t().contiguous().t(), None)
    norms, kept, threshold = torch.rand(columns), round(0.7 * columns), 0.5
    timed: dict[str, Callable[[], Tensor]] = {"by rows": lambda: by_rows(x), "by columns": lambda: by_columns(x)}
    for share in SHARES:
        chosen = ChosenInputs(by_columns, round((1 - share) * columns), norms)
        timed[f"{share:g} left out"] = lambda chosen=chosen: chosen(x)  # type: ignore[misc]
    timed["choosing"] = lambda: places(keep_best(x.float().abs() * norms, kept).flatten(), kept)
    timed["threshold"] = lambda: (x.float().abs().mul(norms).flatten() > threshold).nonzero()
    return timed


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    for product, shape in SHAPES.items():
        timed = candidates(*shape)
        least = dict.fromkeys(timed, float("inf"))
        for _ in range(TURNS):
            for name, run in timed.items():
                began = time.perf_counter()
                run()
                least[name] = min(least[name], time.perf_counter() - began)
        print(product, ", ".join(f"{name} {seconds * 1000:.2f}" for name, seconds in least.items()), sep=": ")


if __name__ == "__main__":
    main()
