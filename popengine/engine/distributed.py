"""Tensor-parallel processes started by torchrun: joining them, agreement on their input, and their output.

`torchrun --nproc-per-node N -m popengine.generate ...` starts a command N times. The first rank reads standard input
and writes results and messages. The others are silent, unless one of them is the first to fail.
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

# Timeouts of a rank that waits for another: in computation, and while a person types.
PATIENCE, OF_A_PERSON = timedelta(minutes=10), timedelta(days=365)
# Flags of input files, whose paths may differ between machines but not their contents, and flags of output files.
OF_FILES = ("text", "image", "calibration", "calibration_text", "archive")
RESULTS = ("out", "json", "save_calibration")
# Other flags that may differ: the path of the checkpoint (loading compares its contents), and the command line itself.
OF_A_RANK = ("ckpt", "words")


def ranks(device: str = "auto") -> Ranks:
    """Return this process's rank and the number of ranks. Joins the process group if torchrun has started this process.

    device  the requested device: ranks on CUDA devices use NCCL, others gloo
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
    """Return the value of each rank."""
    ours = ranks()
    found: list[Any] = [value] * ours.count
    if ours.count > 1:
        distributed.all_gather_object(found, value)
    return found


def broadcast(value: Any, group: distributed.ProcessGroup | None = None) -> Any:
    """Return the first rank's value on every rank, such as a seed or a text that it has read."""
    box = [value]
    if ranks().count > 1:
        distributed.broadcast_object_list(box, src=0, group=group)
    return box[0]


def patient() -> distributed.ProcessGroup | None:
    """Return a group of all ranks whose timeout allows for a person who types; None for a single process."""
    return distributed.new_group(timeout=OF_A_PERSON, backend="gloo") if ranks().count > 1 else None


def agree(on: dict[str, Any]) -> None:
    """Raise InputError if a rank was started with other flags, files or versions than the first."""
    found = all_gather(on)
    for index, theirs in enumerate(found):
        for name in on:
            if theirs[name] != found[0][name]:
                raise InputError(f"rank {index} has another {name} than rank 0: {theirs[name]}, not {found[0][name]}")


def heard_by_all(lines: Iterable[str]) -> Iterator[str]:
    """Yield, on every rank, the lines that the first rank reads."""
    iterator, group = iter(lines) if is_first() else iter(()), patient()
    while (line := broadcast(next(iterator, None), group)) is not None:
        yield line


def contents(path: Any) -> str:
    """Return a digest of the files of a flag, or the text of a value that is no file."""
    if isinstance(path, list):
        return ", ".join(map(contents, path))
    if path is None or not Path(path).is_file():
        return str(path)
    return f"a file of digest {contents_digest(Path(path))}"


def ended_by_torchrun(*_: Any) -> None:
    """Raise InputError on SIGTERM: a rank that dies is silent, and torchrun may end the others before they notice."""
    raise InputError("the ranks have lost each other: torchrun has ended this one, since another is gone")


@contextmanager
def one_of_several(flags: Any) -> Iterator[None]:
    """Run a command on every rank: join them, compare their flags, and let one rank write messages and results.

    The other ranks write results to a temporary folder, which starts as a copy of the existing output folder.
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
        all_gather(None)                 # all have copied before the first rank writes
        before = signal.signal(signal.SIGTERM, ended_by_torchrun)
        try:
            yield
            distributed.destroy_process_group()
        finally:
            signal.signal(signal.SIGTERM, before)
            sys.stdout, sys.stderr = sys.__stdout__ or nowhere, sys.__stderr__ or nowhere


def says_why_it_failed() -> bool:
    """Return True on the first rank that fails, which reports the error. torchrun's store for its ranks decides."""
    try:
        if distributed.is_initialized():
            store = distributed.distributed_c10d._get_default_store()
        else:
            address, port = os.environ.get("MASTER_ADDR", "localhost"), int(os.environ.get("MASTER_PORT", "0"))
            store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        return store.add("popengine: failed", 1) == 1
    except RuntimeError:                # the store has ended with the rank that has reported, or never existed
        return is_first() and not distributed.is_initialized()
