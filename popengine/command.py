"""Shared parts of the commands: one-line errors, flags, and a check for packages that hide ours.

This module does not import PyTorch, which takes seconds, so that a wrong flag fails at once.
"""

import argparse
import difflib
import importlib
import importlib.util
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import Field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TextIO

from models.pruning.settings import PAPER
from popengine.engine.processes import is_one_of_several
from popengine.engine.spinner import waiting
from popengine.studies.settings import PruningSettings
from weights.errors import InputError, one_line

# Messages of PyTorch's allocators, drivers and the library loader when memory runs out; none raises MemoryError.
NO_MEMORY = (
    "DefaultCPUAllocator", "out of memory", "annot allocate memory", "ALLOC_FAILED", "can't start new thread",
    "failed to map segment",
)


class OneLineParser(argparse.ArgumentParser):
    """A parser with one-line errors without usage, and help that fits a screen; --help-all shows the rare flags.

    example  one or two lines of example calls
    common   the flags that --help shows
    """

    def __init__(self, command: str, description: str, example: str, common: str) -> None:
        self.common = {"--help", "--help-all", "--ckpt", *common.split()}
        self.shows_all = False
        self.words: list[str] = []
        shown = "".join(f"\n    popengine {line}" for line in example.splitlines())
        super().__init__(
            prog=f"popengine {command}", usage="%(prog)s [flags]", description=f"{description}\n{shown}",
            formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=32), allow_abbrev=False,
        )
        self.add_argument("--help-all", action=HelpAll, nargs=0, help="show all flags")

    def format_help(self) -> str:
        if self.shows_all:
            return super().format_help()
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        formatter.start_section("flags")
        formatter.add_arguments(
            one for one in self._actions if not one.option_strings or self.common & {*one.option_strings}
        )
        formatter.end_section()
        return formatter.format_help()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.words = [*(sys.argv[1:] if args is None else args)]
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        flags = [flag for action in self._actions for flag in action.option_strings]
        unknown = [name for word in self.words if (name := word.partition("=")[0]).startswith("--")]
        meant = next((near for name in unknown if name not in flags and (near := nearest(name, flags))), "")
        raise InputError(f"{message}{meant} (see --help)")


class HelpAll(argparse.Action):
    """The action of --help-all."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        assert isinstance(parser, OneLineParser)
        parser.shows_all = True
        parser.print_help()
        parser.exit()


def nearest(word: str, names: Iterable[str]) -> str:
    """Return a "did you mean ...?" suffix, or "" if no name is near."""
    near = difflib.get_close_matches(word, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""


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


def complain(line: str) -> None:
    """Print one line on stderr, if stderr accepts it."""
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"{line}\n")):
        try:
            stream.write(text)
            stream.flush()
        except OSError:
            silence(stream)


def silence(stream: TextIO) -> None:
    """Redirect a stream to the null device, so that the interpreter does not flush its buffer again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def open_standard_streams() -> None:
    """Open closed streams on the null device, so that no file of ours takes their numbers.

    A character that a terminal cannot show appears as its escape.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)      # takes the lowest free number: this one
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115  # open until the process ends
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        complain("error: standard output is closed")
        sys.exit(2)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def start_pytorch(flags: argparse.Namespace) -> None:
    """Set the threads and import PyTorch, which takes seconds: after the flags are checked, and with a message."""
    threads, processors = getattr(flags, "threads", None), os.cpu_count() or 1
    if threads is not None and not 1 <= threads <= processors:
        raise InputError(f"threads must be at least 1, not {threads}, and at most the {processors} processors")
    with waiting("starting", sys.stderr.isatty() and not getattr(flags, "quiet", False)):
        torch = importlib.import_module("torch")
    if threads is not None:
        torch.set_num_threads(threads)


@contextmanager
def insistent_interrupts() -> Iterator[None]:
    """Repeat Ctrl-C every second until it takes effect, because Python loses one in a destructor or a callback."""
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


@contextmanager
def noted_interrupts() -> Iterator[list[int]]:
    """Record Ctrl-C in a list, so that a step is completed before its loop ends; a second one interrupts."""
    noted: list[int] = []

    def note(number: int, _: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def refuse_shadowed_packages() -> None:
    """Raise InputError if another package hides ours: `models` and `weights` are common names."""
    if not InputError.__module__.startswith("weights."):
        return                          # a wheel has them inside popengine (setup.py)
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
    """Add --ckpt."""
    flags.add_argument(
        "--ckpt", metavar="DIR|HUB_ID|FILE.gguf", help="checkpoint (default: SmolLM2-135M-Instruct)"
    )


def add_setting_flags(flags: argparse.ArgumentParser, chosen: Iterable[Field[Any]] | None = None) -> None:
    """Add a flag for every pruning setting; with `chosen`, only for those, each with several values to compare."""
    group = flags.add_argument_group("pruning")
    for one in fields(PruningSettings) if chosen is None else chosen:
        about = one.metadata
        several: dict[str, Any] = {"default": argparse.SUPPRESS}
        if chosen is not None:
            several = {"nargs": "+", "default": None if one.default is None else Unsaid([one.default])}
        also = ["--ratio"] if one.name == "prune_ratio" else []
        group.add_argument(
            "--" + one.name.replace("_", "-"), *also, type=about["type"], metavar=about["metavar"],
            help=about["help"], **several,
        )
    add_paper_flag(group)


def pruning_settings(flags: argparse.Namespace, otherwise: PruningSettings | None = None) -> PruningSettings:
    """Return the settings of the flags of `add_setting_flags`, on top of `otherwise` or of the paper's (--paper).

    otherwise  None: the recommended settings
    """
    given = {one.name: getattr(flags, one.name) for one in fields(PruningSettings) if hasattr(flags, one.name)}
    return PruningSettings.paper(**given) if flags.paper else replace(otherwise or PruningSettings(), **given)


class Unsaid(list[Any]):
    """The default values of a flag that was not given."""


def take_paper_values(flags: argparse.Namespace) -> None:
    """With --paper, replace the values of flags that were not given by the paper's."""
    for name, value in PAPER.items():
        if flags.paper and isinstance(getattr(flags, name), Unsaid):
            setattr(flags, name, Unsaid([value]))


