"""Compute the paired difference between two rows of comparisons, on their common windows and questions.

    python tools/paired_difference.py DIR "pop r 0.4, width 0.1, min evidence 0" OTHER_DIR "frozen r 0.35"

Rows have the names of the plots' legends. The difficulty of a window or a question affects both rows, so their
difference has a much smaller standard error than either row.
"""

import argparse
import json
import math
from pathlib import Path

from popengine.evaluation.comparison import Configuration
from weights.errors import InputError


def measured(folder: Path, label: str) -> tuple[object, dict[str, dict[str, float]]]:
    """What was compared, and under the configuration of that name: the mean loss of every window, and of every
    question whether its answer was right (100 or 0)."""
    try:
        first, *records = map(json.loads, (folder / "progress.jsonl").read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: its progress.jsonl cannot be read: {error}") from None
    found: dict[str, dict[str, dict[str, float]]] = {}
    for record in records:
        kind, _, configuration = record["key"].partition(": ")
        if not kind.startswith(("window ", "tasks ")):
            continue
        row = found.setdefault(Configuration.from_fields(json.loads(configuration)).label, {})
        if kind.startswith("window "):
            row.setdefault("nats per token, windows", {})[kind] = sum(record["losses"]) / len(record["losses"])
        else:
            row[f"% of answers, questions of {kind}"] = {
                f"{task} {number}": 100.0 * right
                for task, answers in record["right"].items() for number, right in enumerate(answers)
            }
    if label not in found:
        raise InputError(f"{folder} has no row {label!r}; it has {', '.join(map(repr, found))}")
    names = ("text", "prompt_tokens", "score_tokens", "windows", "questions", "seed")
    return {name: first["comparison"].get(name) for name in names}, found[label]


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("first", "second"):
        flags.add_argument(f"{name}_folder", type=Path)
        flags.add_argument(name)
    given = flags.parse_args()
    try:
        about, one = measured(given.first_folder, given.first)
        other_about, other = measured(given.second_folder, given.second)
        if about != other_about or any(one[of].keys() != other.get(of, {}).keys() for of in one):
            raise InputError(f"the two were not given the same: {about} and {other_about}")
    except InputError as error:
        flags.error(str(error))
    for of, values in one.items():
        differences = [value - other[of][name] for name, value in values.items()]
        mean = sum(differences) / len(differences)
        spread = sum((difference - mean) ** 2 for difference in differences)
        error = math.sqrt(spread / max(1, len(differences) - 1) / len(differences))
        unit, _, counted = of.partition(", ")
        print(f"{given.first} less {given.second}: {mean:+.4f} ± {error:.4f} {unit}, {len(differences)} {counted}")


if __name__ == "__main__":
    main()
