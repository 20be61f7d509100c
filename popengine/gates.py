"""The command: python -m popengine.gates --text FILE --out DIR

Measures the importance of each layer to prompt positions and to output positions by the virtual gates of Prefill-Only
pruning (arXiv 2602.03295, Eq. 5-13). This tests for a given model that deep layers matter little to the prompt.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from popengine.command_line.flags import add_checkpoint_flag, add_machine_flags
from popengine.command_line.parser import OneLineParser
from popengine.command_line.start import run_as_command, start_pytorch
from popengine.engine.processes import is_one_of_several
from weights.errors import InputError
from weights.output_file import make_folder, write_output


def parser() -> argparse.ArgumentParser:
    """Make the command's parser."""
    flags = OneLineParser(
        "gates", "Importance of each layer to the prompt and to the output.", "gates --text FILE --out DIR",
        "--out --text --tasks --samples --prompt-tokens --answer-tokens --dtype --weights",
    )
    add_checkpoint_flag(flags)
    flags.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the table and the plot")
    flags.add_argument("--text", type=Path, metavar="FILE", help="prompts are pieces of this text, UTF-8")
    flags.add_argument("--tasks", metavar="text|pictures", help="prompts are questions of these tasks instead")
    flags.add_argument("--samples", type=int, default=32, metavar="N", help="prompts (default: 32)")
    flags.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="per piece of text (default: 128)")
    flags.add_argument("--answer-tokens", type=int, default=64, metavar="N", help="sampled at most (default: 64)")
    flags.add_argument("--seed", type=int, default=0, metavar="N")
    flags.add_argument("--no-plots", action="store_true", help="only the table")
    flags.add_argument("--quiet", action="store_true", help="no progress bars")
    add_machine_flags(flags)
    return flags


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run `python -m popengine.gates`."""
    run_as_command(run, parser(), arguments)


def run(flags: argparse.Namespace) -> None:
    """Measure the gates, and write the table and the plot."""
    if (flags.text is None) == (flags.tasks is None):
        raise InputError("give a text (--text) or tasks (--tasks) to take prompts from, one of the two")
    for name in ("samples", "answer_tokens"):
        if getattr(flags, name) < 1:
            raise InputError(f"{name.replace('_', ' ')} must be at least 1, not {getattr(flags, name)}")
    if is_one_of_several():
        raise InputError("derivatives do not go through sums over ranks: start gates without torchrun")
    start_pytorch(flags)
    from models.cost_model import layer_weights
    from popengine.engine import loading
    from popengine.evaluation import gates, scoring, tasks

    if not flags.no_plots:
        from popengine.evaluation import plots

        plots.tell_if_missing()
    questions = [] if flags.tasks is None else tasks.questions_for(flags.tasks, flags.samples, flags.seed)
    make_folder(flags.out, "gates.json", "gates.md", "gates.png")
    show_progress = sys.stderr.isatty() and not flags.quiet
    engine = loading.load(
        flags.ckpt, dtype=flags.dtype, device=flags.device, weights=flags.weights, compile=False,
        progress=show_progress,
    )
    if flags.text is None:
        every = max(1, len(questions) // flags.samples)         # the same number of every kind of question
        prompts = gates.of_questions(engine, questions[::every][: flags.samples])
    else:
        text = scoring.read_text(flags.text, engine.tokenizer)
        windows = scoring.cut_windows(text, engine.tokenizer, flags.prompt_tokens, 1, flags.samples)
        prompts = [(window.prompt, ()) for window in windows]
    samples = gates.answered(engine, prompts, flags.answer_tokens, flags.seed)
    found = gates.study(engine, samples, show_progress)
    about: dict[str, Any] = {
        "checkpoint": "default" if flags.ckpt is None else Path(flags.ckpt).name,
        "prompts": flags.tasks or f"{flags.text.name}, {flags.prompt_tokens} tokens each",
        "answer_tokens": sum(len(sample.answer) for sample in samples),
        "seed": flags.seed,
        "dtype": str(engine.dtype).removeprefix("torch."),
    }
    rows = found.rows()
    sizes = {"layer_weights": asdict(layer_weights(engine.model))}     # by which --prefill-skip auto knows the model
    write_output(flags.out / "gates.json", json.dumps({"about": about | sizes, "rows": rows}, indent=1) + "\n")
    table = gates.markdown(found, about)
    write_output(flags.out / "gates.md", table)
    if not flags.no_plots and plots.INSTALLED:
        plots.plot_gates(rows, flags.out / "gates.png", about["checkpoint"])
    print(table, end="")


if __name__ == "__main__":
    main()
