"""The command: python -m popengine.compare --text FILE --methods dense pop frozen --prune-ratio 0.2 0.4 --out DIR

Compares every method with every setting that affects it, on the same windows of a text and the same questions. Writes a
table (Markdown and JSON) and plots. Measurements are saved as they are made; a run that was killed resumes there.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import NoReturn

from popengine.command_line.flags import add_checkpoint_flag, add_machine_flags, add_scoring_flags
from popengine.command_line.parser import OneLineParser
from popengine.command_line.setting_flags import add_setting_flags, take_paper_values
from popengine.command_line.start import run_as_command, start_pytorch
from popengine.studies.settings import compared_fields
from weights.errors import InputError
from weights.output_file import make_folder


def parser() -> argparse.ArgumentParser:
    """Make the command's parser."""
    flags = OneLineParser(
        "compare", "Pruning methods side by side: quality on a text and on tasks, and bytes read per decode step.",
        "compare --text FILE --out DIR --methods dense pop frozen --prune-ratio 0.2 0.4",
        "--out --text --tasks --methods --prune-ratio --candidate-width --by-position --windows --dtype --weights",
    )
    add_checkpoint_flag(flags)
    flags.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the table and the plots")
    flags.add_argument("--text", type=Path, metavar="FILE", help="a text to score, UTF-8")
    flags.add_argument("--tasks", nargs="+", default=[], metavar="text|pictures", help="questions with exact answers")
    flags.add_argument("--questions", type=int, default=20, metavar="N", help="questions per task (default: 20)")
    flags.add_argument(
        "--methods", nargs="+", default=["dense", "all-channels", "pop", "frozen"], metavar="M",
        help="names (frozen is GRIFFIN); an unknown name lists all",
    )
    flags.add_argument(
        "--time", type=int, default=0, metavar="ROUNDS", help="also time decode steps, this many times per method"
    )
    flags.add_argument("--compile", action="store_true", help="time compiled steps")
    flags.add_argument(
        "--by-position", action="store_true", help="also loss by position after the prompt: tables and positions.png"
    )
    flags.add_argument("--no-plots", action="store_true", help="only the table")
    flags.add_argument("--quiet", action="store_true", help="no progress bars")
    add_scoring_flags(flags)
    add_setting_flags(flags, compared_fields())
    add_machine_flags(flags, several_forms=True)
    return flags


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run `python -m popengine.compare` and the console script `popengine-compare`."""
    run_as_command(run, parser(), arguments)


def run(flags: argparse.Namespace) -> None:
    """Measure all methods, and write the table and the plots."""
    if flags.text is None and not flags.tasks:
        raise InputError("give a text to score (--text), tasks (--tasks), or both")
    if flags.time < 0 or (flags.time and flags.text is None):
        raise InputError("--time takes a number of rounds of at least 1, and a text whose first window is decoded")
    if flags.by_position and flags.text is None:
        raise InputError("--by-position scores a text: give one with --text")
    take_paper_values(flags)
    start_pytorch(flags)
    from popengine.evaluation import by_position, comparison, comparison_table, prepared, scoring, tasks
    from popengine.evaluation.progress_file import ProgressFile

    prepared.check_methods(flags)
    for name in flags.tasks:
        tasks.questions_for(name, flags.questions, flags.seed)
    if not flags.no_plots:
        comparison.load_plots()                         # says now, not after hours, that matplotlib is missing
    plots = ["perplexity.png", "agreement.png", "rank_drift.png", "frontier.png", "partition.png", "positions.png"]
    plots += [comparison.task_plot(name) for name in flags.tasks]
    make_folder(flags.out, "table.json", "table.md", "progress.jsonl", *plots)
    show_progress = sys.stderr.isatty() and not flags.quiet
    ready = prepared.prepare(flags, flags.compile, show_progress)
    engines, calibration = ready.engines, ready.calibrations[flags.weights[0]]
    engine = engines[flags.weights[0]]
    text, windows = None, []
    if flags.text is not None:
        scoring.check_context(engine, flags.prompt_tokens, flags.score_tokens)
        text = scoring.read_text(flags.text, engine.tokenizer)
        windows = scoring.cut_windows(text, engine.tokenizer, flags.prompt_tokens, flags.score_tokens, flags.windows)
    identity = comparison.identity_of(flags, engines, text, calibration)
    is_sound = partial(comparison.is_sound, scored=identity["score_tokens"])
    progress = ProgressFile(flags.out / "progress.jsonl", identity, is_sound)
    compared = comparison.Comparison(engines, ready.prunings, windows, progress, show_progress)
    folder = None if flags.no_plots else flags.out
    result = compared.measure(flags.tasks, flags.questions, flags.seed, flags.time, folder, flags.by_position)
    result["about"] = identity | result["about"]
    table = comparison_table.markdown(result["rows"], result["about"], result["studies"])
    if flags.by_position:
        found = [row["by_position"] for row in result["rows"]]
        table += "\n".join([*by_position.tables([one.label for one in ready.prunings], found), ""])
    comparison_table.write_table(flags.out, result, table)


if __name__ == "__main__":
    main()
