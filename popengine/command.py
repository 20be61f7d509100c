"""What the commands share: errors in one line, flags, a look at what stands in the way of our packages.

Nothing here imports PyTorch, which takes seconds: a wrong flag should not wait for it.
"""

import argparse
import importlib.util
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any, NoReturn, TextIO

from models.pruning.settings import PruningSettings
from weights.errors import InputError, one_line


class OneLineParser(argparse.ArgumentParser):
    """Errors as one line, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def run_as_command(
    run: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser, arguments: list[str] | None
) -> NoReturn:
    """Run a command with these arguments (None: those of the process) and exit with its status."""
    open_standard_streams()
    status = 2
    try:
        flags = parser.parse_args(arguments)
        refuse_shadowed_packages()
        with insistent_interrupts():
            run(flags)
        sys.stdout.flush()
        status = 0
    except InputError as error:
        complain(f"error: {error}")
    except KeyboardInterrupt:
        complain("")
        status = 130
    except BrokenPipeError:
        silence(sys.stdout)         # whoever read our output has gone, and nothing is left to say
        status = 141
    except OSError as error:
        of_file = "" if error.filename is None else f" ({error.filename})"
        complain(one_line(f"error: reading or writing failed: {error.strerror or error}{of_file}"))
    except MemoryError:
        complain("error: this machine has too little memory for that; ask for less, or for a smaller dtype")
    sys.exit(status)


def complain(line: str) -> None:
    """One line on stderr, where there is one that takes it."""
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"{line}\n")):
        try:
            stream.write(text)
            stream.flush()
        except OSError:
            silence(stream)


def silence(stream: TextIO) -> None:
    """What is still in its buffer must not be tried again, by the interpreter at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def open_standard_streams() -> None:
    """Streams that are closed lead nowhere, so that no file of ours takes their place; a terminal that cannot show a
    letter shows its escape."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)      # takes the least number that is free: this one
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115  # for as long as the process
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        complain("error: standard output is closed")
        sys.exit(2)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def insistent_interrupts() -> Iterator[None]:
    """Ctrl-C asks again every second until it is heard: one that falls into a destructor or a callback is lost."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> NoReturn:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGALRM)}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in before.items():
            signal.signal(number, handler)


def refuse_shadowed_packages() -> None:
    """`models` and `weights` are common names: say so when another package of that name stands in front of ours."""
    ours = Path(__file__).resolve().parent.parent
    for name in ("models", "weights"):
        spec = importlib.util.find_spec(name)
        places = [] if spec is None else [*(spec.submodule_search_locations or []), spec.origin or ""]
        if not any(Path(place).resolve() in (ours / name, ours / name / "__init__.py") for place in places):
            found = places[0] if places else "nothing"
            raise InputError(
                f"the package `{name}` of popengine is hidden by {found}; run from another directory, "
                "or use the command popengine-generate"
            )


def add_checkpoint_flag(flags: argparse.ArgumentParser) -> None:
    flags.add_argument(
        "--ckpt", metavar="DIR|HUB_ID|FILE.gguf", help="checkpoint (default: what `make checkpoint` has fetched)"
    )


def add_setting_flags(flags: argparse.ArgumentParser, chosen: Iterable[Field[Any]] | None = None) -> None:
    """A flag for every pruning setting; with `chosen`, for those, and each takes several values to compare."""
    group = flags.add_argument_group("pruning")
    for one in fields(PruningSettings) if chosen is None else chosen:
        about = one.metadata
        several: dict[str, Any] = {"default": argparse.SUPPRESS}
        if chosen is not None:
            several = {"nargs": "+", "default": None if one.default is None else [one.default]}
        group.add_argument(
            "--" + one.name.replace("_", "-"), type=about["type"], metavar=about["metavar"],
            help=about["help"], **several,
        )


def pruning_settings(flags: argparse.Namespace, otherwise: PruningSettings | None = None) -> PruningSettings:
    """What the flags of `add_setting_flags` ask for; where they say nothing `otherwise` holds (None: the paper's)."""
    given = {one.name: getattr(flags, one.name) for one in fields(PruningSettings) if hasattr(flags, one.name)}
    return replace(otherwise or PruningSettings(), **given)


def add_machine_flags(flags: argparse.ArgumentParser, several_forms: bool = False) -> argparse._ArgumentGroup:
    machine = flags.add_argument_group("machine")
    machine.add_argument("--dtype", default="auto", metavar="auto|float32|bfloat16|float16")
    machine.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:i]|mps")
    forms = {"nargs": "+", "default": ["auto"]} if several_forms else {"default": "auto"}
    machine.add_argument(
        "--weights", metavar="auto|plain|int8|int4", help="packed or not (auto: as the checkpoint is)", **forms
    )
    return machine


def add_scoring_flags(flags: argparse.ArgumentParser) -> None:
    """What the commands that score a text share."""
    flags.add_argument("--prompt-tokens", type=int, default=128, metavar="N")
    flags.add_argument("--score-tokens", type=int, default=128, metavar="N")
    flags.add_argument("--windows", type=int, default=12, metavar="N", help="pieces of the text, spread over it")
    flags.add_argument("--seed", type=int, default=0, metavar="N", help="for the method `random`")
    calibration = flags.add_argument_group("calibration (methods wanda-sp and flap)")
    calibration.add_argument("--calibration-text", type=Path, metavar="FILE", help="calibrate on this text")
    calibration.add_argument("--save-calibration", type=Path, metavar="FILE.safetensors")
    calibration.add_argument("--calibration", type=Path, metavar="FILE.safetensors", help="one that was saved")


def make_folder(folder: Path, *names: str) -> None:
    """Raises InputError for a folder that cannot be made or written to, or where a file of these names cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: the output folder cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: the output folder cannot be written to")
    for name in names:
        check_output(folder / name)


def check_output(path: Path) -> None:
    """Before the work whose results go there: InputError where a file cannot be written, or is something else."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is not a file, and is not replaced by one")
    is_new = not path.exists()
    try:
        with path.open("a"):
            pass
        if is_new:
            path.unlink()
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
