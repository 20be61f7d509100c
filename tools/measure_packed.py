"""Time every product of packed weights beside the plain one, and measure the loss of quality by group size.

    python tools/measure_packed.py                      # products
    python tools/measure_packed.py --text FILE          # groups of 32, 64 and 128 in the default checkpoint's layers
    python tools/measure_packed.py --ckpt FILE          # error of each type of a quantised checkpoint after loading

Products alternate over more matrices than fit into the cache. Results are microseconds (median of 9) and GB/s of
weights. Groups are used if their size divides a row. The default checkpoint's weights already have groups of 32, so
that 32 changes nothing and larger groups show the added loss. A type's error is ||loaded - stored|| / ||stored||.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from measure_products import microseconds, report
from torch import Tensor

from models.matrices.packed import Int4Matrix, Int8Matrix
from models.matrices.plain import Matrix
from models.matrices.products import fused_gemv
from popengine.engine.loading import load
from popengine.evaluation.scoring import cut_windows, read_text, score_text
from popengine.studies.settings import DENSE
from weights.checkpoint import open_checkpoint
from weights.groups import group

# out, in: gate and up, down of SmolLM2-135M; its lm_head; gate and up, down of a 1B model.
SHAPES = [(1536, 576), (576, 1536), (49152, 576), (8192, 2048), (2048, 8192)]
ROWS = (1, 2, 4, 8, 16, 128)
GROUPS = (32, 64, 128)
ROWS_OF_A_KIND = 512                                # of each matrix
BYTES = 100_000_000                                 # of plain matrices to take turns over


def as_packed(matrix: Int8Matrix, x: Tensor) -> Tensor:
    return torch.ops.aten._weight_int8pack_mm(x, matrix.weight, matrix.scale)


def as_written_out(matrix: Int8Matrix, x: Tensor) -> Tensor:
    return fused_gemv(x, matrix.weight) * matrix.scale


def both_rounded(matrix: Int8Matrix, x: Tensor) -> Tensor:
    """Activations as whole numbers too, a scale for each row."""
    scale = x.abs().amax(dim=1, keepdim=True).float() / 127
    y = torch._int_mm((x / scale).round().to(torch.int8), matrix.numbers().t())
    return (y * scale * matrix.scale).to(x.dtype)


def in_groups(matrix: Int4Matrix, x: Tensor) -> Tensor:
    packed, size = matrix.weight.view(-1, matrix.in_features // 2), matrix.in_features // len(matrix.groups)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, size, matrix.groups)


@torch.inference_mode()
def products() -> None:
    torch._dynamo.config.recompile_limit = 64
    written = torch.compile(as_written_out, dynamic=False)
    for out, columns in SHAPES:
        values = [torch.randn(out, columns, dtype=torch.bfloat16) for _ in range(max(2, BYTES // (2 * out * columns)))]
        int8 = [Int8Matrix.nearest(weight, torch.bfloat16) for weight in values]
        int4 = {
            size: [Int4Matrix.of_groups(group(weight, size), torch.bfloat16) for weight in values]
            for size in GROUPS if columns % size == 0
        }
        for rows in ROWS:
            x = torch.randn(rows, columns, dtype=torch.bfloat16)
            print(f"{out} x {columns}, {rows} rows")

            def timed(what: str, product: Callable[..., Tensor], matrices: list[Matrix], x: Tensor = x) -> None:
                report(what, microseconds(lambda matrix: product(matrix, x), matrices), matrices[0].read_bytes())

            timed("bfloat16, F.linear", Matrix.forward, [Matrix.of(weight, None) for weight in values])
            timed("int8, aten's packed product", as_packed, int8)
            if rows <= 4:
                timed("int8, written out and compiled", written, int8)
            if rows > 16:
                timed("int8, unpacked a stretch at a time", Int8Matrix.forward, int8)
                timed("int8, activations too", both_rounded, int8)
            for size, matrices in int4.items():
                timed(f"int4, aten's packed product, groups of {size}", in_groups, matrices)
            if rows > 16:
                timed("int4, unpacked a stretch at a time", Int4Matrix.forward, int4[32])


@torch.inference_mode()
def groups(text: Path) -> None:
    for size in (None, *GROUPS):
        engine = load(dtype="bfloat16", weights="plain")
        for matrix in engine.model.model.modules():
            if size is not None and isinstance(matrix, Matrix) and matrix.in_features % size == 0:
                matrix.weight.copy_(group(matrix.weight, size).values())
        windows = cut_windows(read_text(text, engine.tokenizer), engine.tokenizer, 128, 128, 24)
        summary = score_text(engine, windows, engine.resolve(DENSE), False, None)
        print(f"groups of {size}: perplexity {summary.perplexity:.3f}")


@torch.inference_mode()
def kinds(path: str) -> None:
    squares: dict[str, Tensor] = {}                                                 # of the errors, of the weights
    with open_checkpoint(path) as checkpoint:
        for name, entry in checkpoint.entries.items():
            if entry.stored is None or len(entry.shape) != 2:
                continue
            rows = slice(0, ROWS_OF_A_KIND)
            stored = checkpoint.read(name, rows)                                    # [rows, in]
            if entry.groups:
                four = Int4Matrix.of_groups(checkpoint.read_groups(name, rows), torch.bfloat16)
                loaded = Int4Matrix.packed(four.weight, four.groups.float(), four.out_features, None).values()
            else:
                eight = Int8Matrix.nearest(stored, torch.bfloat16)
                loaded = eight.numbers() * eight.scale.float().unsqueeze(1)
            both = torch.stack([(loaded - stored).square().sum(), stored.square().sum()])
            what = f"{entry.stored} as {'int4' if entry.groups else 'int8'}"
            squares[what] = squares.get(what, torch.zeros(2)) + both
            checkpoint.release(name)
    for what, (error, whole) in squares.items():
        print(f"{what}: {float((error / whole).sqrt()):.2%}")


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--text", type=Path)
    flags.add_argument("--ckpt")
    given = flags.parse_args()
    if given.ckpt is not None:
        kinds(given.ckpt)
    else:
        products() if given.text is None else groups(given.text)
