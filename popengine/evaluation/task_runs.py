"""Methods on the tasks of a task archive: ask, score and record every item, and write the table."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tqdm import tqdm

from popengine.engine.engine import Engine
from popengine.engine.sampling_settings import Sampling
from popengine.evaluation.answering import encode, encoded_pair, generate_together, generate_until, log_likelihoods
from popengine.evaluation.comparison import Configuration, row_of
from popengine.evaluation.comparison_table import Column, written
from popengine.evaluation.progress_file import ProgressFile
from popengine.evaluation.scoring import mean_and_error
from popengine.evaluation.task_archive import GIVEN, TASKS, Item, Task
from popengine.studies.resolve import StudyPruning
from popengine.studies.separate import separate
from weights.memory import give_back

# The figure of the right answer's log-likelihood, in nats.
LIKELIHOOD = "right_log_likelihood"


@dataclass
class TaskRuns:
    """The inputs and measurements of a run.

    engines  the checkpoint in each form of weights that is compared
    items    items of every task, the same for all configurations
    together the prunings of answers that run together, each as if it were alone, and without copies of weights
    against  the method that the others are subtracted from, item by item: dense, or one at the same ratio
    """

    engines: dict[str, Engine]
    prunings: dict[Configuration, StudyPruning]
    items: dict[str, list[Item]]
    progress: ProgressFile
    batch_size: int
    show_progress: bool
    against: str = "dense"

    def __post_init__(self) -> None:
        self.together = self.prunings if self.batch_size == 1 else {
            one: separate(pruning, self.engines[one.weights].model) for one, pruning in self.prunings.items()
        }

    def measure(self) -> None:
        """Ask every item that is not recorded yet."""
        total = len(self.prunings) * sum(map(len, self.items.values()))
        with tqdm(total=total, desc="tasks", unit="item", disable=not self.show_progress) as bar:
            for (name, items), one in itertools.product(self.items.items(), self.prunings):
                for batch in self.batches(TASKS[name], items):
                    missing = [item for item in batch if one.key(f"{name} {item.key}") not in self.progress.records]
                    engine, pruning = self.engines[one.weights], self.together[one]
                    records = answered(engine, TASKS[name], missing, pruning) if missing else []
                    for item, record in zip(missing, records, strict=True):
                        self.progress.add(one.key(f"{name} {item.key}"), record)
                    give_back()
                    bar.update(len(batch))

    def batches(self, task: Task, items: list[Item]) -> list[list[Item]]:
        """Group prompts of similar length, in the same batches after a killed run; choices run one by one."""
        size = self.batch_size if task.score else 1
        items = sorted(items, key=lambda item: -len(item.prompt))
        return [items[start : start + size] for start in range(0, len(items), size)]

    def rows(self) -> list[dict[str, Any]]:
        """Compute, per configuration and task, the mean and the standard error of every metric.

        For all tasks of a kind together, the first metric of each task is averaged. `less` has paired differences.
        """
        rows = []
        for one, pruning in self.prunings.items():
            row: dict[str, Any] = row_of(one, pruning, self.engines) | {"tasks": {}}
            for name, items in self.items.items():
                records = self.records(one, name)
                row["tasks"][name] = {"items": len(items)} | {
                    metric: mean_and_error([record["scores"][metric] for record in records])
                    for metric in TASKS[name].metrics
                }
                if TASKS[name].score is None:
                    right = [record["answer"][item.right] for item, record in zip(items, records, strict=True)]
                    row["tasks"][name][LIKELIHOOD] = mean_and_error(right)
                elif all("tokens" in record for record in records):
                    row["tasks"][name]["tokens"] = mean_and_error([record["tokens"] for record in records])
            for kind, names in kinds([*self.items]).items():
                row[kind] = averaged([row["tasks"][name][TASKS[name].metrics[0]] for name in names])
            other = self.reference(one)
            if other is not None:
                row["less"] = self.less(one, other)
            rows.append(row)
        return rows

    def records(self, one: Configuration, name: str) -> list[dict[str, Any]]:
        """Return the record of every item of a task."""
        return [self.progress.records[one.key(f"{name} {item.key}")] for item in self.items[name]]

    def reference(self, one: Configuration) -> Configuration | None:
        """Return the configuration that is subtracted from this one; None for itself, or if there is none."""
        asked = (one.settings.prune_ratio, one.settings.ffn_ratio)
        found = next((
            other for other in self.prunings if other.method == self.against
            and (self.against == "dense" or (other.settings.prune_ratio, other.settings.ffn_ratio) == asked)
        ), None)
        return None if found == one else found

    def less(self, one: Configuration, other: Configuration) -> dict[str, Any]:
        """Compute mean differences of two configurations, with standard errors over items, which are taken in pairs.

        Of scores, and of the log-likelihood of right answers, which changes even if no score does.
        """
        tasks: dict[str, dict[str, Any]] = {}
        for name, items in self.items.items():
            pairs = list(zip(self.records(one, name), self.records(other, name), strict=True))
            metric = TASKS[name].metrics[0]
            tasks[name] = {"score": mean_and_error([a["scores"][metric] - b["scores"][metric] for a, b in pairs])}
            if TASKS[name].score is None:
                tasks[name][LIKELIHOOD] = mean_and_error([
                    a["answer"][item.right] - b["answer"][item.right] for item, (a, b) in zip(items, pairs, strict=True)
                ])
        return {"of": other.label, "tasks": tasks} | {
            kind: {of: averaged([tasks[name][of] for name in names]) for of in tasks[names[0]]}
            for kind, names in kinds([*self.items]).items()
        }


def averaged(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    """Average means over tasks, with the standard error of that average over items."""
    return {
        "mean": sum(one["mean"] for one in figures) / len(figures),
        "error": math.sqrt(sum(one["error"] ** 2 for one in figures)) / len(figures),
    }


def answered(engine: Engine, task: Task, items: Sequence[Item], pruning: StudyPruning) -> list[dict[str, Any]]:
    """Answer items that run together, and score the answers."""
    if task.score is None:
        return [chosen(engine, item, pruning) for item in items]
    prompts = [encode(engine, item.prompt) for item in items]
    if len(items) > 1:
        texts = generate_together(engine, prompts, task.new_tokens, pruning, task.stops)
    else:
        texts = generate_until(engine, prompts, task.new_tokens, pruning, Sampling(), task.stops)
    return [
        {"answer": text, "scores": task.score(item, text), "tokens": len(engine.tokenizer.encode(text, False))}
        for item, text in zip(items, texts, strict=True)
    ]


def chosen(engine: Engine, item: Item, pruning: StudyPruning) -> dict[str, Any]:
    """Compute the log-likelihood of each option of an item, and score the choice.

    One option alone is no choice: its score is the geometric mean of the probabilities of its tokens.
    """
    windows = [encoded_pair(engine, *option) for option in item.options]
    found = [likelihood for likelihood, _ in log_likelihoods(engine, windows, pruning)]
    tokens = len(windows[item.right or 0].continuation)
    scores = choice_scores(item, found) if len(windows) > 1 else {"per_token": math.exp(found[0] / tokens)}
    return {"answer": found, "scores": scores, "tokens": tokens}


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


def kinds(names: Sequence[str]) -> dict[str, list[str]]:
    """Group tasks into those with chosen, given and generated answers; empty groups are left out."""
    found: dict[str, list[str]] = {"chosen": [], "given": [], "generated": []}
    for name in names:
        task = TASKS[name]
        found["generated" if task.score else "given" if task.metrics == GIVEN else "chosen"].append(name)
    return {kind: own for kind, own in found.items() if own}


def markdown(labels: Sequence[str], rows: Sequence[dict[str, Any]], about: dict[str, Any], against: str) -> str:
    """Write the table of every task's first metric, in percent, and tables of right answers and of differences."""
    columns: dict[str, Column] = {}
    for name in rows[0]["tasks"]:
        metric = TASKS[name].metrics[0]
        columns[f"{name} {metric}"] = partial(cell, ("tasks", name, metric))
    for kind, names in kinds([*rows[0]["tasks"]]).items():
        if len(names) > 1:
            columns[f"all {kind}"] = partial(cell, (kind,))
    return written(rows, columns, about) + "\n".join([*more_tables(labels, rows, against), ""])


