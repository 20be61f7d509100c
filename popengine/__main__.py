"""The entry point of all commands: popengine COMMAND ..., or python -m popengine COMMAND ..."""

import argparse
import importlib
import os
import sys
from typing import NoReturn

from popengine import __version__
from popengine.command_line.parser import nearest
from popengine.engine.spinner import waiting
from weights.errors import InputError

COMMANDS = {
    "chat": "talk to a model",
    "demo": "dense and pruned answers side by side, and what pruning saves",
    "generate": "answer one prompt",
    "explain": "one run as a page that explains it",
    "compile": "compile decode steps once, for every later run",
    "info": "describe a checkpoint without loading it",
    "score": "perplexity of a text",
    "compare": "methods side by side: quality, and bytes read per step",
    "bench": "time decode steps, also of other engines",
    "gates": "importance of each layer to a prompt",
    "tasks": "twelve public tasks under pruning methods, offline",
    "harness": "tasks of LM-Evaluation-Harness",
}
HELP = f"""\
usage: popengine COMMAND [flags]

    popengine chat                                             the default checkpoint, a small model
    popengine chat --ckpt DIR --dtype bfloat16                 another model (a folder, a Hub id, a .gguf file)
    popengine generate --prompt "Why is the sky blue?" --prune-ratio 0.4
    popengine info DIR

commands
{chr(10).join(f"  {name:10}{about}" for name, about in COMMANDS.items())}

popengine COMMAND --help shows a command's common flags, --help-all all of them; popengine --version"""


def main() -> NoReturn:
    """Run `python -m popengine` and the console script `popengine`."""
    if "_ARGCOMPLETE" in os.environ:
        complete()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help", "--help-all", "--version"):
        print(f"popengine {__version__}" if name == "--version" else HELP)
        sys.exit(0)
    try:
        if name not in COMMANDS:
            raise InputError(f"{name} is no command{nearest(name, COMMANDS)} (there are {', '.join(COMMANDS)})")
        with waiting("starting", sys.stderr.isatty()):              # the harness imports all of lm_eval
            command = importlib.import_module(f"popengine.{name}")
    except InputError as error:                                     # an optional package may be missing
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"popengine {name}", *sys.argv[2:]]
    command.main()
    sys.exit(0)


def complete() -> NoReturn:
    """Answer a shell's completion request through argcomplete (the extra `completion`)."""
    argcomplete = importlib.import_module("argcomplete")
    line = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
    name = line.split()[1] if len(f"{line}.".split()) > 2 else ""
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=[*COMMANDS])
    if name in COMMANDS and name != "harness":                      # the harness has lm_eval's flags
        os.environ["_ARGCOMPLETE"] = "2"                            # completion starts at the second word
        parser = importlib.import_module(f"popengine.{name}").parser()
    argcomplete.autocomplete(parser)
    sys.exit(1)


if __name__ == "__main__":
    main()
