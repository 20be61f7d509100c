"""The measurements of a long comparison so far, one JSON object per line, so that a killed run can continue.

The first line identifies the comparison; every later line is one finished measurement. Lines are written whole, so only
the last line of a killed run can be incomplete.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from popengine.engine.distributed import broadcast
from weights.errors import InputError, one_line
from weights.mapped_file import read_bytes
from weights.output_file import append_output, write_output

# Bytes; a long comparison has a few million.
LARGEST_PROGRESS = 1_000_000_000


class ProgressFile:
    """Records by their `key`. A warning on stderr says if the file that was found is damaged.

    is_sound  returns True if a record from the file is complete and valid; others are measured again
    """

    def __init__(self, path: Path, identity: dict[str, Any], is_sound: Callable[[dict[str, Any]], bool]) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        text = read_bytes(path, LARGEST_PROGRESS).decode("utf-8", "replace") if path.exists() else ""
        entries = [parsed(line) for line in text.splitlines()]
        head = entries[0] if entries else None
        found = head.get("comparison") if head is not None else None
        if isinstance(found, dict) and found != identity:
            differs = ", ".join(name for name in identity if found.get(name) != identity[name])
            raise InputError(f"{path.parent} holds another comparison ({differs} differ): give another --out folder")
        # Without the first line, the other lines cannot be assigned to a comparison.
        known = entries[1:] if found == identity else []
        sound = [one for one in known if one is not None and isinstance(one.get("key"), str) and is_sound(one)]
        self.records = {entry["key"]: entry for entry in sound}
        damaged = bool(text) and (len(sound) != len(entries) - 1 or found != identity or not text.endswith("\n"))
        if damaged:
            aside = free_name(path)
            write_output(aside, path.read_bytes())
            kept = f"{len(sound)} of its measurements are kept, the others are made again"
            print(f"warning: {one_line(f'{path} was damaged: moved to {aside.name}, {kept}')}", file=sys.stderr)
        if damaged or not text:
            write_output(path, lines({"comparison": identity}, *sound))
        self.records = broadcast(self.records)      # a rank on another machine has another folder

    def add(self, key: str, record: dict[str, Any]) -> None:
        self.records[key] = {"key": key, **record}
        append_output(self.path, lines(self.records[key]))


def lines(*entries: dict[str, Any]) -> str:
    """Write entries as JSON, one per line."""
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def parsed(line: str) -> dict[str, Any] | None:
    """Parse the object on a line; None if the line is damaged."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def free_name(path: Path) -> Path:
    """Return an unused name beside `path`."""
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    return aside
