"""From a command's parser to its exit status. PyTorch, which takes seconds, is imported after the flags are checked."""

import argparse
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

from popengine.command_line.interrupts import insistent_interrupts
from popengine.command_line.streams import complain, open_standard_streams, silence
from popengine.engine.processes import is_one_of_several
from popengine.engine.spinner import waiting
from weights.errors import InputError, one_line

# Messages of PyTorch's allocators, drivers and the library loader when memory runs out; none raises MemoryError.
NO_MEMORY = (
    "DefaultCPUAllocator", "out of memory", "annot allocate memory", "ALLOC_FAILED", "can't start new thread",
    "failed to map segment",
)


def run_as_command(
    run: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser, arguments: list[str] | None
) -> NoReturn:
    """Run a command with these arguments (None: the process's own) and exit with its status."""
    open_standard_streams()
    status, said = 2, ""
    # This module imports PyTorch, which takes seconds.
    torchrun = importlib.import_module("popengine.engine.distributed") if is_one_of_several() else None
    try:
        flags = parser.parse_args(arguments)
        refuse_shadowed_packages()
        with insistent_interrupts(), torchrun.one_of_several(flags) if torchrun else nullcontext():
            run(flags)
            sys.stdout.flush()
        status = 0
    except InputError as error:
        said = f"error: {error}"
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        silence(sys.stdout)         # the reader of our output has gone
        status = 141
    except (OSError, MemoryError, RuntimeError, ImportError) as error:
        told = said_of(error)
        if told is None and (torchrun is None or isinstance(error, ImportError)):
            raise
        said = one_line(f"error: {told or f'the ranks have lost each other, or one has failed: {error}'}")
    if status in (2, 130) and (torchrun is None or torchrun.says_why_it_failed()):
        complain(said)
    sys.exit(status)


def said_of(error: Exception) -> str | None:
    """Return the message of an error for a user; None for an error in the program."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        return "this machine has too little memory for that; ask for less, or for a smaller dtype"
    if isinstance(error, OSError):
        of_file = "" if error.filename is None else f" ({error.filename})"
        return one_line(f"reading or writing failed: {error.strerror or error}{of_file}")
    return None


def refuse_shadowed_packages() -> None:
    """Raise InputError if another package hides ours: `models` and `weights` are common names."""
    if not InputError.__module__.startswith("weights."):
        return                          # a wheel has them inside popengine (setup.py)
    ours = Path(__file__).resolve().parents[2]
    for name in ("models", "weights"):
        spec = importlib.util.find_spec(name)
        places = [] if spec is None else [*(spec.submodule_search_locations or []), spec.origin or ""]
        if not any(Path(place).resolve() in (ours / name, ours / name / "__init__.py") for place in places):
            found = places[0] if places else "nothing"
            raise InputError(
                f"the package `{name}` of popengine is hidden by {found}; run from another directory, "
                "or use the command popengine-generate"
            )


def start_pytorch(flags: argparse.Namespace) -> None:
    """Set the threads and import PyTorch, which takes seconds: after the flags are checked, and with a message."""
    threads, processors = getattr(flags, "threads", None), os.cpu_count() or 1
    if threads is not None and not 1 <= threads <= processors:
        raise InputError(f"threads must be at least 1, not {threads}, and at most the {processors} processors")
    with waiting("starting", sys.stderr.isatty() and not getattr(flags, "quiet", False)):
        torch = importlib.import_module("torch")
    if threads is not None:
        torch.set_num_threads(threads)


def load_with_warnings(load: Callable[..., Any], flags: argparse.Namespace) -> Any:
    """Load the engine with `load` (popengine.engine.loading.load) and these flags, and print warnings on stderr."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        engine = load(
            flags.ckpt, dtype=flags.dtype, device=flags.device, weights=flags.weights, max_seq_len=flags.max_seq_len,
            compile=flags.compile, progress=sys.stderr.isatty() and not flags.quiet,
        )
    for warning in caught:
        print(f"warning: {one_line(str(warning.message))}", file=sys.stderr)
    for field in engine.unknown_fields:
        unknown = one_line(field, 100)
        print(f"warning: config.json has a field that popengine does not know and ignores: {unknown}", file=sys.stderr)
    return engine
