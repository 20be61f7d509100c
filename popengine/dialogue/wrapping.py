"""Word wrap of text that streams to a terminal, whose width may change while it does."""

import os
import re
import sys
import unicodedata
from collections.abc import Callable

# White space, or text without any.
PARTS = re.compile(r"\n|[^\S\n]+|\S+")
TAB = 8
# Control characters, with which an answer could steer the terminal; a line break and a tab are none.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# Joins characters to one emoji.
JOINER = "\u200d"


class WordWrap:
    """Breaks lines between words. An unfinished word is held back until the text after it arrives.

    columns  returns the width of the terminal, asked again for every text; 0: nothing is wrapped
    used     columns that the present line has filled
    held     text that was not shown yet: white space and the word after it
    """

    def __init__(self, columns: Callable[[], int]) -> None:
        self.columns, self.used, self.held = columns, 0, ""

    def add(self, text: str) -> str:
        """Add text and return what can be shown. On a terminal control characters are left out."""
        width = self.columns()
        if not width:
            held, self.held = self.held, ""
            return held + text
        text = CONTROLS.sub("", text)
        if self.used > width:                       # the terminal became narrower and broke this line itself
            self.used %= width
        *parts, last = ["", *PARTS.findall(self.held + text)]
        self.held = ""
        shown, space = "", ""
        for part in parts:
            shown, space = self.put(shown, space, part, width)
        if last == "\n":
            return self.put(shown, space, last, width)[0]
        if ends_word(last) or columns_of(last) >= width:
            return self.put(shown, space, last, width)[0]
        self.held = space + last
        return shown

    def finish(self) -> str:
        """Return the text that was held back."""
        width, held, self.held = self.columns(), self.held, ""
        shown = space = ""
        for part in PARTS.findall(held):
            shown, space = self.put(shown, space, part, width or sys.maxsize)
        return shown + space

    def put(self, shown: str, space: str, part: str, width: int) -> tuple[str, str]:
        """Add a part to the lines. Returns the text so far, and white space that no word has followed yet."""
        if part == "\n":
            self.used = 0
            return shown + "\n", ""                 # white space at the end of a line is not shown
        if part.isspace():
            return shown, space + part
        for word in pieces_of(part):
            size, gap = columns_of(word), columns_of(space, self.used)
            if self.used and self.used + gap + size > width:
                shown, space, self.used = shown + "\n", "", 0
                gap = 0
            shown += space + word
            self.used += gap + size
            if self.used > width:                   # longer than a line: the terminal breaks it
                self.used = self.used % width or width
            space = ""
        return shown, ""


def pieces_of(word: str) -> list[str]:
    """Cut a word where a line may break: on both sides of a wide character."""
    found = [""]
    for letter in word:
        follows_wide = bool(found[-1]) and is_wide(found[-1][-1]) and columns_of(letter) > 0
        if (is_wide(letter) or follows_wide) and not found[-1].endswith(JOINER):
            found.append("")
        found[-1] += letter
    return [one for one in found if one]


def ends_word(text: str) -> bool:
    """Return True if a line may break after this text, whatever follows."""
    return bool(text) and is_wide(text[-1])


def is_wide(letter: str) -> bool:
    """Return True for a character that fills two columns, as Chinese ones do."""
    return unicodedata.east_asian_width(letter) in "WF"


def columns_of(text: str, start: int = 0) -> int:
    """Count the columns of a text that starts in column `start`. Marks and control characters have none."""
    used = start
    for letter in text:
        if letter == "\t":
            used += TAB - used % TAB
        elif unicodedata.category(letter) not in ("Mn", "Me", "Cf", "Cc"):
            used += 2 if is_wide(letter) else 1
    return used - start


def terminal_columns() -> int:
    """Return the columns of the terminal at standard output; 0 if it is none."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns if sys.stdout.isatty() else 0
    except (OSError, ValueError):
        return 0
