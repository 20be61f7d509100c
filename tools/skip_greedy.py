"""Find the layers that prompts can skip at the least loss, one after the other, on a calibration text.

    python tools/skip_greedy.py --ckpt model.gguf --text FILE --layers 1/4 --out DIR

DIR gets skipped.md and skipped.json, with a value of --prefill-skip for every number of layers, and progress.jsonl.
A run that was killed, or that --minutes stopped, goes on where it was. Popengine commands take the values as they are:

    popengine generate --ckpt model.gguf --prompt "..." --prune-ratio 0 --prefill-skip layers:3+7+9
"""

import argparse
import json
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from popengine.command_line.flags import add_checkpoint_flag, add_machine_flags
from popengine.command_line.parser import OneLineParser
from popengine.command_line.start import run_as_command, start_pytorch
from popengine.studies.skipped_layers import layer_count, share_or_number
from weights.errors import InputError
from weights.output_file import make_folder, write_output


def parser() -> argparse.ArgumentParser:
    flags = OneLineParser(
        "skip_greedy", "The layers that a prompt can skip at the least loss of what follows it, found greedily.",
        "gates --help      # ranks layers one by one, in a fraction of the time",
        "--out --text --layers --windows --prompt-tokens --score-tokens --minutes --dtype --weights",
    )
    add_checkpoint_flag(flags)
    flags.add_argument("--text", type=Path, required=True, metavar="FILE", help="calibration text, UTF-8")
    flags.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the table")
    flags.add_argument("--layers", default="1/4", metavar="N|SHARE", help="how many layers to find (default: 1/4)")
    flags.add_argument("--windows", type=int, default=4, metavar="N", help="windows of the text (default: 4)")
    flags.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="(default: 128)")
    flags.add_argument("--score-tokens", type=int, default=32, metavar="N", help="tokens that follow (default: 32)")
    flags.add_argument("--boundary-tokens", type=int, default=1, metavar="K", help="run all layers (default: 1)")
    flags.add_argument("--minutes", type=float, default=math.inf, metavar="M", help="stop after M minutes")
    flags.add_argument("--quiet", action="store_true", help="no progress bar")
    add_machine_flags(flags)
    return flags


def run(flags: argparse.Namespace) -> None:
    if (wanted := share_or_number(flags.layers)) is None:
        raise InputError(f"layers must be a number of layers or a share like 1/4, not {flags.layers}")
    if not 1 <= flags.boundary_tokens < flags.prompt_tokens:
        raise InputError(f"boundary tokens must be at least 1 and below {flags.prompt_tokens}, the prompt's tokens")
    if not flags.minutes > 0:
        raise InputError(f"minutes must be above 0, not {flags.minutes}")
    start_pytorch(flags)
    from popengine.engine import loading
    from popengine.evaluation import scoring, skip_search
    from popengine.evaluation.progress_file import ProgressFile
    from popengine.studies.calibration import fingerprint
    from popengine.studies.settings import DENSE

    until = time.monotonic() + 60 * flags.minutes
    make_folder(flags.out, "skipped.json", "skipped.md", "progress.jsonl")
    show_progress = sys.stderr.isatty() and not flags.quiet
    engine = loading.load(
        flags.ckpt, dtype=flags.dtype, device=flags.device, weights=flags.weights, compile=False,
        progress=show_progress,
    )
    layers = len(engine.model.model.layers)
    count = layer_count(wanted, layers)
    if not 1 <= count < layers:
        raise InputError(f"layers {flags.layers} is {count} of the model's {layers} layers: give 1 to {layers - 1}")
    scoring.check_context(engine, flags.prompt_tokens, flags.score_tokens)
    text = scoring.read_text(flags.text, engine.tokenizer)
    windows = scoring.cut_windows(text, engine.tokenizer, flags.prompt_tokens, flags.score_tokens, flags.windows)
    about: dict[str, Any] = {
        "checkpoint": "default" if flags.ckpt is None else Path(flags.ckpt).name, "model": fingerprint(engine.model),
        "text": f"{text.name} ({text.digest})", "windows": flags.windows, "prompt_tokens": flags.prompt_tokens,
        "score_tokens": flags.score_tokens, "boundary_tokens": flags.boundary_tokens,
        "dtype": str(engine.dtype).removeprefix("torch."),
    }
    is_sound = partial(skip_search.is_sound, windows=flags.windows)
    search = skip_search.SkipSearch(
        engine, engine.resolve(DENSE), windows, flags.boundary_tokens,
        ProgressFile(flags.out / "progress.jsonl", about, is_sound), until, show_progress,
    )
    rounds = search.rounds(count)
    write_output(flags.out / "skipped.json", json.dumps({"about": about, "rounds": rounds}, indent=1) + "\n")
    table = skip_search.markdown(rounds, about)
    write_output(flags.out / "skipped.md", table)
    print(table, end="")
    if len(rounds) < count:
        print(f"note: time is over after {len(rounds)} of {count} layers; the same command goes on", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """Run the tool."""
    run_as_command(run, parser(), arguments)


if __name__ == "__main__":
    main()
