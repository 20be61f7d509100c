"""Holds a checkpoint's tokenizer in a process of its own: a request a line on stdin, an answer a line on stdout.

The file came with somebody's checkpoint, and what it may ask of the library is not bounded: expressions that run away,
steps that blow text up, contradictions at which native code panics or crashes. `popengine.text.isolated` runs this file
as a script, isolated (`python -I -S`). It imports the standard library and the library that the file is for.
"""

import base64
import json
import signal
import sys
from typing import Any

# Of processor time: for a request, for each of its letters, and for each byte of the file when it is read. Real
# tokenizers take a twentieth, a twentieth and a quarter.
SECONDS, SECONDS_A_LETTER, SECONDS_A_BYTE = 1.0, 20e-6, 0.2e-6
# Of address space, likewise; real ones take a tenth, a third and three quarters.
MEMORY_BYTES, BYTES_A_LETTER, BYTES_A_BYTE = 300_000_000, 500, 40
LONGEST_ANSWER = 50_000_000
# Of tokens beside the vocabulary: Gemma has 6,000, models that speak have some 29,000.
MOST_ADDED = 32_000


def allow(letters: int, file_bytes: int) -> None:
    """Sets what the next request may take, where the system has limits. Past them the process ends."""
    try:
        import resource
    except ImportError:  # not POSIX
        return
    signal.setitimer(signal.ITIMER_PROF, SECONDS + letters * SECONDS_A_LETTER + file_bytes * SECONDS_A_BYTE)
    memory = MEMORY_BYTES + BYTES_A_LETTER * letters + BYTES_A_BYTE * file_bytes
    # After the first request nothing more is opened or written.
    limits = {resource.RLIMIT_AS: memory, resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_NOFILE: 0}
    for kind, soft in limits.items():
        try:
            resource.setrlimit(kind, (soft, resource.getrlimit(kind)[1]))
        except (ValueError, OSError):  # macOS refuses some
            continue


def check_added(count: int) -> None:
    if count > MOST_ADDED:
        raise ValueError(f"it has {count} added tokens, and at most {MOST_ADDED} are read")


class FastHolder:
    """The tokenizer of a tokenizer.json, and what can be asked of it."""

    # Stands in front of a text that follows a control token, as that token would.
    BEFORE = "\ufdd0before\ufdd1"

    def __init__(self, content: str) -> None:
        import tokenizers

        check_added(content.count('"single_word"'))     # before time goes into them; each says so
        self.added_token = tokenizers.AddedToken
        self.backend = tokenizers.Tokenizer.from_str(content)
        # A tokenizer.json may carry the truncation and padding of somebody's training run.
        self.backend.no_truncation()
        self.backend.no_padding()

    def add(self, tokens: list[tuple[str, dict[str, bool]]], special: bool) -> None:
        made = [self.added_token(content, **flags) for content, flags in tokens]
        (self.backend.add_special_tokens if special else self.backend.add_tokens)(made)

    def added(self) -> list[tuple[int, str, dict[str, bool]]]:
        names = ("single_word", "lstrip", "rstrip", "normalized", "special")
        found = self.backend.get_added_tokens_decoder().items()
        check_added(len(found))
        return [(number, token.content, {name: getattr(token, name) for name in names}) for number, token in found]

    def size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=False)

    def number(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool, parse_special: bool, begins: bool) -> list[int]:
        self.backend.encode_special_tokens = not parse_special
        if begins:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        self.backend.add_tokens([self.added_token(self.BEFORE, normalized=False)])
        before = self.backend.token_to_id(self.BEFORE)
        ids = self.backend.encode(self.BEFORE + text, add_special_tokens=add_special_tokens).ids
        return [number for number in ids if number != before]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)


class SentencePieceHolder:
    """A sentencepiece model, and what can be asked of it."""

    def __init__(self, content: str) -> None:
        import sentencepiece

        # Protobuf merges what is appended: normalizer_spec {add_dummy_prefix: false, remove_extra_whitespaces: false}.
        # Spaces are then all ours; the characters' normalization stays as the model has it.
        model = base64.b64decode(content) + b"\x1a\x04\x18\x00\x20\x00"
        self.backend = sentencepiece.SentencePieceProcessor(model_proto=model)
        if self.backend.get_piece_size() == 0:
            raise RuntimeError("no pieces")

    def pieces(self) -> dict[str, Any]:
        numbers = range(self.backend.get_piece_size())
        is_control, is_unknown, is_byte = self.backend.is_control, self.backend.is_unknown, self.backend.is_byte
        return {
            "texts": [self.backend.id_to_piece(number) for number in numbers],
            "controls": [number for number in numbers if is_control(number) or is_unknown(number)],
            "bytes": [number for number in numbers if is_byte(number)],
            "bos": self.backend.bos_id(), "eos": self.backend.eos_id(),          # -1 where the model has none
        }

    def encode(self, text: str) -> list[int]:
        return list(self.backend.encode(text))


HOLDERS: dict[str, Any] = {"tokenizers": FastHolder, "sentencepiece": SentencePieceHolder}


def main() -> None:
    holder: Any = None
    for line in sys.stdin:
        name, *words = json.loads(line)
        try:
            if name == "load":
                package, content, folders = words
                sys.path.extend(folders)
                __import__(package)             # while files can be opened
                allow(0, len(content))
                holder, answer = HOLDERS[package](content), None
            else:
                allow(len(line), 0)
                answer = getattr(holder, name)(*words)
            written = json.dumps({"answer": answer})
            if len(written) > LONGEST_ANSWER:
                raise MemoryError("what it makes of a text is too long")
        except BaseException as error:  # a panic of the Rust side is no Exception
            written = json.dumps({"error": str(error) or type(error).__name__})
        sys.stdout.write(written + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
