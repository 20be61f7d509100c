"""Who says what: a message that spells a control token means its letters, and only a chat template writes the token.

Before rendering, every such spelling is hidden behind a character that nothing else uses; in the rendered text a
stretch between the template's own control tokens that holds one is encoded without special tokens. Texts that spell
none go through all of this unchanged.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from popengine.text.tokenizer import TextTokenizer

PRIVATE_USE = range(0xF0000, 0xFFFFE)     # not the lower one, where fonts of symbols live


class Spelled:
    """The control tokens that messages spell, each with the character that stands for it.

    meant  those that a message may spell and mean, but for what the model wrote: its messages are letters
    """

    def __init__(self, tokens: Collection[str], messages: Any, template: str, meant: Collection[str] = ()) -> None:
        text = "\n".join([template, *leaves(messages)])
        found = [token for token in sorted(tokens, key=len, reverse=True) if token and token in text]
        marks = (chr(code) for code in PRIVATE_USE if chr(code) not in text)
        self.marks = dict(zip(found, marks, strict=False))
        self.tokens = {mark: token for token, mark in self.marks.items()}
        self.unmeant = self.marks.keys() - {*meant}

    def hide(self, value: Any, by_model: bool = False) -> Any:
        """Messages with marks in the place of tokens, in whatever they consist of."""
        if isinstance(value, str):
            tokens = self.marks if by_model else self.unmeant
            return any_of(tokens).sub(lambda found: self.marks[found.group()], value)
        if isinstance(value, dict):
            by_model = by_model or value.get("role") == "assistant"
            return {name: self.hide(inner, by_model) for name, inner in value.items()}
        return [self.hide(inner, by_model) for inner in value] if isinstance(value, (list, tuple)) else value

    def is_in(self, text: str) -> bool:
        return any_of(self.tokens).search(text) is not None

    def encode(self, text: str, tokenizer: TextTokenizer) -> list[int]:
        """Token ids of a rendered text, in which marks stand for letters."""
        marks = any_of(self.tokens)
        if not self.is_in(text):
            return tokenizer.encode(text, add_special_tokens=False)
        ids: list[int] = []
        meant = ""                              # a stretch whose control tokens the template has written
        for piece in re.split(f"({any_of(tokenizer.special_tokens).pattern})", text):
            if not marks.search(piece):
                meant += piece
                continue
            ids += tokenizer.encode(meant, add_special_tokens=False, begins=not ids)
            letters = marks.sub(lambda found: self.tokens[found.group()], piece)
            ids += tokenizer.encode(letters, add_special_tokens=False, parse_special=False, begins=not ids)
            meant = ""
        return ids + tokenizer.encode(meant, add_special_tokens=False, begins=not ids)


def leaves(value: Any) -> Iterable[str]:
    """Every text that messages consist of."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from leaves(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from leaves(inner)


def any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Finds any of these words, the longest where several begin at one place; of none it finds nothing."""
    longest_first = sorted((word for word in words if word), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


NOTHING_SPELLED = Spelled((), "", "")
