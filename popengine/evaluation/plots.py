"""The plots of a comparison. They need matplotlib, which the extra `plots` installs; without it nothing is drawn.

Every plot shows a price (quality lost) and, where there is one, the gain (bytes or time saved). Legends are outside the
panels. A function returns False, and writes no file, if it would draw an empty panel.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from popengine.evaluation.comparison_table import right_answers
from popengine.evaluation.studies import NetworkPicks, RankDrift
from popengine.studies.settings import INPUT_METHODS
from weights.output_file import replacing

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    INSTALLED = True
except ImportError:
    INSTALLED = False

MISSING = "note: no plots are drawn, as matplotlib is missing: pip install 'popengine[plots]'"

STYLES = {
    "dense": ("black", "*"),
    "all-channels": ("tab:gray", "D"),
    "pop": ("tab:blue", "o"),
    "pop, inputs off": ("tab:green", "P"),
    "frozen": ("tab:orange", "s"),
    "frozen, inputs off": ("tab:red", "X"),
    "up": ("tab:cyan", "^"),
    "gate": ("tab:olive", "v"),
    "cats": ("tab:pink", "<"),
    "teal": ("darkgreen", ">"),
    "wina": ("darkgreen", "<"),
    "glass": ("tab:purple", "d"),
    "draft": ("navy", "h"),
    "random": ("tab:brown", "x"),
    "magnitude": ("tab:red", "^"),
    "wanda-sp": ("tab:green", "v"),
    "flap": ("tab:purple", "P"),
    "cfsp": ("teal", "X"),
    "tyr": ("crimson", "p"),
    "probe-pruning": ("tab:cyan", "H"),
    "shortgpt": ("saddlebrown", "<"),
    "finercut": ("darkorange", ">"),
    "prefill-only": ("dimgray", "1"),
    "visual-tokens": ("goldenrod", "*"),
    "router-statistics": ("indigo", "s"),
    "uncurl": ("deeppink", "D"),
}
REGION_COLOURS = {"retained": "#1f4e79", "candidate": "#f2b134", "pruned": "#e8e8e8"}


@dataclass(frozen=True)
class Point:
    """One row of the table, for the plots.

    weight_share      bytes per token over the dense model's
    perplexity        None if it is not a number
    agreed            share of windows whose likeliest token is the dense model's, per position of the given text
    agreed_generated  this share along the text that the dense model generates
    still_alike       share of windows that agree on every token so far, along that text
    """

    method: str
    label: str
    ffn_ratio: float
    candidate_width: float
    megabytes: float
    weight_share: float
    perplexity: float | None
    agreed: list[float]
    agreed_generated: list[float]
    still_alike: list[float]


def tell_if_missing() -> None:
    """Print one line on stderr if matplotlib is missing."""
    if not INSTALLED:
        print(MISSING, file=sys.stderr, flush=True)


def panels(rows: int, columns: int, size: tuple[float, float], sharey: bool = False) -> tuple[Any, list[Any]]:
    """Return a figure and its panels. Its layout leaves room for a legend outside them."""
    figure, axes = pyplot.subplots(rows, columns, figsize=size, sharey=sharey, squeeze=False, layout="constrained")
    return figure, list(axes.flat)


def legend(figure: Any, axes: Any, where: str = "outside right upper", **style: Any) -> None:
    """Add the legend of one panel to the figure, outside all panels, with each label once."""
    named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(named.values(), named.keys(), loc=where, fontsize=8, **style)


def save(figure: Any, path: Path) -> None:
    """Write a figure as a PNG file and close it."""
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=130)
    pyplot.close(figure)


def against_dense(axes: Any, megabytes: float, perplexity: float | None) -> None:
    """Add the share of bytes saved to the top of a panel, and perplexity over dense's to its right.

    megabytes, perplexity  the dense model's values on both axes, where lines are drawn; None: it was not measured
    """
    axes.axvline(megabytes, color="lightgray", zorder=0)
    saved = (lambda x: 100 * (1 - x / megabytes)), (lambda share: megabytes * (1 - share / 100))
    axes.secondary_xaxis("top", functions=saved).set_xlabel("bytes saved against dense, %")
    if perplexity is not None:
        axes.axhline(perplexity, color="lightgray", zorder=0)
        right = axes.secondary_yaxis("right", functions=(lambda y: y / perplexity, lambda share: share * perplexity))
        even_ticks(right.yaxis, [limit / perplexity for limit in axes.get_ylim()])
        right.set_ylabel("perplexity over dense's")


def even_ticks(axis: Any, limits: Sequence[float]) -> None:
    """Put round ticks on an axis of any scale, between the limits."""
    ticks = [tick for tick in MaxNLocator(8).tick_values(*limits) if limits[0] <= tick <= limits[1]]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))


def plot_perplexity(points: Sequence[Point], path: Path) -> bool:
    """Plot perplexity against weight bytes per token; POP's widths at one ratio are joined.

    A value above ten times the best is drawn on the upper edge with its number, so that the others remain distinct.
    """
    measured = [(point, point.perplexity) for point in points if point.perplexity is not None]
    if not measured:
        return False
    figure, (axes,) = panels(1, 1, (10.5, 5.8))
    best = min(value for _, value in measured)
    top = min(10 * best, 1.25 * max(value for _, value in measured))
    for method in dict.fromkeys(point.method for point, _ in measured):
        colour, marker = STYLES.get(method, ("tab:cyan", "o"))
        own = [(point, value) for point, value in measured if point.method == method]
        for ratio in sorted({point.ffn_ratio for point, _ in own}):
            line = sorted(((p, v) for p, v in own if p.ffn_ratio == ratio), key=lambda pair: pair[0].candidate_width)
            axes.plot([p.megabytes for p, _ in line], [v for _, v in line], color=colour, linewidth=0.9, alpha=0.6)
            if method == "pop":
                for point, value in line:
                    axes.annotate(
                        f"{point.candidate_width:g}", (point.megabytes, value), fontsize=8, color=colour,
                        textcoords="offset points", xytext=(5, 5),
                    )
        for point, value in own:
            if value > top:
                axes.annotate(
                    f"{value:.0f}", (point.megabytes, top), fontsize=7, color=colour, ha="left",
                    textcoords="offset points", xytext=(5, -9 if method == "random" else -20), annotation_clip=False,
                )
        axes.scatter(
            [p.megabytes for p, _ in own], [min(v, top) for _, v in own], color=colour, marker=marker,
            s=140 if method == "dense" else 42, label=method, zorder=3, clip_on=False,
        )
    axes.set_yscale("log")
    axes.set_ylim(best * 0.9, top)
    even_ticks(axes.yaxis, axes.get_ylim())
    dense = next((value for point, value in measured if point.method == "dense"), None)
    whole = measured[0][0].megabytes / measured[0][0].weight_share
    against_dense(axes, whole, dense)
    axes.set_xlabel("weights read per decoded token, MB")
    axes.set_ylabel("perplexity (lower is better)")
    figure.suptitle("What a decode step reads, and what it costs in quality (numbers: candidate width of pop)")
    axes.grid(alpha=0.3)
    legend(figure, axes)
    save(figure, path)
    return True


def plot_agreement(points: Sequence[Point], path: Path, bin_size: int = 16) -> bool:
    """Plot agreement with the dense model by position, in bins; the legend has the bytes that each method reads.

    Three panels: on the given text, along the dense model's generation, and the share of windows that agree on every
    token so far.
    """
    shown = [point for point in points if point.method != "dense"]
    if not shown:
        return False
    figure, three = panels(1, 3, (16, 4.8), sharey=True)
    lines = ("-", "--", ":", "-.")
    for axes, title, values in (
        (three[0], "same top token, given the text", [point.agreed for point in shown]),
        (three[1], "same token, along dense generation", [point.agreed_generated for point in shown]),
        (three[2], "every token so far the same", [point.still_alike for point in shown]),
    ):
        used: dict[str, int] = {}
        for point, shares in zip(shown, values, strict=True):
            size = min(bin_size, len(shares))
            bins = torch.tensor(shares[: len(shares) // size * size]).view(-1, size).mean(dim=1)
            middle = [size * index + size / 2 for index in range(len(bins))]
            colour = STYLES.get(point.method, ("tab:cyan", "o"))[0]
            line = lines[used.get(point.method, 0) % len(lines)]
            used[point.method] = used.get(point.method, 0) + 1
            label = f"{point.label} ({point.weight_share:.0%} of the bytes)"
            axes.plot(middle, bins.tolist(), line, color=colour, marker=".", label=label)
        axes.set_ylim(0, 1)
        axes.set_title(title)
        axes.set_xlabel(f"position after the prompt (mean over {bin_size})")
        axes.grid(alpha=0.3)
    three[0].set_ylabel("share that agrees with the dense model")
    legend(figure, three[2], handlelength=3.5)
    save(figure, path)
    return True


def plot_by_position(labels: Sequence[str], rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Plot loss less dense's, KL divergence and agreement by position, on the text and along dense generation.

    Error bars are standard errors over windows, of the losses in pairs with dense.
    """
    shown = [
        (label, row) for label, row in zip(labels, rows, strict=True)
        if "less_dense" in row["by_position"]["text"]["groups"][0]
    ]
    if not shown:
        return False
    figure, axes = panels(2, 3, (16, 8.2))
    titles = {"less_dense": "loss less dense's, nats per token", "divergence": "KL divergence from dense, nats",
              "agreement": "same top token as dense"}
    lines = ("-", "--", ":", "-.")
    for row_of_panels, (source, words) in enumerate((("text", "the text"), ("generated", "dense generation"))):
        for panel, (figure_name, title) in zip(axes[3 * row_of_panels :], titles.items(), strict=False):
            used: dict[str, int] = {}
            for label, row in shown:
                groups = row["by_position"][source]["groups"]
                middle = [(group["first"] + group["last"]) / 2 for group in groups]
                figures = [group[figure_name] for group in groups]
                colour, marker = STYLES.get(row["method"], ("tab:cyan", "o"))
                line = lines[used.get(row["method"], 0) % len(lines)]
                used[row["method"]] = used.get(row["method"], 0) + 1
                panel.errorbar(
                    middle, [one["mean"] for one in figures], [one["error"] or 0.0 for one in figures], color=colour,
                    marker=marker, linestyle=line, capsize=2, label=label,
                )
            panel.set_xscale("log", base=2)
            ends = [group["last"] for group in shown[0][1]["by_position"][source]["groups"]]
            panel.set_xticks(ends, [f"{end}" for end in ends])
            panel.set_title(f"{title}; {words}", fontsize=10)
            panel.set_xlabel("position after the prompt")
            panel.grid(alpha=0.3)
    legend(figure, axes[0], "outside lower center", ncols=3)
    save(figure, path)
    return True


