"""Several processes that hold one model: joining those that torchrun has started, what they agree on, who speaks.

`torchrun --nproc-per-node N -m popengine.generate ...` starts a command N times. The first rank reads standard input,
writes results and speaks; of the others nothing is heard, unless one of them is the first to fail.
"""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from models.ranks import ALONE, Ranks
from popengine.engine.processes import is_first, is_one_of_several
from weights.errors import InputError
from weights.mapped_file import contents_digest

# A rank that waits so long for another has lost it; for what a person types all wait as long as he takes.
PATIENCE, OF_A_PERSON = timedelta(minutes=10), timedelta(days=365)
# Flags that name files, which may lie elsewhere on another machine but must hold the same; where results are written.
OF_FILES = ("text", "image", "calibration", "calibration_text", "archive")
RESULTS = ("out", "json", "save_calibration")
# What else may differ: a path of its own for the checkpoint, whose contents loading compares; the words of all these.
OF_A_RANK = ("ckpt", "words")


def ranks(device: str = "auto") -> Ranks:
    """What this process is among others. Joins them where torchrun has started it and nobody has yet.

    device  as it was asked for: on cards ranks talk by NCCL, else by gloo
    """
    if not is_one_of_several():
        return ALONE
    if not distributed.is_initialized():
        cuda = torch.cuda.is_available() and device.startswith(("auto", "cuda"))
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        try:
            distributed.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"the ranks could not join: {error}") from None
    return Ranks(distributed.get_rank(), distributed.get_world_size())


def all_gather(value: Any) -> list[Any]:
    """What each rank has."""
    ours = ranks()
    found: list[Any] = [value] * ours.count
    if ours.count > 1:
        distributed.all_gather_object(found, value)
    return found


def broadcast(value: Any, group: distributed.ProcessGroup | None = None) -> Any:
    """What the first rank has, on every rank: a seed that it has drawn, a text that it has read."""
    box = [value]
    if ranks().count > 1:
        distributed.broadcast_object_list(box, src=0, group=group)
    return box[0]


def patient() -> distributed.ProcessGroup | None:
    """All ranks, who wait for each other as long as a person takes to type."""
    return distributed.new_group(timeout=OF_A_PERSON, backend="gloo") if ranks().count > 1 else None


def agree(on: dict[str, Any]) -> None:
    """InputError where ranks were started with other flags, files or versions than the first."""
    found = all_gather(on)
    for index, theirs in enumerate(found):
        for name in on:
            if theirs[name] != found[0][name]:
                raise InputError(f"rank {index} has another {name} than rank 0: {theirs[name]}, not {found[0][name]}")


def heard_by_all(lines: Iterable[str]) -> Iterator[str]:
    """Lines that the first rank reads, on every rank."""
    iterator, group = iter(lines) if is_first() else iter(()), patient()
    while (line := broadcast(next(iterator, None), group)) is not None:
        yield line


def contents(path: Any) -> str:
    """What a flag's files hold, in short; of what is no file the words."""
    if isinstance(path, list):
        return ", ".join(map(contents, path))
    if path is None or not Path(path).is_file():
        return str(path)
    return f"a file of digest {contents_digest(Path(path))}"


def ended_by_torchrun(*_: Any) -> None:
    """A rank that dies says nothing, and torchrun may end the others before they notice."""
    raise InputError("the ranks have lost each other: torchrun has ended this one, since another is gone")


@contextmanager
def one_of_several(flags: Any) -> Iterator[None]:
    """A command on every rank: joined, of the same flags, and with one of them that speaks and writes results.

    The others write theirs to a folder that is thrown away, which begins as a copy of what is there already.
    """
    if not is_one_of_several():
        yield
        return
    with tempfile.TemporaryDirectory() as thrown_away, open(os.devnull, "w") as nowhere:
        ranks(getattr(flags, "device", "auto"))
        shown = {
            name: contents(value) if name in OF_FILES else str(value)
            for name, value in sorted(vars(flags).items()) if name not in (*RESULTS, *OF_A_RANK)
        }
        ours = sys.modules["popengine"].__version__
        versions = {"version of popengine": ours, "version of PyTorch": torch.__version__}
        agree(versions | {f"--{name.replace('_', '-')}": value for name, value in shown.items()})
        if not is_first():
            for name in RESULTS:
                asked = getattr(flags, name, None)
                if isinstance(asked, (str, Path)):
                    private = Path(thrown_away) / Path(asked).resolve().name
                    if Path(asked).is_dir():
                        shutil.copytree(asked, private)
                    setattr(flags, name, type(asked)(private))
            sys.stdout = sys.stderr = nowhere
        all_gather(None)                 # copied, before the first rank writes
        before = signal.signal(signal.SIGTERM, ended_by_torchrun)
        try:
            yield
            distributed.destroy_process_group()
        finally:
            signal.signal(signal.SIGTERM, before)
            sys.stdout, sys.stderr = sys.__stdout__ or nowhere, sys.__stderr__ or nowhere


def says_why_it_failed() -> bool:
    """Whether this rank is the first to fail, and so says why: asked of the store that torchrun keeps for its ranks."""
    try:
        if distributed.is_initialized():
            store = distributed.distributed_c10d._get_default_store()
        else:
            address, port = os.environ.get("MASTER_ADDR", "localhost"), int(os.environ.get("MASTER_PORT", "0"))
            store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        return store.add("popengine: failed", 1) == 1
    except RuntimeError:                # the store has gone with the one that has spoken, or was never there
        return is_first() and not distributed.is_initialized()
