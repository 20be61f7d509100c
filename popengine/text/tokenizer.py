"""Text to token ids and back, for both kinds of tokenizer file, and decoding of streamed tokens.

`tokenizers` reads tokenizer.json (FastTokenizer), `sentencepiece` reads tokenizer.model (SentencePieceTokenizer), each
in a child process (popengine/text/sandbox). Both decode as Hugging Face does; TextStream works on either.
"""

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import AddedToken

from popengine.text.sandbox.process import Sandbox
from weights import files
from weights.errors import InputError
from weights.json_files import JsonObject, lfs_hint, read_json, shown
from weights.mapped_file import read_bytes, read_text

# Names under which tokenizer_config.json and special_tokens_map.json declare special tokens, each a string or a dict.
SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MOST_ADDED = 32_000     # tokens beside the vocabulary: Gemma has 6,000, speech models about 29,000
SPACE_MARK = "▁"  # sentencepiece's visible space
# Bytes of tokenizer.json or tokenizer.model: far above any real one (Gemma's has 33 MB).
LARGEST_TOKENIZER = 64_000_000


class TextTokenizer(Protocol):
    """Interface of a tokenizer.

    vocabulary_size  highest id that has a token, plus one
    bos_token        text of the beginning-of-sequence token, or None; eos_token likewise
    template_tokens  special tokens by their names in chat templates: bos_token, pad_token, ...
    special_ids      ids that `decode` omits: control tokens, not text; special_tokens: their spellings
    byte_ids         ids that stand for one raw byte ("<0x0A>"); empty for byte-level tokenizers
    sandbox          its process, which also renders the checkpoint's chat template
    """

    sandbox: Sandbox
    vocabulary_size: int
    bos_token: str | None
    eos_token: str | None
    template_tokens: dict[str, Any]
    special_ids: frozenset[int]
    special_tokens: frozenset[str]
    byte_ids: frozenset[int]

    def encode(
        self, text: str, add_special_tokens: bool, parse_special: bool = True, begins: bool = True
    ) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def token_id(self, token: str) -> int | None: ...


