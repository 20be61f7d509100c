"""The command: python -m popengine.chat --ckpt ...

A line is a turn, or a command if it begins with a slash. Answers stream to stdout, everything else goes to stderr.
Input from a pipe is read line by line, and the first invalid line ends the command with exit status 2.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NoReturn

from popengine.command_line.flags import add_checkpoint_flag, add_generation_flags, add_stop_flag, sampling_fields
from popengine.command_line.interrupts import noted_interrupts
from popengine.command_line.parser import OneLineParser, nearest
from popengine.command_line.setting_flags import pruning_settings
from popengine.command_line.start import load_with_warnings, run_as_command, said_of, start_pytorch
from popengine.engine.processes import is_first
from popengine.studies.settings import PruningSettings
from popengine.terminal import messages, typed_lines
from weights.errors import InputError, one_line

# Converters from a word to each setting's value; those of sampling are fields of popengine.engine.sampling.Sampling.
OF_PRUNING: dict[str, Callable[[str], Any]] = {one.name: one.metadata["type"] for one in fields(PruningSettings)}
OF_SAMPLING: dict[str, Callable[[str], Any]] = {
    "temperature": float, "top_k": int, "top_p": float, "seed": int, "min_p": float, "repetition_penalty": float,
    "stop": lambda text: () if text == "none" else (text,),
}
SETTINGS = OF_PRUNING | OF_SAMPLING | {"max_new_tokens": int}
# Settings that may be None, typed as `none`.
OPTIONAL = {one.name for one in fields(PruningSettings) if one.default is None} | {"seed"}
# Alternative settings of the prune ratio: one of them, not both.
EITHER = {"prune_ratio": "ffn_ratio", "ffn_ratio": "prune_ratio"}


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
    from popengine.engine import distributed, loading, results
    from popengine.engine.sampling import Sampling

    sampling = Sampling(**sampling_fields(flags))
    engine = load_with_warnings(loading.load, flags)
    conversation = engine.chat(
        flags.system_prompt, pruning=pruning, sampling=sampling, max_new_tokens=flags.max_new_tokens
    )
    resolved = engine.resolve(pruning)      # raises errors and makes the prior before the first turn
    typed = distributed.broadcast(sys.stdin.isatty() and sys.stdout.isatty())
    chat = Chat(conversation, results, distributed, shows_statistics=typed and not flags.quiet)
    if typed and not flags.quiet:
        how = f"{results.rule_words(resolved.settings)}, ratio {resolved.ratio:.3g}" if resolved.ratio else "dense"
        dtype = str(engine.dtype).removeprefix("torch.")
        tell(f"{engine.name}, {engine.weights} weights, {dtype}, {how}; /help says more")
    lines = typed_lines(lambda: [*COMMANDS], tell) if typed else piped_lines()
    for line in distributed.heard_by_all(messages(lines)):
        try:
            chat.obey(line, noted_interrupts() if typed else contextlib.nullcontext([]))
        except KeyboardInterrupt:
            if not typed:
                raise
            print()
        except Exception as error:
            if not typed or isinstance(error, BrokenPipeError):
                raise
            # An interactive conversation continues after every error, including our own.
            tell(f"error: {said_of(error) or one_line(f'of popengine itself, {error!r}')}")
        if chat.ended:
            return


def piped_lines() -> Iterator[str]:
    """Yield the lines of standard input. Raises InputError for a line that is not UTF-8."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError:
            raise InputError(f"line {number} on standard input is not UTF-8") from None


def tell(words: str) -> None:
    """Print a line on stderr."""
    print(words, file=sys.stderr, flush=True)


