"""Chat templates: finding a checkpoint's template, rendering it in a sandbox, and the token that ends an answer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from popengine.text.tokenizer import TextTokenizer
from weights import files
from weights.errors import InputError
from weights.json_files import LARGEST_JSON, read_json
from weights.mapped_file import read_text

# {"role": "user", "content": text}; with pictures, content may be [{"type": "image"}, {"type": "text", "text": ...}].
Message = dict[str, Any]

WITHOUT_TEMPLATE = "`generate --raw` runs a prompt without a template"
LONGEST_TEXT = 1_000_000  # characters, if the context is unknown


def read_chat_template(directory: Path) -> str | None:
    """Return the chat template of a checkpoint directory, or None.

    Searched in chat_template.jinja, chat_template.json (written by processors, so it supports pictures), and
    `chat_template` of tokenizer_config.json: a string, or a list of named templates, of which "default" is used.
    """
    path = Path(directory) / files.CHAT_TEMPLATE
    if path.exists():
        return read_text(path, LARGEST_JSON)
    for name in (files.OLDER_CHAT_TEMPLATE, files.TOKENIZER_CONFIG):
        path = Path(directory) / name
        template = read_json(path, optional=True).get("chat_template")
        if isinstance(template, list):
            named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
            if not named:
                raise InputError(f'{path}: none of the chat templates is named "default"')
            template = named[-1].get("template")
        if isinstance(template, str):
            return template
        if template is not None:
            raise InputError(f"{path}: chat_template should be a string, found {type(template).__name__}")
    return None


def render_chat(
    template: str,
    messages: Sequence[Message],
    tokenizer: TextTokenizer,
    *,
    add_generation_prompt: bool = True,
) -> str:
    """Render one conversation, special tokens included."""
    (text,) = render_chats(template, [messages], tokenizer, add_generation_prompt=add_generation_prompt)
    return unless_failed(text)


def unless_failed(text: str | InputError) -> str:
    """Return the rendered text, or raise the InputError in its place."""
    if isinstance(text, InputError):
        raise text
    return text


def render_chats(
    template: str,
    conversations: Sequence[Sequence[Message]],
    tokenizer: TextTokenizer,
    *,
    add_generation_prompt: bool = True,
    longest: int = LONGEST_TEXT,
) -> list[str | InputError]:
    """Render several conversations in the process that holds the checkpoint's tokenizer.

    Templates come with checkpoints and are untrusted: they run in jinja2's sandbox, with limits on time and memory,
    without files, and with at most `longest` characters per text. A text that fails is replaced by an InputError with
    the reason, in the template's own words if it raised them. A failure of the template itself raises InputError.
    """
    if not conversations:
        return []
    common = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
    each = [{**tokenizer.template_tokens, **common, "messages": list(messages)} for messages in conversations]
    found = tokenizer.sandbox.request("render", template, each, longest)
    if "error" in found:
        raise template_failed(found["error"])
    return [text if isinstance(text, str) else template_failed(text["error"]) for text in found["answer"]]


def template_failed(reason: str) -> InputError:
    """Return the InputError for a chat template that failed."""
    return InputError(f"the chat template failed: {reason}; {WITHOUT_TEMPLATE}")


def end_of_turn_token(template: str, tokenizer: TextTokenizer) -> int | None:
    """Return the id of the special token that the template writes after an assistant's turn, such as <|im_end|>.

    Returns None if there is none, if it is not a single special token, or if the template fails.
    """
    marker = "popengine end of turn marker"
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": marker}]
    try:
        text = render_chat(template, messages, tokenizer, add_generation_prompt=False)
        _, found, after = text.rpartition(marker)
        ids = tokenizer.encode(after.lstrip(), add_special_tokens=False)
    except InputError:
        return None
    return ids[0] if found and ids and ids[0] in tokenizer.special_ids else None
