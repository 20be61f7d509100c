"""The command: python -m popengine.info CKPT

What a checkpoint is and what of it is supported, before anything of it is loaded.
"""

import argparse
import json
from typing import NoReturn

from popengine.command import OneLineParser, add_checkpoint_flag, run_as_command, start_pytorch
from weights.errors import InputError


def parser() -> argparse.ArgumentParser:
    flags = OneLineParser(
        "info", "What a checkpoint is, and what of it is supported, before anything of it is loaded.",
        "info DIR|HUB_ID|FILE.gguf", "--json",
    )
    flags.add_argument("checkpoint", nargs="?", metavar="CKPT", help="the same as --ckpt")
    add_checkpoint_flag(flags)
    flags.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return flags


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry of `python -m popengine.info`."""
    run_as_command(run, parser(), arguments)


def run(flags: argparse.Namespace) -> None:
    if flags.checkpoint and flags.ckpt:
        raise InputError("name one checkpoint, with --ckpt or without")
    start_pytorch(flags)
    from popengine.engine import checkpoint_info

    found = checkpoint_info.describe(flags.checkpoint or flags.ckpt)
    print(json.dumps(found, ensure_ascii=False) if flags.json else "\n".join(checkpoint_info.lines(found)))


if __name__ == "__main__":
    main()
