"""The command: python -m popengine.chat --ckpt ...

A line is a turn, or with a slash in front a command. Answers stream to stdout, all else goes to stderr. From a pipe it
works line by line, and the first line that is wrong ends it with exit status 2.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any, NoReturn

from models.pruning.settings import PruningSettings
from popengine.command import (
    OneLineParser,
    add_checkpoint_flag,
    add_generation_flags,
    generation_settings,
    insistent_interrupts,
    load_with_warnings,
    nearest,
    noted_interrupts,
    run_as_command,
    start_pytorch,
)
from popengine.torchrun import heard_by_all, is_first, told_by_first
from weights.errors import InputError

try:
    import readline  # where there is one, lines can be edited and come again
except ImportError:
    readline = None  # type: ignore[assignment]

# What makes each setting's value from a word; those of the sampling are popengine.sampling.Sampling's.
OF_PRUNING: dict[str, Callable[[str], Any]] = {one.name: one.metadata["type"] for one in fields(PruningSettings)}
OF_SAMPLING: dict[str, Callable[[str], Any]] = {"temperature": float, "top_k": int, "top_p": float, "seed": int}
SETTINGS = OF_PRUNING | OF_SAMPLING | {"max_new_tokens": int}
HELP = """\
/ratio 0.3        how much is pruned: a share of the layers' parameters, 0: dense
/image PATH       a picture that the next turn is about
/system TEXT      what the model is told first
/reset            begin anew
/stats            what the last answer took
/save FILE        keep the conversation; /load FILE goes on with one
/quit             or Ctrl-D; Ctrl-C ends an answer
Settings, shown without a value, changed with one: {settings}
Model, dtype, weights and device are chosen at the start: popengine chat --ckpt ... --dtype ..."""


def parser() -> argparse.ArgumentParser:
    flags = OneLineParser(
        "chat", "Talk to a model. In the conversation, /help lists what else can be said.",
        "chat\nchat --ckpt DIR --dtype bfloat16 --prune-ratio 0.4",
        "--system-prompt -n --temperature --prune-ratio --paper --dtype --weights --compile",
    )
    add_checkpoint_flag(flags)
    flags.add_argument("--system-prompt", metavar="TEXT", help="what the model is told first")
    add_generation_flags(flags, new_tokens=512)
    return flags


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry of `python -m popengine.chat`."""
    run_as_command(run, parser(), arguments)


def run(flags: argparse.Namespace) -> None:
    pruning = generation_settings(flags)
    start_pytorch(flags)
    from popengine import loading, statistics
    from popengine.sampling import Sampling

    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p, flags.seed)
    engine = load_with_warnings(loading.load, flags)
    conversation = engine.chat(
        flags.system_prompt, pruning=pruning, sampling=sampling, max_new_tokens=flags.max_new_tokens
    )
    engine.resolve(pruning)                 # what is wrong with it, and the prior, before anything is said
    chat = Chat(conversation, statistics)
    typed = told_by_first(sys.stdin.isatty() and sys.stdout.isatty())
    if typed and not flags.quiet:
        tell(f"{engine.folder.name}, {engine.weights}, {str(engine.dtype).removeprefix('torch.')}; /help says more")
    for line in heard_by_all(typed_lines() if typed else piped_lines()):
        if line.strip() == "/quit":
            return
        try:
            chat.obey(line, noted_interrupts() if typed else contextlib.nullcontext([]))
        except InputError as error:
            if not typed:
                raise
            tell(f"error: {error}")
        except KeyboardInterrupt:
            if not typed:
                raise
            print()


def piped_lines() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError:
            raise InputError(f"line {number} on standard input is not UTF-8") from None


def typed_lines() -> Iterator[str]:
    if readline is not None:
        readline.set_completer_delims(" ")
        readline.set_completer(complete)
        readline.parse_and_bind("tab: complete")
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
        else:
            yield line


def complete(start: str, index: int) -> str | None:
    found = [name for name in Chat.names() if start.startswith("/") and name.startswith(start)]
    return found[index] if index < len(found) else None


