"""Time all considered implementations of the product of few tokens with a weight, and gathering against masking.

    python tools/measure_products.py [--threads N]

Prints microseconds (median of 9) and GB/s of weights, for products that alternate over more matrices than fit into the
cache. In the second table a down_proj of A active channels keeps K of them in a step: masking reads all A columns,
gathering only K. The third table selects a share of all rows or columns.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.matrices.products import add_up_columns, add_up_for_each, fused_gemv

# out, in: gate and up, down, o of SmolLM2-135M; its lm_head; gate and up of a 1B model.
SHAPES = [(1536, 576), (576, 1536), (576, 576), (49152, 576), (8192, 2048)]
GATHERS = [(576, 794, 717), (2048, 4236, 3826)]     # H, A, K: SmolLM2-135M and a 1B model at 40 %
CHOSEN = [(1536, 576), (8192, 2048), (14336, 4096)]  # channels, H: SmolLM2-135M, 1B and 8B models
ROWS = (2, 3, 4, 8, 16)                             # of a batch
BYTES = 200_000_000                                 # of matrices to take turns over


def masked(down: Tensor, h: Tensor, keep: Tensor) -> Tensor:
    return fused_gemv((h * keep)[None], down)


def gathered(down: Tensor, h: Tensor, winners: Tensor) -> Tensor:
    return fused_gemv(h[None, winners], down[:, winners])


def chosen_rows(weight: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    return fused_gemv(x, weight[rows])


def multiplied(weight: Tensor, x: Tensor) -> Tensor:
    return fused_gemv(x, weight)


def microseconds(step: Callable[[Tensor], Tensor], weights: list[Tensor]) -> float:
    times = []
    for _ in range(9):
        began = time.perf_counter()
        for weight in weights:
            step(weight)
        times.append((time.perf_counter() - began) / len(weights))
    return statistics.median(times) * 1e6


def report(what: str, took: float, read: int) -> None:
    print(f"  {what:45} {took:8.0f} us  {read / took / 1e3:6.1f} GB/s")


@torch.inference_mode()
def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--threads", type=int, default=torch.get_num_threads())
    threads = flags.parse_args().threads
    torch.set_num_threads(threads)
    torch._dynamo.config.recompile_limit = 64           # one for every shape below
    fast = {f: torch.compile(f, dynamic=False) for f in (masked, gathered, multiplied, chosen_rows)}
    print(f"{threads} threads")
    for dtype in (torch.float32, torch.bfloat16):
        for rows, columns in SHAPES:
            print(f"{rows} x {columns}, {dtype}")
            read = rows * columns * dtype.itemsize
            by_rows = [torch.randn(rows, columns).to(dtype) for _ in range(max(2, BYTES // read))]
            by_columns = [weight.t().contiguous().t() for weight in by_rows]
            x, everything = torch.randn(columns).to(dtype), torch.arange(columns)
            report("F.linear, by rows", microseconds(lambda w: F.linear(x[None], w), by_rows), read)  # noqa: B023
            report("F.linear, by columns", microseconds(lambda w: F.linear(x[None], w), by_columns), read)  # noqa: B023
            summed = microseconds(lambda w: add_up_columns(w.t(), everything, x, threads), by_columns)  # noqa: B023
            report("columns added up (eager steps)", summed, read)
            report("written out and compiled, by rows (compiled steps)",
                   microseconds(lambda w: fast[multiplied](w, x[None]), by_rows), read)  # noqa: B023
            for rows_of_x in ROWS:
                x = torch.randn(rows_of_x, columns).to(dtype)
                print(f"  {rows_of_x} rows of x")
                report("F.linear, by rows", microseconds(lambda w: F.linear(x, w), by_rows), read)  # noqa: B023
                report("weight to the left, by rows", microseconds(lambda w: (w @ x.t()).t(), by_rows), read)  # noqa: B023
                report("F.linear, by columns", microseconds(lambda w: F.linear(x, w), by_columns), read)  # noqa: B023
                report("columns added up for each row",
                       microseconds(lambda w: add_up_for_each(w.t(), x), by_columns), read)  # noqa: B023
                report("written out and compiled, by rows",
                       microseconds(lambda w: fast[multiplied](w, x), by_rows), read)  # noqa: B023
        for hidden, active, picked in GATHERS:
            print(f"down_proj {hidden} x {active}, of which {picked} win, {dtype}")
            read, fewer = (hidden * count * dtype.itemsize for count in (active, picked))
            by_rows = [torch.randn(hidden, active).to(dtype) for _ in range(max(2, BYTES // read))]
            by_columns = [weight.t().contiguous().t() for weight in by_rows]
            h, winners = torch.randn(active).to(dtype), torch.randperm(active)[:picked].sort().values
            keep = torch.zeros(active, dtype=torch.bool).index_fill(0, winners, True)
            everything = torch.arange(active)
            report("columns added up, masked",
                   microseconds(lambda w: add_up_columns(w.t(), everything, h * keep, threads), by_columns), read)  # noqa: B023
            report("columns added up, gathered (eager steps)",
                   microseconds(lambda w: add_up_columns(w.t(), winners, h[winners], threads), by_columns), fewer)  # noqa: B023
            report("written out, masked (compiled steps)",
                   microseconds(lambda w: fast[masked](w, h, keep), by_rows), read)  # noqa: B023
            report("written out, gathered",
                   microseconds(lambda w: fast[gathered](w, h, winners), by_rows), fewer)  # noqa: B023
        for channels, hidden in CHOSEN:
            read = channels * hidden * dtype.itemsize
            weights = [torch.randn(channels, hidden).to(dtype) for _ in range(max(2, BYTES // read))]
            x, h = torch.randn(1, hidden).to(dtype), torch.randn(channels).to(dtype)
            print(f"{channels} channels of {hidden}, chosen among all, {dtype}")
            report("all rows, written out", microseconds(lambda w: fast[multiplied](w, x), weights), read)  # noqa: B023
            for share in (0.5, 0.4, 0.3, 0.2):
                count = round(share * channels)
                rows = torch.randperm(channels)[:count].sort().values
                few = count * hidden * dtype.itemsize
                report(f"{share:.0%} of the rows, gathered",
                       microseconds(lambda w: fast[chosen_rows](w, x, rows), weights), few)  # noqa: B023
                report(f"{share:.0%} of the columns, added up",
                       microseconds(lambda w: add_up_columns(w, rows, h[rows], threads), weights), few)  # noqa: B023


if __name__ == "__main__":
    main()
