"""The command: python -m popengine.info CKPT

Describes a checkpoint and its supported features without loading it.
"""

import argparse
import json
from typing import NoReturn

from popengine.command_line.flags import add_checkpoint_flag
from popengine.command_line.parser import OneLineParser
from popengine.command_line.start import run_as_command, start_pytorch
from weights.errors import InputError


def parser() -> argparse.ArgumentParser:
    """Make the command's parser."""
    flags = OneLineParser(
        "info", "Describe a checkpoint and its supported features, without loading it.",
        "info DIR|HUB_ID|FILE.gguf", "--json",
    )
    flags.add_argument("checkpoint", nargs="?", metavar="CKPT", help="alternative to --ckpt")
    add_checkpoint_flag(flags)
    flags.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return flags


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run `python -m popengine.info`."""
    run_as_command(run, parser(), arguments)


def run(flags: argparse.Namespace) -> None:
    """Print the description."""
    if flags.checkpoint and flags.ckpt:
        raise InputError("name one checkpoint, with --ckpt or without")
    start_pytorch(flags)
    from popengine.engine import checkpoint_info

    found = checkpoint_info.describe(flags.checkpoint or flags.ckpt)
    print(json.dumps(found, ensure_ascii=False) if flags.json else "\n".join(checkpoint_info.lines(found)))


if __name__ == "__main__":
    main()
