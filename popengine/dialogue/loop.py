"""The loop of a dialogue: it obeys lines, typed or piped, until the end of the input."""

import contextlib
import sys
from collections.abc import Iterator

from popengine.command_line.interrupts import noted_interrupts
from popengine.command_line.start import said_of
from popengine.dialogue.answers import Dialogue
from popengine.dialogue.commands import COMMANDS, obey
from popengine.dialogue.terminal import messages, tell, typed_lines
from popengine.engine import distributed
from weights.errors import InputError, one_line


def converse(dialogue: Dialogue, typed: bool) -> None:
    """Obey lines until the end of the input or /quit. typed: a person types them, and errors do not end it"""
    lines = typed_lines(lambda: [*COMMANDS], tell) if typed else piped_lines()
    for line in distributed.heard_by_all(messages(lines)):
        try:
            obey(dialogue, line, noted_interrupts() if typed else contextlib.nullcontext([]))
        except KeyboardInterrupt:
            if not typed:
                raise
            print()
        except Exception as error:
            if not typed or isinstance(error, BrokenPipeError):
                raise
            # A typed dialogue continues after every error, including our own.
            tell(f"error: {said_of(error) or one_line(f'of popengine itself, {error!r}')}")
        if dialogue.ended:
            return


def piped_lines() -> Iterator[str]:
    """Yield the lines of standard input. Raises InputError for a line that is not UTF-8."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError:
            raise InputError(f"line {number} on standard input is not UTF-8") from None
