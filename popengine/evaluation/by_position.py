"""Quality by position: does a method lose more the further an answer goes? (POP, arXiv 2602.06822, its motivation)

Positions of scored tokens are grouped: 1 to 32, 33 to 64, 65 to 128 and so on, each group twice as long as all before.
Figures are means over windows, with standard errors over windows. Differences between two methods are taken window by
window, because most of a window's loss is how hard its text is.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from popengine.evaluation.scoring import WindowScore, mean_and_error

FIRST_GROUP = 32
# What a window's score holds per token, by the name of the figure.
PER_TOKEN: dict[str, Callable[[WindowScore], Sequence[float]]] = {
    "loss": lambda score: score.losses,
    "divergence": lambda score: score.divergences,
    "agreement": lambda score: score.agreed,
}


def position_groups(scored: int) -> list[tuple[int, int]]:
    """Return the first and the last position of every group, counted from 1, of `scored` tokens."""
    groups, first, last = [], 1, FIRST_GROUP
    while first <= scored:
        groups.append((first, min(last, scored)))
        first, last = last + 1, 2 * last
    return groups


def by_position(
    scores: Sequence[WindowScore], references: dict[str, Sequence[WindowScore] | None]
) -> dict[str, Any]:
    """Compute the figures of every group of positions.

    scores      of one method, one for every window
    references  scores of other methods on the same windows, by name; None: not compared
    returns     groups: for each the figures of PER_TOKEN, and less_NAME, the loss less that of a reference
                last_less_first: by less_NAME, how much that difference grows from the first to the last group
                Every figure has a mean and an error, which is None for a single window.
    """
    positions = position_groups(len(scores[0].losses))
    groups: list[dict[str, Any]] = []
    growth = {}
    for first, last in positions:
        figures = {name: of_windows(means(scores, values, first, last)) for name, values in PER_TOKEN.items()}
        groups.append({"first": first, "last": last} | figures)
    for name, reference in references.items():
        if reference is None:
            continue
        lost = [
            [mine - theirs for mine, theirs in zip(means(scores, PER_TOKEN["loss"], *group),
                                                   means(reference, PER_TOKEN["loss"], *group), strict=True)]
            for group in positions
        ]                                                                           # groups of windows
        for group, differences in zip(groups, lost, strict=True):
            group[f"less_{name}"] = of_windows(differences)
        growth[f"less_{name}"] = of_windows([late - early for early, late in zip(lost[0], lost[-1], strict=True)])
    return {"groups": groups, "last_less_first": growth if len(groups) > 1 else {}}


def means(
    scores: Sequence[WindowScore], values: Callable[[WindowScore], Sequence[float]], first: int, last: int
) -> list[float]:
    """Average each window's values over the positions from first to last."""
    return [sum(values(score)[first - 1 : last]) / (last - first + 1) for score in scores]


def of_windows(values: Sequence[float]) -> dict[str, float | None]:
    """Compute the mean over windows and its standard error; None for a single window, as JSON has no nan."""
    return {name: None if math.isnan(value) else value for name, value in mean_and_error(values).items()}


def tables(labels: Sequence[str], found: Sequence[dict[str, Any]]) -> list[str]:
    """Write the Markdown tables of the losses less each reference's, on the text and along the dense generation.

    found  of each row of a comparison: `by_position` by source
    """
    titles = {"text": "on the text", "generated": "on what the dense model generates"}
    lines: list[str] = []
    for source, title in titles.items():
        groups = found[0][source]["groups"]
        for name in ("dense", "pop"):
            difference = f"less_{name}"
            rows = [
                (label, own[source]) for label, own in zip(labels, found, strict=True)
                if difference in own[source]["groups"][0]
            ]
            if not rows:
                continue
            of = "dense's" if name == "dense" else "pop's at the same ratio"
            heads = [f"{group['first']} to {group['last']}" for group in groups] + ["last less first"]
            lines += [
                "", f"Loss less {of}, nats per token, {title}, by position:", "",
                f"| | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 1),
            ]
            for label, own in rows:
                cells = [cell(group[difference]) for group in own["groups"]]
                cells.append(cell(own["last_less_first"].get(difference)))
                lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def cell(figure: dict[str, float | None] | None) -> str:
    """Write a difference with its standard error."""
    if figure is None:
        return ""
    error = "" if figure["error"] is None else f" ± {figure['error']:.3f}"
    return f"{figure['mean']:+.3f}{error}"