class FastTokenizer:
    """The tokenizer of a tokenizer.json, with the file's rules for spaces and BOS."""

    def __init__(
        self, sandbox: Sandbox, bos_token: str | None = None, eos_token: str | None = None,
        template_tokens: Mapping[str, Any] | None = None,
    ) -> None:
        self.sandbox, self.bos_token, self.eos_token = sandbox, bos_token, eos_token
        self.template_tokens = with_ends(template_tokens, bos_token, eos_token)
        named = [token for token in (bos_token, eos_token) if token and self.token_id(token) is not None]
        added = add_tokens(sandbox)
        known = {token.content for token in added.values() if token.special}
        if new := [AddedToken(token, normalized=False) for token in named if token not in known]:
            added = add_tokens(sandbox, new, special=True)

        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.special_tokens = frozenset(token.content for token in added.values() if token.special)
        self.vocabulary_size = max(sandbox.about, max(added, default=-1) + 1)
        letter = self.token_id("<0x41>")
        has_bytes = letter is not None and self.decode([letter], skip_special_tokens=False) == "A"
        of_bytes = [self.token_id(f"<0x{byte:02X}>") for byte in range(256 if has_bytes else 0)]
        self.byte_ids = frozenset(token_id for token_id in of_bytes if token_id is not None)

    def encode(
        self, text: str, add_special_tokens: bool, parse_special: bool = True, begins: bool = True
    ) -> list[int]:
        """Return token ids of `text`. Spelled special tokens become their ids, or letters if parse_special is False.

        add_special_tokens  also add the tokens that the tokenizer puts around a text (usually BOS in front)
        begins              False after a control token: some tokenizers put a space before a text only at its beginning
        """
        check_unicode(text)
        return self.sandbox.ask("encode", text, add_special_tokens, parse_special, begins)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Decode `ids`; an id without a token (as in a padded vocabulary) is skipped."""
        return self.sandbox.ask("decode", list(ids), skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """Return the id of the token spelled `token`, or None."""
        return self.sandbox.ask("token_to_id", token)


class SentencePieceTokenizer:
    """A sentencepiece model with the special tokens around it, tokenized as transformers' LlamaTokenizer does.

    Text between special tokens is encoded piece by piece. `prefix_space` says which of these pieces get a leading space
    mark if the text has no space there: "always" (the `legacy` behaviour), "first" (only at the start of the text),
    "never". An existing space counts as the prefix.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        template_tokens: Mapping[str, Any] | None = None,
        added_tokens: dict[int, AddedToken] | None = None,
        prefix_space: str = "first",
        add_bos: bool = True,
        add_eos: bool = False,
    ) -> None:
        self.sandbox, self.prefix_space = sandbox, prefix_space
        model = sandbox.about
        self.texts = dict(enumerate(model["texts"]))
        self.added = {token_id: AddedToken(self.texts[token_id], special=True) for token_id in model["controls"]}
        self.added.update(added_tokens or {})
        self.texts.update({token_id: token.content for token_id, token in self.added.items()})
        self.token_ids = {token: token_id for token_id, token in self.texts.items()}

        self.bos_token = bos_token or self.texts.get(model["bos"])
        self.eos_token = eos_token or self.texts.get(model["eos"])
        self.template_tokens = with_ends(template_tokens, self.bos_token, self.eos_token)
        self.add_bos = add_bos and self.bos_token in self.token_ids
        self.add_eos = add_eos and self.eos_token in self.token_ids
        for name in (self.bos_token, self.eos_token):
            if name in self.token_ids:
                self.added.setdefault(self.token_ids[name], AddedToken(name)).special = True
        self.special_ids = frozenset(token_id for token_id, token in self.added.items() if token.special)
        self.byte_ids = frozenset(model["bytes"])
        self.vocabulary_size = max(self.texts) + 1
        self.special_tokens = frozenset(self.texts[token_id] for token_id in self.special_ids)
        self._added_pattern = added_tokens_pattern(self.added.values())
        self._text_pattern = added_tokens_pattern(token for token in self.added.values() if not token.special)

    def encode(
        self, text: str, add_special_tokens: bool, parse_special: bool = True, begins: bool = True
    ) -> list[int]:
        """Return token ids of `text`. Spelled special tokens become their ids, or letters if parse_special is False.

        Other added tokens always become their ids.

        add_special_tokens  also add BOS in front and EOS behind, if the tokenizer's configuration asks for them
        begins              as for FastTokenizer
        """
        check_unicode(text)
        ids: list[int] = []
        if add_special_tokens and self.add_bos and self.bos_token is not None:
            ids.append(self.token_ids[self.bos_token])
        position = 0
        for found in (self._added_pattern if parse_special else self._text_pattern).finditer(text):
            token_id = self.token_ids[found.group()]
            before = text[position : found.start()]
            before = before.rstrip() if self.added[token_id].lstrip else before
            ids += self._encode_plain(before, begins and position == 0)
            ids.append(token_id)
            position = found.end()
            if self.added[token_id].rstrip:
                position += len(text[position:]) - len(text[position:].lstrip())
        ids += self._encode_plain(text[position:], begins and position == 0)
        if add_special_tokens and self.add_eos and self.eos_token is not None:
            ids.append(self.token_ids[self.eos_token])
        return ids

    def _encode_plain(self, text: str, is_first: bool) -> list[int]:
        wants_prefix = self.prefix_space == "always" or (self.prefix_space == "first" and is_first)
        if text and wants_prefix and not text.startswith((" ", SPACE_MARK)):
            text = " " + text
        return self.sandbox.ask("encode", text)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Decode `ids`; an id without a token is skipped.

        Successive byte tokens are decoded together as UTF-8; if that is invalid, each byte becomes U+FFFD, as in
        Hugging Face. The space that encoding put in front of the text is removed.
        """
        text: list[str] = []
        run = bytearray()
        for token_id in ids:
            if (skip_special_tokens and token_id in self.special_ids) or token_id not in self.texts:
                continue
            if token_id in self.byte_ids:
                run.append(int(self.texts[token_id][3:5], 16))
                continue
            text.append(decode_bytes(run))
            run.clear()
            text.append(self.texts[token_id].replace(SPACE_MARK, " "))
        text.append(decode_bytes(run))
        joined = "".join(text)
        return joined if self.prefix_space == "never" else joined.removeprefix(" ")

    def token_id(self, token: str) -> int | None:
        """Return the id of the token spelled `token`, or None."""
        return self.token_ids.get(token)


class TextStream:
    """Decodes a growing sequence of ids: the results of `push` and `finish` join to `decode` of all ids.

    Text is returned as soon as no later token can change it, so a character whose bytes are spread over several tokens
    appears whole. The cost of a push does not grow with the length of the text.
    """

    # An incomplete character has at most 3 bytes, so it lies within the last few tokens.
    OVERLAP = 8

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.window: list[int] = []  # the last tokens: enough for the newest to decode as in the whole text
        self.given = 0  # characters of the window's text returned so far

    def push(self, token: int) -> str:
        """Return the text that `token` makes final; "" if there is none yet, and for special tokens."""
        if token in self.tokenizer.special_ids or token >= self.tokenizer.vocabulary_size:
            return ""
        self.window.append(token)
        if token in self.tokenizer.byte_ids:
            return ""  # a later byte decides whether the whole run of bytes is text or is invalid
        certain = self._certain()
        text = certain[self.given :]
        self.given = len(certain)
        if len(self.window) > 2 * self.OVERLAP:
            self.window = self.window[-self.OVERLAP :]  # the last is no byte token, so no run of bytes is open
            self.given = len(self._certain())
        return text

    def _certain(self) -> str:
        text = self.tokenizer.decode(self.window)
        return text[:-1] if text.endswith("\N{REPLACEMENT CHARACTER}") else text  # perhaps half a character

    def finish(self) -> str:
        """Return the text that was held back. The stream is then empty and can be used again."""
        text = self.tokenizer.decode(self.window)[self.given :]
        self.window, self.given = [], 0
        return text


def open_tokenizer(directory: Path) -> TextTokenizer:
    """Open the tokenizer of a checkpoint directory: tokenizer.json if present, else tokenizer.model.

    Raises InputError that names the file that is missing or broken.
    """
    directory = Path(directory)
    if (directory / files.TOKENIZER).is_file():
        return _open_fast(directory)
    if (directory / files.SENTENCEPIECE).is_file():
        return _open_sentencepiece(directory)
    # vocab.json and merges.txt do not define the pre-tokenizer, in which SmolLM2, GPT-2 and Qwen2 differ.
    found = [name for name in files.OTHER_TOKENIZERS if (directory / name).is_file()]
    convert = "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) of transformers writes tokenizer.json"
    hint = f"; {found[0]} alone is not enough: {convert}" if found else ""
    raise InputError(f"{directory}: no tokenizer: expected tokenizer.json or tokenizer.model there{hint}")


def _open_fast(directory: Path) -> FastTokenizer:
    path = directory / files.TOKENIZER
    content = read_text(path, LARGEST_TOKENIZER)
    sandbox = Sandbox("tokenizers", content, str(path), lfs_hint(content[:100].encode()))
    named, extra = _special_tokens(directory)
    # Tokens that the configuration adds to the file, in the order of their ids.
    added = add_tokens(sandbox)
    known = {token.content for token in added.values()}
    declared = _added_tokens(directory, [*named.values(), *extra])
    if new := [token for _, token in sorted(declared.items()) if token.content not in known]:
        added = add_tokens(sandbox, new)
    by_content = {token.content: token for token in added.values()}
    new = [
        by_content.get(name, AddedToken(name, normalized=False)) for name in named.values()
        if name not in by_content or not by_content[name].special
    ]
    new += [AddedToken(name, normalized=False) for name in extra if name not in by_content]
    if new:
        add_tokens(sandbox, new, special=True)
    return FastTokenizer(sandbox, named.get("bos_token"), named.get("eos_token"), _for_templates(named, extra))


def _open_sentencepiece(directory: Path) -> SentencePieceTokenizer:
    path = directory / files.SENTENCEPIECE
    config = read_json(directory / files.TOKENIZER_CONFIG, optional=True)
    named, extra = _special_tokens(directory)
    prefix_space = "always" if config.get("legacy") else "first"
    if config.get("add_prefix_space") is False:
        prefix_space = "never"
    content = read_bytes(path, LARGEST_TOKENIZER)
    hint = "; a checkpoint whose tokenizer.model is not sentencepiece's needs tokenizer.json beside it"
    model = base64.b64encode(content or b"\0").decode()
    sandbox = Sandbox("sentencepiece", model, str(path), hint + lfs_hint(content))
    pieces = sandbox.about["texts"]
    added = _added_tokens(directory, [*named.values(), *extra])
    next_id = max(len(pieces), max(added, default=-1) + 1)
    placed = {token.content: token_id for token_id, token in added.items()}
    for name in (*named.values(), *extra):
        if name not in placed:
            if name in pieces:
                placed[name] = pieces.index(name)
            else:
                placed[name], next_id = next_id, next_id + 1
            added[placed[name]] = AddedToken(name, special=True, normalized=False)
    for name in named.values():
        added[placed[name]].special = True
    return SentencePieceTokenizer(
        sandbox,
        bos_token=named.get("bos_token"),
        eos_token=named.get("eos_token"),
        template_tokens=_for_templates(named, extra),
        added_tokens=added,
        prefix_space=prefix_space,
        add_bos=config.get("add_bos_token") is not False,
        add_eos=config.get("add_eos_token") is True,
    )


def add_tokens(sandbox: Sandbox, tokens: Sequence[AddedToken] = (), special: bool = False) -> dict[int, AddedToken]:
    """Add tokens beside the vocabulary of a tokenizer.json. Returns all added tokens, by id."""
    found = sandbox.ask("add", [token.__getstate__() for token in tokens], special, keep=len(tokens) > 0)
    return {token_id: AddedToken(**token) for token_id, token in found}


def with_ends(tokens: Mapping[str, Any] | None, bos_token: str | None, eos_token: str | None) -> dict[str, Any]:
    """Return the tokens for templates, without an absent bos or eos, so that it is undefined and not "None"."""
    ends = {"bos_token": bos_token, "eos_token": eos_token}
    return {**(tokens or {}), **{name: token for name, token in ends.items() if token is not None}}


def _special_tokens(directory: Path) -> tuple[dict[str, str], list[str]]:
    """Return the special tokens declared beside the tokenizer: a dict of those with names, and a list of the others.

    As in transformers 5, every field called something_token declares one.
    """
    declared = dict(read_json(directory / files.TOKENIZER_CONFIG, optional=True))
    if "added_tokens_decoder" not in declared:  # as in transformers: only older folders need the second file
        declared.update(read_json(directory / files.SPECIAL_TOKENS, optional=True))
    extra: Any = declared.get("extra_special_tokens") or declared.get("additional_special_tokens") or []
    by_name = {name: declared.get(name) for name in SPECIAL_TOKEN_NAMES}
    by_name |= {name: value for name, value in declared.items() if name.endswith("_token")}
    by_name |= extra if isinstance(extra, dict) else {}
    listed = extra if isinstance(extra, list) else []
    if len(listed) + len(by_name) > MOST_ADDED:
        raise InputError(f"{directory}: more than {MOST_ADDED} special tokens are named")
    named = {name: text for name, value in by_name.items() if (text := token_text(value))}
    return named, [text for token in listed if (text := token_text(token))]


def _for_templates(named: dict[str, str], extra: list[str]) -> dict[str, Any]:
    return {**named, "additional_special_tokens": extra} if extra else {**named}        # the list: transformers 4


def _added_tokens(directory: Path, special: list[str]) -> dict[int, AddedToken]:
    """Return tokens beyond the vocabulary, by id: `added_tokens_decoder` of tokenizer_config.json or added_tokens.json.

    special  the special ones among the tokens of added_tokens.json, a plain {token: id}
    """
    config = directory / files.TOKENIZER_CONFIG
    declared = JsonObject(read_json(config, optional=True), str(config)).section("added_tokens_decoder")
    added: dict[int, AddedToken] = {}
    check_count(declared)
    for number in declared.raw:
        if not re.fullmatch(r"[0-9]{1,9}", number):
            raise InputError(f"{declared.where}: {shown(number)} is no token id")
        token = declared.section(number)
        is_special = token.boolean("special", False)
        flags = {name: token.boolean(name, False) for name in ("single_word", "lstrip", "rstrip")}
        normalized = token.boolean("normalized", not is_special)
        added[int(number)] = AddedToken(token.text("content"), special=is_special, normalized=normalized, **flags)
    if not added:
        path = directory / files.ADDED_TOKENS
        older = JsonObject(read_json(path, optional=True), str(path))
        check_count(older)
        for content in older.raw:
            is_special = content in special
            added[older.integer(content, None, 0)] = AddedToken(content, special=is_special, normalized=not is_special)
    return added


def check_count(added: JsonObject) -> None:
    """Raise InputError for too many added tokens."""
    if len(added.raw) > MOST_ADDED:
        raise InputError(f"{added.where}: it has {len(added.raw)} added tokens, and at most {MOST_ADDED} are read")


def added_tokens_pattern(tokens: Iterable[AddedToken]) -> re.Pattern[str]:
    """Return a pattern that finds added tokens in text, the longest of several at one position."""
    words = []
    for token in sorted(tokens, key=lambda token: len(token.content), reverse=True):
        if token.content:
            word = re.escape(token.content)
            words.append(rf"(?<!\w){word}(?!\w)" if token.single_word else word)
    return re.compile("|".join(words) or "(?!)")


def decode_bytes(run: bytes | bytearray) -> str:
    """Decode UTF-8; if it is invalid, each byte becomes U+FFFD."""
    try:
        return run.decode("utf-8")
    except UnicodeDecodeError:
        return "\N{REPLACEMENT CHARACTER}" * len(run)


def check_unicode(text: str) -> None:
    """Raise InputError for text with a lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text is not valid Unicode: a lone surrogate at character {error.start}; give it as UTF-8"
        ) from error


def token_text(token: Any) -> str | None:
    """Return the text of a token in a configuration file: a string, or a dict with its text under "content"."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
