"""The command: python -m popengine.demo

The dense and the pruned model answer the same prompts at the same time, step by step in turns, and one table compares
them. Everything in the table is measured in this run.
"""

import argparse
import shutil
import sys
from pathlib import Path
from textwrap import fill
from typing import NoReturn

from popengine.command_line.flags import add_checkpoint_flag, add_machine_flags
from popengine.command_line.parser import OneLineParser
from popengine.command_line.setting_flags import add_setting_flags, pruning_settings
from popengine.command_line.start import load_with_warnings, run_as_command, start_pytorch
from popengine.engine.processes import is_one_of_several
from popengine.studies.settings import PruningSettings
from weights.errors import InputError

NOTE = Path(__file__).parent / "demo_note.txt"
QUESTION = "What is the capital of France?"
# The setting that reads least among those that keep the answers of SmolLM2-135M sound (docs/results.md), and that of
# the larger model, which the demo takes if `make real` has fetched it.
SMALL = PruningSettings(candidate_width=0.3)
LARGE = PruningSettings(0.4, candidate_width=0.3)
LARGE_FILE = Path(__file__).resolve().parent.parent / "weights" / "real" / "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"

# Beside the small default model only. The figures are those of docs/speed.md and docs/results.md.
LARGER = (
    "A larger model gains time, and pays for it: on the Q4_K_M file of Qwen2.5-Coder-1.5B the paper's setting at ratio "
    "0.4 reads 0.76 of the bytes and takes 0.77 to 0.91 of a compiled dense step's time, at 1.45 times dense's "
    "perplexity. In a clone, `make real` makes this demo run on that file."
)


def parser() -> argparse.ArgumentParser:
    """Make the command's parser."""
    flags = OneLineParser(
        "demo", "Dense and pruned answers side by side, and what pruning saves.",
        "demo\ndemo --ckpt FILE.gguf --prune-ratio 0.4 --candidate-width 0.1",
        "--prompt -n --prune-ratio --candidate-width --dtype --weights --compile",
    )
    add_checkpoint_flag(flags)
    flags.add_argument(
        "--prompt", action="append", metavar="TEXT", help="replaces a note and a short question; may be repeated"
    )
    flags.add_argument("-n", "--max-new-tokens", type=int, default=120, metavar="N", help="(default: 120)")
    add_setting_flags(flags)
    machine = add_machine_flags(flags)
    machine.add_argument("--compile", action="store_true", help="compile the decode steps (slow to start, fast to run)")
    flags.set_defaults(max_seq_len=None, quiet=False)
    return flags


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run `python -m popengine.demo`."""
    run_as_command(run, parser(), arguments)


def run(flags: argparse.Namespace) -> None:
    """Answer every prompt twice, and print the table."""
    if is_one_of_several():
        raise InputError("the demo times two runs in one process: start it without torchrun")
    small = flags.ckpt is None and not LARGE_FILE.exists()
    if flags.ckpt is None and not small:
        flags.ckpt, pruning = str(LARGE_FILE), pruning_settings(flags, LARGE)
        print(f"The model is {LARGE_FILE.name}.\n")
    else:
        pruning = pruning_settings(flags, SMALL)
    if small and (flags.weights, flags.dtype) == ("auto", "auto"):
        # The fallback file has four bits, which garble the answers of a model this small in any engine.
        flags.weights, flags.dtype = "plain", "bfloat16"
    prompts = flags.prompt or [NOTE.read_text("utf-8").strip(), QUESTION]
    start_pytorch(flags)
    from popengine.engine import loading
    from popengine.evaluation.side_by_side import NAMES, Screen, answer_in_turns, begun, printable, table

    engine = load_with_warnings(loading.load, flags)
    pairs = []
    for prompt in prompts:
        answers = begun(engine, prompt, flags.max_new_tokens, pruning)
        print(f"> {prompt}\n")
        screen = Screen(sys.stdout) if sys.stdout.isatty() else None
        pairs.append(answer_in_turns(*answers, screen))
        texts = [f"{name}: {printable(answer.text).strip()}" for name, answer in zip(NAMES, pairs[-1], strict=True)]
        if screen is None:
            print("\n\n".join(texts))
        elif not screen.two_columns:
            print(f"\n\n{texts[1]}")
        print()
    *lines, sentence = table(pairs)
    if small:
        sentence += f" {LARGER}"
    print("\n".join([*lines, fill(sentence, width=min(shutil.get_terminal_size().columns, 120))]))


if __name__ == "__main__":
    main()
