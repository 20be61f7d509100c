"""The command: python -m popengine.compare --text FILE --methods dense pop frozen --prune-ratio 0.2 0.4 --out DIR

Every method with every setting that matters to it, on the same windows of a text and the same questions: a table
(Markdown and JSON) and plots. Measurements are written down as they are made; a run that was killed goes on from there.
"""

import argparse
import itertools
import json
import operator
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from popengine import __version__
from popengine.command import OneLineParser, add_checkpoint_flag, add_machine_flags, run_as_command
from popengine.measure.progress_file import ProgressFile
from popengine.score import (
    Text,
    Window,
    WindowScore,
    add_scoring_flags,
    calibration_from,
    check_context,
    cut_windows,
    read_text,
    summarise,
)
from weights.errors import InputError

if TYPE_CHECKING:
    from models.pruning.settings import Pruning, PruningSettings
    from popengine.engine import Engine
    from popengine.measure.plots import Point
    from popengine.measure.studies import NetworkPicks, RankDrift
    from popengine.methods.by_name import Request

DRIFT_WINDOWS = 4


@dataclass(frozen=True)
class Configuration:
    """One row of the table: a method and the settings that matter to it (the others at their defaults)."""

    method: str
    prune_ratio: float | None = None
    ffn_ratio: float | None = None
    candidate_width: float = 0.1
    head_ratio: float = 0.0
    prefill: str = "pruned"
    unseen_experts: str = "weights"

    def settings(self) -> "PruningSettings":
        from models.pruning.settings import PruningSettings

        return PruningSettings(**{name: value for name, value in asdict(self).items() if name != "method"})

    @property
    def label(self) -> str:
        """Short, for legends: what differs from the defaults."""
        if self.method == "dense":
            return "dense"
        ratio = f"r {self.ffn_ratio:g}" if self.ffn_ratio is not None else f"{100 * (self.prune_ratio or 0):g} %"
        width = f", width {self.candidate_width:g}" if self.method == "pop" else ""
        heads = f", heads {self.head_ratio:g}" if self.head_ratio else ""
        prefill = ", dense prefill" if self.prefill == "dense" else ""
        unseen = ", unseen experts dense" if self.unseen_experts == "dense" else ""
        return f"{self.method} {ratio}{width}{heads}{prefill}{unseen}"


FOLLOW_THE_PROMPT = ("pop", "frozen", "all-channels")


def configurations(flags: argparse.Namespace, mixture: bool) -> list[Configuration]:
    """The grid, without settings that would not change a method: dense has none, only pop has widths, static methods
    prune no heads and have no unseen experts."""
    ratios = [{"ffn_ratio": ratio} for ratio in flags.ffn_ratio or ()]
    ratios += [{"prune_ratio": ratio} for ratio in flags.prune_ratio or (() if flags.ffn_ratio else (0.2,))]
    made: dict[Configuration, None] = {}
    for method in flags.methods:
        if method == "dense":
            made[Configuration("dense", prune_ratio=0.0)] = None
            continue
        follows = method in FOLLOW_THE_PROMPT
        for ratio, width, heads, prefill, unseen in itertools.product(
            ratios,
            flags.candidate_width if method == "pop" else [0.1],
            flags.head_ratio if follows else [0.0],
            flags.prefill,
            flags.unseen_experts if follows and mixture else ["weights"],
        ):
            made[Configuration(method, **ratio, candidate_width=width, head_ratio=heads, prefill=prefill,
                               unseen_experts=unseen)] = None
    return list(made)


