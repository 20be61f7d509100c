"""Comparison of methods: the grid of configurations, and measurements that continue after a killed run."""

import argparse
import importlib
import itertools
import json
import math
import operator
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from models.cost_model import bytes_per_token
from popengine import __version__
from popengine.engine.engine import Engine
from popengine.evaluation.by_position import by_position, of_windows
from popengine.evaluation.progress_file import ProgressFile
from popengine.evaluation.scoring import (
    Text,
    Window,
    WindowScore,
    dense_log_probabilities,
    log_probabilities,
    score_window,
    summarise,
)
from popengine.evaluation.studies import (
    NetworkPicks,
    RankDrift,
    drift_figures,
    drift_of_networks,
    pick_figures,
    picks,
    rank_drift,
)
from popengine.evaluation.tasks import is_answered, questions_for
from popengine.studies.calibration import Calibration, fingerprint
from popengine.studies.input_shares import USUAL_INPUTS
from popengine.studies.resolve import StudyPruning
from popengine.studies.settings import (
    DENSE,
    INPUT_METHODS,
    LAYER_METHODS,
    RULE_NAMES,
    WIDTH_RULES,
    PruningSettings,
    compared_fields,
)
from popengine.studies.skipped_layers import skips_layers
from weights.memory import give_back

DRIFT_WINDOWS = 4
# A configuration scores so many windows before the next one: its buffers are new memory, and slow, at the first.
WINDOWS_AT_ONCE = 4
# Of so many windows the dense model generates a text, one token after the other.
GENERATED_WINDOWS = 8
TIMED_STEPS = 24
WARM_UP_STEPS = 4
# Settings that the axes or the widths of the plots show.
ON_AXES = ("prune_ratio", "ffn_ratio", "candidate_width")


@dataclass(frozen=True)
class Configuration:
    """One row of the table: a method, its relevant settings (others at their defaults), and the form of the weights."""

    method: str
    settings: PruningSettings
    weights: str = "auto"

    def fields(self) -> dict[str, Any]:
        """Return the settings that tables compare, by name; they identify a row, in files too."""
        named = {one.name: getattr(self.settings, one.name) for one in compared_fields()}
        return {"method": self.method, "weights": self.weights} | named

    def key(self, what: str) -> str:
        """Return the key in the progress file of a measurement under this configuration."""
        return f"{what}: {json.dumps(self.fields())}"

    @classmethod
    def from_fields(cls, named: dict[str, Any]) -> "Configuration":
        """Make a configuration from the result of `fields`."""
        settings = {name: value for name, value in named.items() if name not in ("method", "weights")}
        return cls(named["method"], PruningSettings(**settings), named["weights"])

    @property
    def label(self) -> str:
        """Short name for legends: the settings that differ from the defaults."""
        form = "" if self.weights == "auto" else f", {self.weights}"
        if self.method == "dense":
            return f"dense{form}"
        settings = self.settings
        ratio = f"{100 * (settings.prune_ratio or 0):g} %"
        if settings.ffn_ratio is not None:
            ratio = f"r {settings.ffn_ratio:g}"
        words = [self.method if self.method in NO_RATIO else f"{self.method} {ratio}"]
        for one in compared_fields():
            value, column = getattr(settings, one.name), one.metadata["column"]
            differs = value != one.default
            if column == "width":
                differs = self.method in WIDTH_RULES or (differs and self.method in LAYER_METHODS)
            if column and differs:
                words.append(f"{column} {value}")
        return ", ".join(words) + form


FOLLOW_THE_PROMPT = (*RULE_NAMES, "frozen")
# Methods that change prefill only.
SKIPPING = ("prefill-only", "skip-first", "skip-evenly", "skip-no-boundary", "skip-no-keys", "visual-tokens")
# Methods that a prune ratio does not change.
NO_RATIO = (*SKIPPING, *INPUT_METHODS)


