"""The command: python -m popengine.generate --ckpt ... --prompt ...

Text streams to stdout as it is generated, statistics go to stderr; --json replaces both by one object on stdout. Bad
input causes one line on stderr and exit status 2.
"""

import argparse
import json
import sys
from typing import NoReturn

from popengine.command import (
    OneLineParser,
    add_checkpoint_flag,
    add_generation_flags,
    add_stop_flag,
    load_with_warnings,
    pruning_settings,
    run_as_command,
    sampling_fields,
    start_pytorch,
)
from popengine.engine.processes import is_first
from weights.errors import InputError

# Bytes on standard input: no context holds more.
LARGEST_PROMPT = 64_000_000


def parser() -> argparse.ArgumentParser:
    """Make the command's parser."""
    flags = OneLineParser(
        "generate", "Generate text with Partition-guided Online Pruning (POP, arXiv 2602.06822).",
        'generate --prompt "Why is the sky blue?"\ngenerate --ckpt DIR --prompt "..." --prune-ratio 0.4',
        "--prompt --image -n --temperature --system-prompt --raw --prune-ratio --paper --dtype --weights --compile "
        "--json",
    )
    add_checkpoint_flag(flags)
    flags.add_argument("--prompt", required=True, metavar="TEXT|-", help="the prompt; - reads it from standard input")
    flags.add_argument(
        "--image", action="append", default=[], metavar="PATH", help="an image of the prompt; may be repeated"
    )
    flags.add_argument("--system-prompt", metavar="TEXT", help="instructions before the prompt")
    flags.add_argument("--raw", action="store_true", help="encode the prompt without the chat template")
    flags.add_argument(
        "--parse-special", action="store_true",
        help="read control tokens spelled in a message as these tokens (default: as letters)",
    )
    flags.add_argument("--ignore-eos", action="store_true", help="continue after the end of the sequence")
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
    pruning = pruning_settings(flags)
    if flags.logprobs and not flags.json:
        raise InputError("--logprobs is a part of the JSON object: give --json too")
    start_pytorch(flags)
    from popengine.engine import distributed, loading, results
    from popengine.engine.sampling import Sampling

    prompt = distributed.broadcast(read_prompt(flags.prompt) if is_first() else None, distributed.patient())
    sampling = Sampling(**sampling_fields(flags))
    engine = load_with_warnings(loading.load, flags)
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
        logprobs=flags.logprobs,
    )
    text, token_ids, logprobs = [], [], []
    for piece in pieces:
        text.append(piece.text)
        token_ids.append(piece.token_id)
        logprobs.append(piece.logprob)
        if not flags.json:
            print(piece.text, end="", flush=True)
    assert piece.statistics is not None
    if flags.json:
        found = results.report(piece.statistics)
        found["timing"]["load_s"] = engine.load_s
        made = {
            "text": "".join(text), "token_ids": token_ids[:-1], "prompt_token_ids": piece.prompt_token_ids,
            "finish_reason": piece.finish_reason,
        } | ({"logprobs": logprobs[:-1]} if flags.logprobs else {})
        print(json.dumps(made | found, ensure_ascii=sys.stdout.encoding.lower() != "utf-8"))
        return
    print(flush=True)
    if not flags.quiet:
        lines = results.lines(piece.statistics, piece.finish_reason or "length", engine.load_s)
        print("", *lines, sep="\n", file=sys.stderr)


def read_prompt(text: str) -> str:
    """Return the prompt; - reads it from standard input."""
    if text != "-":
        return text
    try:
        return sys.stdin.buffer.read(LARGEST_PROMPT).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt on standard input is not UTF-8 (at byte {error.start})") from None


if __name__ == "__main__":
    main()
