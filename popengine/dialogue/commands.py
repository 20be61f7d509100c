"""The slash commands of a dialogue: their table, their arguments and what they do."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from popengine.command_line.parser import nearest
from popengine.dialogue.answers import Dialogue
from popengine.dialogue.terminal import tell
from popengine.engine.processes import is_first
from popengine.engine.results import lines, pruning_report
from popengine.engine.sampling_settings import Sampling
from popengine.studies.settings import PruningSettings
from weights.errors import InputError

# Converters from a word to each setting's value.
OF_PRUNING: dict[str, Callable[[str], Any]] = {one.name: one.metadata["type"] for one in fields(PruningSettings)}
OF_SAMPLING: dict[str, Callable[[str], Any]] = {
    one.name: one.metadata["type"] for one in fields(Sampling) if one.metadata      # all but `stop`
} | {"stop": lambda text: () if text == "none" else (text,)}
SETTINGS = OF_PRUNING | OF_SAMPLING | {"max_new_tokens": int}
# Settings that may be None, typed as `none`.
OPTIONAL = {one.name for one in (*fields(PruningSettings), *fields(Sampling)) if one.default is None}
# Alternative settings of the prune ratio: one of them, not both.
EITHER = {"prune_ratio": "ffn_ratio", "ffn_ratio": "prune_ratio"}


@dataclass(frozen=True)
class Command:
    """A command of the dialogue, typed with a slash.

    parse  makes the argument from the words after the name, or raises InputError
    run    executes the command with that argument
    shown  the argument in the help; help: empty for a setting, which is listed by its name
    """

    parse: Callable[[str], Any]
    run: Callable[[Dialogue, Any], None]
    shown: str = ""
    help: str = ""


def obey(dialogue: Dialogue, line: str, interrupts: contextlib.AbstractContextManager[list[int]]) -> None:
    """Run a command, or answer a turn; `interrupts` records in a list that the answer should end."""
    if not line.strip():
        return
    if not line.startswith("/"):
        dialogue.answer(line.rstrip("\n"), interrupts)
        return
    name, _, words = line.strip().partition(" ")
    if name not in COMMANDS:
        raise InputError(
            f"{name} is no command (/help lists them; begin with a space to send it as text){nearest(name, COMMANDS)}"
        )
    COMMANDS[name].run(dialogue, COMMANDS[name].parse(words.strip()))


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


def path_of_picture(words: str) -> str:
    """Return the path of a picture. Raises InputError for none."""
    if not words:
        raise InputError("/image takes the path of a picture")
    return words


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


def change(dialogue: Dialogue, asked: tuple[str, dict[str, Any]]) -> None:
    """Change fields of the settings from the next turn on, or none, and show the named one."""
    (name, changes), conversation, engine = asked, dialogue.conversation, dialogue.engine
    if name in OF_PRUNING:
        pruning = replace(conversation.pruning, **changes)
        engine.resolve(pruning)                                     # raises errors now
        conversation.pruning = pruning
    elif name in OF_SAMPLING:
        conversation.sampling = replace(conversation.sampling, **changes)
    else:
        conversation.max_new_tokens = changes.get(name, conversation.max_new_tokens)
    found = vars(conversation) | vars(conversation.sampling)
    found |= pruning_report(engine.resolve(conversation.pruning))
    tell(f"{name.replace('_', '-')} {found[name]}")


def explain_commands(_: Dialogue, __: None) -> None:
    """List all commands."""
    for name, one in COMMANDS.items():
        if one.help:
            tell(f"{f'{name} {one.shown}':<18}{one.help}")
    settings = [name for name, one in COMMANDS.items() if not one.help]
    tell(f"Settings, shown without a value, changed with one: {' '.join(settings)}")
    tell("Model, dtype, weights and device are chosen at the start: popengine chat --ckpt ... --dtype ...")


def begin_anew(dialogue: Dialogue, _: None) -> None:
    """Remove all turns."""
    dialogue.conversation.begin_anew()


def instruct(dialogue: Dialogue, words: str) -> None:
    """Set the system prompt, or remove it."""
    dialogue.conversation.instruct(words or None)


def add_picture(dialogue: Dialogue, path: str) -> None:
    """Add a picture to the next turn. Raises InputError for a text model, or a file that is no picture."""
    dialogue.engine.pictures.pixel_values([path])
    dialogue.images.append(path)


def show_statistics(dialogue: Dialogue, _: None) -> None:
    """Show the statistics of the last answer."""
    last = dialogue.last
    if last is None or last.statistics is None:
        raise InputError("nothing was answered yet")
    tell("\n".join(lines(last.statistics, last.finish_reason or "length", dialogue.engine.load_s)))


def save(dialogue: Dialogue, path: str) -> None:
    """Save the conversation."""
    if is_first():
        dialogue.conversation.save(path)


def load(dialogue: Dialogue, path: str) -> None:
    """Continue a saved conversation."""
    dialogue.conversation.load(path)


def end(dialogue: Dialogue, _: None) -> None:
    """End the dialogue."""
    dialogue.ended = True


COMMANDS = {
    "/ratio": Command(setting("prune_ratio"), change, "0.3", "share of the layers' parameters to prune, 0: dense"),
    "/image": Command(path_of_picture, add_picture, "PATH", "a picture for the next turn"),
    "/system": Command(text, instruct, "TEXT", "set the system prompt, or remove it"),
    "/reset": Command(nothing, begin_anew, "", "remove all turns"),
    "/stats": Command(nothing, show_statistics, "", "statistics of the last answer"),
    "/save": Command(file, save, "FILE", "save the conversation (default: conversation.json)"),
    "/load": Command(file, load, "FILE", "continue a saved conversation (default: conversation.json)"),
    "/help": Command(nothing, explain_commands, "", "this list"),
    "/quit": Command(nothing, end, "", "or Ctrl-D; Ctrl-C ends an answer"),
} | {f"/{name.replace('_', '-')}": Command(setting(name), change) for name in SETTINGS}
