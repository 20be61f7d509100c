"""Time one down_proj at a decode step: masking the losing candidates against reading only the winners' columns.

    python tools/measure_gather.py

H hidden size, A active channels, K of them that win. Prints microseconds, median of 9, for products that take turns
over enough matrices not to be served from the cache.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = [(576, 794, 717, 60), (2048, 4236, 3826, 8)]   # H, A, K, matrices: SmolLM2-135M and a 1B model at 40 %


def masked(down: Tensor, h: Tensor, keep: Tensor) -> Tensor:
    return (down.float() * (h * keep).float()).sum(-1).to(h.dtype)


def gathered_columns(down: Tensor, h: Tensor, winners: Tensor) -> Tensor:
    return (down[:, winners].float() * h[winners].float()).sum(-1).to(h.dtype)


def gathered_rows(transposed: Tensor, h: Tensor, winners: Tensor) -> Tensor:
    return (transposed[winners].float() * h[winners].float()[:, None]).sum(0).to(h.dtype)


def microseconds(step: Callable[[int], Tensor], matrices: int) -> float:
    times = []
    for _ in range(9):
        began = time.perf_counter()
        for index in range(matrices):
            step(index)
        times.append((time.perf_counter() - began) / matrices)
    return statistics.median(times) * 1e6


@torch.inference_mode()
def main() -> None:
    compiled = {f: torch.compile(f, dynamic=False) for f in (masked, gathered_columns, gathered_rows)}
    for hidden, active, picked, count in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            down = [torch.randn(hidden, active).to(dtype) for _ in range(count)]
            transposed = [weight.t().contiguous() for weight in down]               # [A, H]
            # As the engine stores them for eager steps: float32 by columns, bfloat16 by rows.
            eager = [weight.t() for weight in transposed] if dtype == torch.float32 else down
            h = torch.randn(active).to(dtype)
            winners = torch.randperm(active)[:picked].sort().values
            keep = torch.zeros(active, dtype=torch.bool).index_fill(0, winners, True)

            def bag(i: int, rows: list[Tensor] = transposed, h: Tensor = h, winners: Tensor = winners) -> Tensor:
                return F.embedding_bag(winners[None], rows[i], mode="sum", per_sample_weights=h[winners][None])

            ways: dict[str, Callable[[int], Tensor]] = {
                "compiled, masked": lambda i: compiled[masked](down[i], h, keep),  # noqa: B023
                "compiled, gathering columns": lambda i: compiled[gathered_columns](down[i], h, winners),  # noqa: B023
                "compiled, gathering rows": lambda i: compiled[gathered_rows](transposed[i], h, winners),  # noqa: B023
                "eager, masked": lambda i: F.linear((h * keep)[None], eager[i]),  # noqa: B023
                "eager, embedding_bag": bag,
            }
            for name, step in ways.items():
                print(f"{hidden:5} {active:5} {picked:5} {dtype}  {name:28} {microseconds(step, count):8.0f} us")


if __name__ == "__main__":
    main()