@dataclass
class Comparison:
    """Everything that a run works on. windows are empty without a text."""

    engine: "Engine"
    prunings: "dict[Configuration, Pruning]"
    settings: "dict[Configuration, PruningSettings]"
    windows: list[Window]
    progress: ProgressFile
    show_progress: bool

    def measure_text(self) -> None:
        """Score every window under every configuration; what has been scored is left out."""
        import torch
        from tqdm import tqdm

        from popengine.score import dense_log_probabilities, log_probabilities, score_window

        model = self.engine.model
        missing = [
            (index, [one for one in self.prunings if text_key(one, index) not in self.progress.records])
            for index in range(len(self.windows))
        ]
        count = sum(len(wanted) for _, wanted in missing)
        bar = tqdm(total=count, desc="text", unit="window", disable=not self.show_progress)
        with bar, torch.inference_mode():
            for index, wanted in missing:
                if not wanted:
                    continue
                window = self.windows[index]
                dense = dense_log_probabilities(model, window)
                for one in wanted:
                    score = score_window(log_probabilities(model, window, self.prunings[one]), dense, window)
                    self.progress.add(text_key(one, index), asdict(score))
                    bar.update()

    def measure_generated(self) -> None:
        """Let the dense model go on from every window's prompt, and ask every configuration along the way.

        Up to the first token on which they disagree, that is what the configuration would generate itself.
        """
        import torch
        from tqdm import tqdm

        from popengine.score import log_probabilities

        total = len(self.windows) * (1 + len(self.prunings))
        bar = tqdm(total=total, desc="generated", unit="window", disable=not self.show_progress)
        with bar, torch.inference_mode():
            for index, window in enumerate(self.windows):
                key = generated_key(None, index)
                if key not in self.progress.records:
                    self.progress.add(key, {"ids": self.dense_continuation(window)})
                bar.update()
                generated = Window(window.prompt, self.progress.records[key]["ids"])
                for one, pruning in self.prunings.items():
                    key = generated_key(one, index)
                    if key not in self.progress.records:
                        likeliest = log_probabilities(self.engine.model, generated, pruning).argmax(dim=-1)     # [S]
                        said = likeliest.new_tensor(generated.continuation)
                        self.progress.add(key, {"agreed": (likeliest == said).tolist()})
                    bar.update()

    def dense_continuation(self, window: Window) -> list[int]:
        """As many tokens as are scored, greedily, beyond an end of sequence too."""
        from models.pruning.settings import DENSE

        run = self.engine.run([window.prompt], len(window.continuation), DENSE, ignore_eos=True)
        return [token for (token,) in run if token is not None]

    def measure_tasks(self, task_sets: Sequence[str], count: int, seed: int) -> None:
        """Ask every question under every configuration; what has been asked is left out."""
        from tqdm import tqdm

        from popengine.measure.tasks import is_answered, questions_for

        questions = {name: questions_for(name, count, seed) for name in task_sets}
        total = len(self.settings) * sum(map(len, questions.values()))
        with tqdm(total=total, desc="tasks", unit="question", disable=not self.show_progress) as bar:
            for (name, asked), (one, settings) in itertools.product(questions.items(), self.settings.items()):
                key = task_key(one, name)
                if key not in self.progress.records:
                    right: dict[str, list[bool]] = {}
                    for question in asked:
                        right.setdefault(question.task, []).append(is_answered(self.engine, question, settings))
                        bar.update()
                    self.progress.add(key, {"right": {task: sum(answers) for task, answers in right.items()},
                                            "asked": {task: len(answers) for task, answers in right.items()}})
                else:
                    bar.update(len(asked))

    def rows(self, task_sets: Sequence[str]) -> list[dict[str, Any]]:
        """The table."""
        from models.pruning.settings import DENSE

        model, records = self.engine.model, self.progress.records
        dense_bytes = model.weight_bytes_per_token(self.engine.resolve(DENSE))
        rows = []
        for one, pruning in self.prunings.items():
            read = model.weight_bytes_per_token(pruning)
            row: dict[str, Any] = {
                **asdict(one),
                "ratio": pruning.ratio,
                "ffn_ratio": pruning.ffn_ratio,
                "weight_bytes_per_token": read,
                "weight_share": read / dense_bytes,
            }
            if self.windows:
                summary = summarise([self.window_score(one, index) for index in range(len(self.windows))])
                row |= {name: value if value == value else None for name, value in asdict(summary).items()}
                agreed = [self.agreed_on_generated(one, index) for index in range(len(self.windows))]
                row["generated_agreement"] = sum(map(sum, agreed)) / sum(map(len, agreed))
                row["identical_tokens"] = statistics.median([*own, False].index(False) for own in agreed)
            for name in task_sets:
                found = records[task_key(one, name)]
                row[f"tasks_{name}"] = {"right": found["right"], "asked": found["asked"]}
            rows.append(row)
        return rows

    def window_score(self, one: Configuration, index: int) -> WindowScore:
        record = self.progress.records[text_key(one, index)]
        return WindowScore(record["losses"], record["agreed"], record["divergences"])

    def agreed_on_generated(self, one: Configuration, index: int) -> list[bool]:
        """Per token that the dense model generated: would this configuration have generated it there?"""
        return self.progress.records[generated_key(one, index)]["agreed"]

    def points(self, rows: Sequence[dict[str, Any]]) -> "Iterator[Point]":
        """The rows as the plots need them."""
        from popengine.measure.plots import Point

        for one, row in zip(self.prunings, rows, strict=True):
            given = [self.window_score(one, index).agreed for index in range(len(self.windows))]
            generated = [self.agreed_on_generated(one, index) for index in range(len(self.windows))]
            still_alike = [list(itertools.accumulate(own, operator.and_)) for own in generated]
            yield Point(
                one.method, one.label, round(row["ffn_ratio"], 3), one.candidate_width,
                row["weight_bytes_per_token"] / 1e6, row["perplexity"],
                share_by_position(given), share_by_position(generated), share_by_position(still_alike),
            )

    def study_drift(self) -> "list[RankDrift]":
        """How the dense model's ranking moves, on the first windows."""
        from popengine.measure.studies import rank_drift

        return [rank_drift(self.engine.model, window) for window in self.windows[:DRIFT_WINDOWS]]

    def study_picks(self) -> "tuple[Configuration, list[NetworkPicks]] | None":
        """What POP of the usual width decides on the first window, at the highest ratio; None when it was not run."""
        from popengine.measure.studies import picks

        popped = [
            one for one, pruning in self.prunings.items()
            if one.method == "pop" and self.is_usual(one) and one.candidate_width == self.middle_width()
            and pruning.ffn_ratio > 0
        ]
        if not popped:
            return None
        return popped[-1], picks(self.engine.model, self.windows[0], self.prunings[popped[-1]])

    def plot(
        self, rows: Sequence[dict[str, Any]], drifts: "list[RankDrift]",
        picked: "tuple[Configuration, list[NetworkPicks]] | None", folder: Path,
    ) -> list[str]:
        """Draw what there is data for; the names of the files."""
        from popengine.measure import plots

        usual = [
            (one, point) for one, point in zip(self.prunings, self.points(rows), strict=True) if self.is_usual(one)
        ]
        plots.plot_perplexity([point for _, point in usual], folder / "perplexity.png")
        plots.plot_agreement(
            [point for one, point in usual if one.method != "pop" or one.candidate_width == self.middle_width()],
            folder / "agreement.png",
        )
        plots.plot_rank_drift(drifts, folder / "rank_drift.png")
        names = ["perplexity.png", "agreement.png", "rank_drift.png"]
        if picked is not None:
            one, networks = picked
            plots.plot_partition_map(networks, folder / "partition.png", one.label)
            names.append("partition.png")
        return names

    def is_usual(self, one: Configuration) -> bool:
        """Whether the plots show this one."""
        return one.method == "dense" or (one.prefill, one.head_ratio, one.unseen_experts) == self.usual_settings()

    def usual_settings(self) -> tuple[str, float, str]:
        """Prefill, heads off and treatment of unseen experts that the plots show: the first of each that was asked
        for. (dense has no choice, and counts with any.)"""
        first = next((one for one in self.prunings if one.method != "dense"), Configuration("dense"))
        return first.prefill, first.head_ratio, first.unseen_experts

    def middle_width(self) -> float:
        """The paper's width if it was measured, else the first one."""
        widths = [one.candidate_width for one in self.prunings if one.method == "pop"]
        return 0.1 if 0.1 in widths or not widths else widths[0]


