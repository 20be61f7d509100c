"""Write docs/commands.md from the commands' parsers, and docs/api.md from docstrings: python tools/write_docs.py

tests/docs/test_docs.py compares both pages with this output, and fails if a flag or a public name is missing.
"""

import argparse
import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import popengine
from models.pruning.pruning import Pruning
from popengine.__main__ import COMMANDS
from popengine.engine.conversation import Conversation
from popengine.engine.engine import Engine
from popengine.engine.results import ExpertUse, Generation, Piece, Regions, Statistics

DOCS = Path(__file__).resolve().parents[1] / "docs"
GENERATED = "Written by `python tools/write_docs.py`; changes belong into {}.\n"
# What the public names of `popengine` hand out.
GIVEN = (Engine, Piece, Generation, Conversation, Statistics, Regions, ExpertUse, Pruning)

# What an engine's users call. Its other methods are for the package.
OF_ENGINE = ("generate", "stream", "chat", "stop_ids", "unknown_fields", "resolve")


def commands_page() -> str:
    lines = [
        "# Commands\n", GENERATED.format("the commands' parsers"),
        "`popengine COMMAND` and `python -m popengine.COMMAND` are the same. `--help` shows the common flags,",
        "`--help-all` all of them. Whatever is wrong with the input is one line on stderr and exit status 2.\n",
        "| | |", "|---|---|",
        *(f"| [`{name}`](#{name}) | {about} |" for name, about in COMMANDS.items()),
    ]
    for name in COMMANDS:
        lines += ["", f"## {name}", ""]
        if name == "harness":           # whose flags are lm_eval's
            lines += [docstring(importlib.import_module("popengine.harness"))]
            continue
        parser = importlib.import_module(f"popengine.{name}").parser()
        description, example = parser.description.split("\n\n", 1)
        lines += [one_line(description), "", example.rstrip()]
        for group in parser._action_groups:
            flags = [action for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
            flags = [action for action in flags if "--help-all" not in action.option_strings]
            if flags:
                title = "" if group.title in ("options", "positional arguments") else f"*{group.title}*"
                lines += ["", f"| {title} | |", "|---|---|", *map(flag_line, flags)]
    return "\n".join(lines) + "\n"


def flag_line(action: argparse.Action) -> str:
    """A row of a table: how a flag is written, what it does, and its default where the help does not say it."""
    shown = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
    words = [f"{one} {shown}".strip() for one in action.option_strings] or [str(shown)]
    text, default = one_line((action.help or "") % {"default": action.default}), action.default
    plain = default not in (None, "", False, argparse.SUPPRESS, []) and "default" not in text
    said = f" (default: {' '.join(map(str, default)) if isinstance(default, list) else default})" if plain else ""
    return f"| {', '.join(f'`{escaped(word)}`' for word in words)} | {escaped(text + said).strip()} |"


def escaped(text: str) -> str:
    return text.replace("|", "\\|")


def one_line(text: str) -> str:
    return " ".join(text.split())


def public() -> dict[str, Any]:
    """Every public name of `popengine`, and every class whose objects they hand out."""
    return {name: getattr(popengine, name) for name in popengine.PUBLIC} | {one.__name__: one for one in GIVEN}


def members(kind: type) -> Iterator[tuple[str, Any]]:
    """What a class adds: its methods and properties, as functions; of an engine those that are for its users."""
    for name, member in vars(kind).items():
        if kind is Engine and name not in OF_ENGINE:
            continue
        if isinstance(member, property):
            member = member.fget
        elif isinstance(member, functools.cached_property):
            member = member.func
        if not name.startswith("_") and inspect.isfunction(member):
            yield name, member


def api_page() -> str:
    lines = [
        "# The Python API\n", GENERATED.format("the docstrings"),
        f"`import popengine` gives {', '.join(f'`{name}`' for name in popengine.PUBLIC)}; the other classes are what",
        "these hand out. The pages of [using it](using.md) and [conversations](chat.md) have examples.\n",
        " · ".join(f"[{name}](#{name.lower()})" for name in public()),
    ]
    for name, one in public().items():
        written = written_call(name, one) if callable(one) and name != "InputError" else name
        lines += ["", f"## {name}", "", f"`{one.__module__}`", "", f"```python\n{written}\n```", ""]
        lines += [docstring(one)]
        if inspect.isclass(one):
            lines += [docstring(base) for base in reversed(one.__mro__[1:]) if is_dataclass(base)]
        for member, function in members(one) if inspect.isclass(one) else ():
            is_property = isinstance(vars(one)[member], (property, functools.cached_property))
            call = f"{member}: {type_of(function)}" if is_property else written_call(member, function)
            lines += ["", f"### {name}.{member}", "", f"```python\n{call}\n```", "", docstring(function)]
    return "\n".join(lines) + "\n"


def written_call(name: str, function: Any) -> str:
    """A signature as it is written, one parameter a line where it is long."""
    signature = inspect.signature(function)
    parameters = [one for one in signature.parameters.values() if one.name != "self"]
    words, starred = [], False
    for one in parameters:
        if one.kind is one.KEYWORD_ONLY and not starred:
            words.append("*")
            starred = True
        words.append(bare(str(one)))
    gives = "" if inspect.isclass(function) else f" -> {type_of(function)}"
    short = f"{name}({', '.join(words)}){gives}"
    return short if len(short) <= 110 else f"{name}(\n    " + ",\n    ".join(words) + f",\n){gives}"


def type_of(function: Any) -> str:
    given = inspect.signature(function).return_annotation
    return bare(inspect.formatannotation(given))


def bare(text: str) -> str:
    """Types without the modules that they are from."""
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", text).replace("'", '"')


def docstring(one: Any) -> str:
    text = inspect.getdoc(one)
    if not text:
        raise SystemExit(f"{one.__module__}.{one.__qualname__} has no docstring")
    return f"```text\n{text}\n```"


PAGES = {"commands.md": commands_page, "api.md": api_page}

if __name__ == "__main__":
    for page_name, write in PAGES.items():
        (DOCS / page_name).write_text(write(), encoding="utf-8")
