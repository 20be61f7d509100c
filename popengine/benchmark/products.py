"""The table of `popengine bench --products`: every candidate for the product of one row, on a model's own weights.

models/matrices/candidates.py names the candidates. Those of one weight take turns.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from models.compiled import CPU_OPTIONS
from models.matrices.candidates import (
    COMPILED,
    MOST_ROUNDS,
    PER_SHAPE,
    compiled_calls,
    eager_calls,
    in_turns,
    packed_calls,
)
from popengine.benchmark.benchmark import SUMMED_BYTES, header
from popengine.benchmark.shapes import write_random_checkpoint
from popengine.benchmark.table import align, heading
from popengine.engine.choices import Choices, Place, alike, layouts, measured_on
from popengine.engine.loading import choose_device, load
from weights.default_checkpoint import default_checkpoint
from weights.errors import InputError

# Seconds for the candidates of one weight.
SECONDS = 1.0


def measure(flags: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Time the products of the flags' checkpoint or shape and return the results as JSON."""
    checkpoint = write_random_checkpoint(flags.shape, folder) if flags.shape else flags.ckpt or default_checkpoint()
    result = header(flags, checkpoint, choose_device(flags.device))
    array = torch.ones(SUMMED_BYTES // 4)
    result["bandwidth_gb_per_s"] = array.nbytes / min(in_turns({"sum": lambda _: array.sum()}, SECONDS)["sum"]) / 1e9
    result["products"] = {}
    for dtype in flags.dtype:
        for form in flags.weights:
            if form not in ("auto", "plain") and dtype == "float32":
                continue                            # packed products need half precision
            engine = load(checkpoint, dtype=dtype, device=flags.device, weights=form, compile=False)
            choices = Choices()
            for (kind, out, columns), places in alike(engine.model).items():
                name = f"{kind} {out} x {columns}"
                if name not in result["products"]:
                    result["products"][name] = products_of(kind, name, places, choices, flags.compile)
    if not result["products"]:
        raise InputError("no product to time: packed weights need --dtype bfloat16 or float16")
    return result


@torch.inference_mode()
def products_of(
    kind: str, name: str, places: list[Place], choices: Choices, compiles: bool
) -> list[dict[str, Any]]:
    """Time the candidates of one format and shape, and return a row for each."""
    if kind in ("int8", "int4"):
        first, *others = (getattr(*place) for place in places)
        matrices = [first, *(one for one in others if one.out_features == first.out_features)]
        eager, read, chosen = packed_calls(matrices), first.read_bytes(), "packed"
    else:
        weights = measured_on(places)
        eager, read = eager_calls(weights), weights[0].nbytes
        chosen = choices.choose(f"eager {name}", layouts(places), None)
    rows = [row("eager", one, times, read, one == chosen) for one, times in in_turns(eager, SECONDS).items()]
    if compiles and kind != "int4":                 # whose compiled product is the eager one
        weights = measured_on(places)
        found = in_turns(compiled_calls(kind, weights, CPU_OPTIONS), SECONDS)
        key = f"compiled {name}" if kind in PER_SHAPE else f"compiled {kind}"
        chosen = choices.choose(key, COMPILED[kind], None)
        rows += [row("compiled", one, times, weights[0].nbytes, one == chosen) for one, times in found.items()]
    return rows


def row(mode: str, name: str, times: list[float], read: int, chosen: bool) -> dict[str, Any]:
    """Return the figures of a candidate: its least and median time, and the bytes of weights that it reads."""
    return {
        "mode": mode, "product": name, "microseconds": min(times) * 1e6,
        "median_microseconds": statistics.median(times) * 1e6, "gb_per_s": read / min(times) / 1e9, "chosen": chosen,
    }


def describe(result: dict[str, Any]) -> str:
    """Write the table as text."""
    memory = result["bandwidth_gb_per_s"]
    lines = [
        *heading(result),
        f"measured  processor time of a thread, least and median of up to {MOST_ROUNDS} products in turns, "
        f"{result['threads']} threads; this memory gives {memory:.1f} GB/s",
    ]
    for name, rows in result["products"].items():
        table = [[name, "us", "median", "GB/s", "of memory", ""]]
        for one in rows:
            table.append([
                f"  {one['mode']}: {one['product']}", f"{one['microseconds']:.0f}",
                f"{one['median_microseconds']:.0f}", f"{one['gb_per_s']:.1f}", f"{one['gb_per_s'] / memory:.0%}",
                "chosen" if one["chosen"] else "",
            ])
        lines += ["", *(line.rstrip() for line in align(table))]
    return "\n".join(lines)