def text_key(one: Configuration, window: int) -> str:
    return f"window {window}: {json.dumps(asdict(one))}"


def generated_key(one: Configuration | None, window: int) -> str:
    """None: the dense model's own tokens."""
    return f"generated {window}: {'tokens' if one is None else json.dumps(asdict(one))}"


def share_by_position(by_window: Sequence[Sequence[bool]]) -> list[float]:
    """Over windows, per position."""
    return [sum(at) / len(at) for at in zip(*by_window, strict=True)]


def task_key(one: Configuration, task_set: str) -> str:
    return f"tasks {task_set}: {json.dumps(asdict(one))}"


def parser() -> argparse.ArgumentParser:
    flags = OneLineParser(
        prog="popengine-compare",
        description="Pruning methods side by side: quality on a text and on tasks, and what a decode step reads.",
        allow_abbrev=False,
    )
    add_checkpoint_flag(flags)
    flags.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the table and the plots go")
    flags.add_argument("--text", type=Path, metavar="FILE", help="a text to score, UTF-8")
    flags.add_argument("--tasks", nargs="+", default=[], metavar="text|pictures", help="questions with exact answers")
    flags.add_argument("--questions", type=int, default=20, metavar="N", help="of every task (default: 20)")
    flags.add_argument("--methods", nargs="+", default=["dense", "all-channels", "pop", "frozen"], metavar="M")
    flags.add_argument("--prune-ratio", type=float, nargs="+", metavar="R", help="default: 0.2")
    flags.add_argument("--ffn-ratio", type=float, nargs="+", metavar="R", help="instead, or besides")
    flags.add_argument("--candidate-width", type=float, nargs="+", default=[0.1], metavar="W", help="of pop")
    flags.add_argument("--head-ratio", type=float, nargs="+", default=[0.0], metavar="R")
    flags.add_argument("--prefill", nargs="+", default=["pruned"], metavar="pruned|dense")
    flags.add_argument("--unseen-experts", nargs="+", default=["weights"], metavar="weights|dense")
    flags.add_argument("--no-plots", action="store_true", help="only the table")
    flags.add_argument("--quiet", action="store_true", help="no progress bars")
    add_scoring_flags(flags)
    add_machine_flags(flags)
    return flags


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry of `python -m popengine.compare` and of the console script `popengine-compare`."""
    run_as_command(run, parser(), arguments)


def run(flags: argparse.Namespace) -> None:
    if flags.text is None and not flags.tasks:
        raise InputError("give a text to score (--text), tasks (--tasks), or both")
    from popengine.engine import load
    from popengine.measure.tasks import questions_for
    from popengine.methods.by_name import Request, check_method

    for method in flags.methods:
        check_method(method)
    for name in flags.tasks:
        questions_for(name, flags.questions, flags.seed)
    for one in configurations(flags, mixture=True):
        one.settings()                          # says what is out of range, before anything is loaded
    if flags.text is not None and not flags.no_plots:
        import popengine.measure.plots  # noqa: F401  # says so now, not after hours, when matplotlib is missing
    make_folder(flags.out)
    show_progress = sys.stderr.isatty() and not flags.quiet
    engine = load(flags.ckpt, dtype=flags.dtype, device=flags.device, progress=show_progress)
    text, windows = None, []
    if flags.text is not None:
        check_context(engine, flags.prompt_tokens, flags.score_tokens)
        text = read_text(flags.text, engine.tokenizer)
        windows = cut_windows(text, engine.tokenizer, flags.prompt_tokens, flags.score_tokens, flags.windows)
    request = Request(engine.model, Configuration("dense", 0.0).settings(), calibration_from(flags, engine), flags.seed)
    wanted = configurations(flags, mixture=hasattr(engine.model.config, "num_experts"))
    settings = {one: settings_of(one, request) for one in wanted}
    prunings = {one: engine.resolve(settings[one]) for one in wanted}       # errors come before anything is written
    identity = identity_of(flags, engine, text, request)
    progress = ProgressFile(flags.out / "progress.jsonl", identity)
    for note in progress.notes:
        print(f"warning: {note}", file=sys.stderr)
    comparison = Comparison(engine, prunings, settings, windows, progress, show_progress)
    comparison.measure_text()
    comparison.measure_generated()
    comparison.measure_tasks(flags.tasks, flags.questions, flags.seed)
    rows = comparison.rows(flags.tasks)
    about = identity | {"machine": machine(), "plots": []}
    studies: dict[str, dict[str, float]] = {}
    if windows:
        from popengine.measure.studies import drift_figures, pick_figures

        drifts, picked = comparison.study_drift(), comparison.study_picks()
        studies["ranking of the dense model"] = drift_figures(drifts)
        if picked is not None:
            studies[f"share of steps that pick a candidate, {picked[0].label}"] = pick_figures(picked[1])
        if not flags.no_plots:
            about["plots"] = comparison.plot(rows, drifts, picked, flags.out)
    result = {"about": about, "rows": rows, "studies": studies}
    (flags.out / "table.json").write_text(json.dumps(result, indent=1) + "\n")
    table = markdown(rows, about, studies)
    (flags.out / "table.md").write_text(table)
    print(table, end="")


def settings_of(one: Configuration, request: "Request") -> "PruningSettings":
    from popengine.methods.by_name import settings_for

    return settings_for(one.method, replace(request, settings=one.settings()))


def identity_of(flags: argparse.Namespace, engine: "Engine", text: Text | None, request: "Request") -> dict[str, Any]:
    """What must be the same for measurements to stand side by side."""
    from popengine.methods.calibration import fingerprint

    return {
        "checkpoint": "default" if flags.ckpt is None else Path(flags.ckpt).name,
        "model": fingerprint(engine.model),
        "text": None if text is None else f"{text.name} ({text.digest})",
        "prompt_tokens": None if text is None else flags.prompt_tokens,
        "score_tokens": None if text is None else flags.score_tokens,
        "windows": None if text is None else flags.windows,
        "questions": flags.questions if flags.tasks else None,
        "seed": flags.seed,
        "calibration": None if request.calibration is None else request.calibration.made_from,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "device": engine.device.type,
    }


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: the output folder cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: the output folder cannot be written to")


def machine() -> dict[str, Any]:
    import torch

    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "popengine": __version__,
    }


def markdown(
    rows: Sequence[dict[str, Any]], about: dict[str, Any], studies: dict[str, dict[str, float]]
) -> str:
    """The table for people. Columns in which every row is alike are left out."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "method": lambda row: row["method"],
        "ratio": lambda row: f"{row['ratio']:.3g}",
        "r (FFN)": lambda row: f"{row['ffn_ratio']:.3g}",
        "width": lambda row: f"{row['candidate_width']:g}" if row["method"] == "pop" else "",
        "heads off": lambda row: f"{row['head_ratio']:g}",
        "prefill": lambda row: "" if row["method"] == "dense" else row["prefill"],
        "unseen experts": lambda row: "" if row["method"] == "dense" else row["unseen_experts"],
    }
    always: dict[str, Callable[[dict[str, Any]], str]] = {
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
    for name in rows[0]:
        if name.startswith("tasks_"):
            for task in rows[0][name]["asked"]:
                always[task] = partial(share_right, name, [task])
            always["all tasks"] = partial(share_right, name, list(rows[0][name]["asked"]))
    shown = {
        name: show for name, show in columns.items()
        if name == "method" or len({show(row) for row in rows} - {""}) > 1
    } | always
    lines = [
        "| " + " | ".join(shown) + " |",
        "|" + "---|" * len(shown),
        *("| " + " | ".join(show(row) for show in shown.values()) + " |" for row in rows),
    ]
    machine_words = ", ".join(f"{name} {value}" for name, value in about["machine"].items())
    facts = [f"{name.replace('_', ' ')} {value}" for name, value in about.items()
             if name not in ("machine", "plots") and value is not None]
    studied = []
    for name, found in studies.items():
        figures = ", ".join(f"{key.replace('_', ' ')} {value:.3f}" for key, value in found.items())
        studied.append(f"{name[0].upper()}{name[1:]}: {figures}.")
    ending = [*studied, f"Measured with: {'; '.join(facts)}.", f"Machine: {machine_words}."]
    return "\n".join([*lines, *(line for sentence in ending for line in ("", sentence)), ""])


def share_right(task_set: str, tasks: Sequence[str], row: dict[str, Any]) -> str:
    """Of the questions of these tasks together."""
    right, asked = (sum(row[task_set][key][task] for task in tasks) for key in ("right", "asked"))
    return f"{right / asked:.1%}"


if __name__ == "__main__":
    main()
