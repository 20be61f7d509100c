"""Started by torchrun, a command's processes join here: one speaks, all read the same, and none waits for a dead one.

    torchrun --nproc-per-node N -m popengine.generate ...
"""

import io
import os
import signal
import sys
import time
from argparse import Namespace
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from models.ranks import Ranks, ranks_here
from weights.errors import InputError

# How long ranks wait for each other at the start, and how long for the one that says what is wrong, in seconds.
START_S, LAST_WORDS_S = 60.0, 1.0
FAILED = "popengine failed"


def join(flags: Namespace) -> None:
    """Find the other ranks. InputError where one does not come, or was started otherwise."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    signal.signal(signal.SIGTERM, stop)
    wait_for_all(rank, size)
    on_cards = getattr(flags, "device", "cpu") != "cpu" and torch.cuda.is_available()
    if on_cards:
        if (local := int(os.environ["LOCAL_RANK"])) >= torch.cuda.device_count():
            raise InputError(f"rank {rank} has no card: {torch.cuda.device_count()} are here; start fewer per node")
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if on_cards else "gloo")
    require_alike(f"PyTorch {torch.__version__}")
    said = {name: value for name, value in vars(flags).items() if name not in ("ckpt", "words")}
    require_alike(f"flags {said}")
    sys.stdin = io.TextIOWrapper(io.BufferedReader(SharedInput(ranks_here())), "utf-8")
    if rank > 0:
        sys.stdout, sys.stderr = open(os.devnull, "w"), open(os.devnull, "w")  # noqa: SIM115  # for the whole run


def wait_for_all(rank: int, size: int) -> None:
    """Until every rank is there, or one has failed: torch.distributed would wait for it."""
    store, began = connect(), time.monotonic()
    store.set(f"popengine came {rank}", "")
    while not store.check([f"popengine came {one}" for one in range(size)]):
        if store.check([FAILED]):
            raise InputError("another rank has failed")
        if time.monotonic() - began > START_S:
            raise InputError(f"not all of {size} ranks have started within {START_S:.0f} s")
        time.sleep(0.05)


def connect() -> dist.TCPStore:
    """The table of words that torchrun keeps for all ranks."""
    return dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=10)
    )


def require_alike(mine: str) -> None:
    """InputError where this is not the same on all ranks; by itself a process is alike."""
    ranks = ranks_here()
    if ranks.size == 1:
        return
    all_have: list[Any] = [None] * ranks.size
    dist.all_gather_object(all_have, mine)
    for rank, other in enumerate(all_have):
        if other != all_have[0]:
            raise InputError(f"ranks must be started alike: rank 0 has {all_have[0]}, rank {rank} has {other}")


def stop(*_: Any) -> NoReturn:
    raise InputError("torchrun has stopped this rank: another one has ended, or the run was interrupted")


def last_words(error: BaseException) -> tuple[str, int]:
    """What to say of an error, and the status to end with. Empty where another rank has said what is wrong."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)       # torchrun ends all ranks once one has ended
    status = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 2
    try:
        first = connect().add(FAILED, 1) == 1
    except (RuntimeError, OSError):     # torchrun itself has gone
        first = True
    if not first:
        time.sleep(LAST_WORDS_S)
        return "", status
    return f"rank {os.environ['RANK']}: {in_words(error)}", status


def in_words(error: BaseException) -> str:
    line = " ".join(str(error).split())[:300]
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in line:
        return f"too little memory: {line}; start more ranks, or use a --dtype with fewer bytes"
    if isinstance(error, dist.DistError) or "gloo" in line or "Connection" in line:
        return f"another rank has ended, or cannot be reached ({line[:100]})"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return line if isinstance(error, InputError) else f"{type(error).__name__}: {line}"


class SharedInput(io.RawIOBase):
    """Standard input of all ranks: what rank 0 reads. All must read alike."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.file = ranks, sys.stdin.buffer if ranks.rank == 0 else None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # One line at a time, so that a conversation need not end before it begins.
        given: list[Any] = [self.file.readline(len(buffer)) if self.file is not None else None]
        dist.broadcast_object_list(given, 0)
        buffer[: len(given[0])] = given[0]
        return len(given[0])