def plot_rank_drift(drifts: Sequence[RankDrift], path: Path) -> bool:
    """Plot mean rank difference and top-50 % overlap per decode step: median and middle 80 % of the networks."""
    if not drifts:
        return False
    figure, both = panels(1, 2, (11, 4.8))
    for axes, title, chance, values in (
        (both[0], "mean rank difference / channels", 1 / 3, [drift.rank_difference for drift in drifts]),
        (both[1], "overlap of the top 50 %", 0.5, [drift.overlap for drift in drifts]),
    ):
        over_windows = torch.stack(values).nanmean(dim=0)                           # [networks, S]
        steps = range(1, over_windows.shape[1] + 1)
        low, middle, high = (over_windows.nanquantile(q, dim=0).tolist() for q in (0.1, 0.5, 0.9))
        axes.fill_between(steps, low, high, color="tab:blue", alpha=0.2, label="middle 80 % of the networks")
        axes.plot(steps, middle, color="tab:blue", marker="." if len(steps) < 40 else "", label="median network")
        axes.axhline(chance, color="black", linestyle=":", label="by chance")
        axes.set_xlabel("decode step")
        axes.set_ylabel("share of the channels")
        axes.set_title(title)
        axes.set_ylim(0, 0.5 if chance < 0.5 else 1)
        axes.grid(alpha=0.3)
    legend(figure, both[0], "outside lower center", ncols=3)
    figure.suptitle(f"Dense model: a decode step's ranking of channels against the prompt's, {len(drifts)} windows")
    save(figure, path)
    return True


