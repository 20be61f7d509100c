"""The plots of a comparison. They need matplotlib, which the extra `plots` installs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from popengine.evaluation.comparison_table import right_answers
from popengine.evaluation.studies import NetworkPicks, RankDrift
from weights.errors import InputError
from weights.output_file import replacing

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch
except ImportError:
    raise InputError("plots need matplotlib: pip install 'popengine[plots]', or give --no-plots") from None

STYLES = {
    "dense": ("black", "*"),
    "all-channels": ("tab:gray", "D"),
    "pop": ("tab:blue", "o"),
    "frozen": ("tab:orange", "s"),
    "up": ("tab:cyan", "^"),
    "gate": ("tab:olive", "v"),
    "cats": ("tab:pink", "<"),
    "teal": ("darkgreen", ">"),
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

    agreed            share of windows whose likeliest token is the dense model's, per position of the given text
    agreed_generated  this share along the text that the dense model generates
    still_alike       share of windows that agree on every token so far, along that text
    """

    method: str
    label: str
    ffn_ratio: float
    candidate_width: float
    megabytes: float
    perplexity: float
    agreed: list[float]
    agreed_generated: list[float]
    still_alike: list[float]


def save(figure: Any, path: Path) -> None:
    """Write a figure as a PNG file and close it."""
    figure.tight_layout()
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=130)
    pyplot.close(figure)


def plot_perplexity(points: Sequence[Point], path: Path) -> None:
    """Plot perplexity against weight bytes per token; POP's widths at one ratio are joined.

    A value above ten times the best is drawn on the upper edge with its number, so that the others remain distinct.
    """
    figure, axes = pyplot.subplots(figsize=(10, 5.5))
    best = min(point.perplexity for point in points)
    top = min(10 * best, 1.25 * max(point.perplexity for point in points))
    for method in dict.fromkeys(point.method for point in points):
        colour, marker = STYLES.get(method, ("tab:cyan", "o"))
        own = [point for point in points if point.method == method]
        for ratio in sorted({point.ffn_ratio for point in own}):
            line = sorted((p for p in own if p.ffn_ratio == ratio), key=lambda p: p.candidate_width)
            axes.plot([p.megabytes for p in line], [p.perplexity for p in line], color=colour, linewidth=0.9, alpha=0.6)
            if method == "pop":
                for point in line:
                    axes.annotate(
                        f"{point.candidate_width:g}", (point.megabytes, point.perplexity), fontsize=8, color=colour,
                        textcoords="offset points", xytext=(5, 5),
                    )
        for point in own:
            if point.perplexity > top:
                axes.annotate(
                    f"{point.perplexity:.0f}", (point.megabytes, top), fontsize=7, color=colour, ha="left",
                    textcoords="offset points", xytext=(5, -9 if method == "random" else -20), annotation_clip=False,
                )
        axes.scatter(
            [p.megabytes for p in own], [min(p.perplexity, top) for p in own], color=colour, marker=marker,
            s=140 if method == "dense" else 42, label=method, zorder=3, clip_on=False,
        )
    axes.set_yscale("log")
    axes.set_ylim(best * 0.9, top)
    steps = (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 15, 20, 25, 30, 40, 50, 60, 80, 100, 150, 200, 300, 500, 1000, 2000, 5000)
    ticks = [tick for tick in steps if best * 0.9 <= tick <= top]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("weights read per decoded token, MB")
    axes.set_ylabel("perplexity (lower is better)")
    axes.set_title("What a decode step reads, and what it costs in quality (numbers: candidate width of pop)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1))
    save(figure, path)


def plot_agreement(points: Sequence[Point], path: Path, bin_size: int = 16) -> None:
    """Plot agreement with the dense model by position, in bins.

    Three panels: on the given text, along the dense model's generation, and the share of windows that agree on every
    token so far.
    """
    figure, panels = pyplot.subplots(1, 3, figsize=(15.5, 4.8), sharey=True)
    lines = ("-", "--", ":", "-.")
    shown = [point for point in points if point.method != "dense"]
    for axes, title, values in (
        (panels[0], "same top token, given the text", [point.agreed for point in shown]),
        (panels[1], "same token, along dense generation", [point.agreed_generated for point in shown]),
        (panels[2], "every token so far the same", [point.still_alike for point in shown]),
    ):
        used: dict[str, int] = {}
        for point, shares in zip(shown, values, strict=True):
            size = min(bin_size, len(shares))
            bins = torch.tensor(shares[: len(shares) // size * size]).view(-1, size).mean(dim=1)
            middle = [size * index + size / 2 for index in range(len(bins))]
            colour = STYLES.get(point.method, ("tab:cyan", "o"))[0]
            line = lines[used.get(point.method, 0) % len(lines)]
            used[point.method] = used.get(point.method, 0) + 1
            axes.plot(middle, bins.tolist(), line, color=colour, marker=".", label=point.label)
        axes.set_ylim(0, 1)
        axes.set_title(title)
        axes.set_xlabel(f"position after the prompt (mean over {bin_size})")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("agreement with the dense model")
    panels[2].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), handlelength=3.5)
    save(figure, path)


def plot_rank_drift(drifts: Sequence[RankDrift], path: Path) -> None:
    """Plot mean rank difference and top-50 % overlap per decode step: median and middle 80 % of the networks."""
    figure, both = pyplot.subplots(1, 2, figsize=(11, 4.3))
    for axes, title, chance, values in (
        (both[0], "mean rank difference / channels", 1 / 3, [drift.rank_difference for drift in drifts]),
        (both[1], "overlap of the top 50 %", 0.5, [drift.overlap for drift in drifts]),
    ):
        over_windows = torch.stack(values).nanmean(dim=0)                           # [networks, S]
        steps = range(1, over_windows.shape[1] + 1)
        low, middle, high = (over_windows.nanquantile(q, dim=0).tolist() for q in (0.1, 0.5, 0.9))
        axes.fill_between(steps, low, high, color="tab:blue", alpha=0.2, label="middle 80 % of the networks")
        axes.plot(steps, middle, color="tab:blue", label="median network")
        axes.axhline(chance, color="black", linestyle=":", label="by chance")
        axes.set_xlabel("decode step")
        axes.set_title(title)
        axes.set_ylim(0, 0.5 if chance < 0.5 else 1)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(f"Dense model: a decode step's ranking of channels against the prompt's, {len(drifts)} windows")
    save(figure, path)


def plot_partition_map(networks: Sequence[NetworkPicks], path: Path, label: str) -> None:
    """Plot networks x channels: above the region of every channel, below how often each candidate was picked."""
    channels = networks[0].partition.sizes.channels
    regions = torch.zeros(len(networks), channels)
    candidates = networks[0].partition.sizes.candidate
    share = torch.zeros(len(networks), candidates)
    for row, network in enumerate(networks):
        regions[row, network.partition.candidate] = 1
        regions[row, network.partition.pruned] = 2
        share[row] = (network.picked / max(network.steps, 1)).sort(descending=True).values.cpu()
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(13, 8.5))
    above.imshow(
        regions.numpy(), aspect="auto", interpolation="nearest", cmap=ListedColormap(list(REGION_COLOURS.values())),
        vmin=0, vmax=2, extent=(0, channels, len(networks), 0),
    )
    above.set_title(f"Partition of one prompt, {label}")
    above.set_xlabel("channel, in the model's order")
    above.set_ylabel(row_name(networks))
    above.legend(
        handles=[Patch(color=colour, label=name) for name, colour in REGION_COLOURS.items()],
        loc="upper right", ncols=3, fontsize=8, framealpha=0.95,
    )
    image = below.imshow(share.numpy(), aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=1,
                         extent=(0, candidates, len(networks), 0))
    below.set_title("How often decode steps picked each candidate (each row sorted; half are picked at every step)")
    below.set_xlabel("candidate, from the most to the least picked")
    below.set_ylabel(row_name(networks))
    figure.colorbar(image, ax=below, label="share of steps", fraction=0.03, pad=0.01)
    save(figure, path)


