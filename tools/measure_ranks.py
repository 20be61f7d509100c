"""Measure steps of a model in one process or in ranks of torchrun: time, communication, bytes and memory.

    OMP_NUM_THREADS=1 python tools/measure_ranks.py SHAPE FOLDER [DTYPE] [--compile]
    torchrun --nproc-per-node 2 tools/measure_ranks.py SHAPE FOLDER [DTYPE] [--compile]

Random weights of a shape of popengine.bench; the folder keeps them for the next run.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.cost_model import bytes_per_token
from popengine.benchmark.engines import OwnEngine
from popengine.benchmark.shapes import write_random_checkpoint
from popengine.engine.loading import load
from popengine.engine.processes import is_first
from popengine.studies.settings import DENSE, PruningSettings
from weights.memory import peak_memory_bytes

PROMPT_TOKENS, STEPS = 64, 16


def main() -> None:
    flags = argparse.ArgumentParser()
    for name, default in (("shape", None), ("folder", None), ("dtype", "bfloat16")):
        flags.add_argument(name, nargs=None if default is None else "?", default=default)
    flags.add_argument("--compile", action="store_true")
    given = flags.parse_args()
    folder = Path(given.folder)
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_random_checkpoint(given.shape, folder)
    engine = load(folder, dtype=given.dtype, device="cpu", compile=given.compile)
    ranks, peak = engine.model.config.ranks, peak_memory_bytes(engine.device)
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for the whole run
    print(f"{given.shape}, {given.dtype}: rank {ranks.index} of {ranks.count}, {peak / 1e6:.0f} MB at peak of loading")
    prunings = {"dense": engine.resolve(DENSE), "POP 0.4": engine.resolve(PruningSettings.paper(prune_ratio=0.4))}
    for name, pruning in prunings.items():
        steps = []
        run = iter(engine.run([[0] * PROMPT_TOKENS], STEPS + 4, pruning, ignore_eos=True))
        for _ in range(STEPS + 4):
            began = time.perf_counter()
            next(run)
            steps.append((time.perf_counter() - began) * 1000)
        read, peak = bytes_per_token(engine.model, pruning), peak_memory_bytes(engine.device)
        print(
            f"{name:8} step {median(steps[4:]):.1f} ms; {read / 1e6:.0f} MB read per token and rank, "
            f"{peak / 1e6:.0f} MB at peak"
        )
    for name, pruning in prunings.items():          # last: the profiler takes memory of its own
        between = OwnEngine(name, engine, pruning).share_between_ranks([[0] * PROMPT_TOKENS], STEPS + 4, STEPS)
        print(f"{name:8} {between:.0%} of a step between ranks")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