def plot_partition_map(networks: Sequence[NetworkPicks], path: Path, label: str) -> bool:
    """Plot networks x channels: above the region of every channel, below how often each candidate was picked."""
    channels = networks[0].partition.sizes.channels
    regions = torch.zeros(len(networks), channels)
    candidates = networks[0].partition.sizes.candidate
    share = torch.zeros(len(networks), candidates)
    for row, network in enumerate(networks):
        regions[row, network.partition.candidate] = 1
        regions[row, network.partition.pruned] = 2
        share[row] = (network.picked / max(network.steps, 1)).sort(descending=True).values.cpu()
    figure, drawn = panels(2 if candidates else 1, 1, (13, 9 if candidates else 5))
    drawn[0].imshow(
        regions.numpy(), aspect="auto", interpolation="nearest", cmap=ListedColormap(list(REGION_COLOURS.values())),
        vmin=0, vmax=2, extent=(0, channels, len(networks), 0),
    )
    drawn[0].set_title(f"Partition of one prompt, {label}")
    drawn[0].set_xlabel("channel, in the model's order")
    drawn[0].set_ylabel(row_name(networks))
    figure.legend(
        handles=[Patch(color=colour, label=name) for name, colour in REGION_COLOURS.items()],
        loc="outside lower center", ncols=3, fontsize=8,
    )
    for below in drawn[1:]:
        image = below.imshow(share.numpy(), aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=1,
                             extent=(0, candidates, len(networks), 0))
        below.set_title("How often decode steps picked each candidate (each row sorted; half are picked at every step)")
        below.set_xlabel("candidate, from the most to the least picked")
        below.set_ylabel(row_name(networks))
        figure.colorbar(image, ax=below, label="share of steps", fraction=0.03, pad=0.01)
    save(figure, path)
    return True


