"""Run the measurements that check the claims of the two papers on a real model, the most telling ones first.

    python tools/papers.py --ckpt model.gguf --text wikitext.txt --out papers              # all of them, some hours
    python tools/papers.py --ckpt model.gguf --text wikitext.txt --out papers --only positions perplexity

Every measurement is a command of popengine with a folder of its own in --out, and prints the command and its table. A
run that was killed goes on where it was. The minutes are estimates for Qwen2.5-Coder-1.5B on two cores with nothing
else running.
"""

import argparse
import importlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ONLINE = ("--methods", "dense", "all-channels", "pop", "frozen", "--prune-ratio", "0.2", "0.4")
CHOSEN = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
TEXT = ("--paper", "--text", "{text}")
TASKS = ("tasks", "--paper", "--archive", "{archive}", "--tasks")
LAYERS = "1/4"


@dataclass(frozen=True)
class Step:
    """A claim, the command that checks it with words in braces to fill in, and its minutes on two cores."""

    claim: str
    minutes: int
    command: Sequence[str]


STEPS = {
    "positions": Step("POP: a frozen mask falls behind the longer the answer is; rankings drift", 75, (
        "compare", *TEXT, *ONLINE, "--score-tokens", "512", "--windows", "8", "--by-position",
    )),
    "perplexity": Step("POP: wider candidates are better; frozen, POP, all-channels in this order", 35, (
        "compare", *TEXT, *ONLINE, "--candidate-width", "0.05", "0.1", "0.2", "0.3", "0.4", "0.5", "--windows", "12",
    )),
    "choices": Step("POP: tasks with answers to choose", 170, (
        *TASKS, *CHOSEN, *ONLINE, "--limit", "100", "--against", "pop",
    )),
    "humaneval": Step("POP: tasks with long answers to generate", 150, (
        *TASKS, "humaneval", "--run-code", *ONLINE, "--limit", "20", "--against", "pop",
    )),
    "gates": Step("Prefill-Only: deep layers matter little to the prompt", 15, (
        "gates", "--text", "{text}", "--samples", "32", "--dtype", "bfloat16", "--weights", "plain",
    )),
    "greedy": Step("Prefill-Only: which layers a prompt can skip", 30, (
        "skip_greedy", "--text", "{calibration}", "--layers", LAYERS, "--windows", "4",
    )),
    "skipped": Step("Prefill-Only: the deepest layers, those of the gates, and the controls", 20, (
        "compare", *TEXT, "--methods", "dense", "prefill-only", "skip-first", "skip-evenly", "skip-no-boundary",
        "skip-no-keys", "--prefill-skip", "1/6", LAYERS, "1/3", "auto:" + LAYERS + ":{out}/gates/gates.json",
        "{greedy}", "--windows", "12",
    )),
    "skipped-choices": Step("Prefill-Only: tasks with answers to choose", 90, (
        *TASKS, *CHOSEN, "--methods", "dense", "prefill-only", "--prefill-skip", LAYERS, "1/3",
        "auto:" + LAYERS + ":{out}/gates/gates.json", "{greedy}", "--limit", "100",
    )),
}


def main(arguments: list[str] | None = None) -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--ckpt", help="the model (default: SmolLM2-135M-Instruct)")
    flags.add_argument("--text", default="wikitext.txt", help="WikiText-2, validation; see docs/results.md")
    flags.add_argument("--calibration-text", help="for the greedy search (default: --text)")
    flags.add_argument("--archive", help="the tasks (default: what `make tasks` fetched)")
    flags.add_argument("--out", type=Path, default=Path("papers"))
    flags.add_argument("--only", nargs="+", choices=STEPS, metavar="NAME", help=", ".join(STEPS))
    given = flags.parse_args(arguments)
    names = given.only or list(STEPS)
    left = sum(STEPS[name].minutes for name in names)
    for number, name in enumerate(names, 1):
        step, began = STEPS[name], time.perf_counter()
        command = [*filled(step.command, given), "--out", str(given.out / name)]
        command += ["--ckpt", given.ckpt] if given.ckpt else []
        print(f"## {name} ({number} of {len(names)}): {step.claim}\n\nAbout {step.minutes} of {left} minutes.\n")
        print(f"    popengine {' '.join(command)}\n", flush=True)
        if status := status_of(command):
            return status
        print(f"{(time.perf_counter() - began) / 60:.1f} minutes\n", flush=True)
        left -= step.minutes
    return 0


def filled(command: Sequence[str], given: argparse.Namespace) -> list[str]:
    """Fill in the words in braces, and leave out --archive where none was given."""
    searched = given.out / "greedy" / "skipped.json"
    rounds = json.loads(searched.read_text(encoding="utf-8"))["rounds"] if searched.is_file() else []
    words = {
        "text": given.text, "calibration": given.calibration_text or given.text, "out": given.out,
        "archive": given.archive, "greedy": rounds[-1]["layers"] if rounds else LAYERS,
    }
    found = [word.format(**words) for word in command]
    if given.archive is None and "--archive" in found:
        place = found.index("--archive")
        del found[place : place + 2]
    return found


def status_of(command: Sequence[str]) -> int:
    """Run a command in this process and return its exit status."""
    package = "" if command[0] == "skip_greedy" else "popengine."
    try:
        importlib.import_module(package + command[0]).main([*command[1:]])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