def tell(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


class Chat:
    """What lines do to a conversation. A command is a method: its name after `on_`, its argument one text.

    statistics  the module popengine.statistics
    """

    def __init__(self, conversation: Any, statistics: Any) -> None:
        self.conversation, self.engine, self.statistics = conversation, conversation.engine, statistics
        self.images: list[str] = []
        self.last: Any = None                                       # the last piece of the last answer

    @staticmethod
    def names() -> list[str]:
        """All commands."""
        own = sorted(name.removeprefix("on_") for name in vars(Chat) if name.startswith("on_"))
        return [f"/{name.replace('_', '-')}" for name in [*own, "quit", *SETTINGS]]

    def obey(self, line: str, interrupts: contextlib.AbstractContextManager[list[int]]) -> None:
        """A command, or a turn; `interrupts` notes in a list that the answer is to end."""
        if not line.strip():
            return
        if not line.startswith("/"):
            self.answer(line.rstrip("\n"), interrupts)
            return
        name, _, argument = line.strip().partition(" ")
        if name not in self.names():
            raise InputError(
                f"{name} is no command (/help lists them; begin with a space to say it all the same)"
                f"{nearest(name, self.names())}"
            )
        name, argument = name[1:].replace("-", "_"), argument.strip()
        if name in SETTINGS:
            self.set(name, argument)
        else:
            getattr(self, f"on_{name}")(argument)

    def answer(self, text: str, interrupts: contextlib.AbstractContextManager[list[int]]) -> None:
        images, self.images = self.images, []
        pieces = self.conversation.stream(text, images)
        with interrupts as noted, contextlib.closing(pieces):
            for piece in pieces:
                print(piece.text, end="", flush=True)
                self.last = piece if piece.finish_reason else self.last
                if told_by_first(bool(noted)):
                    break
        print(flush=True)
        if piece.finish_reason == "length":
            said, most = piece.statistics.new_tokens, self.conversation.max_new_tokens
            more = "the context is full: /reset begins anew" if said < most else "/max-new-tokens allows more"
            tell(f"ended after {said} tokens; {more}")

    def set(self, name: str, word: str) -> None:
        """Change a setting from the next turn on, and show what it is."""
        conversation = self.conversation
        shown = name.replace("_", "-")
        if word:
            self.change(name, shown, word)
        found = vars(conversation) | vars(conversation.sampling)
        found |= self.statistics.pruning_report(self.engine.resolve(conversation.pruning))
        tell(f"{shown} {found[name]}")

    def change(self, name: str, shown: str, word: str) -> None:
        conversation = self.conversation
        owner = "pruning" if name in OF_PRUNING else "sampling" if name in OF_SAMPLING else None
        try:
            value = None if word == "none" else SETTINGS[name](word)
        except ValueError:
            raise InputError(f"/{shown} takes a number, not {word!r}") from None
        if owner is None:
            if value is None or value < 1:
                raise InputError(f"/{shown} must be at least 1, not {word}")
            conversation.max_new_tokens = value
            return
        other = {"prune_ratio": "ffn_ratio", "ffn_ratio": "prune_ratio"}.get(name)      # one says it, not both
        settings = replace(getattr(conversation, owner), **{name: value}, **({other: None} if other else {}))
        if owner == "pruning":
            self.engine.resolve(settings)
        setattr(conversation, owner, settings)

    def on_ratio(self, word: str) -> None:
        self.set("prune_ratio", word)

    def on_help(self, _: str) -> None:
        tell(HELP.format(settings=" ".join(f"/{name.replace('_', '-')}" for name in SETTINGS)))

    def on_reset(self, _: str) -> None:
        self.conversation.begin_anew()

    def on_system(self, text: str) -> None:
        self.conversation.instruct(text or None)

    def on_image(self, path: str) -> None:
        self.engine.pictures.pixel_values([path])      # what is wrong with it is said now
        self.images.append(path)

    def on_stats(self, _: str) -> None:
        if self.last is None:
            raise InputError("nothing was answered yet")
        found = self.statistics.lines(self.last.statistics, self.last.finish_reason, self.engine.load_s)
        tell("\n".join(found))

    def on_save(self, path: str) -> None:
        if is_first():
            self.conversation.save(path or "conversation.json")

    def on_load(self, path: str) -> None:
        self.conversation.load(path or "conversation.json")


if __name__ == "__main__":
    main()
