"""A conversation: successive turns whose keys and values are kept, and whose evidence accumulates.

Every turn goes through the chat template together with all earlier turns. The longest common prefix of token ids with
the cache is not computed again. If the template writes a turn differently from the model (it trims an answer, say), the
cache is rolled back to that point. Tokens that are rolled back stay evidence.
"""

import json
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from models.state import DecodeState
from popengine.engine.results import Generation, Piece, joined
from popengine.engine.run import Run
from popengine.engine.sampling_settings import Sampling
from popengine.images.images import ImageSource
from popengine.studies.resolve import StudyPruning
from popengine.studies.settings import PruningSettings
from popengine.text.prompts import Prompts, check_text
from popengine.text.tokenizer import TextTokenizer
from weights.errors import InputError
from weights.json_files import read_json
from weights.output_file import write_output

FORMAT = "popengine conversation 1"
ROLES = ("system", "user", "assistant")


class TalkingEngine(Protocol):
    """Interface of the engine for a conversation (popengine/engine/engine.py)."""

    prompts: Prompts
    tokenizer: TextTokenizer
    chat_template: str | None
    max_seq_len: int
    fingerprint: str

    def resolve(self, pruning: PruningSettings | StudyPruning) -> StudyPruning: ...

    def capacity(self, tokens: int) -> int: ...

    def new_state(self, batch: int, tokens: int, pruning: StudyPruning) -> DecodeState: ...

    def run(
        self, prompts: list[list[int]], max_new_tokens: int, pruning: StudyPruning, sampling: Sampling, *,
        images: Sequence[ImageSource], held: DecodeState, kept: int,
    ) -> Run: ...

    def pieces(self, run: Run) -> Iterator[Piece]: ...


class Conversation:
    """A conversation, made by `Engine.chat`. Settings may change between turns; another pruning recomputes all turns.

    messages  turns in the form of chat templates; images: their pictures, in order
    state     holds keys and values of `cached`, token ids; None: before the first turn and after an interrupted step
    """

    def __init__(
        self, engine: TalkingEngine, system_prompt: str | None, pruning: PruningSettings | StudyPruning,
        sampling: Sampling, max_new_tokens: int,
    ) -> None:
        if engine.chat_template is None:
            raise engine.prompts.template_problem or InputError(
                "this checkpoint has no chat template, so it cannot hold a conversation; generate --raw can continue "
                "a text"
            )
        self.engine, self.pruning, self.sampling, self.max_new_tokens = engine, pruning, sampling, max_new_tokens
        self.state: DecodeState | None = None
        self.messages: list[dict[str, Any]] = []
        self.images: list[ImageSource] = []
        self.instruct(system_prompt)

    def instruct(self, system_prompt: str | None) -> None:
        """Set the system prompt (None: remove it). The turns stay and are computed again."""
        first = []
        if system_prompt is not None:
            check_text(system_prompt, "the system prompt")
            first = [{"role": "system", "content": system_prompt}]
        self.messages = first + [message for message in self.messages if message["role"] != "system"]
        self.cached: list[int] = []

    def begin_anew(self) -> None:
        """Remove all turns and their evidence; the system prompt stays."""
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self.images, self.cached = [], []

    def say(self, text: str, images: Sequence[ImageSource] = ()) -> Generation:
        """Add a turn and return its whole answer. Arguments and errors as for `stream`."""
        return joined(self.stream(text, images))

    def stream(self, text: str, images: Sequence[ImageSource] = ()) -> Generator[Piece, None, None]:
        """Add a turn and yield its answer piece by piece. If the iterator is closed early, the answer ends there.

        Raises InputError on the call, before the first piece, for bad input or a full context.
        """
        if not text.strip():
            raise InputError("nothing was said: give at least one token of text")
        check_text(text, "what was said")
        parts = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        messages = [*self.messages, {"role": "user", "content": parts if images else text}]
        pictures = [*self.images, *images]
        ids = self.engine.prompts.ids(messages, images=pictures)
        room = self.engine.max_seq_len - len(ids)
        if room < 1:
            raise InputError(
                f"the context is full: the conversation would have {len(ids)} tokens, and the context holds "
                f"{self.engine.max_seq_len}; begin it anew, or ask for less"
            )
        new_tokens = min(self.max_new_tokens, room)
        pruning = self.engine.resolve(self.pruning)
        if self.state is None or self.state.pruning != pruning:
            self.cached, self.state = [], None      # freed before the new one is allocated
        kept = common_prefix(self.cached, ids[:-1])         # the last token is recomputed for its logits
        capacity = self.engine.capacity(len(ids) + new_tokens)
        if self.state is None:
            self.state = self.engine.new_state(1, capacity, pruning)
        elif self.state.cache.capacity < capacity:
            self.state.grow(capacity)
        run = self.engine.run(
            [ids], new_tokens, pruning, self.sampling, images=pictures, held=self.state, kept=kept
        )
        return self.answer(run, messages, pictures)

    def answer(
        self, run: Run, messages: list[dict[str, Any]], pictures: list[ImageSource]
    ) -> Generator[Piece, None, None]:
        """Yield the pieces of a turn's run, and update the conversation with each."""
        state, said, text = self.state, [], ""
        self.state = None                           # until a step is complete
        try:
            for piece in self.engine.pieces(run):
                said += [] if piece.token_id is None else [piece.token_id]
                text += piece.text
                self.state, self.cached = state, (run.prompts[0] + said)[: run.state.cache.filled]
                yield piece
                if piece.finish_reason is None:
                    self.state = None
        finally:
            if said:
                content = text if run.sampling.stop else self.engine.tokenizer.decode(said)
                answer = {"role": "assistant", "content": content}
                self.messages, self.images = [*messages, answer], pictures

    def save(self, path: str | Path) -> None:
        """Save the turns in a file. Raises InputError if it cannot be written."""
        path = Path(path)
        if not all(isinstance(image, (str, Path)) for image in self.images):
            raise InputError(f"{path}: only pictures that are files can be saved with a conversation")
        kept = {
            "format": FORMAT, "model": self.engine.fingerprint, "messages": self.messages,
            "images": [str(Path(str(image)).absolute()) for image in self.images],
        }
        # A picture's path may contain bytes that are not UTF-8; JSON escapes their surrogates as this handler does.
        text = json.dumps(kept, ensure_ascii=False, indent=1)
        write_output(path, text.encode("utf-8", "backslashreplace"))

    def load(self, path: str | Path) -> None:
        """Continue a saved conversation. Raises InputError for another file, or a conversation with another model."""
        path = Path(path)
        kept = read_json(path, surrogates_allowed=True)
        if kept.get("format") != FORMAT:
            raise InputError(f"{path} is not a conversation that popengine saved ({FORMAT})")
        if kept.get("model") != self.engine.fingerprint:
            raise InputError(f"{path} is a conversation with another model than the one that is loaded")
        messages, images = kept.get("messages"), kept.get("images")
        if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
            raise InputError(f"{path}: images should be a list of paths")
        if not isinstance(messages, list) or not all(map(is_message, messages)):
            raise InputError(f"{path}: messages should be a list of turns, each with a role and its content")
        self.messages, self.images, self.cached = messages, list(images), []


def is_message(message: Any) -> bool:
    """Return True for a turn in the form that `stream` writes."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        return False
    content = message.get("content")
    return isinstance(content, str) or (isinstance(content, list) and all(map(is_part, content)))


def is_part(part: Any) -> bool:
    """Return True for a part of a turn: a text or a placeholder of an image."""
    text = isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    return text or part == {"type": "image"}


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))
