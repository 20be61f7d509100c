"""What a long comparison has measured so far, one JSON object per line, so that a killed run goes on where it was.

The first line says what is being compared; every later line is one finished measurement. A line is written when it is
complete, so only the last one of a killed run can be torn.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from popengine.torchrun import told_by_first
from weights.errors import InputError
from weights.mapped_file import read_bytes
from weights.output_file import append_output, write_output

# Bytes; a long comparison has a few million.
LARGEST_PROGRESS = 1_000_000_000


class ProgressFile:
    """Records by their `key`.

    notes     what a user should be told about the file that was found
    is_sound  whether a record from the file has all that its key promises; one that was edited is made again
    """

    def __init__(self, path: Path, identity: dict[str, Any], is_sound: Callable[[dict[str, Any]], bool]) -> None:
        self.path = path
        self.notes: list[str] = []
        self.records: dict[str, dict[str, Any]] = {}
        text = read_bytes(path, LARGEST_PROGRESS).decode("utf-8", "replace") if path.exists() else ""
        entries = [parsed(line) for line in text.splitlines()]
        head = entries[0] if entries else None
        found = head.get("comparison") if head is not None else None
        if isinstance(found, dict) and found != identity:
            differs = ", ".join(name for name in identity if found.get(name) != identity[name])
            raise InputError(f"{path.parent} holds another comparison ({differs} differ): give another --out folder")
        # Without its first line nobody can say what the others are of.
        known = entries[1:] if found == identity else []
        sound = [one for one in known if one is not None and isinstance(one.get("key"), str) and is_sound(one)]
        self.records = {entry["key"]: entry for entry in sound}
        damaged = bool(text) and (len(sound) != len(entries) - 1 or found != identity or not text.endswith("\n"))
        if damaged:
            aside = free_name(path)
            write_output(aside, path.read_bytes())
            self.notes.append(
                f"{path} was damaged: moved to {aside.name}, {len(sound)} of its measurements are kept, "
                "the others are made again"
            )
        if damaged or not text:
            write_output(path, lines({"comparison": identity}, *sound))
        self.records = told_by_first(self.records)      # a rank on another machine has another folder

    def add(self, key: str, record: dict[str, Any]) -> None:
        self.records[key] = {"key": key, **record}
        append_output(self.path, lines(self.records[key]))


def lines(*entries: dict[str, Any]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def parsed(line: str) -> dict[str, Any] | None:
    """The object on a line, or None where the line is damaged."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def free_name(path: Path) -> Path:
    """A name beside `path` that nothing has yet."""
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    return aside
