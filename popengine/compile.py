"""The command: python -m popengine.compile CKPT

Compiles the decode steps of a checkpoint for some settings, and keeps them in the user's cache. Every later command
with these settings runs compiled steps from the start.
"""

import argparse
import sys
import time
from typing import NoReturn

from popengine.command_line.flags import add_checkpoint_flag, add_machine_flags
from popengine.command_line.parser import OneLineParser
from popengine.command_line.setting_flags import add_setting_flags, pruning_settings
from popengine.command_line.start import load_with_warnings, run_as_command, start_pytorch
from popengine.engine.spinner import waiting
from weights.errors import InputError


def parser() -> argparse.ArgumentParser:
    """Make the command's parser."""
    flags = OneLineParser(
        "compile", "Compile decode steps once; later runs with the same settings use them without a wait.",
        "compile DIR|HUB_ID|FILE.gguf\ncompile DIR --paper --prune-ratio 0.4 --dtype bfloat16",
        "--prune-ratio --paper --dtype --weights --threads -b",
    )
    flags.add_argument("checkpoint", nargs="?", metavar="CKPT", help="alternative to --ckpt")
    add_checkpoint_flag(flags)
    flags.add_argument("-b", "--batch", type=int, default=1, metavar="N", help="sequences per step (default: 1)")
    add_setting_flags(flags)
    add_machine_flags(flags)
    flags.add_argument("--quiet", action="store_true", help="no progress")
    flags.set_defaults(compile=True, max_seq_len=None)
    return flags


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run `python -m popengine.compile`."""
    run_as_command(run, parser(), arguments)


def run(flags: argparse.Namespace) -> None:
    """Make the packages that are missing."""
    pruning = pruning_settings(flags)
    if flags.checkpoint and flags.ckpt:
        raise InputError("name one checkpoint, with --ckpt or without")
    if flags.batch < 1:
        raise InputError(f"the batch must be at least 1, not {flags.batch}")
    flags.ckpt = flags.checkpoint or flags.ckpt
    start_pytorch(flags)
    from popengine.engine import loading, packages

    engine = load_with_warnings(loading.load, flags)
    if not isinstance(engine.compiled, packages.CachedSteps):
        raise InputError("there can be no packages: they need a compiler, a CPU, one process and a folder of the user")
    state = engine.new_state(flags.batch, 1, engine.resolve(pruning))
    began = time.perf_counter()
    with waiting("compiling", sys.stderr.isatty() and not flags.quiet):
        made = engine.compiled.make(state)
    seconds, folder = time.perf_counter() - began, engine.compiled.packages.folder
    print(f"made {made} packages in {seconds:.0f} s, kept in {folder}" if made else f"all are in {folder} already")


if __name__ == "__main__":
    main()
