"""The command: python -m popengine.tasks --tasks boolq gsm8k --methods dense pop --prune-ratio 0.2 --out DIR

Runs twelve public tasks offline, from one file that `make tasks` fetches, under every method of `compare`. Answers to
choose from and generated answers both go through prefill and decode steps. A run that was killed resumes where it
stopped.
"""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from popengine.command_line.flags import add_calibration_flags, add_checkpoint_flag, add_machine_flags
from popengine.command_line.parser import OneLineParser
from popengine.command_line.setting_flags import add_setting_flags, take_paper_values
from popengine.command_line.start import run_as_command, start_pytorch
from popengine.studies.settings import compared_fields
from weights.errors import InputError
from weights.output_file import make_folder


def parser() -> argparse.ArgumentParser:
    """Make the command's parser."""
    flags = OneLineParser(
        "tasks", "Public tasks under pruning methods: seven multiple-choice tasks, five with generated answers.",
        "tasks --tasks arc_easy coqa --methods dense pop frozen --prune-ratio 0.2 0.4 --limit 100 --out DIR",
        "--out --tasks --methods --limit --seed --run-code --prune-ratio --candidate-width --dtype --weights",
    )
    add_checkpoint_flag(flags)
    flags.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the table")
    flags.add_argument("--tasks", nargs="+", required=True, metavar="T", help="names; an unknown one lists all")
    flags.add_argument("--methods", nargs="+", default=["dense", "pop"], metavar="M")
    flags.add_argument(
        "--against", metavar="M", help="subtract this method's answers, item by item (default: the first method)"
    )
    flags.add_argument("--limit", type=int, default=100, metavar="N", help="items of each task (default: 100)")
    flags.add_argument("--seed", type=int, default=0, metavar="N", help="for the items, and the method `random`")
    flags.add_argument(
        "--batch-size", type=int, default=1, metavar="N",
        help="answers generated at once, each pruned as if it were alone (default: 1)",
    )
    flags.add_argument("--run-code", action="store_true", help="run programs that the model writes, to test them")
    flags.add_argument("--archive", type=Path, metavar="FILE.whl", help="the package (default: from `make tasks`)")
    flags.add_argument("--quiet", action="store_true", help="no progress bars")
    add_calibration_flags(flags)
    add_setting_flags(flags, compared_fields())
    machine = add_machine_flags(flags, several_forms=True)
    machine.add_argument("--compile", action="store_true", help="compile the decode step")
    return flags


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run `python -m popengine.tasks`."""
    run_as_command(run, parser(), arguments)


def run(flags: argparse.Namespace) -> None:
    """Run the tasks under all methods, and write the table."""
    for name, value in (("limit", flags.limit), ("batch size", flags.batch_size)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    if flags.compile and flags.batch_size > 1:
        raise InputError("answers generated together run eager steps: leave out --compile, or give --batch-size 1")
    against = flags.against or flags.methods[0]
    if against not in flags.methods:
        raise InputError(f"--against {against} is none of the methods of this run: {', '.join(flags.methods)}")
    take_paper_values(flags)
    start_pytorch(flags)
    from popengine.evaluation import comparison, comparison_table, prepared, progress_file, task_archive, task_runs

    for name in flags.tasks:
        if name not in task_archive.TASKS:
            raise InputError(f"unknown task {name!r}; there are {', '.join(task_archive.TASKS)}")
        if task_archive.TASKS[name].runs_code and not flags.run_code:
            raise InputError(f"{name} runs programs that the model writes: allow it with --run-code, or leave it out")
    archive = task_archive.Archive(flags.archive or task_archive.DEFAULT_ARCHIVE)
    items = {name: archive.items(name, flags.limit, flags.seed) for name in flags.tasks}
    prepared.check_methods(flags)
    make_folder(flags.out, "table.json", "table.md", "progress.jsonl")
    show_progress = sys.stderr.isatty() and not flags.quiet
    ready = prepared.prepare(flags, flags.compile, show_progress)
    about = comparison.identity_of_model(flags, ready.engines, ready.calibrations[flags.weights[0]]) | {
        "tasks": f"{archive.path.name} ({archive.digest})", "batch_size": flags.batch_size,
    }
    progress = progress_file.ProgressFile(flags.out / "progress.jsonl", about, task_runs.is_sound)
    runs = task_runs.TaskRuns(
        ready.engines, ready.prunings, items, progress, flags.batch_size, show_progress, against
    )
    runs.measure()
    about |= {"limit": flags.limit, "machine": comparison.machine()}
    rows = runs.rows()
    table = task_runs.markdown([one.label for one in ready.prunings], rows, about, against)
    comparison_table.write_table(flags.out, {"about": about, "rows": rows}, table)


if __name__ == "__main__":
    main()
