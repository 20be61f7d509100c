"""Run the measurements that check the claims of the two papers on a real model, the most telling ones first.

    python tools/papers.py --ckpt model.gguf --text wikitext.txt --out papers              # all of them, some hours
    python tools/papers.py --ckpt model.gguf --text wikitext.txt --out papers --only positions perplexity

Every measurement is a command of popengine with a folder of its own in --out, and prints the command and its table. A
run that was killed goes on where it was; only timings start anew. The minutes are for Qwen2.5-Coder-1.5B on two cores
with nothing else running, most of them estimates: eight hours for the papers' claims, and one and a half for the
frontier of quality, bytes and time.
"""

import argparse
import importlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# A prompt on packed weights takes two to three times as long, and quality is the same within the noise.
PLAIN = ("--paper", "--weights", "plain", "--dtype", "bfloat16")
ONLINE = ("--methods", "dense", "all-channels", "pop", "frozen", "--prune-ratio", "0.2", "0.4")
STATIC = ("wanda-sp", "flap", "cfsp", "tyr", "probe-pruning", "shortgpt")
CHOSEN = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
TEXT = ("compare", *PLAIN, "--text", "{text}")
# Many answers at once, each with a partition of its own, for which no weights are copied.
TASKS = ("tasks", *PLAIN, "--batch-size", "55", "--archive", "{archive}", "--tasks")
ANSWERS = (*TASKS[:-1], "--run-code", "--tasks")
CALIBRATED = ("--methods", "dense", "pop", "frozen", "all-channels", "wanda-sp", "flap", "--prune-ratio", "0.2", "0.4",
              "--calibration-text", "{calibration}", "--against", "pop")
BENCH = ("bench", "--paper", "--dtype", "bfloat16", "--weights")
ANSWER = (*BENCH, "auto", "int8", "--compile-only", "--against", "llama.cpp", "--prune-ratio", "0", "0.2", "0.4")
# Packed weights too: 8 windows. Steps are timed in turns.
FRONTIER = ("compare", "--paper", "--dtype", "bfloat16", "--text", "{text}", "--windows", "8", "--compile", "--time",
            "5", "--weights")
WIDTHS = ("--prune-ratio", "0.2", "0.4", "--candidate-width", "0.1", "0.3", "0.5")
# 1.01, 1.04 and 1.06 of the perplexity, the second with and without the inputs of the head.
INPUTS = ("0.2,down=0.4,head=0.3", "0.25,qkv=0.2,o=0.35,down=0.6", "0.25,qkv=0.2,o=0.35,down=0.6,head=0.3",
          "0.3,qkv=0.2,o=0.4,down=0.5,head=0.3")
# Commands that are no commands of popengine.
TOOLS = ("skip_greedy", "draw_frontier")
LAYERS, LAYERS_AS_RATIO = "1/4", "0.25"


@dataclass(frozen=True)
class Step:
    """A claim, the command that checks it with words in braces to fill in, and its minutes on two cores."""

    claim: str
    minutes: int
    command: Sequence[str]