def more_tables(labels: Sequence[str], rows: Sequence[dict[str, Any]], against: str) -> Iterator[str]:
    """Yield the lines of tables of the log-likelihood of right answers, and of what every row has more than another."""
    of = "dense" if against == "dense" else f"{against} at the same ratio"
    pairs, names = list(zip(labels, rows, strict=True)), list(rows[0]["tasks"])
    found = [(label, row["tasks"]) for label, row in pairs]
    unscored = [name for name in names if TASKS[name].score is None]
    yield from figures_table("Log-likelihood of the right answer, nats", found, unscored, LIKELIHOOD, 1, "")
    several = [kind for kind, own in kinds(names).items() if len(own) > 1]
    differences = [
        (label, row["less"]["tasks"] | {f"all {kind}": row["less"][kind] for kind in several})
        for label, row in pairs if "less" in row
    ]
    if differences:
        first = differences[0][1]
        title = f"Score less that of {of} on the same items, points"
        yield from figures_table(title, differences, list(first), "score", 100, "+")
        of_right = [name for name in first if LIKELIHOOD in first[name]]
        title = f"Log-likelihood of the right answer less that of {of} on the same items, nats"
        yield from figures_table(title, differences, of_right, LIKELIHOOD, 1, "+")


def figures_table(
    title: str, rows: Sequence[tuple[str, dict[str, Any]]], names: Sequence[str], of: str, scale: float, sign: str
) -> Iterator[str]:
    """Yield the lines of a table of one figure by label and task; nothing without tasks."""
    if not names:
        return
    yield from ("", f"{title}:", "", f"| | {' | '.join(names)} |", "|" + "---|" * (len(names) + 1))
    for label, own in rows:
        cells = (f"{scale * own[name][of]['mean']:{sign}.2f} ± {scale * own[name][of]['error']:.2f}" for name in names)
        yield f"| {label} | {' | '.join(cells)} |"


def cell(path: tuple[str, ...], row: dict[str, Any]) -> str:
    """Return the cell of a mean with its error, in percent."""
    figure = row
    for name in path:
        figure = figure[name]
    return f"{100 * figure['mean']:.1f} ± {100 * figure['error']:.1f}"
