"""Draw the frontier of several comparisons in one plot: perplexity against bytes and time, over dense of the same form.

    python tools/draw_frontier.py DIR DIR --out frontier.png

A folder is one that `popengine compare --time ROUNDS` wrote. A process can hold few forms of a large model at once.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from popengine.evaluation import plots
from weights.errors import InputError


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


def main(arguments: list[str] | None = None) -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    flags.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    given = flags.parse_args(arguments)
    try:
        rows = [row for folder in given.folders for row in rows_of(folder)]
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    plots.tell_if_missing()
    return 0 if plots.INSTALLED and plots.plot_frontier(rows, given.out) else 1


if __name__ == "__main__":
    sys.exit(main())