def plot_frontier(rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Plot perplexity against bytes and time of a step, all over the dense model's in the same form of weights.

    The Pareto frontier is joined, error bars are standard errors over windows, and numbers beside points are widths.
    With one form of weights, colours show methods; with several, colours show forms and markers show methods.
    """
    rows = [row for row in rows if row["over_dense"] is not None and row["over_dense"]["perplexity"] is not None]
    if not rows:
        return False
    forms = list(dict.fromkeys(row["weights"] for row in rows))
    figure, both = panels(1, 2, (13.5, 6.2), sharey=True)
    for axes, name, title in (
        (both[0], "bytes", "weights read per decoded token"), (both[1], "time", "time per decoded token"),
    ):
        shown = [(row, row["over_dense"]) for row in rows if name in row["over_dense"]]
        for form, method in dict.fromkeys((row["weights"], kind_of(row)) for row, _ in shown):
            own = [(row, found) for row, found in shown if (row["weights"], kind_of(row)) == (form, method)]
            colour, marker = STYLES.get(method, ("tab:cyan", "o"))
            colour = colour if len(forms) == 1 else f"C{forms.index(form)}"
            axes.errorbar(
                [found[name] for _, found in own], [found["perplexity"] for _, found in own],
                [found["error"] or 0.0 for _, found in own], color=colour, marker=marker, linestyle="", capsize=2,
                elinewidth=0.8, markersize=11 if method == "dense" else 6, zorder=3,
                label=method if len(forms) == 1 else f"{form}, {method}",
            )
            for row, found in own if method == "pop" else ():
                axes.annotate(
                    f"{row['candidate_width']:g}", (found[name], found["perplexity"]), fontsize=7, color=colour,
                    textcoords="offset points", xytext=(5, 4),
                )
        points = sorted((found[name], found["perplexity"]) for _, found in shown)
        unbeaten = [
            point for place, point in enumerate(points) if all(point[1] < earlier[1] for earlier in points[:place])
        ]
        if unbeaten:
            axes.plot(*zip(*unbeaten, strict=True), color="black", linewidth=0.8, linestyle=":", zorder=1)
        for line in (axes.axvline, axes.axhline):
            line(1, color="lightgray", zorder=0)
        axes.set_xlabel(f"{title}, over dense's")
        axes.grid(alpha=0.3)
    both[0].set_ylabel("perplexity over dense's (numbers: candidate width of pop)")
    legend(figure, both[1])
    save(figure, path)
    return True


def kind_of(row: dict[str, Any]) -> str:
    """Return the method of a row, and whether inputs are left out on top of it."""
    on_top = row.get("input_sparsity") and row["method"] not in INPUT_METHODS
    return f"{row['method']}, inputs off" if on_top else str(row["method"])


def plot_tasks(labels: Sequence[str], rows: Sequence[dict[str, Any]], task_set: str, path: Path) -> bool:
    """Plot right answers of every row of the table, with standard errors over questions, beside the bytes it reads."""
    if not rows:
        return False
    figure, (right, read) = panels(1, 2, (10.5, 1.4 + 0.26 * len(rows)), sharey=True)
    for place, row in enumerate(rows):
        found = row[f"tasks_{task_set}"]
        share, error = right_answers(found, list(found["asked"]))
        colour, marker = STYLES.get(row["method"], ("black", "."))
        right.errorbar(100 * share, -place, xerr=100 * error, color=colour, marker=marker, capsize=2)
        read.barh(-place, 100 * row["weight_share"], height=0.6, color=colour)
        if row["method"] == "dense":
            right.axvline(100 * share, color="lightgray", zorder=0)
            read.axvline(100 * row["weight_share"], color="lightgray", zorder=0)
    right.set_yticks([-place for place in range(len(rows))], labels, fontsize=8)
    right.set_xlabel(f"right answers, % of all questions (tasks: {task_set})")
    read.set_xlabel("weights read per decoded token, % of dense's")
    save(figure, path)
    return True


def plot_gates(rows: Sequence[dict[str, Any]], path: Path, label: str) -> bool:
    """Plot each layer's importance for prompt positions and for output positions, as shares of all layers."""
    if not any(row[f"{name}_share"] for row in rows for name in ("prompt", "output")):
        return False
    figure, (axes,) = panels(1, 1, (9, 4.6))
    layers = [row["layer"] for row in rows]
    for name, colour, marker in (("prompt", "tab:blue", "o"), ("output", "tab:orange", "s")):
        # A gate without influence has importance 0, which a log axis cannot show: the line has a gap.
        shares = [row[f"{name}_share"] or float("nan") for row in rows]
        axes.plot(layers, shares, color=colour, marker=marker, label=f"{name} positions")
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel("share of the importance of all layers")
    axes.set_title(f"Virtual gates: mean of (dLoss / dg)^2, {label}")
    axes.grid(alpha=0.3)
    legend(figure, axes, "outside lower center", ncols=2)
    save(figure, path)
    return True


def row_name(networks: Sequence[NetworkPicks]) -> str:
    """Return the label of the axis of networks."""
    return "layer and expert" if any("expert" in network.name for network in networks) else "layer"
