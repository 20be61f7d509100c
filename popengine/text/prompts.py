"""Prompts to token ids, through the chat template if there is one, with placeholders for pictures."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from popengine.text.chat import render_chats
from popengine.text.sandbox.special_tokens import NOTHING_SPELLED, Spelled, leaves
from popengine.text.tokenizer import TextTokenizer
from weights.errors import InputError

Messages = list[dict[str, Any]]
# A text, or a conversation in the form of chat templates: [{"role": "user", "content": "..."}, ...].
Prompt = str | Messages


# Renders several conversations at once; an InputError replaces a text that fails.
Render = Callable[[Sequence[Messages]], list[str | InputError]]

# Bound on a text for a context: words have about four letters per token, runs of spaces more. Tokenizing takes about
# 500 bytes per letter, so a text that cannot fit is refused before.
LETTERS_PER_TOKEN = 16
# Letters that a template may add to twice its messages: tools and dates have some thousands. The context of an
# untrusted config is no bound.
TEMPLATE_LETTERS = 200_000


class Placing(Protocol):
    """Placement of pictures in a text and among its tokens (popengine.images.vision).

    meant  control tokens that keep their meaning in a message, unless the model wrote it
    """

    @property
    def meant(self) -> tuple[str, ...]: ...

    def plain_text(self, prompt: str, images: int) -> str: ...

    def render(self, conversations: Sequence[Messages], images: Sequence[int], render: Render) -> list[str]: ...

    def mark_images(self, text: str) -> str: ...

    def expand(self, ids: list[int], images: Sequence[Any]) -> list[int]: ...


class Prompts:
    """The text side of a checkpoint.

    chat_template  an InputError if the checkpoint's cannot be read; raised only on use, hence not for raw text
    context        maximum number of tokens of a prompt
    """

    def __init__(
        self, tokenizer: TextTokenizer, chat_template: str | InputError | None, placing: Placing, context: int
    ) -> None:
        self.template_problem = chat_template if isinstance(chat_template, InputError) else None
        self.chat_template = None if isinstance(chat_template, InputError) else chat_template
        self.tokenizer, self.placing = tokenizer, placing
        self.longest = LETTERS_PER_TOKEN * context

    def ids(
        self, prompt: Prompt, *, raw: bool = False, system_prompt: str | None = None, images: Sequence[Any] = (),
        parse_special: bool = False,
    ) -> list[int]:
        """Return token ids of one prompt, as `batch` does for several."""
        return self.batch([prompt], [images], raw=raw, system_prompt=system_prompt, parse_special=parse_special)[0]

    def batch(
        self, prompts: Sequence[Prompt], images: Sequence[Sequence[Any]], *, raw: bool = False,
        system_prompt: str | None = None, parse_special: bool = False,
    ) -> list[list[int]]:
        """Return token ids of prompts, through the chat template if there is one and `raw` is False.

        images         pictures of each prompt; each becomes as many image tokens as the vision tower makes
        parse_special  read control tokens spelled in a message as these tokens, not as their letters
        Raises InputError for an empty prompt, and for text or images that do not fit the checkpoint.
        """
        tokens = set() if parse_special else self.tokenizer.special_tokens
        spelled = Spelled(tokens, [*prompts, system_prompt or ""], self.chat_template or "", self.placing.meant)
        made = []
        for text, adds_special in self.texts(prompts, [len(own) for own in images], raw, system_prompt, spelled):
            text = self.placing.mark_images(text)
            if len(text) > self.longest:
                raise InputError(
                    f"the prompt has {len(text)} letters, more than the context of "
                    f"{self.longest // LETTERS_PER_TOKEN} tokens can hold"
                )
            made.append(self.tokenizer.encode(text, True) if adds_special else spelled.encode(text, self.tokenizer))
        return [self.placing.expand(ids, own) for ids, own in zip(made, images, strict=True)]

    def texts(
        self, prompts: Sequence[Prompt], images: Sequence[int], raw: bool = False, system_prompt: str | None = None,
        spelled: Spelled = NOTHING_SPELLED,
    ) -> list[tuple[str, bool]]:
        """Return the texts to tokenize, each with True if the tokenizer must still add its special tokens."""
        found: dict[int, tuple[str, bool]] = {}
        chats: dict[int, Messages] = {}
        for index, (prompt, count) in enumerate(zip(prompts, images, strict=True)):
            if isinstance(prompt, str):
                if not prompt.strip():
                    raise InputError("the prompt is empty: give at least one token of text")
                check_text(prompt, "the prompt")
            if isinstance(prompt, str) and (raw or (self.chat_template is None and self.template_problem is None)):
                if system_prompt is not None:
                    raise InputError("a system prompt needs a chat template, and this prompt is encoded without one")
                found[index] = prompt if raw else self.placing.plain_text(prompt, count), True
            else:
                chats[index] = spelled.hide(self.messages(prompt, system_prompt))
        if chats:
            said = max(sum(map(len, leaves(messages))) for messages in chats.values())
            render = partial(
                render_chats, str(self.chat_template), tokenizer=self.tokenizer,
                longest=min(self.longest, 2 * said + TEMPLATE_LETTERS),
            )
            cut = {index: spelled.hide(messages, pieces=True) for index, messages in chats.items()}
            cut = {index: messages for index, messages in cut.items() if messages != chats[index]}
            indices = [*chats, *cut]
            texts = self.placing.render(
                [*chats.values(), *cut.values()], [images[index] for index in indices], render
            )
            # The template has already written the special tokens.
            found |= {index: (text, False) for index, text in zip(chats, texts, strict=False)}
            for index, text in zip(cut, texts[len(chats) :], strict=True):
                found[index] = spelled.chosen(found[index][0], text), False
        return [found[index] for index in range(len(prompts))]

    def messages(self, prompt: Prompt, system_prompt: str | None) -> Messages:
        if self.chat_template is None:
            raise self.template_problem or InputError(
                "this checkpoint has no chat template: give the prompt as one text"
            )
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if system_prompt is not None:
            check_text(system_prompt, "the system prompt")
            messages = [{"role": "system", "content": system_prompt}, *messages]
        return messages


def check_text(text: str, what: str) -> None:
    """Raise InputError for lone surrogates, which Python makes of bytes that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{what} is not valid UTF-8 (at character {error.start})") from None
