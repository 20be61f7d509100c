"""Compare dense answers to the public tasks with those of lm_eval's Hugging Face model, on equal requests, in float32.

    python tools/tasks_against_harness.py --tasks arc_easy winogrande nq_open coqa --limit 25

lm_eval's data sets are not needed: its model answers the requests of popengine.tasks through its own interface. Prints,
for each task, the number of items with another score or text, the distance between log-likelihoods, and every item that
differs. The exit status is 1 if a score differs. Tasks that run code are left out.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from popengine.engine.engine import Engine
from popengine.engine.loading import load
from popengine.evaluation.task_archive import DEFAULT_ARCHIVE, TASKS, Archive, Item, Task
from popengine.evaluation.task_runs import answered, choice_scores
from popengine.studies.settings import DENSE
from weights.default_checkpoint import default_checkpoint


def harness_model(path: Path) -> HFLM:
    """lm_eval's, with the weights of a folder or, put back into plain numbers, of a .gguf file."""
    where: dict[str, Any] = {"pretrained_model_name_or_path": path}
    if path.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)


def asked_of_harness(model: HFLM, task: Task, items: list[Item]) -> list[Any]:
    """Of each item the log-likelihoods of its options, or the text that is generated."""
    if task.score is not None:
        arguments = {"until": list(task.stops), "max_gen_toks": task.new_tokens, "do_sample": False}
        asked = [Instance("generate_until", {}, (item.prompt, arguments), 0) for item in items]
        return model.generate_until(asked, disable_tqdm=True)
    asked = [Instance("loglikelihood", {}, option, 0) for item in items for option in item.options]
    found = iter(model.loglikelihood(asked, disable_tqdm=True))
    return [[next(found)[0] for _ in item.options] for item in items]


def compare(engine: Engine, model: HFLM, name: str, items: list[Item]) -> int:
    """Prints a line for the task and one for every item that differs; returns how many scores differ."""
    task, dense = TASKS[name], engine.resolve(DENSE)
    other, texts, farthest, lines = 0, 0, 0.0, []
    for item, theirs in zip(items, asked_of_harness(model, task, items), strict=True):
        (ours,) = answered(engine, task, [item], dense)
        if task.score is None:
            scores = choice_scores(item, theirs)
            farthest = max(farthest, *(abs(one - two) for one, two in zip(ours["answer"], theirs, strict=True)))
            differs = False
        else:
            scores = task.score(item, theirs)
            differs = ours["answer"] != theirs
        other, texts = other + (scores != ours["scores"]), texts + differs
        if differs or scores != ours["scores"]:
            lines.append(f"  item {item.key}: {ours['scores']} here, {scores} there")
            lines += [f"    {answer!r}" for answer in (ours["answer"], theirs)]
    what = f"log-likelihoods at most {farthest:.1e} apart" if task.score is None else f"{texts} other texts"
    print(f"{name}: {len(items)} items, {other} other scores, {what}", *lines, sep="\n", flush=True)
    return other


def main(arguments: list[str] | None = None) -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [name for name, task in TASKS.items() if not task.runs_code]
    flags.add_argument("--tasks", nargs="+", default=["arc_easy", "winogrande", "nq_open", "coqa"], choices=known)
    flags.add_argument("--limit", type=int, default=25)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--ckpt", type=Path, default=None)
    flags.add_argument("--archive", type=Path, default=DEFAULT_ARCHIVE)
    given = flags.parse_args(arguments)
    path = given.ckpt or default_checkpoint()
    engine, model, archive = load(path, dtype="float32", weights="plain"), harness_model(path), Archive(given.archive)
    return min(1, sum(
        compare(engine, model, name, archive.items(name, given.limit, given.seed)) for name in given.tasks
    ))


if __name__ == "__main__":
    sys.exit(main())
