"""Join several comparisons into one table and one plot: quality against bytes and time, over dense of the same form.

    python tools/draw_frontier.py DIR DIR --bench llama.json --out frontier.png > frontier.md

A folder is one that `popengine compare --time ROUNDS` wrote. A process can hold few forms of a large model at once.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from popengine.evaluation import plots
from weights.errors import InputError

COLUMNS = (
    "weights", "method", "prune ratio", "width", "inputs off", "perplexity over dense's", "same", "KL", "bytes", "ms",
    "time",
)
FORMS = {"auto": "the file", "plain": "bfloat16"}
# Methods without candidates, or whose candidates are all channels.
WITHOUT_WIDTH = ("dense", "frozen", "all-channels", "up", "draft", "wina", "teal")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Read the rows of a comparison. Raises InputError if it has none with times."""
    try:
        rows: list[dict[str, Any]] = json.loads((folder / "table.json").read_text(encoding="utf-8"))["rows"]
        timed = any("time" in (row["over_dense"] or {}) for row in rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: its table.json cannot be read: {error}") from None
    if not timed:
        raise InputError(f"{folder}: this comparison timed nothing: run it with --time and the method dense")
    return rows


def once_each(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out dense rows of a form of weights that has one already."""
    seen, found = set[str](), []
    for row in rows:
        if row["method"] != "dense" or row["weights"] not in seen:
            found.append(row)
        seen.add(row["weights"])
    return found


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Write the rows as a table in Markdown, form by form."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for form in dict.fromkeys(row["weights"] for row in rows):
        lines += [f"| {' | '.join(cells(row))} |" for row in rows if row["weights"] == form]
    return lines


def cells(row: dict[str, Any]) -> list[str]:
    """Write the cells of one row; a number that was not measured is an empty cell."""
    over = row["over_dense"]
    quotient = "1" if row["method"] == "dense" else f"{over['perplexity']:.3f} ± {over['error'] or 0:.3f}"
    return [
        FORMS.get(row["weights"], row["weights"]), row["method"], f"{row['ratio']:.2g}",
        "" if row["method"] in WITHOUT_WIDTH else f"{row['candidate_width']:g}", row.get("input_sparsity") or "",
        quotient, f"{row['agreement']:.3f}", f"{max(0.0, row['divergence']):.3f}", f"{over['bytes']:.2f}",
        f"{row['decode_ms_per_token']:.1f}" if "decode_ms_per_token" in row else "",
        f"{over['time']:.2f}" if "time" in over else "",
    ]


def llama_row(bench: Path) -> str:
    """Write the row of llama.cpp from a file of `popengine bench --json`, whose first row is dense.

    Raises InputError if the file has no such row.
    """
    try:
        rows = json.loads(bench.read_text(encoding="utf-8"))["dtypes"][0]["rows"]
        dense, (other,) = rows[0], [row for row in rows if row["engine"].startswith("llama.cpp")]
        milliseconds = other["decode_ms_per_token"]["median"]
        quotient = milliseconds / dense["decode_ms_per_token"]["median"]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        raise InputError(f"{bench}: it has no row of dense steps and one of llama.cpp") from None
    found = ["the file", "llama.cpp, dense", "0", "", "", "", "", "", "", f"{milliseconds:.1f}", f"{quotient:.2f}"]
    return f"| {' | '.join(found)} |"


def parser() -> argparse.ArgumentParser:
    """Make the command's parser."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    flags.add_argument("--bench", type=Path, metavar="FILE.json", help="a run of bench --against llama.cpp")
    flags.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    return flags


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    try:
        rows = once_each([row for folder in given.folders for row in rows_of(folder)])
        lines = table(rows) + ([llama_row(given.bench)] if given.bench else [])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    plots.tell_if_missing()
    return 0 if plots.INSTALLED and plots.plot_frontier(rows, given.out) else 1


if __name__ == "__main__":
    sys.exit(main())
