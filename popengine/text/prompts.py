"""Prompts to token ids: through the chat template where there is one, with the places of pictures."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from popengine.text.chat import render_chats
from popengine.text.sandbox.special_tokens import NOTHING_SPELLED, Spelled, leaves
from popengine.text.tokenizer import TextTokenizer
from weights.errors import InputError

Messages = list[dict[str, Any]]
# A prompt, or a conversation as chat templates take it: [{"role": "user", "content": "..."}, ...].
Prompt = str | Messages


# Several conversations as texts, in one go: of one that cannot be rendered, why not.
Render = Callable[[Sequence[Messages]], list[str | InputError]]

# Of a text that may fit a context: words of a language have four letters a token, runs of spaces have more. Tokenizing
# takes some 500 bytes a letter, so that what cannot fit must not get there.
LETTERS_PER_TOKEN = 16
# What a template may write beside twice what its messages say: tools and dates have some thousands. A context that a
# config claims bounds nothing.
TEMPLATE_LETTERS = 200_000


class Placing(Protocol):
    """How pictures get their places in a text and among its tokens (popengine.pictures.vision).

    meant  control tokens that a message may spell and mean, unless the model wrote it
    """

    @property
    def meant(self) -> tuple[str, ...]: ...

    def plain_text(self, prompt: str, images: int) -> str: ...

    def render(self, conversations: Sequence[Messages], images: Sequence[int], render: Render) -> list[str]: ...

    def written_out(self, text: str) -> str: ...

    def expand(self, ids: list[int], images: Sequence[Any]) -> list[int]: ...


class Prompts:
    """The text side of a checkpoint.

    chat_template  an InputError says why the checkpoint's cannot be read: raised once it is needed, so not for raw text
    context        tokens that a prompt has room in
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
        """Token ids of one prompt, as `batch` gives them for several."""
        return self.batch([prompt], [images], raw=raw, system_prompt=system_prompt, parse_special=parse_special)[0]

    def batch(
        self, prompts: Sequence[Prompt], images: Sequence[Sequence[Any]], *, raw: bool = False,
        system_prompt: str | None = None, parse_special: bool = False,
    ) -> list[list[int]]:
        """Token ids of prompts: through the chat template if there is one and `raw` does not forbid it.

        images         those of each; each has as many image tokens among the ids as the vision tower makes
        parse_special  whether control tokens that a message spells are those tokens, and not their letters
        Raises InputError for an empty prompt, and where text or images do not suit the checkpoint.
        """
        tokens = set() if parse_special else self.tokenizer.special_tokens
        spelled = Spelled(tokens, [*prompts, system_prompt or ""], self.chat_template or "", self.placing.meant)
        made = []
        for text, adds_special in self.texts(prompts, [len(own) for own in images], raw, system_prompt, spelled):
            text = self.placing.written_out(text)
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
        """Prompts as they go to the tokenizer, and whether that still has to add its special tokens."""
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
            # The template has written the special tokens itself.
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
    """Text with lone surrogates is what Python makes of bytes that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{what} is not valid UTF-8 (at character {error.start})") from None
