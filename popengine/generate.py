"""The command: python -m popengine.generate --ckpt ... --prompt ...

Text streams to stdout as it is generated, statistics go to stderr; --json replaces both by one object on stdout. Bad
input causes one line on stderr and exit status 2.
"""

import argparse
import json
import sys
from typing import NoReturn

from popengine.command_line.flags import (
    add_checkpoint_flag,
    add_generation_flags,
    add_prompt_flags,
    add_stop_flag,
    read_prompt,
    sampling_fields,
)
from popengine.command_line.parser import OneLineParser
from popengine.command_line.setting_flags import pruning_settings
from popengine.command_line.start import load_with_warnings, run_as_command, start_pytorch
from popengine.engine.processes import is_first
from popengine.engine.sampling_settings import Sampling
from weights.errors import InputError


def parser() -> argparse.ArgumentParser:
    """Make the command's parser."""
    flags = OneLineParser(
        "generate", "Generate text with Partition-guided Online Pruning (POP, arXiv 2602.06822).",
        'generate --prompt "Why is the sky blue?"\ngenerate --ckpt DIR --prompt "..." --prune-ratio 0.4',
        "--prompt --image -n --temperature --system-prompt --raw --prune-ratio --paper --dtype --weights --compile "
        "--json",
    )
    add_checkpoint_flag(flags)
    add_prompt_flags(flags)
    flags.add_argument(
        "--parse-special", action="store_true",
        help="read control tokens spelled in a message as these tokens (default: as letters)",
    )
    add_generation_flags(flags, new_tokens=128)
    add_stop_flag(flags)
    flags.add_argument("--logprobs", action="store_true", help="with --json: the log-probability of every token")
    flags.add_argument("--json", action="store_true", help="one JSON object on stdout instead of text and statistics")
    return flags


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run `python -m popengine.generate` and the console script `popengine-generate`."""
    run_as_command(run, parser(), arguments)


def run(flags: argparse.Namespace) -> None:
    """Generate for one prompt, and print text and statistics or one JSON object."""
    pruning, sampling = pruning_settings(flags), Sampling(**sampling_fields(flags))
    if flags.logprobs and not flags.json:
        raise InputError("--logprobs is a part of the JSON object: give --json too")
    start_pytorch(flags)
    from popengine.engine import distributed, loading, results

    prompt = distributed.broadcast(read_prompt(flags.prompt) if is_first() else None, distributed.patient())
    engine = load_with_warnings(loading.load, flags)
    pieces = []
    for piece in engine.stream(
        prompt,
        images=flags.image,
        max_new_tokens=flags.max_new_tokens,
        pruning=pruning,
        sampling=sampling,
        raw=flags.raw,
        system_prompt=flags.system_prompt,
        ignore_eos=flags.ignore_eos,
        parse_special=flags.parse_special,
        logprobs=flags.logprobs,
    ):
        pieces.append(piece)
        if not flags.json:
            print(piece.text, end="", flush=True)
    answer = results.joined(pieces)
    if flags.json:
        found = results.report(answer.statistics)
        found["timing"]["load_s"] = engine.load_s
        made = {
            "text": answer.text, "token_ids": answer.token_ids, "prompt_token_ids": answer.prompt_token_ids,
            "finish_reason": answer.finish_reason,
        } | ({"logprobs": answer.logprobs} if flags.logprobs else {})
        print(json.dumps(made | found, ensure_ascii=sys.stdout.encoding.lower() != "utf-8"))
        return
    print(flush=True)
    if not flags.quiet:
        lines = results.lines(answer.statistics, answer.finish_reason, engine.load_s)
        print("", *lines, sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main()
