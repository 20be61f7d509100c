"""Letters of messages never become control tokens: those are the chat template's to write.

Before rendering, each control token that a message spells is hidden behind a mark, a character that nothing else uses.
In the rendered text a stretch between the template's own control tokens that holds a mark is encoded without control
tokens. So is a stretch of which the tokenizer's normalizer makes one. What several texts, or a text and its template,
spell together is found by a second rendering, with the beginnings and ends of tokens hidden in every text. Messages
that spell no control token go through all of this unchanged.
"""

import re
from collections.abc import Collection, Iterable
from typing import Any

from popengine.text.tokenizer import TextTokenizer
from weights.errors import InputError

PRIVATE_USE = range(0xF0000, 0xFFFFE)     # not the lower one, where fonts of symbols live


class Spelled:
    """The control tokens that messages spell, and pieces of them, each with the mark that stands for it.

    meant  tokens that a message may spell and mean, unless the model wrote it
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
        self.letters: dict[str, str] = {}       # that a mark stands for

    def mark(self, letters: str) -> str:
        if letters and letters not in self.marks:
            mark = next(self.free, None)
            if mark is None:
                raise InputError(f"the messages leave none of the {len(PRIVATE_USE)} private-use characters free")
            self.marks[letters], self.letters[mark] = mark, letters
        return self.marks.get(letters, "")

    def hide(self, value: Any, pieces: bool = False, by_model: bool = False) -> Any:
        """Messages with marks for tokens; pieces: and for what may be a part of one, at the ends of a text."""
        if isinstance(value, str):
            text = (self.found if by_model else self.unmeant).sub(lambda found: self.mark(found.group()), value)
            return self.hide_pieces(text) if pieces else text
        if isinstance(value, dict):
            # A role is a word that templates compare, and may build a token of.
            words = {name for name in ("role", "type") if str(value.get(name)).isidentifier()}
            by_model = by_model or value.get("role") == "assistant"
            return {name: self.hide(inner, pieces and name not in words, by_model) for name, inner in value.items()}
        return [self.hide(inner, pieces, by_model) for inner in value] if isinstance(value, (list, tuple)) else value

    def hide_pieces(self, text: str) -> str:
        """White space around does not count: templates take it away."""
        said = text.strip()
        before, _, after = text.partition(said) if said else (text, "", "")
        if said and said in self.together:
            return before + self.mark(said) + after
        lengths = range(min(self.longest, len(said)), 0, -1)
        end = len(said) - next((length for length in lengths if f"\0{said[-length:]}" in self.together), 0)
        begin = min(end, next((length for length in lengths if f"{said[:length]}\0" in self.together), 0))
        return before + self.mark(said[:begin]) + said[begin:end] + self.mark(said[end:]) + after

    def chosen(self, text: str, cut: str) -> str:
        """A rendered text, or that of the same messages without pieces of tokens where it has fewer tokens."""
        guarded = any_of(self.guarded)
        return text if guarded.findall(text) == guarded.findall(cut) else cut

    def is_in(self, text: str) -> bool:
        return any_of(self.letters).search(text) is not None

    def encode(self, text: str, tokenizer: TextTokenizer) -> list[int]:
        """Token ids of a rendered text, in which marks stand for letters."""
        marks, written = any_of(self.letters), any_of(tokenizer.special_tokens)
        if not marks.search(text):
            ids = tokenizer.encode(text, add_special_tokens=False)
            controls = sum(one in tokenizer.special_ids for one in ids)
            if not self.longest or controls == sum(map(text.count, tokenizer.special_tokens)):
                return ids
        ids, meant = [], ""                     # meant: a stretch whose control tokens the template has written
        for piece in re.split(f"({written.pattern})", text):
            letters = marks.sub(lambda found: self.letters[found.group()], piece)
            if letters == piece and (written.fullmatch(piece) or not becomes_control(piece, tokenizer)):
                meant += piece
                continue
            ids += tokenizer.encode(meant, add_special_tokens=False, begins=not ids)
            ids += tokenizer.encode(letters, add_special_tokens=False, parse_special=False, begins=not ids)
            meant = ""
        return ids + tokenizer.encode(meant, add_special_tokens=False, begins=not ids)


def becomes_control(text: str, tokenizer: TextTokenizer) -> bool:
    """Whether a normalizer makes a control token of a text that has none."""
    return tokenizer.encode(text, False) != tokenizer.encode(text, False, parse_special=False)


def leaves(value: Any) -> list[str]:
    """Every text that messages consist of."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [text for one in inner for text in leaves(one)]


def any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Finds any of these words, the longest where several begin at one place; of none it finds nothing."""
    longest_first = sorted((word for word in words if word), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


NOTHING_SPELLED = Spelled((), "", "")
