"""Text that arrives in pieces and ends at the first stop string."""

from collections.abc import Sequence

from popengine.text.tokenizer import TextStream, TextTokenizer


class StoppedText:
    """Tokens to text, up to the first stop string. What could be the beginning of one is held back until it is not.

    found  whether a stop string has arrived; nothing after that is given out
    """

    def __init__(self, tokenizer: TextTokenizer, stops: Sequence[str]) -> None:
        self.stream, self.stops = TextStream(tokenizer), stops
        self.given, self.held, self.found = "", "", False

    def push(self, token: int) -> str:
        """The text that can be shown after one more token."""
        return self.add(self.stream.push(token))

    def add(self, text: str) -> str:
        """The text that can be shown after more of it has arrived."""
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
        """What was held back, when no more tokens arrive."""
        text = self.add(self.stream.finish())
        held, self.held = self.held, ""
        return text + self.give(held)

    def whole(self) -> str:
        """All of the text, when no more tokens arrive."""
        self.finish()
        return self.given

    def give(self, text: str) -> str:
        self.given += text
        return text


def overlap(text: str, stop: str) -> int:
    """The number of characters at the end of a text that a stop string could begin with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
