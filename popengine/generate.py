"""The command: python -m popengine.generate --ckpt ... --prompt ...

Text streams to stdout as it is made, statistics go to stderr; with --json one object on stdout takes the place of
both. Bad input is one line on stderr and exit status 2.
"""

import argparse
import json
import sys
import warnings
from typing import NoReturn

from models.pruning.settings import RECOMMENDED, PruningSettings
from popengine.command import (
    OneLineParser,
    add_checkpoint_flag,
    add_machine_flags,
    add_setting_flags,
    pruning_settings,
    run_as_command,
)
from weights.errors import InputError, one_line

# Bytes on standard input: no context holds more.
LARGEST_PROMPT = 64_000_000


def parser() -> argparse.ArgumentParser:
    flags = OneLineParser(
        prog="popengine-generate",
        description="Generate text with Partition-guided Online Pruning (POP, arXiv 2602.06822).",
        allow_abbrev=False,
    )
    add_checkpoint_flag(flags)
    flags.add_argument("--prompt", required=True, metavar="TEXT|-", help="the prompt; - reads it from standard input")
    flags.add_argument(
        "--image", action="append", default=[], metavar="PATH", help="an image the prompt is about; may be repeated"
    )
    flags.add_argument("-n", "--max-new-tokens", type=int, default=128, metavar="N")
    sampling = flags.add_argument_group("sampling")
    sampling.add_argument("--temperature", "--temp", type=float, default=0.0, metavar="T", help="0 is greedy")
    sampling.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens; 0: all")
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="P", help="only the likeliest P of probability")
    sampling.add_argument("--seed", type=int, metavar="N", help="makes sampling reproducible")
    sampling.add_argument("--ignore-eos", action="store_true", help="go on after the end of the sequence")
    prompting = flags.add_argument_group("prompt")
    prompting.add_argument("--system-prompt", metavar="TEXT")
    prompting.add_argument("--raw", action="store_true", help="the prompt as it stands, without the chat template")
    prompting.add_argument(
        "--parse-special", action="store_true",
        help="control tokens that a message spells are those tokens (default: their letters, as they were typed)",
    )
    add_setting_flags(flags)
    flags.add_argument(
        "--paper", action="store_true",
        help="where other flags say nothing, the paper's rule to the letter (pop, evidence from the prompt alone), "
        "instead of what is recommended (width 0.5, a prior of 32 tokens)",
    )
    machine = add_machine_flags(flags)
    machine.add_argument("--max-seq-len", type=int, metavar="N", help="a shorter context than the model's")
    machine.add_argument("--compile", action="store_true", help="compile the decode step (slow to start, fast to run)")
    output = flags.add_argument_group("output")
    output.add_argument("--quiet", action="store_true", help="neither statistics nor progress bars")
    output.add_argument("--json", action="store_true", help="one JSON object on stdout instead of text and statistics")
    return flags


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry of `python -m popengine.generate` and of the console script `popengine-generate`."""
    run_as_command(run, parser(), arguments)


def run(flags: argparse.Namespace) -> None:
    prompt = read_prompt(flags.prompt)
    pruning = settings(flags)
    # PyTorch takes seconds to import: only now that the flags have been understood.
    from popengine import loading, statistics
    from popengine.sampling import Sampling

    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p, flags.seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        engine = loading.load(
            flags.ckpt,
            dtype=flags.dtype,
            device=flags.device,
            weights=flags.weights,
            max_seq_len=flags.max_seq_len,
            compile=flags.compile,
            progress=sys.stderr.isatty() and not flags.quiet,
        )
    for warning in caught:
        print(f"warning: {one_line(str(warning.message))}", file=sys.stderr)
    for field in engine.unknown_fields:
        unknown = one_line(field, 100)
        print(f"warning: config.json has a field that popengine does not know and ignores: {unknown}", file=sys.stderr)
    pieces = engine.stream(
        prompt,
        images=flags.image,
        max_new_tokens=flags.max_new_tokens,
        pruning=pruning,
        sampling=sampling,
        raw=flags.raw,
        system_prompt=flags.system_prompt,
        ignore_eos=flags.ignore_eos,
        parse_special=flags.parse_special,
    )
    text, token_ids = [], []
    for piece in pieces:
        text.append(piece.text)
        token_ids.append(piece.token_id)
        if not flags.json:
            print(piece.text, end="", flush=True)
    assert piece.statistics is not None
    if flags.json:
        found = statistics.report(piece.statistics)
        found["timing"]["load_s"] = engine.load_s
        made = {
            "text": "".join(text), "token_ids": token_ids[:-1], "prompt_token_ids": piece.prompt_token_ids,
            "finish_reason": piece.finish_reason,
        }
        print(json.dumps(made | found, ensure_ascii=sys.stdout.encoding.lower() != "utf-8"))
        return
    print(flush=True)
    if not flags.quiet:
        lines = statistics.lines(piece.statistics, piece.finish_reason or "length", engine.load_s)
        print("", *lines, sep="\n", file=sys.stderr)


def settings(flags: argparse.Namespace) -> PruningSettings:
    """What the flags ask for, on top of what is recommended, or of the paper's."""
    return pruning_settings(flags, PruningSettings() if flags.paper else RECOMMENDED)


def read_prompt(text: str) -> str:
    if text != "-":
        return text
    try:
        return sys.stdin.buffer.read(LARGEST_PROMPT).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt on standard input is not UTF-8 (at byte {error.start})") from None


if __name__ == "__main__":
    main()
