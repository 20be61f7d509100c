"""Streamed text that ends at the first stop string."""

from collections.abc import Sequence

from popengine.text.tokenizer import TextStream, TextTokenizer


class StoppedText:
    """Converts tokens to text up to the first stop string, and holds back what may be the beginning of one.

    found  True once a stop string has arrived; no later text is returned
    """

    def __init__(self, tokenizer: TextTokenizer, stops: Sequence[str]) -> None:
        self.stream, self.stops = TextStream(tokenizer), stops
        self.given, self.held, self.found = "", "", False

    def push(self, token: int) -> str:
        """Add one token and return the text that can be shown."""
        return self.add(self.stream.push(token))

    def add(self, text: str) -> str:
        """Add text and return the text that can be shown."""
        if self.found:
            return ""
        text = self.held + text
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self.held = True, ""
            return self.give(text[: min(places)])
        kept = max((overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - kept :]
        return self.give(text[: len(text) - kept])

    def finish(self) -> str:
        """Return the text that was held back, after the last token."""
        text = self.add(self.stream.finish())
        held, self.held = self.held, ""
        return text + self.give(held)

    def whole(self) -> str:
        """Return the complete text, after the last token."""
        self.finish()
        return self.given

    def give(self, text: str) -> str:
        self.given += text
        return text


def overlap(text: str, stop: str) -> int:
    """Return the number of characters at the end of a text that a stop string may begin with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
