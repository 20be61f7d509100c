"""Methods on the tasks of a task archive: ask, score and record every item, and write the table."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tqdm import tqdm

from popengine.engine.engine import Engine
from popengine.engine.sampling_settings import Sampling
from popengine.evaluation.answering import encode, encoded_pair, generate_until, log_likelihoods
from popengine.evaluation.comparison import Configuration, row_of
from popengine.evaluation.comparison_table import Column, written
from popengine.evaluation.progress_file import ProgressFile
from popengine.evaluation.scoring import mean_and_error
from popengine.evaluation.task_archive import TASKS, Item, Task
from popengine.studies.resolve import StudyPruning


@dataclass
class TaskRuns:
    """The inputs and measurements of a run.

    engines  the checkpoint in each form of weights that is compared
    items    items of every task, the same for all configurations
    """

    engines: dict[str, Engine]
    prunings: dict[Configuration, StudyPruning]
    items: dict[str, list[Item]]
    progress: ProgressFile
    batch_size: int
    show_progress: bool

    def measure(self) -> None:
        """Ask every item that is not recorded yet."""
        total = len(self.prunings) * sum(map(len, self.items.values()))
        with tqdm(total=total, desc="tasks", unit="item", disable=not self.show_progress) as bar:
            for (name, items), (one, pruning) in itertools.product(self.items.items(), self.prunings.items()):
                for batch in self.batches(TASKS[name], items):
                    missing = [item for item in batch if one.key(f"{name} {item.key}") not in self.progress.records]
                    records = answered(self.engines[one.weights], TASKS[name], missing, pruning) if missing else []
                    for item, record in zip(missing, records, strict=True):
                        self.progress.add(one.key(f"{name} {item.key}"), record)
                    bar.update(len(batch))

    def batches(self, task: Task, items: list[Item]) -> list[list[Item]]:
        """Group prompts of similar length, in the same batches after a killed run; choices run one by one."""
        size = self.batch_size if task.score else 1
        items = sorted(items, key=lambda item: -len(item.prompt))
        return [items[start : start + size] for start in range(0, len(items), size)]

    def rows(self) -> list[dict[str, Any]]:
        """Compute, per configuration and task, the mean and the standard error of every metric.

        For all tasks of a kind together, the first metric of each task is averaged.
        """
        rows = []
        for one, pruning in self.prunings.items():
            row: dict[str, Any] = row_of(one, pruning, self.engines) | {"tasks": {}}
            for name, items in self.items.items():
                scores = [self.progress.records[one.key(f"{name} {item.key}")]["scores"] for item in items]
                row["tasks"][name] = {"items": len(items)} | {
                    metric: mean_and_error([score[metric] for score in scores]) for metric in TASKS[name].metrics
                }
            for kind, names in kinds(self.items).items():
                figures = [row["tasks"][name][TASKS[name].metrics[0]] for name in names]
                row[kind] = {
                    "mean": sum(one["mean"] for one in figures) / len(figures),
                    "error": math.sqrt(sum(one["error"] ** 2 for one in figures)) / len(figures),
                }
            rows.append(row)
        return rows


def answered(engine: Engine, task: Task, items: Sequence[Item], pruning: StudyPruning) -> list[dict[str, Any]]:
    """Answer items that run together, and score the answers."""
    if task.score is None:
        return [chosen(engine, item, pruning) for item in items]
    prompts = [encode(engine, item.prompt) for item in items]
    texts = generate_until(engine, prompts, task.new_tokens, pruning, Sampling(), task.stops)
    return [{"answer": text, "scores": task.score(item, text)} for item, text in zip(items, texts, strict=True)]


def chosen(engine: Engine, item: Item, pruning: StudyPruning) -> dict[str, Any]:
    """Compute the log-likelihood of each option of an item, and score the choice."""
    windows = [encoded_pair(engine, *option) for option in item.options]
    found = [likelihood for likelihood, _ in log_likelihoods(engine, windows, pruning)]
    return {"answer": found, "scores": choice_scores(item, found)}


def choice_scores(item: Item, found: Sequence[float]) -> dict[str, float]:
    """Score the likeliest option, by log-likelihood (acc) and per letter without the leading space (acc_norm).

    This is lm_eval's definition. found: log-likelihood of each option
    """
    by_letter = [value / len(text.removeprefix(" ")) for value, (_, text) in zip(found, item.options, strict=True)]
    ways = {"acc": found, "acc_norm": by_letter}
    return {name: float(values.index(max(values)) == item.right) for name, values in ways.items()}


def is_sound(record: dict[str, Any]) -> bool:
    """Return True if a record of a progress file has all that `answered` makes."""
    task, scores = TASKS.get(record["key"].partition(" ")[0]), record.get("scores")
    return task is not None and isinstance(scores, dict) and set(scores) == set(task.metrics) and all(
        type(one) is float and 0 <= one <= 1 for one in scores.values()
    )


def kinds(names: Sequence[str] | dict[str, Any]) -> dict[str, list[str]]:
    """Group tasks into those with chosen answers and those with generated answers; empty groups are left out."""
    found = {"chosen": [name for name in names if TASKS[name].score is None],
             "generated": [name for name in names if TASKS[name].score is not None]}
    return {kind: own for kind, own in found.items() if own}


def markdown(rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> str:
    """Write the table of every task's first metric, in percent, in Markdown."""
    columns: dict[str, Column] = {}
    for name in rows[0]["tasks"]:
        metric = TASKS[name].metrics[0]
        columns[f"{name} {metric}"] = partial(cell, ("tasks", name, metric))
    for kind, names in kinds(rows[0]["tasks"]).items():
        if len(names) > 1:
            columns[f"all {kind}"] = partial(cell, (kind,))
    return written(rows, columns, about)


def cell(path: tuple[str, ...], row: dict[str, Any]) -> str:
    """Return the cell of a mean with its error, in percent."""
    figure = row
    for name in path:
        figure = figure[name]
    return f"{100 * figure['mean']:.1f} ± {100 * figure['error']:.1f}"
