"""What the commands share: errors in one line, flags, a look at what stands in the way of our packages.

Nothing here imports PyTorch, which takes seconds: a wrong flag should not wait for it.
"""

import argparse
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from models.pruning.settings import PruningSettings
from weights.errors import InputError


class OneLineParser(argparse.ArgumentParser):
    """Errors as one line, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def run_as_command(
    run: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser, arguments: list[str] | None
) -> NoReturn:
    """Run a command with these arguments (None: those of the process) and exit with its status."""
    try:
        flags = parser.parse_args(arguments)
        refuse_shadowed_packages()
        with insistent_interrupts():
            run(flags)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has gone: nothing is left to say, not even by the interpreter's flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    sys.exit(0)


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


def make_folder(folder: Path) -> None:
    """Raises InputError for a folder that cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: the output folder cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: the output folder cannot be written to")
