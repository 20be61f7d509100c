"""The parser of every command: errors in one line, and help in two lengths. Imports no PyTorch, which takes seconds."""

import argparse
import difflib
import sys
from collections.abc import Iterable
from functools import partial
from typing import Any, NoReturn

from weights.errors import InputError


class OneLineParser(argparse.ArgumentParser):
    """A parser with one-line errors without usage, and help that fits a screen; --help-all shows the rare flags.

    example  one or two lines of example calls
    common   the flags that --help shows
    """

    def __init__(self, command: str, description: str, example: str, common: str) -> None:
        self.common = {"--help", "--help-all", "--ckpt", *common.split()}
        self.shows_all = False
        self.words: list[str] = []
        shown = "".join(f"\n    popengine {line}" for line in example.splitlines())
        super().__init__(
            prog=f"popengine {command}", usage="%(prog)s [flags]", description=f"{description}\n{shown}",
            formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=32), allow_abbrev=False,
        )
        self.add_argument("--help-all", action=HelpAll, nargs=0, help="show all flags")

    def format_help(self) -> str:
        if self.shows_all:
            return super().format_help()
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        formatter.start_section("flags")
        formatter.add_arguments(
            one for one in self._actions if not one.option_strings or self.common & {*one.option_strings}
        )
        formatter.end_section()
        return formatter.format_help()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.words = [*(sys.argv[1:] if args is None else args)]
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        flags = [flag for action in self._actions for flag in action.option_strings]
        unknown = [name for word in self.words if (name := word.partition("=")[0]).startswith("--")]
        meant = next((near for name in unknown if name not in flags and (near := nearest(name, flags))), "")
        raise InputError(f"{message}{meant} (see --help)")


class HelpAll(argparse.Action):
    """The action of --help-all."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        assert isinstance(parser, OneLineParser)
        parser.shows_all = True
        parser.print_help()
        parser.exit()


def nearest(word: str, names: Iterable[str]) -> str:
    """Return a "did you mean ...?" suffix, or "" if no name is near."""
    near = difflib.get_close_matches(word, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""
