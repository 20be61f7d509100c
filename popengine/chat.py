"""The command: python -m popengine.chat --ckpt ...

A line is a turn, or a command if it begins with a slash. Answers stream to stdout, everything else goes to stderr.
Input from a pipe is read line by line, and the first invalid line ends the command with exit status 2.
"""

import argparse
import sys
from typing import NoReturn

from popengine.command_line.flags import add_checkpoint_flag, add_generation_flags, add_stop_flag, sampling_fields
from popengine.command_line.parser import OneLineParser
from popengine.command_line.setting_flags import pruning_settings
from popengine.command_line.start import load_with_warnings, run_as_command, start_pytorch


def parser() -> argparse.ArgumentParser:
    """Make the command's parser."""
    flags = OneLineParser(
        "chat", "Talk to a model. In the conversation, /help lists the commands.",
        "chat\nchat --ckpt DIR --dtype bfloat16 --prune-ratio 0.4",
        "--system-prompt -n --temperature --prune-ratio --paper --dtype --weights --compile",
    )
    add_checkpoint_flag(flags)
    flags.add_argument("--system-prompt", metavar="TEXT", help="instructions before the first turn")
    add_stop_flag(flags)
    add_generation_flags(flags, new_tokens=512)
    return flags


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run `python -m popengine.chat`."""
    run_as_command(run, parser(), arguments)


def run(flags: argparse.Namespace) -> None:
    """Load the engine, and obey lines until the end of input."""
    pruning = pruning_settings(flags)
    start_pytorch(flags)
    from popengine.dialogue.answers import Dialogue
    from popengine.dialogue.loop import converse
    from popengine.dialogue.terminal import tell
    from popengine.engine import distributed, loading, results
    from popengine.engine.sampling import Sampling

    sampling = Sampling(**sampling_fields(flags))
    engine = load_with_warnings(loading.load, flags)
    conversation = engine.chat(
        flags.system_prompt, pruning=pruning, sampling=sampling, max_new_tokens=flags.max_new_tokens
    )
    resolved = engine.resolve(pruning)      # raises errors and makes the prior before the first turn
    typed = distributed.broadcast(sys.stdin.isatty() and sys.stdout.isatty())
    if typed and not flags.quiet:
        how = f"{results.rule_words(resolved.settings)}, ratio {resolved.ratio:.3g}" if resolved.ratio else "dense"
        dtype = str(engine.dtype).removeprefix("torch.")
        tell(f"{engine.name}, {engine.weights} weights, {dtype}, {how}; /help says more")
    converse(Dialogue(engine, conversation, shows_statistics=typed and not flags.quiet), typed)


if __name__ == "__main__":
    main()
