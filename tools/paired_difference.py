"""The difference in loss between two rows of comparisons, on the windows that both have scored.

    python tools/paired_difference.py DIR "pop r 0.4, width 0.1" OTHER_DIR "frozen r 0.35"

A row is named as the legends of the plots name it. How hard a window is hits both rows alike, so their difference is
known far better than either loss.
"""

import argparse
import json
import math
from pathlib import Path

from popengine.measure.comparison import Configuration
from weights.errors import InputError


def losses(folder: Path, label: str) -> tuple[object, dict[int, float]]:
    """Which text was scored, and the mean loss of every window under the configuration of that name."""
    try:
        first, *records = map(json.loads, (folder / "progress.jsonl").read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: its progress.jsonl cannot be read: {error}") from None
    found: dict[str, dict[int, float]] = {}
    for record in records:
        kind, _, configuration = record["key"].partition(": ")
        if kind.startswith("window "):
            scored = found.setdefault(Configuration.from_fields(json.loads(configuration)).label, {})
            scored[int(kind.removeprefix("window "))] = sum(record["losses"]) / len(record["losses"])
    if label not in found:
        raise InputError(f"{folder} has no row {label!r}; it has {', '.join(map(repr, found))}")
    same = {name: first["comparison"][name] for name in ("text", "prompt_tokens", "score_tokens", "windows")}
    return same, found[label]


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("first", "second"):
        flags.add_argument(f"{name}_folder", type=Path)
        flags.add_argument(name)
    given = flags.parse_args()
    try:
        about, one = losses(given.first_folder, given.first)
        other_about, other = losses(given.second_folder, given.second)
        if about != other_about or one.keys() != other.keys():
            raise InputError(f"the two did not score the same windows: {about} and {other_about}")
    except InputError as error:
        flags.error(str(error))
    differences = [one[window] - other[window] for window in one]
    mean = sum(differences) / len(differences)
    spread = sum((difference - mean) ** 2 for difference in differences)
    error = math.sqrt(spread / max(1, len(differences) - 1) / len(differences))
    print(f"{given.first} less {given.second}: {mean:+.4f} ± {error:.4f} nats per token, {len(differences)} windows")


if __name__ == "__main__":
    main()