class Chat:
    """Applies lines to a conversation.

    results, distributed  the modules of popengine, which import PyTorch
    shows_statistics      show one line of statistics after every answer
    """

    def __init__(self, conversation: Any, results: Any, distributed: Any, shows_statistics: bool = False) -> None:
        self.shows_statistics = shows_statistics
        self.conversation, self.engine = conversation, conversation.engine
        self.results, self.distributed = results, distributed
        self.images: list[str] = []
        self.last: Any = None                                       # the last piece of the last answer
        self.ended = False

    def obey(self, line: str, interrupts: contextlib.AbstractContextManager[list[int]]) -> None:
        """Run a command or a turn; `interrupts` records in a list that the answer should end."""
        if not line.strip():
            return
        if not line.startswith("/"):
            self.answer(line.rstrip("\n"), interrupts)
            return
        name, _, words = line.strip().partition(" ")
        if name not in COMMANDS:
            raise InputError(
                f"{name} is no command (/help lists them; begin with a space to send it as text)"
                f"{nearest(name, COMMANDS)}"
            )
        command = COMMANDS[name]
        command.run(self, command.parse(words.strip()))

    def answer(self, text: str, interrupts: contextlib.AbstractContextManager[list[int]]) -> None:
        images, self.images = self.images, []
        pieces = self.conversation.stream(text, images)
        with interrupts as noted, contextlib.closing(pieces):
            for piece in pieces:
                print(piece.text, end="", flush=True)
                self.last = piece if piece.finish_reason else self.last
                if self.distributed.broadcast(bool(noted)):
                    break
        print(flush=True)
        if self.shows_statistics and piece.statistics is not None:
            tell(self.results.one_line_of(piece.statistics))
        if piece.finish_reason == "length":
            said, most = piece.statistics.new_tokens, self.conversation.max_new_tokens
            more = "the context is full: /reset begins anew" if said < most else "/max-new-tokens allows more"
            tell(f"ended after {said} tokens; {more}")

    def set(self, asked: tuple[str, dict[str, Any]]) -> None:
        """Change fields of the settings from the next turn on, or none, and show the named one."""
        (name, changes), conversation = asked, self.conversation
        if name in OF_PRUNING:
            pruning = replace(conversation.pruning, **changes)
            self.engine.resolve(pruning)                            # raises errors now
            conversation.pruning = pruning
        elif name in OF_SAMPLING:
            conversation.sampling = replace(conversation.sampling, **changes)
        else:
            conversation.max_new_tokens = changes.get(name, conversation.max_new_tokens)
        found = vars(conversation) | vars(conversation.sampling)
        found |= self.results.pruning_report(self.engine.resolve(conversation.pruning))
        tell(f"{name.replace('_', '-')} {found[name]}")

    def help(self, _: None) -> None:
        for name, one in COMMANDS.items():
            if one.help:
                tell(f"{f'{name} {one.shown}':<18}{one.help}")
        settings = [name for name, one in COMMANDS.items() if not one.help]
        tell(f"Settings, shown without a value, changed with one: {' '.join(settings)}")
        tell("Model, dtype, weights and device are chosen at the start: popengine chat --ckpt ... --dtype ...")

    def reset(self, _: None) -> None:
        self.conversation.begin_anew()

    def system(self, text: str) -> None:
        self.conversation.instruct(text or None)

    def image(self, path: str) -> None:
        self.engine.pictures.pixel_values([path])                   # raises errors now
        self.images.append(path)

    def stats(self, _: None) -> None:
        if self.last is None:
            raise InputError("nothing was answered yet")
        found = self.results.lines(self.last.statistics, self.last.finish_reason, self.engine.load_s)
        tell("\n".join(found))

    def save(self, path: str) -> None:
        if is_first():
            self.conversation.save(path)

    def load(self, path: str) -> None:
        self.conversation.load(path)

    def quit(self, _: None) -> None:
        self.ended = True


@dataclass(frozen=True)
class Command:
    """A command of the conversation, typed with a slash.

    parse  makes the argument from the words after the name, or raises InputError
    run    executes the command with that argument
    shown  the argument in the help; help: empty for a setting, which is listed by its name
    """

    parse: Callable[[str], Any]
    run: Callable[[Chat, Any], None]
    shown: str = ""
    help: str = ""


def nothing(words: str) -> None:
    """Raise InputError for a command with words after its name."""
    if words:
        raise InputError(f"this command stands alone, without {words!r}")


def text(words: str) -> str:
    """Return the words as they are."""
    return words


def file(words: str) -> str:
    """Return the name of a file, by default conversation.json."""
    return words or "conversation.json"


def setting(name: str) -> Callable[[str], tuple[str, dict[str, Any]]]:
    """Return a parser of a setting's value: it returns the changed fields, none of them without a value."""

    def parse(word: str) -> tuple[str, dict[str, Any]]:
        if not word:
            return name, {}
        try:
            value: Any = None if word == "none" and name in OPTIONAL else SETTINGS[name](word)
        except ValueError:
            kind = "a whole number" if SETTINGS[name] is int else "a number"
            raise InputError(f"/{name.replace('_', '-')} takes {kind}, not {word!r}") from None
        if name == "max_new_tokens" and value < 1:
            raise InputError(f"/max-new-tokens must be at least 1, not {word}")
        return name, {name: value} | ({EITHER[name]: None} if name in EITHER else {})

    return parse


COMMANDS = {
    "/ratio": Command(
        setting("prune_ratio"), Chat.set, "0.3", "share of the layers' parameters to prune, 0: dense"
    ),
    "/image": Command(text, Chat.image, "PATH", "a picture for the next turn"),
    "/system": Command(text, Chat.system, "TEXT", "set the system prompt, or remove it"),
    "/reset": Command(nothing, Chat.reset, "", "remove all turns"),
    "/stats": Command(nothing, Chat.stats, "", "statistics of the last answer"),
    "/save": Command(file, Chat.save, "FILE", "save the conversation (default: conversation.json)"),
    "/load": Command(file, Chat.load, "FILE", "continue a saved conversation (default: conversation.json)"),
    "/help": Command(nothing, Chat.help, "", "this list"),
    "/quit": Command(nothing, Chat.quit, "", "or Ctrl-D; Ctrl-C ends an answer"),
} | {f"/{name.replace('_', '-')}": Command(setting(name), Chat.set) for name in SETTINGS}


if __name__ == "__main__":
    main()