def add_paper_flag(flags: argparse._ActionsContainer) -> None:
    """Add --paper."""
    flags.add_argument(
        "--paper", action="store_true",
        help="the paper's values for settings that are not given: width 0.1, no minimum of evidence",
    )


def add_machine_flags(flags: argparse.ArgumentParser, several_forms: bool = False) -> argparse._ArgumentGroup:
    """Add dtype, device, weights and threads; several_forms: --weights takes several values."""
    machine = flags.add_argument_group("machine")
    machine.add_argument("--dtype", default="auto", metavar="auto|float32|bfloat16|float16", help="or bf16, fp16, fp32")
    machine.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:i]|mps")
    forms = {"nargs": "+", "default": ["auto"]} if several_forms else {"default": "auto"}
    machine.add_argument(
        "--weights", metavar="auto|plain|int8|int4", help="format (auto: as stored in the checkpoint)", **forms
    )
    machine.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    return machine


def add_generation_flags(flags: argparse.ArgumentParser, new_tokens: int) -> None:
    """Add the flags of commands that generate."""
    flags.add_argument(
        "-n", "--max-new-tokens", type=int, default=new_tokens, metavar="N", help=f"(default: {new_tokens})"
    )
    sampling = flags.add_argument_group("sampling")
    sampling.add_argument("--temperature", "--temp", type=float, default=0.0, metavar="T", help="0 is greedy")
    sampling.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K most likely tokens; 0: all")
    sampling.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="keep the most likely tokens up to probability P; 1: all"
    )
    sampling.add_argument(
        "--min-p", type=float, default=0.0, metavar="P",
        help="drop tokens below this share of the highest probability",
    )
    sampling.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="P",
        help="above 1: tokens seen before become less likely",
    )
    sampling.add_argument("--seed", type=int, metavar="N", help="makes sampling reproducible")
    add_setting_flags(flags)
    machine = add_machine_flags(flags)
    machine.add_argument("--max-seq-len", type=int, metavar="N", help="a shorter context than the model's")
    machine.add_argument(
        "--compile", action="store_true", default=None, help="compile the decode step: only the first run waits for it"
    )
    flags.add_argument("--quiet", action="store_true", help="no statistics, no progress bars")


def add_stop_flag(flags: argparse.ArgumentParser) -> None:
    """Add --stop."""
    flags.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text; may be repeated"
    )


def sampling_fields(flags: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of popengine.engine.sampling.Sampling from the flags."""
    names = ("temperature", "top_k", "top_p", "seed", "min_p", "repetition_penalty")
    return {name: getattr(flags, name) for name in names} | {"stop": tuple(getattr(flags, "stop", ()))}


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


def add_scoring_flags(flags: argparse.ArgumentParser) -> None:
    """Add the flags of commands that score a text."""
    flags.add_argument("--prompt-tokens", type=int, default=128, metavar="N")
    flags.add_argument("--score-tokens", type=int, default=128, metavar="N")
    flags.add_argument("--windows", type=int, default=12, metavar="N", help="number of windows, spread over the text")
    flags.add_argument("--seed", type=int, default=0, metavar="N", help="for the methods `random` and `tyr`")
    add_calibration_flags(flags)


def add_calibration_flags(flags: argparse.ArgumentParser) -> None:
    """Add the flags of methods that are calibrated on a text."""
    calibration = flags.add_argument_group("calibration (for methods that need one)")
    calibration.add_argument("--calibration-text", type=Path, metavar="FILE", help="calibrate on this text")
    calibration.add_argument(
        "--calibration-tasks", metavar="text|pictures", help="or on training questions of these tasks and their answers"
    )
    calibration.add_argument("--save-calibration", type=Path, metavar="FILE.safetensors")
    calibration.add_argument("--calibration", type=Path, metavar="FILE.safetensors", help="read a saved calibration")
