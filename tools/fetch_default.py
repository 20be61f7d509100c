"""Fetch the default checkpoint, SmolLM2-135M-Instruct, into weights/default/ of a checkout (`make checkpoint`).

A second run finds the files and does nothing. weights/default_checkpoint.py names the sources.
"""

import sys
from pathlib import Path

from popengine.command_line.interrupts import insistent_interrupts
from weights.default_checkpoint import DEFAULT_DIRECTORY, fetch_default, found_in
from weights.errors import InputError


@insistent_interrupts()
def main(directory: Path = DEFAULT_DIRECTORY) -> int:
    """Fetch what is missing into `directory`; 0 when the checkpoint is there afterwards, 1 when no source had it."""
    if found := found_in(directory):
        print(f"default checkpoint: {found} (already there)")
        return 0
    try:
        path, source = fetch_default(directory)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"default checkpoint: {path} ({source})")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
