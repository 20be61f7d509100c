"""The table of a comparison, in Markdown."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import Field
from functools import partial
from pathlib import Path
from typing import Any

from popengine.studies.settings import LAYER_METHODS, WIDTH_RULES, compared_fields
from popengine.studies.skipped_layers import skips_layers
from weights.output_file import write_output

Column = Callable[[dict[str, Any]], str]


def markdown(
    rows: Sequence[dict[str, Any]], about: dict[str, Any], studies: dict[str, dict[str, float]]
) -> str:
    """Write the table of a comparison in Markdown."""
    always: dict[str, Column] = {
        "MB per token": lambda row: f"{row['weight_bytes_per_token'] / 1e6:.1f}",
        "of dense": lambda row: f"{row['weight_share']:.1%}",
    }
    if "perplexity" in rows[0]:
        always |= {
            "perplexity": lambda row: f"{row['perplexity']:.2f}",
            "loss": lambda row: f"{row['mean_loss']:.3f} ± {row['standard_error'] or float('nan'):.3f}",
            "same top token": lambda row: f"{row['agreement']:.1%}",
            "KL from dense": lambda row: f"{max(0.0, row['divergence']):.3f}",
            "same token generated": lambda row: f"{row['generated_agreement']:.1%}",
            "tokens alike (median)": lambda row: f"{row['identical_tokens']:.1f}",
        }
    if "decode_ms_per_token" in rows[0]:
        always["ms per token"] = lambda row: f"{row['decode_ms_per_token']:.1f}"
    if rows[0]["over_dense"] is not None:
        for figure in rows[0]["over_dense"]:
            if figure != "error":
                always[f"{figure} over dense's"] = partial(over_dense, figure)
    for name in rows[0]:
        if name.startswith("tasks_"):
            for task in rows[0][name]["asked"]:
                always[task] = partial(share_right, name, [task])
            always["all tasks"] = partial(share_right, name, list(rows[0][name]["asked"]))
    studied = []
    for name, found in studies.items():
        figures = ", ".join(f"{key.replace('_', ' ')} {value:.3f}" for key, value in found.items())
        studied.append(f"{name[0].upper()}{name[1:]}: {figures}.")
    return written(rows, always, about, studied)


def over_dense(figure: str, row: dict[str, Any]) -> str:
    """Return the cell of a quotient to the dense row in the same form of weights; empty if there is none.

    figure  bytes, perplexity or time
    """
    found = row["over_dense"]
    if found is None or found.get(figure) is None:
        return ""
    if figure == "perplexity":
        return f"{found[figure]:.3f} ± {math.nan if found['error'] is None else found['error']:.3f}"
    return f"{found[figure]:.2f}"


def written(
    rows: Sequence[dict[str, Any]], always: dict[str, Column], about: dict[str, Any], studied: Sequence[str] = ()
) -> str:
    """Write a table: columns of methods and settings (only those that differ), then the given columns.

    Below the table stand the figures of studies and the circumstances of the measurements.
    """
    columns: dict[str, Column] = {
        "weights": lambda row: row["weights"],
        "method": lambda row: row["method"],
        "prune ratio": lambda row: f"{row['ratio']:.3g}",
        "FFN ratio": lambda row: f"{row['ffn_ratio']:.3g}",
    }
    for one in compared_fields():
        if one.metadata["column"]:
            columns[one.metadata["column"]] = partial(setting_cell, one)
    shown = {
        name: show for name, show in columns.items()
        if name == "method" or len({show(row) for row in rows} - {""}) > 1
    } | always
    lines = [
        "| " + " | ".join(shown) + " |",
        "|" + "---|" * len(shown),
        *("| " + " | ".join(show(row) for show in shown.values()) + " |" for row in rows),
    ]
    alike = ", ".join(f"{name} {value}" for name, value in unsaid_settings(rows, shown).items())
    machine_words = ", ".join(f"{name} {value}" for name, value in about["machine"].items())
    facts = [f"{name.replace('_', ' ')} {value}" for name, value in about.items()
             if name not in ("machine", "plots") and value is not None]
    studied = [*studied, *([f"In all rows: {alike}."] if alike else [])]
    ending = [*studied, f"Measured with: {'; '.join(facts)}.", f"Machine: {machine_words}."]
    return "\n".join([*lines, *(line for sentence in ending for line in ("", sentence)), ""])


def unsaid_settings(rows: Sequence[dict[str, Any]], shown: dict[str, Column]) -> dict[str, str]:
    """Settings without a column, as they are the same wherever they matter: the width, and what is not a default."""
    found = {}
    for one in compared_fields():
        name = one.metadata["column"]
        if name and name not in shown:
            values = {setting_cell(one, row) for row in rows if row["method"] != "dense"} - {""}
            default = setting_cell(one, {**rows[0], "method": "pop", one.name: one.default})
            if len(values) == 1 and (name == "width" or values != {default}):
                found[name] = values.pop()
    return found


def setting_cell(one: Field[Any], row: dict[str, Any]) -> str:
    """Return the cell of a setting, empty if it does not change the row's method."""
    value, matters = row[one.name], one.metadata["matters"]
    if row["method"] == "dense" or (matters == "to widths" and row["method"] not in WIDTH_RULES):
        return ""
    if matters == "to skipping" and (not skips_layers(row["prefill_skip"]) or row["method"] == "skip-no-boundary"):
        return ""
    if matters == "to thinning" and (
        row["visual_tokens"] == "all" or (one.name == "visual_tokens_layer" and row["visual_tokens_by"] != "attention")
    ):
        return ""
    if matters == "to layers" and row["method"] not in LAYER_METHODS:
        return ""
    return "off" if value is None else f"{value:g}" if isinstance(value, float) else str(value) or "none"


def share_right(task_set: str, tasks: Sequence[str], row: dict[str, Any]) -> str:
    """Return the cell of right answers to these tasks, with the standard error."""
    share, error = right_answers(row[task_set], tasks)
    return f"{share:.1%} ± {error:.1%}"


def right_answers(found: dict[str, dict[str, int]], tasks: Sequence[str]) -> tuple[float, float]:
    """Compute the share of right answers over all questions of these tasks, and its standard error over questions."""
    right, asked = (sum(found[key][task] for task in tasks) for key in ("right", "asked"))
    share = right / asked
    return share, math.sqrt(share * (1 - share) / max(1, asked - 1))


def write_table(folder: Path, result: dict[str, Any], table: str) -> None:
    """Write table.json and table.md into a folder, and print the table."""
    write_output(folder / "table.json", json.dumps(result, indent=1) + "\n")
    write_output(folder / "table.md", table)
    print(table, end="")
