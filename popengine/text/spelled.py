"""Who says what: a message that spells a control token means its letters, and only a chat template writes the token.

Before rendering, every such spelling is hidden behind a character that nothing else uses; in the rendered text a
stretch between the template's own control tokens that holds one is encoded without special tokens. So is a stretch of
which the tokenizer's normalizer makes one. What several texts, or a text and its template, spell together is found by
rendering a second time, with the beginnings and ends of tokens hidden in every text. Texts that spell none go through
all of this unchanged.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from popengine.text.tokenizer import TextTokenizer
from weights.errors import InputError

PRIVATE_USE = range(0xF0000, 0xFFFFE)     # not the lower one, where fonts of symbols live


class Spelled:
    """The control tokens that messages spell, and pieces of them, each with the character that stands for it.

    meant  those that a message may spell and mean, but for what the model wrote: its messages are letters
    """

    def __init__(self, tokens: Collection[str], messages: Any, template: str, meant: Collection[str] = ()) -> None:
        text = "\n".join([template, *leaves(messages)])
        self.guarded = [token for token in tokens if token not in meant]
        self.found = any_of(token for token in tokens if token in text)
        self.unmeant = any_of(token for token in self.guarded if token in text)
        self.longest = max(map(len, tokens), default=0)
        self.together = "\0".join(["", *self.guarded, ""])
        self.free = (chr(code) for code in PRIVATE_USE if chr(code) not in text)
        self.marks: dict[str, str] = {}
        self.letters: dict[str, str] = {}

    def mark(self, letters: str) -> str:
        """The character that stands for these letters."""
        if letters not in self.marks:
            mark = next(self.free, None)
            if mark is None:
                raise InputError(f"the messages leave none of the {len(PRIVATE_USE)} private-use characters free")
            self.marks[letters], self.letters[mark] = mark, letters
        return self.marks[letters]

    def hide(self, value: Any, pieces: bool = False, by_model: bool = False) -> Any:
        """Messages with marks in the place of tokens, in whatever they consist of. pieces: and of what could be the
        beginning or the end of one, or its middle"""
        if isinstance(value, str):
            tokens = self.found if by_model else self.unmeant
            text = tokens.sub(lambda found: self.mark(found.group()), value)
            return self.without_pieces(text) if pieces else text
        if isinstance(value, dict):
            # A role is a word that templates compare, and may build a token of.
            words = {name for name in ("role", "type") if str(value.get(name)).isidentifier()}
            by_model = by_model or value.get("role") == "assistant"
            return {name: self.hide(inner, pieces and name not in words, by_model) for name, inner in value.items()}
        return [self.hide(inner, pieces, by_model) for inner in value] if isinstance(value, (list, tuple)) else value

    def without_pieces(self, text: str) -> str:
        """White space around does not count: templates take it away."""
        said = text.strip()
        if not said:
            return text
        lengths = range(min(self.longest, len(said)), 0, -1)
        if said in self.together:
            return text.replace(said, self.mark(said))
        end = next((length for length in lengths if f"\0{said[-length:]}" in self.together), 0)
        begin = next((length for length in lengths if f"{said[:length]}\0" in self.together), 0)
        begin = min(begin, len(said) - end)
        before, after = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
        first, last = said[:begin], said[len(said) - end :]
        first, last = (self.mark(piece) if piece else "" for piece in (first, last))
        return before + first + said[begin : len(said) - end] + last + after

    def chosen(self, text: str, cut: str) -> str:
        """A rendered text, or that of the same messages without pieces of tokens where it has fewer tokens."""
        guarded = any_of(self.guarded)
        return text if guarded.findall(text) == guarded.findall(cut) else cut

    def is_in(self, text: str) -> bool:
        return any_of(self.letters).search(text) is not None

    def encode(self, text: str, tokenizer: TextTokenizer) -> list[int]:
        """Token ids of a rendered text, in which marks stand for letters."""
        marks = any_of(self.letters)
        if not marks.search(text):
            ids = tokenizer.encode(text, add_special_tokens=False)
            controls = sum(one in tokenizer.special_ids for one in ids)
            if not self.longest or controls == sum(map(text.count, tokenizer.special_tokens)):
                return ids
        written = any_of(tokenizer.special_tokens)
        ids = []
        meant = ""                              # a stretch whose control tokens the template has written
        for piece in re.split(f"({written.pattern})", text):
            letters = marks.sub(lambda found: self.letters[found.group()], piece)
            if letters == piece and (written.fullmatch(piece) or not self.becomes_control(piece, tokenizer)):
                meant += piece
                continue
            ids += tokenizer.encode(meant, add_special_tokens=False, begins=not ids)
            ids += tokenizer.encode(letters, add_special_tokens=False, parse_special=False, begins=not ids)
            meant = ""
        return ids + tokenizer.encode(meant, add_special_tokens=False, begins=not ids)

    def becomes_control(self, text: str, tokenizer: TextTokenizer) -> bool:
        """Whether a normalizer makes a control token of a text that has none."""
        parsed, plain = (tokenizer.encode(text, False, parse_special=parse) for parse in (True, False))
        return parsed != plain


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
