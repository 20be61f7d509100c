"""Write the tables of the two POP papers for this project's models: python tools/write_tables.py NAME

A table runs one or more commands of popengine, with their folders in --out; results saved there are not measured again.
Tables of public tasks have paired differences to one method on the same items.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from popengine.evaluation.task_archive import GIVEN, TASKS

RATIOS = ("--prune-ratio", "0.2", "0.4")
TWELVE = [name for name, task in TASKS.items() if task.metrics != GIVEN]
POP = ("--methods", "dense", "all-channels", "pop", "frozen", "flap", "wanda-sp", *RATIOS)
CALIBRATED = ("--calibration-text", "{calibration}")
PLAIN, LIMIT = ("--dtype", "bfloat16", "--weights", "plain"), ("--limit", "{limit}")
# Where the default model is not at chance.
CHOSEN, LONGER = ("--tasks", "arc_easy", "hellaswag"), ("--tasks", "coqa")
TEXT = ("--text", "{text}", "--windows", "8", "--dtype", "float32", "--weights", "plain", "--no-plots")
ONLINE = ("--questions", "{limit}", "--methods", "dense", "all-channels", "pop", "frozen", *RATIOS, "--no-plots")
MIXTURE = ("--ckpt", "weights/mixtral-tiny", "--tasks", "text")
PICTURES = ("--ckpt", "weights/llava-tiny", "--tasks", "pictures")


@dataclass(frozen=True)
class Table:
    """What it is in the papers' terms, and a command of popengine; words in braces are filled in.

    limit    items of each task, where nothing else is asked for
    against  the method whose row others are subtracted from; empty: none
    """

    title: str
    command: Sequence[str]
    limit: int = 0
    against: str = ""


TABLES = {
    "dense": Table("The dense model on all twelve tasks", (
        "tasks", "--tasks", *TWELVE, "--methods", "dense", *PLAIN, *LIMIT, "--batch-size", "16", "--run-code",
    ), 200),
    "chosen": Table("POP: answers to choose", ("tasks", *CHOSEN, *POP, *CALIBRATED, *PLAIN, *LIMIT), 100, "pop"),
    "generated": Table("POP: answers to generate", ("tasks", *LONGER, *POP, *CALIBRATED, *PLAIN, *LIMIT), 40, "pop"),
    "experts": Table("POP: mixtures of experts", ("compare", *MIXTURE, *ONLINE), 200),
    "pictures": Table("POP: pictures", ("compare", *PICTURES, *ONLINE), 200),
    "perplexity": Table("POP: perplexity", ("compare", *TEXT, *POP, *CALIBRATED)),
    "latency": Table("POP: time of a step", (
        "bench", "-p", "128", "-n", "128", "--prune-ratio", "0", "0.2", "0.4", "--compile", *PLAIN,
    )),
    "width": Table("POP: widths, and the variants beside them", (
        "compare", *TEXT, "--methods", "dense", "frozen", "pop", "all-channels", *RATIOS, "--candidate-width", "0.05",
        "0.1", "0.2", "0.4",
    )),
    "main": Table("Prefill-Only: beside layers that are removed", (
        "tasks", *CHOSEN, "--methods", "dense", "prefill-only", "shortgpt", "--prefill-skip", "0", "1/3",
        "--prune-ratio", "0.25", *CALIBRATED, *PLAIN, *LIMIT,
    ), 40, "dense"),
    "skipped": Table("Prefill-Only: shares of the layers", (
        "tasks", *CHOSEN, "--methods", "dense", "prefill-only", "--prefill-skip", "1/6", "1/4", "1/3", "1/2", *PLAIN,
        *LIMIT,
    ), 40, "dense"),
    "controls": Table("Prefill-Only: what it takes", (
        "tasks", *CHOSEN, "--methods", "dense", "prefill-only", "skip-first", "skip-evenly", "skip-no-boundary",
        "skip-no-keys", "--prefill-skip", "1/3", *PLAIN, *LIMIT,
    ), 40, "dense"),
}


def main(arguments: list[str] | None = None) -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("name", choices=TABLES, nargs="+")
    flags.add_argument("--out", type=Path, default=Path("tables"))
    flags.add_argument("--limit", type=int, help="items of each task (each table has its own default)")
    flags.add_argument("--tasks", nargs="+", help="others than the table's own")
    flags.add_argument("--text", default="wikitext.txt", help="WikiText-2, validation; see docs/results.md")
    flags.add_argument("--calibration-text", default="calibration.txt", help="any other text, for wanda-sp and flap")
    flags.add_argument("--ckpt", help="another model in the place of the default one")
    given = flags.parse_args(arguments)
    for name in given.name:
        table, folder, began = TABLES[name], given.out / name, time.perf_counter()
        filled = {"limit": given.limit or table.limit, "text": given.text, "calibration": given.calibration_text}
        first, *words = [word.format(**filled) for word in table.command]
        command = [first, "--paper", *words]
        command += ["--ckpt", given.ckpt] if given.ckpt else []
        command += ["--against", table.against] if table.against else []
        command += ["--tasks", *given.tasks] if given.tasks else []
        command += [] if command[0] == "bench" else ["--out", str(folder)]
        print(f"## {table.title}\n\n    popengine {' '.join(command)}\n", flush=True)
        if status := status_of(command):
            return status
        print(f"{(time.perf_counter() - began) / 60:.1f} minutes\n", flush=True)
    return 0


def status_of(command: Sequence[str]) -> int:
    try:
        importlib.import_module(f"popengine.{command[0]}").main([*command[1:]])
    except SystemExit as end:
        return int(end.code or 0)


if __name__ == "__main__":
    sys.exit(main())
