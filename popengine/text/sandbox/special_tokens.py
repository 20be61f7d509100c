"""Protection against control tokens spelled in messages: only the chat template may write control tokens.

Before rendering, each control token that a message spells is replaced by a mark, a character used nowhere else. In the
rendered text a stretch between the template's own control tokens that contains a mark is encoded without control
tokens. So is a stretch that the tokenizer's normalizer turns into one. A second rendering, with beginnings and ends of
tokens hidden in every text, detects tokens spelled jointly by several texts, or by a text and the template. Messages
that spell no control token stay unchanged.
"""

import re
from collections.abc import Collection, Iterable
from typing import Any

from popengine.text.tokenizer import TextTokenizer
from weights.errors import InputError

PRIVATE_USE = range(0xF0000, 0xFFFFE)     # not the lower range, which symbol fonts use


class Spelled:
    """The control tokens spelled in messages, and pieces of them, each with its mark.

    meant  tokens that keep their meaning in a message, unless the model wrote it
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
        self.letters: dict[str, str] = {}       # letters of each mark

    def mark(self, letters: str) -> str:
        if letters and letters not in self.marks:
            mark = next(self.free, None)
            if mark is None:
                raise InputError(f"the messages leave none of the {len(PRIVATE_USE)} private-use characters free")
            self.marks[letters], self.letters[mark] = mark, letters
        return self.marks.get(letters, "")

    def hide(self, value: Any, pieces: bool = False, by_model: bool = False) -> Any:
        """Replace tokens in messages by marks; pieces: also possible parts of tokens at the ends of a text."""
        if isinstance(value, str):
            text = (self.found if by_model else self.unmeant).sub(lambda found: self.mark(found.group()), value)
            return self.hide_pieces(text) if pieces else text
        if isinstance(value, dict):
            # Templates compare roles, and may build tokens from them.
            words = {name for name in ("role", "type") if str(value.get(name)).isidentifier()}
            by_model = by_model or value.get("role") == "assistant"
            return {name: self.hide(inner, pieces and name not in words, by_model) for name, inner in value.items()}
        return [self.hide(inner, pieces, by_model) for inner in value] if isinstance(value, (list, tuple)) else value

    def hide_pieces(self, text: str) -> str:
        """Replace possible parts of tokens at both ends, ignoring surrounding white space, which templates remove."""
        said = text.strip()
        before, _, after = text.partition(said) if said else (text, "", "")
        if said and said in self.together:
            return before + self.mark(said) + after
        lengths = range(min(self.longest, len(said)), 0, -1)
        end = len(said) - next((length for length in lengths if f"\0{said[-length:]}" in self.together), 0)
        begin = min(end, next((length for length in lengths if f"{said[:length]}\0" in self.together), 0))
        return before + self.mark(said[:begin]) + said[begin:end] + self.mark(said[end:]) + after

    def chosen(self, text: str, cut: str) -> str:
        """Return `text`, or `cut` (the same messages without pieces of tokens) if their control tokens differ."""
        guarded = any_of(self.guarded)
        return text if guarded.findall(text) == guarded.findall(cut) else cut

    def is_in(self, text: str) -> bool:
        return any_of(self.letters).search(text) is not None

    def encode(self, text: str, tokenizer: TextTokenizer) -> list[int]:
        """Return token ids of a rendered text with marks."""
        marks, written = any_of(self.letters), any_of(tokenizer.special_tokens)
        if not marks.search(text):
            ids = tokenizer.encode(text, add_special_tokens=False)
            controls = sum(one in tokenizer.special_ids for one in ids)
            if not self.longest or controls == sum(map(text.count, tokenizer.special_tokens)):
                return ids
        ids, meant = [], ""                     # meant: a stretch whose control tokens come from the template
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
    """Return True if the normalizer makes a control token from a text without one."""
    return tokenizer.encode(text, False) != tokenizer.encode(text, False, parse_special=False)


def leaves(value: Any) -> list[str]:
    """Return every text in messages."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [text for one in inner for text in leaves(one)]


def any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern for any of these words, the longest of several at one position, or one that finds nothing."""
    longest_first = sorted((word for word in words if word), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


NOTHING_SPELLED = Spelled((), "", "")