def plot_frontier(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot loss against the bytes and against the time of a step; the Pareto frontier is joined.

    With one form of weights, colours show methods; with several, colours show forms and markers show methods.
    """
    forms = list(dict.fromkeys(row["weights"] for row in rows))
    figure, both = pyplot.subplots(1, 2, figsize=(12.5, 5), sharey=True)
    for axes, name, title in (
        (both[0], "weight_bytes_per_token", "weights read per decoded token, MB"),
        (both[1], "decode_ms_per_token", "time per decoded token, ms"),
    ):
        scale = 1e-6 if name == "weight_bytes_per_token" else 1.0
        for form, method in dict.fromkeys((row["weights"], row["method"]) for row in rows):
            own = [row for row in rows if (row["weights"], row["method"]) == (form, method)]
            colour, marker = STYLES.get(method, ("tab:cyan", "o"))
            axes.scatter(
                [row[name] * scale for row in own], [row["mean_loss"] for row in own],
                color=colour if len(forms) == 1 else f"C{forms.index(form)}", marker=marker,
                s=120 if method == "dense" else 42, label=method if len(forms) == 1 else f"{form}, {method}", zorder=3,
            )
        points = sorted((row[name] * scale, row["mean_loss"]) for row in rows)
        unbeaten = [
            point for place, point in enumerate(points) if all(point[1] < earlier[1] for earlier in points[:place])
        ]
        axes.plot(*zip(*unbeaten, strict=True), color="black", linewidth=0.8, linestyle=":", zorder=1)
        axes.set_xlabel(title)
        axes.grid(alpha=0.3)
    both[0].set_ylabel("loss, nats per token")
    both[1].legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1))
    save(figure, path)


def plot_tasks(labels: Sequence[str], rows: Sequence[dict[str, Any]], task_set: str, path: Path) -> None:
    """Plot right answers of every row of the table, in order from the top, with standard errors over questions."""
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.26 * len(rows)))
    for place, row in enumerate(rows):
        found = row[f"tasks_{task_set}"]
        share, error = right_answers(found, list(found["asked"]))
        colour, marker = STYLES.get(row["method"], ("black", "."))
        axes.errorbar(100 * share, -place, xerr=100 * error, color=colour, marker=marker, capsize=2)
        if row["method"] == "dense":
            axes.axvline(100 * share, color="lightgray", zorder=0)
    axes.set_yticks([-place for place in range(len(rows))], labels, fontsize=8)
    axes.set_xlabel(f"right answers, % of all questions (tasks: {task_set})")
    save(figure, path)


def plot_gates(rows: Sequence[dict[str, Any]], path: Path, label: str) -> None:
    """Plot each layer's importance for prompt positions and for output positions, as shares of all layers."""
    figure, axes = pyplot.subplots(figsize=(9, 4.3))
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
    axes.legend(fontsize=9, loc="upper center")
    save(figure, path)


def row_name(networks: Sequence[NetworkPicks]) -> str:
    """Return the label of the axis of networks."""
    return "layer and expert" if any("expert" in network.name for network in networks) else "layer"
