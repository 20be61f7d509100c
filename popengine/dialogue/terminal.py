"""The terminal of a conversation: typed and pasted lines, blocks of lines, and history.

Pasted lines arrive as one message if readline supports bracketed paste. History is kept between conversations in the
user's state folder, readable by the user alone.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator

from popengine.command_line.interrupts import insistent_interrupts
from weights.errors import InputError
from weights.output_file import replacing
from weights.user_folders import state_folder

try:
    import readline  # optional: editing and history of lines
except ImportError:
    readline = None  # type: ignore[assignment]
try:
    import termios  # not on Windows

    NO_TERMINAL: tuple[type[Exception], ...] = (OSError, ValueError, termios.error)
except ImportError:
    termios = None  # type: ignore[assignment]
    NO_TERMINAL = (AttributeError, OSError, ValueError)

BLOCK = '"""'
MOST_HISTORY = 1000  # lines


def tell(words: str) -> None:
    """Print a line on stderr."""
    print(words, file=sys.stderr, flush=True)


@contextlib.contextmanager
def silent_keys() -> Iterator[None]:
    """Do not echo keys while an answer streams. They wait in the terminal, and the next prompt line shows them."""
    try:
        number = sys.stdin.fileno()
        before = termios.tcgetattr(number)
    except NO_TERMINAL:
        yield
        return
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(number, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)


def typed_lines(names: Callable[[], list[str]], tell: Callable[[str], None]) -> Iterator[str]:
    """Yield lines from a terminal until its end. names: completions of Tab; tell: reports errors in a line"""
    if readline is None:
        yield from asked_lines(tell)
        return

    def complete(start: str, index: int) -> str | None:
        found = [name for name in names() if name.startswith(start)]
        return found[index] if index < len(found) else None

    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
    readline.parse_and_bind("set enable-bracketed-paste on")
    read_history()
    try:
        yield from asked_lines(tell)
    finally:
        write_history()


def asked_lines(tell: Callable[[str], None]) -> Iterator[str]:
    """Yield what a person types, line by line, until the end of input."""
    while True:
        try:
            with insistent_interrupts():
                line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            tell("Ctrl-D or /quit ends the conversation")
        except UnicodeDecodeError:
            tell("error: that line is not UTF-8")
        else:
            yield line


def messages(lines: Iterator[str]) -> Iterator[str]:
    """Join lines from one that begins with three quotation marks to one that ends with them; yield others unchanged."""
    for line in lines:
        if not line.lstrip().startswith(BLOCK):
            yield line
            continue
        parts = [line.strip().removeprefix(BLOCK)]
        while not parts[-1].rstrip().endswith(BLOCK) and (further := next(lines, None)) is not None:
            parts.append(further.rstrip("\n"))
        parts[-1] = parts[-1].rstrip().removesuffix(BLOCK)
        text = "\n".join(parts).strip("\n")
        yield f" {text}" if text.startswith("/") else text          # a block is never a command


def read_history() -> None:
    """Load the lines of earlier conversations. A file that is missing or cannot be read gives none."""
    with contextlib.suppress(OSError, InputError, UnicodeDecodeError):
        text = (state_folder() / "history").read_text("utf-8")
        readline.clear_history()
        for line in text.splitlines()[-MOST_HISTORY:]:
            readline.add_history(line)


def write_history() -> None:
    """Save the typed lines. A failure is ignored."""
    count = readline.get_current_history_length()
    lines = [readline.get_history_item(place + 1) or "" for place in range(max(0, count - MOST_HISTORY), count)]
    with contextlib.suppress(OSError, InputError):
        path = state_folder() / "history"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replacing(path) as unfinished:
            unfinished.chmod(0o600)                     # before it has contents
            kept = "".join(f"{' '.join(line.splitlines())}\n" for line in lines if line.strip())
            unfinished.write_bytes(kept.encode("utf-8", "replace"))