def configurations(flags: argparse.Namespace, mixture: bool, pictures: bool) -> list[Configuration]:
    """Build the grid, without settings that would not change a method.

    Dense has no settings, only pop and glass have widths, static methods prune no heads and have no unseen experts,
    only prompts that skip layers have a boundary, and only models that read pictures drop picture tokens.
    """
    ratios = [{"ffn_ratio": ratio} for ratio in flags.ffn_ratio or ()]
    ratios += [{"prune_ratio": ratio} for ratio in flags.prune_ratio or (() if flags.ffn_ratio else (0.2,))]
    usual = PruningSettings.paper() if flags.paper else PruningSettings()
    made: dict[Configuration, None] = {}
    for form, method in itertools.product(flags.weights, flags.methods):
        if method == "dense":
            made[Configuration("dense", DENSE, form)] = None
            continue
        leaves_out = method in LAYER_METHODS            # the rule pop may prune their channels too
        follows = method in FOLLOW_THE_PROMPT or leaves_out
        matter = {
            "to all": True, "to widths": method in WIDTH_RULES or leaves_out, "to rules": method in RULE_NAMES,
            "to prompts": follows, "to experts": follows and mixture,
            "to inputs": method in ("pop", "frozen", *INPUT_METHODS),
            "to skipping": method != "skip-no-boundary", "to layers": leaves_out, "to pictures": pictures,
            "to thinning": pictures,
        }
        others = [one for one in compared_fields() if one.name not in ("prune_ratio", "ffn_ratio")]
        choices = [
            (matter[one.metadata["matters"]] and getattr(flags, one.name)) or [getattr(usual, one.name)]
            for one in others
        ]
        of_method = [{"prune_ratio": 0.0}] if method in NO_RATIO else ratios
        for ratio, *values in itertools.product(of_method, *choices):
            chosen = dict(zip((one.name for one in others), values, strict=True))
            if leaves_out and chosen["layer_share"] == 1:
                unused = (one for one in others if one.metadata["matters"] in ("to widths", "to prompts"))
                chosen |= {one.name: getattr(usual, one.name) for one in unused}
            settings = PruningSettings(**ratio, **chosen)
            if not skips_layers(settings.prefill_skip):
                if method in SKIPPING and method != "visual-tokens" and len(flags.prefill_skip) > 1:
                    continue                        # 0 was meant for the others
                settings = replace(settings, boundary_tokens=PruningSettings.boundary_tokens)
            if settings.visual_tokens == "all":
                if method == "visual-tokens" and len(flags.visual_tokens) > 1:
                    continue                        # all were meant for the others
                settings = replace(settings, visual_tokens_by=PruningSettings.visual_tokens_by)
            if settings.visual_tokens == "all" or settings.visual_tokens_by != "attention":
                settings = replace(settings, visual_tokens_layer=PruningSettings.visual_tokens_layer)
            if method in INPUT_METHODS and settings.input_shares is None:
                if len(flags.input_sparsity) > 1:
                    continue                        # none was meant for the others
                settings = replace(settings, input_sparsity=settings.input_sparsity or USUAL_INPUTS)
            made[Configuration(method, settings, form)] = None
    return list(made)


