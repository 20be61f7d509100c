"""The state of a dialogue, and an answer as it streams: wrapped, ended by Ctrl-C, or stopped when it repeats itself."""

import contextlib

from popengine.dialogue.repetition import TIMES, repeated
from popengine.dialogue.terminal import silent_keys, tell
from popengine.dialogue.wrapping import WordWrap, terminal_columns
from popengine.engine.conversation import Conversation
from popengine.engine.distributed import broadcast
from popengine.engine.engine import Engine
from popengine.engine.results import Piece, one_line_of


class Dialogue:
    """A conversation, and what its commands change.

    shows_statistics  show one line of statistics after every answer
    images            pictures of the next turn; last: the last piece of the last answer that came to its end
    """

    def __init__(self, engine: Engine, conversation: Conversation, shows_statistics: bool = False) -> None:
        self.engine, self.conversation, self.shows_statistics = engine, conversation, shows_statistics
        self.images: list[str] = []
        self.last: Piece | None = None
        self.ended = False

    def answer(self, text: str, interrupts: contextlib.AbstractContextManager[list[int]]) -> None:
        """Answer a turn on standard output; `interrupts` records in a list that the answer should end."""
        images, self.images = self.images, []
        pieces = self.conversation.stream(text, images)
        wrap, tokens, loop = WordWrap(terminal_columns), list[int](), 0
        with silent_keys(), interrupts as noted, contextlib.closing(pieces):
            try:
                for piece in pieces:
                    print(wrap.add(piece.text), end="", flush=True)
                    tokens += [] if piece.token_id is None else [piece.token_id]
                    loop = repeated(tokens) if piece.finish_reason is None else 0
                    if broadcast(bool(noted)) or loop:
                        break
            finally:
                print(wrap.finish(), end="", flush=True)
        print(flush=True)
        if loop:
            tell(
                f"stopped after {len(tokens)} tokens: the last {loop} came {TIMES} times in a row; "
                "/repetition-penalty 1.1 makes that rarer"
            )
        if piece.finish_reason is not None:
            self.last = piece
        if self.shows_statistics and piece.statistics is not None:
            tell(one_line_of(piece.statistics))
        if piece.finish_reason == "length" and piece.statistics is not None:
            said, most = piece.statistics.new_tokens, self.conversation.max_new_tokens
            more = "the context is full: /reset begins anew" if said < most else "/max-new-tokens allows more"
            tell(f"ended after {said} tokens; {more}")
