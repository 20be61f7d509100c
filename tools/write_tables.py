"""Write the tables of the two POP papers for this project's models: python tools/write_tables.py NAME

A table runs one or more commands of popengine, with their folders in --out; results saved there are not measured again.
Tables of public tasks are followed by paired differences to one method on the same items, which have a much smaller
standard error: of the scores, and of the log-likelihood of the right answer, which also changes if no score does.
"""

import argparse
import importlib
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from popengine.evaluation.comparison import Configuration
from popengine.evaluation.scoring import mean_and_error
from popengine.evaluation.task_archive import DEFAULT_ARCHIVE, TASKS, Archive
from popengine.studies.settings import compared_fields

RATIOS = ("--prune-ratio", "0.2", "0.4")
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
        "tasks", "--tasks", *TASKS, "--methods", "dense", *PLAIN, *LIMIT, "--batch-size", "16", "--run-code",
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
        command += ["--tasks", *given.tasks] if given.tasks else []
        command += [] if command[0] == "bench" else ["--out", str(folder)]
        print(f"## {table.title}\n\n    popengine {' '.join(command)}\n", flush=True)
        if status := status_of(command):
            return status
        if table.against:
            print(*differences(folder, table.against), sep="\n")
        print(f"{(time.perf_counter() - began) / 60:.1f} minutes\n", flush=True)
    return 0


def status_of(command: Sequence[str]) -> int:
    try:
        importlib.import_module(f"popengine.{command[0]}").main([*command[1:]])
    except SystemExit as end:
        return int(end.code or 0)


def differences(folder: Path, against: str) -> Iterator[str]:
    """A Markdown table of every row less the row of the method `against`: the dense one, or POP's at the same ratio.

    A task's differences are averaged first, then the tasks; a standard error is over items, drawn in pairs.
    """
    result = json.loads((folder / "table.json").read_text())
    records = {record.get("key"): record for record in map(json.loads, (folder / "progress.jsonl").open())}
    archive, about = Archive(DEFAULT_ARCHIVE), result["about"]
    items = {name: archive.items(name, about["limit"], about["seed"]) for name in result["rows"][0]["tasks"]}
    yield f"| less {against} | score, points | log-likelihood of the right answer, nats |"
    yield "|---|---|---|"
    for row in result["rows"]:
        of_method = [one for one in result["rows"] if one["method"] == against]
        others = [one for one in of_method if against == "dense" or one["ratio"] == row["ratio"]]
        if others and row is not others[0]:
            mine, theirs = configuration(row), configuration(others[0])
            scores, likelihoods = [], []
            for name, own in items.items():
                keys = [f"{name} {item.key}" for item in own]
                pairs = [(records[mine.key(key)], records[theirs.key(key)]) for key in keys]
                metric = TASKS[name].metrics[0]
                scores.append(mean_and_error([one["scores"][metric] - other["scores"][metric] for one, other in pairs]))
                if TASKS[name].score is None:
                    likelihoods.append(mean_and_error([
                        one["answer"][item.right] - other["answer"][item.right]
                        for item, (one, other) in zip(own, pairs, strict=True)
                    ]))
            yield f"| {mine.label} | {averaged(scores, 100)} | {averaged(likelihoods, 1)} |"
    yield ""


def configuration(row: dict[str, Any]) -> Configuration:
    names = ["method", "weights", *(one.name for one in compared_fields())]
    asked = {name: row[name] for name in names}
    if asked["prune_ratio"] is not None:
        asked["ffn_ratio"] = None               # a row has what that ratio came to in its place
    return Configuration.from_fields(asked)


def averaged(figures: Sequence[dict[str, float]], scale: float) -> str:
    """Over tasks; empty where there is none."""
    if not figures:
        return ""
    mean = sum(one["mean"] for one in figures) / len(figures)
    error = math.sqrt(sum(one["error"] ** 2 for one in figures)) / len(figures)
    return f"{scale * mean:+.2f} ± {scale * error:.2f}"


if __name__ == "__main__":
    sys.exit(main())