@dataclass
class Comparison:
    """The inputs and measurements of a comparison. windows are empty without a text.

    engines  the checkpoint in each form of weights that is compared; "the dense model" is that of the first
    """

    engines: dict[str, Engine]
    prunings: dict[Configuration, StudyPruning]
    windows: list[Window]
    progress: ProgressFile
    show_progress: bool

    @property
    def engine(self) -> Engine:
        return next(iter(self.engines.values()))

    @property
    def generated_from(self) -> list[Window]:
        return self.windows[:GENERATED_WINDOWS]

    def measure(
        self, tasks: Sequence[str], questions: int, seed: int, rounds: int, plots: Path | None, positions: bool = False
    ) -> dict[str, Any]:
        """Measure everything that is not recorded yet and return the table.

        plots      folder for drawings, None: none
        positions  also give every row its quality by position
        """
        self.measure_text()
        self.measure_generated()
        self.measure_tasks(tasks, questions, seed)
        self.measure_speed(rounds)
        rows = self.rows(tasks)
        if positions:
            for one, row in zip(self.prunings, rows, strict=True):
                row["by_position"] = self.by_position(one)
        about: dict[str, Any] = {"machine": machine(), "plots": []}
        studies: dict[str, dict[str, float]] = {}
        networks: dict[str, Any] = {}
        folder = plots if plots is not None and plots_module().INSTALLED else None
        if self.windows:
            measured = min(DRIFT_WINDOWS, len(self.generated_from))
            drifts = [rank_drift(self.engine.model, window) for window in self.windows[:measured]]
            own = [rank_drift(self.engine.model, self.generated_window(index)) for index in range(measured)]
            picked = self.study_picks()
            studies["ranking of the dense model"] = drift_figures(drifts)
            studies["ranking of the dense model along its own generation"] = drift_figures(own)
            networks["drift on the text"] = drift_of_networks(drifts)
            networks["drift along generation"] = drift_of_networks(own)
            if picked is not None:
                studies[f"share of steps that pick a candidate, {picked[0].label}"] = pick_figures(picked[1])
                networks["new picks at a step"] = [
                    {"network": network.name, "mean": sum(network.changed) / max(1, len(network.changed))}
                    for network in picked[1]
                ]
            if folder is not None:
                about["plots"] = self.plot(rows, drifts, picked, folder)
        if folder is not None:
            for name in tasks:
                labels = [one.label for one in self.prunings]
                if plots_module().plot_tasks(labels, rows, name, folder / task_plot(name)):
                    about["plots"].append(task_plot(name))
        if positions and folder is not None and plots_module().plot_by_position(
            [one.label for one in self.prunings], rows, folder / "positions.png"
        ):
            about["plots"].append("positions.png")
        return {"about": about, "rows": rows, "studies": studies, "networks": networks}

    def measure_text(self) -> None:
        """Score every window under every configuration, except for recorded ones."""
        self.score_windows("window", self.windows)

    def measure_generated(self) -> None:
        """Generate from prompts of windows with the dense model, and predict each token under every configuration.

        Up to the first disagreement, a configuration would generate the same tokens itself. Scores are recorded as of
        a text, but `agreed` says whether the configuration's likeliest token is the generated one.
        """
        keys = {index: f"generated {index}: tokens" for index in range(len(self.generated_from))}
        missing = [index for index, key in keys.items() if key not in self.progress.records]
        # A step of a batch takes little longer than one of a single sequence, but has to be compiled for itself.
        at_once = 1 if self.engine.compiles else max(1, len(missing))
        for first in range(0, len(missing), at_once):
            together, length = missing[first : first + at_once], len(self.windows[0].continuation)
            prompts = [self.windows[index].prompt for index in together]
            run = self.engine.run(prompts, length, DENSE, ignore_eos=True)
            steps = tqdm(run, total=length, desc="generating", unit="token", disable=not self.show_progress)
            for index, ids in zip(together, zip(*steps, strict=True), strict=True):
                self.progress.add(keys[index], {"ids": list(ids)})
        self.score_windows("generated", [self.generated_window(index) for index in keys])

    def score_windows(self, source: str, windows: Sequence[Window]) -> None:
        """Score windows under every configuration, except for recorded ones. source: "window" or "generated" """
        places = [(one, index) for one in self.prunings for index in range(len(windows))]
        count = sum(one.key(f"{source} {index}") not in self.progress.records for one, index in places)
        bar = tqdm(total=count, desc=source, unit="window", disable=not self.show_progress)
        with bar, torch.inference_mode():
            for first in range(0, len(windows), WINDOWS_AT_ONCE):
                near = range(first, min(first + WINDOWS_AT_ONCE, len(windows)))
                dense: dict[int, Tensor] = {}                                       # [S, V] each
                for one, index in itertools.product(self.prunings, near):
                    key, window = one.key(f"{source} {index}"), windows[index]
                    if key in self.progress.records:
                        continue
                    if index not in dense:
                        dense[index] = dense_log_probabilities(self.engine.model, window)
                    own = log_probabilities(self.engines[one.weights], window, self.prunings[one])
                    found = score_window(own, dense[index], window)
                    if source == "generated":
                        said = torch.tensor(window.continuation, device=own.device)         # [S]
                        found = replace(found, agreed=(own.argmax(dim=-1) == said).tolist())
                    self.progress.add(key, asdict(found))
                    give_back()
                    bar.update()

    def measure_speed(self, rounds: int) -> None:
        """Time decode steps of every configuration on the first window's prompt.

        Configurations take turns, in an order that alternates, so that a slow minute of the machine affects all of
        them. A turn is an untimed start, which warms caches, and then the timed steps.
        """
        bar = tqdm(total=rounds * len(self.prunings), desc="speed", unit="turn", disable=not self.show_progress)
        with bar:
            for number in range(rounds):
                for one in list(self.prunings) if number % 2 == 0 else reversed(self.prunings):
                    if one.key(f"speed {number}") not in self.progress.records:
                        self.step_ms(one, WARM_UP_STEPS)
                        self.progress.add(one.key(f"speed {number}"), {"ms": self.step_ms(one, TIMED_STEPS)})
                    bar.update()

    def step_ms(self, one: Configuration, tokens: int) -> float:
        """Measure the median time of a decode step, in ms, over the generation of so many tokens."""
        run = self.engines[one.weights].run([self.windows[0].prompt], tokens, self.prunings[one], ignore_eos=True)
        moments = [time.perf_counter() for _ in run]
        return statistics.median(later - earlier for earlier, later in itertools.pairwise(moments)) * 1000

    def measure_tasks(self, task_sets: Sequence[str], count: int, seed: int) -> None:
        """Ask every question under every configuration, except for recorded ones."""
        questions = {name: questions_for(name, count, seed) for name in task_sets}
        total = len(self.prunings) * sum(map(len, questions.values()))
        with tqdm(total=total, desc="tasks", unit="question", disable=not self.show_progress) as bar:
            for (name, asked), (one, pruning) in itertools.product(questions.items(), self.prunings.items()):
                key = one.key(f"tasks {name}")
                if key not in self.progress.records:
                    right: dict[str, list[bool]] = {}
                    for question in asked:
                        right.setdefault(question.task, []).append(
                            is_answered(self.engines[one.weights], question, pruning)
                        )
                        bar.update()
                    self.progress.add(key, {"right": right})
                else:
                    bar.update(len(asked))

    def rows(self, task_sets: Sequence[str]) -> list[dict[str, Any]]:
        """Return the rows of the table."""
        records = self.progress.records
        rows = []
        for one, pruning in self.prunings.items():
            row = row_of(one, pruning, self.engines)
            if self.windows:
                summary = summarise(self.scores(one, "window"))
                row |= {name: value if value == value else None for name, value in asdict(summary).items()}
                agreed = [score.agreed for score in self.scores(one, "generated")]
                row["generated_agreement"] = sum(map(sum, agreed)) / sum(map(len, agreed))
                row["identical_tokens"] = statistics.median([*own, False].index(False) for own in agreed)
            turns = self.turns(one)
            if turns:
                row["decode_ms_per_token"] = statistics.median(turns)
            row["over_dense"] = self.over_dense(one, row)
            for name in task_sets:
                found = records[one.key(f"tasks {name}")]["right"].items()
                right, asked = ({task: count(answers) for task, answers in found} for count in (sum, len))
                row[f"tasks_{name}"] = {"right": right, "asked": asked}
            rows.append(row)
        return rows

    def turns(self, one: Configuration) -> list[float]:
        """Return the recorded times of a step, one of each round, in ms."""
        records, turns = self.progress.records, list[float]()
        while (key := one.key(f"speed {len(turns)}")) in records:
            turns.append(records[key]["ms"])
        return turns

    def over_dense(self, one: Configuration, row: dict[str, Any]) -> dict[str, Any] | None:
        """Compare a row with the dense one in the same form of weights; None if that is not among the rows.

        bytes       of a step
        perplexity  the quotient, and error: its standard error over windows, taken in pairs
        time        the median over rounds of the quotient of two turns of one round
        """
        of_form = (other for other in self.prunings if other.method == "dense" and other.weights == one.weights)
        dense = next(of_form, None)
        if dense is None:
            return None
        read = bytes_per_token(self.engines[one.weights].model, self.prunings[dense])
        found: dict[str, Any] = {"bytes": row["weight_bytes_per_token"] / read}
        if self.windows:
            own, its = ([sum(score.losses) / len(score.losses) for score in self.scores(which, "window")]
                        for which in (one, dense))
            lost = of_windows([mine - theirs for mine, theirs in zip(own, its, strict=True)])
            quotient = None if lost["mean"] is None else math.exp(lost["mean"])        # `summarise` bounds the loss
            found["perplexity"] = quotient
            found["error"] = None if quotient is None or lost["error"] is None else quotient * lost["error"]
        turns = [mine / theirs for mine, theirs in zip(self.turns(one), self.turns(dense), strict=False)]
        if turns:
            found["time"] = statistics.median(turns)
        return found

    def scores(self, one: Configuration, source: str) -> list[WindowScore]:
        """Return the recorded score of every window. source: "window", the text, or "generated", by the dense model"""
        windows = self.windows if source == "window" else self.generated_from
        records = [self.progress.records[one.key(f"{source} {index}")] for index in range(len(windows))]
        return [WindowScore(record["losses"], record["agreed"], record["divergences"]) for record in records]

    def generated_window(self, index: int) -> Window:
        """Return what the dense model generated from a window's prompt, once it is recorded."""
        return Window(self.windows[index].prompt, self.progress.records[f"generated {index}: tokens"]["ids"])

    def by_position(self, one: Configuration) -> dict[str, Any]:
        """Compute quality by position on the text and on what the dense model generates, against dense and POP.

        POP is that of the same ratio, and of the paper's width if it was measured.
        """
        def first(method: str, **settings: Any) -> Configuration | None:
            """Return the first other configuration of a method and settings."""
            return next((
                other for other in self.prunings if other.method == method and other != one and all(
                    getattr(other.settings, name) == value for name, value in settings.items()
                )
            ), None)

        ratios = {name: getattr(one.settings, name) for name in ("prune_ratio", "ffn_ratio")}
        references = {"dense": first("dense")}
        if one.method != "dense":
            references["pop"] = first("pop", candidate_width=self.middle_width(), **ratios)
        return {
            name: by_position(
                self.scores(one, source),
                {of: None if other is None else self.scores(other, source) for of, other in references.items()},
            )
            for name, source in (("text", "window"), ("generated", "generated"))
        }

    def points(self, rows: Sequence[dict[str, Any]]) -> Iterator[Any]:
        """Yield the rows as points for the plots."""
        for one, row in zip(self.prunings, rows, strict=True):
            given = [score.agreed for score in self.scores(one, "window")]
            generated = [score.agreed for score in self.scores(one, "generated")]
            still_alike = [list(itertools.accumulate(own, operator.and_)) for own in generated]
            yield plots_module().Point(
                one.method, one.label, round(row["ffn_ratio"], 3), one.settings.candidate_width,
                row["weight_bytes_per_token"] / 1e6, row["weight_share"], row["perplexity"],
                share_by_position(given), share_by_position(generated), share_by_position(still_alike),
            )

    def study_picks(self) -> tuple[Configuration, list[NetworkPicks]] | None:
        """Record the picks of POP of the usual width on the first window, at the highest ratio; None: not compared."""
        popped = [
            one for one, pruning in self.prunings.items()
            if one.method == "pop" and self.is_usual(one) and one.settings.candidate_width == self.middle_width()
            and pruning.ffn_ratio > 0
        ]
        if not popped:
            return None
        found = picks(self.engine, self.windows[0], self.prunings[popped[-1]])
        return (popped[-1], found) if any(network.steps for network in found) else None     # every step ran dense

    def plot(
        self, rows: Sequence[dict[str, Any]], drifts: list[RankDrift],
        picked: tuple[Configuration, list[NetworkPicks]] | None, folder: Path,
    ) -> list[str]:
        """Draw every plot that there is data for, and return the names of the files."""
        plots = plots_module()
        usual = [
            (one, point) for one, point in zip(self.prunings, self.points(rows), strict=True) if self.is_usual(one)
        ]
        of_one_width = [
            point for one, point in usual if one.method != "pop" or one.settings.candidate_width == self.middle_width()
        ]
        drawn = {
            "perplexity.png": plots.plot_perplexity([point for _, point in usual], folder / "perplexity.png"),
            "agreement.png": plots.plot_agreement(of_one_width, folder / "agreement.png"),
            "rank_drift.png": plots.plot_rank_drift(drifts, folder / "rank_drift.png"),
        }
        if "decode_ms_per_token" in rows[0]:
            drawn["frontier.png"] = plots.plot_frontier(rows, folder / "frontier.png")
        if picked is not None:
            one, networks = picked
            drawn["partition.png"] = plots.plot_partition_map(networks, folder / "partition.png", one.label)
        return [name for name, was in drawn.items() if was]

    def is_usual(self, one: Configuration) -> bool:
        """Return True if the plots show this configuration: what no axis shows is as in the first configuration."""
        first = next((other for other in self.prunings if other.method != "dense"), one)
        alike = all(
            getattr(one.settings, field.name) == getattr(first.settings, field.name)
            for field in compared_fields() if field.name not in ON_AXES
        )
        return (one.method == "dense" or alike) and one.weights == next(iter(self.engines))

    def middle_width(self) -> float:
        """Return the paper's width if it was measured, else the first one."""
        widths = [one.settings.candidate_width for one in self.prunings if one.method == "pop"]
        return 0.1 if 0.1 in widths or not widths else widths[0]


