"""Ranks without torchrun: processes that are forked from one that has imported PyTorch, which starting anew takes 3 s.

They get the variables that torchrun sets and a store that outlives them, as torchrun keeps one. No agent ends the
others when one of them fails.
"""

import os
import runpy
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from torch.distributed import TCPStore

from popengine.engine.distributed import PATIENCE

# Seconds after which a process that has not ended will not end: half of what a rank waits for one that is gone. A bound
# on how fast ranks end would fail on a busy machine.
ENDED_WITHIN = PATIENCE.total_seconds() / 2
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload([
    "torch.distributed", "popengine.engine.distributed", "popengine.engine.loading", "popengine.engine.results",
    "popengine.evaluation.scoring", "popengine.studies.by_name", "popengine.text.chat",
])


class Said(NamedTuple):
    """Exit status of each rank, and what all of them wrote."""

    statuses: list[int]
    out: str
    err: str


def rank(environment: dict[str, str], words: list[str], out: str, err: str) -> None:
    """Run a command in this process, which is forked for it: `-m module flags` or `file arguments`."""
    os.environ.update(environment)
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


def run_ranks(folder: Path, count: int, *words: object) -> Said:
    """Run a command on so many ranks, which write to files of an existing folder. TimeoutError if one of them stays."""
    store, ended_by = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), time.monotonic() + ENDED_WITHIN
    out, err = folder / f"{store.port}.out", folder / f"{store.port}.err"
    processes = [
        CONTEXT.Process(target=rank, args=(
            {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"},
            [str(word) for word in words], str(out), str(err),
        ))
        for index in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0.0, ended_by - time.monotonic()))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    if late:
        said = err.read_text()[-3000:] if err.exists() else ""
        raise TimeoutError(f"{len(late)} of {count} ranks had not ended after {ENDED_WITHIN:.0f} s: {said}")
    return Said([process.exitcode or 0 for process in processes], out.read_text(), err.read_text())
