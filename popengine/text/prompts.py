"""Prompts to token ids: through the chat template where there is one, with the places of pictures."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from popengine.text.chat import render_chat
from popengine.text.tokenizer import TextTokenizer
from weights.errors import InputError

Messages = list[dict[str, Any]]
# A prompt, or a conversation as chat templates take it: [{"role": "user", "content": "..."}, ...].
Prompt = str | Messages


class Placing(Protocol):
    """How pictures get their places in a text and among its tokens (popengine.pictures.vision)."""

    def plain_text(self, prompt: str, images: int) -> str: ...

    def render(self, messages: Messages, images: int, render: Callable[[Messages], str]) -> str: ...

    def expand(self, ids: list[int], images: int) -> list[int]: ...


class Prompts:
    """The text side of a checkpoint."""

    def __init__(self, tokenizer: TextTokenizer, chat_template: str | None, placing: Placing) -> None:
        self.tokenizer, self.chat_template, self.placing = tokenizer, chat_template, placing

    def ids(
        self, prompt: Prompt, *, raw: bool = False, system_prompt: str | None = None, images: int = 0
    ) -> list[int]:
        """Token ids of a prompt: through the chat template if there is one and `raw` does not forbid it.

        images  how many are given with it; each has as many image tokens among the ids as the vision tower makes
        Raises InputError for an empty prompt, and where text or images do not suit the checkpoint.
        """
        text, add_special_tokens = self.text(prompt, raw, system_prompt, images)
        return self.placing.expand(self.tokenizer.encode(text, add_special_tokens), images)

    def text(self, prompt: Prompt, raw: bool, system_prompt: str | None, images: int) -> tuple[str, bool]:
        """A prompt as it goes to the tokenizer, and whether that still has to add its special tokens."""
        if isinstance(prompt, str):
            if not prompt.strip():
                raise InputError("the prompt is empty: give at least one token of text")
            check_text(prompt, "the prompt")
        if isinstance(prompt, str) and (raw or self.chat_template is None):
            if system_prompt is not None:
                raise InputError("a system prompt needs a chat template, and this prompt is encoded without one")
            return prompt if raw else self.placing.plain_text(prompt, images), True
        if self.chat_template is None:
            raise InputError("this checkpoint has no chat template: give the prompt as one text")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if system_prompt is not None:
            check_text(system_prompt, "the system prompt")
            messages = [{"role": "system", "content": system_prompt}, *messages]
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token
        render = partial(render_chat, self.chat_template, bos_token=bos, eos_token=eos)
        # The template has written the special tokens itself.
        return self.placing.render(messages, images, render), False


def check_text(text: str, what: str) -> None:
    """Text with lone surrogates is what Python makes of bytes that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{what} is not valid UTF-8 (at character {error.start})") from None