def row_of(one: Configuration, pruning: StudyPruning, engines: dict[str, Engine]) -> dict[str, Any]:
    """Return the cells of a row that need no measurement; the dense model is that of the first engine."""
    first = next(iter(engines.values()))
    read = bytes_per_token(engines[one.weights].model, pruning)
    return {
        **one.fields(),
        "ratio": pruning.ratio,
        "ffn_ratio": pruning.ffn_ratio,
        "weight_bytes_per_token": read,
        "weight_share": read / bytes_per_token(first.model, first.resolve(DENSE)),
    }


def is_sound(record: dict[str, Any], scored: int | None) -> bool:
    """Return True if a record of a progress file has all that `Comparison` writes. scored: tokens of a window"""
    of = record["key"].partition(" ")[0]

    def listed(name: str, *kinds: type) -> bool:
        values = record.get(name)
        return isinstance(values, list) and len(values) == scored and all(
            type(one) in kinds and math.isfinite(one) and one >= least for one in values
        )

    least = -1e-3                               # a divergence of 0 may round below 0
    if record["key"].endswith(": tokens"):
        return listed("ids", int)
    if of in ("window", "generated"):
        return listed("losses", float) and listed("agreed", bool) and listed("divergences", float)
    if of == "speed":
        return type(record.get("ms")) is float and 0 < record["ms"] < math.inf
    right = record.get("right")
    return isinstance(right, dict) and all(
        isinstance(answers, list) and answers and all(type(one) is bool for one in answers)
        for answers in right.values()
    )