STEPS = {
    "perplexity": Step("POP: wider candidates are better; frozen, POP, all-channels in this order", 35, (
        *TEXT, *ONLINE, "--candidate-width", "0.05", "0.1", "0.2", "0.3", "0.4", "0.5", "--windows", "24",
    )),
    "gold": Step("POP: right answers of tasks that generate, token by token", 25, (
        *TASKS, "humaneval-gold", "mbpp-gold", *ONLINE, "--limit", "100", "--against", "pop",
    )),
    "humaneval": Step("POP: programs that pass their tests, beside masks calibrated on other text", 80, (
        *ANSWERS, "humaneval", *CALIBRATED, "--limit", "164",
    )),
    "positions": Step("POP: a frozen mask falls behind the longer the answer is; rankings drift", 35, (
        *TEXT, "--methods", "dense", "pop", "frozen", "--prune-ratio", "0.2", "0.4", "--score-tokens", "512",
        "--windows", "40", "--by-position",
    )),
    "static": Step("POP: better than masks calibrated on other text", 20, (
        *TEXT, "--methods", "dense", "pop", *STATIC, "--prune-ratio", "0.2", "0.4", "--calibration-text",
        "{calibration}", "--windows", "24",
    )),
    "latency": Step("POP: a step is 1.14 and 1.38 times as fast; a whole answer beside llama.cpp", 10, (
        *ANSWER, "-p", "512", "-n", "128", "--rounds", "3",
    )),
    "latency-long": Step("The same for a short prompt and a long answer", 20, (
        *ANSWER, "-p", "128", "-n", "512", "--rounds", "3",
    )),
    **{f"first-token-{prompt}": Step("Prefill-Only: the first token comes earlier", minutes, (
        *BENCH, "auto", "plain", "--against", "transformers,llama.cpp", "--prune-ratio", "0", "--prefill-skip", LAYERS,
        "1/3", "-p", prompt, "-n", "2", "--rounds", "2",
    )) for prompt, minutes in (("512", 3), ("2048", 6), ("4096", 12))},
    "frontier-packed": Step("What POP costs and saves, packed weights", 35, (
        *FRONTIER, "auto", "int8", "--methods", "dense", "pop", "frozen", "all-channels", *WIDTHS,
    )),
    "frontier-plain": Step("The same in bfloat16, and rules that score before they read", 30, (
        *FRONTIER, "plain", "--methods", "dense", "pop", "frozen", "all-channels", "up", "draft", *WIDTHS,
    )),
    "frontier-rules": Step("The same at higher ratios", 10, (
        *FRONTIER, "plain", "--methods", "dense", "up", "draft", "--prune-ratio", "0.5", "0.6",
    )),
    "frontier-inputs": Step("Input sparsity alone and beside POP", 20, (
        *FRONTIER, "plain", "--methods", "dense", "wina", "pop", "--prune-ratio", "0.2", "--candidate-width", "0.3",
        "--input-sparsity", *INPUTS,
    )),
    "frontier-llama": Step("llama.cpp on the same file", 3, (
        *BENCH, "auto", "--compile-only", "--against", "llama.cpp", "--prune-ratio", "0", "-p", "128", "-n", "24",
        "--rounds", "5",
    )),
    "frontier": Step("All of these in one table and one plot", 1, (
        "draw_frontier", *("{out}/frontier-" + part for part in ("packed", "plain", "rules", "inputs")),
        "--bench", "{out}/frontier-llama.json",
    )),
    "gates": Step("Prefill-Only: deep layers matter little to the prompt", 8, (
        "gates", "--text", "{text}", "--samples", "32", "--dtype", "bfloat16", "--weights", "plain",
    )),
    "greedy": Step("Prefill-Only: which layers a prompt can skip", 12, (
        "skip_greedy", "--text", "{calibration}", "--layers", LAYERS, "--windows", "4",
    )),
    "skipped": Step("Prefill-Only: how many layers, and which: the deepest, those of the gates, the best found", 10, (
        *TEXT, "--methods", "dense", "prefill-only", "--prefill-skip", "1/6", LAYERS, "1/3", "1/2",
        "auto:" + LAYERS + ":{out}/gates/gates.json", "{greedy}", "--boundary-tokens", "1", "16", "--windows", "24",
    )),
    "controls": Step("Prefill-Only: its design choices; removed layers cost more than skipped ones", 8, (
        *TEXT, "--methods", "dense", "prefill-only", "skip-first", "skip-evenly", "skip-no-boundary", "skip-no-keys",
        "shortgpt", "--prefill-skip", LAYERS, "--prune-ratio", LAYERS_AS_RATIO, "--calibration-text", "{calibration}",
        "--windows", "24",
    )),
    "inputs": Step("Input sparsity at POP's prune ratios", 8, (
        *TEXT, "--methods", "dense", "wina", "teal", "--input-sparsity", "0.2", "0.4", "--windows", "24",
    )),
    "together": Step("Both methods at once", 12, (
        *TEXT, "--methods", "dense", "pop", "--prune-ratio", "0.2", "0.4", "--prefill-skip", "0", "{greedy}",
        "--boundary-tokens", "1", "16", "--windows", "12",
    )),
    "choices": Step("POP: tasks with answers to choose", 60, (
        *TASKS, *CHOSEN, *ONLINE, "--limit", "100", "--against", "pop",
    )),
    "skipped-choices": Step("Prefill-Only: tasks with answers to choose", 25, (
        *TASKS, *CHOSEN, "--methods", "dense", "prefill-only", "--prefill-skip", LAYERS, "1/3",
        "auto:" + LAYERS + ":{out}/gates/gates.json", "{greedy}", "--limit", "50",
    )),
    "coqa": Step("POP: answers after long prompts, beside masks calibrated on other text", 40, (
        *ANSWERS, "coqa", *CALIBRATED, "--limit", "50", "--batch-size", "8",        # prompts of unlike length
    )),
    "answers": Step("POP: other tasks with answers to generate", 45, (
        *ANSWERS, "mbpp", "gsm8k", *CALIBRATED, "--limit", "30",
    )),
}


def main(arguments: list[str] | None = None) -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--ckpt", help="the model (default: SmolLM2-135M-Instruct)")
    flags.add_argument("--text", default="wikitext.txt", help="WikiText-2, validation; see docs/results.md")
    flags.add_argument("--calibration-text", help="for static masks and the greedy search (default: --text)")
    flags.add_argument("--archive", help="the tasks (default: what `make tasks` fetched)")
    flags.add_argument("--out", type=Path, default=Path("papers"))
    flags.add_argument("--only", nargs="+", choices=STEPS, metavar="NAME", help=", ".join(STEPS))
    given = flags.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    names = given.only or list(STEPS)
    left = sum(STEPS[name].minutes for name in names)
    for number, name in enumerate(names, 1):
        step, began = STEPS[name], time.perf_counter()
        command = [*filled(step.command, given), *written_to(step.command[0], given.out, name)]
        command += ["--ckpt", given.ckpt] if given.ckpt and step.command[0] != "draw_frontier" else []
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


def written_to(command: str, out: Path, name: str) -> list[str]:
    """Return the words that say where a command writes: bench and the plot a file, the others a folder."""
    if command == "bench":
        return ["--json", str(out / f"{name}.json")]
    return ["--out", str(out / (f"{name}.png" if command == "draw_frontier" else name))]


def status_of(command: Sequence[str]) -> int:
    """Run a command in this process and return its exit status."""
    package = "" if command[0] in TOOLS else "popengine."
    try:
        status: int = importlib.import_module(package + command[0]).main([*command[1:]]) or 0
    except SystemExit as end:
        return int(end.code or 0)
    return status


if __name__ == "__main__":
    sys.exit(main())