def share_by_position(by_window: Sequence[Sequence[bool]]) -> list[float]:
    """Compute the share of True per position, over windows."""
    return [sum(at) / len(at) for at in zip(*by_window, strict=True)]


def task_plot(task_set: str) -> str:
    """Return the name of the plot's file for a set of tasks."""
    return f"tasks_{task_set}.png"


def load_plots() -> None:
    """Import the plots. If matplotlib is missing, print one note: the numbers are measured and saved without them."""
    plots_module().tell_if_missing()


def plots_module() -> ModuleType:
    """Import the plots only if something may be drawn: matplotlib takes a second."""
    return importlib.import_module("popengine.evaluation.plots")


def identity_of(
    flags: argparse.Namespace, engines: dict[str, Engine], text: Text | None, calibration: Calibration | None
) -> dict[str, Any]:
    """Return the facts that must be equal for measurements to be comparable."""
    return {
        "text": None if text is None else f"{text.name} ({text.digest})",
        "prompt_tokens": None if text is None else flags.prompt_tokens,
        "score_tokens": None if text is None else flags.score_tokens,
        "windows": None if text is None else flags.windows,
        "questions": flags.questions if flags.tasks else None,
    } | identity_of_model(flags, engines, calibration)


def identity_of_model(
    flags: argparse.Namespace, engines: dict[str, Engine], calibration: Calibration | None
) -> dict[str, Any]:
    """Return the part of `identity_of` that is about model, seed, calibration and device."""
    engine = engines[flags.weights[0]]
    return {
        "checkpoint": "default" if flags.ckpt is None else Path(flags.ckpt).name,
        "model": fingerprint(engine.model),
        "seed": flags.seed,
        "calibration": None if calibration is None else calibration.made_from,
        "dtype": ", ".join(dict.fromkeys(str(one.dtype).removeprefix("torch.") for one in engines.values())),
        "device": engine.device.type,
        "ranks": engine.model.config.ranks.count,
    }


def machine() -> dict[str, Any]:
    """Return system, processors, threads and versions."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "popengine": __version__,
    }
