"""Holds the tokenizer of a tokenizer.json in a process of its own: a request a line on stdin, an answer on stdout.

The file came with somebody's checkpoint, and what it may ask of the library is not bounded: expressions that run away,
steps that blow text up, contradictions at which the Rust side panics. `popengine.text.isolated` runs this file as a
script, isolated (`python -I -S`). It imports the standard library and tokenizers.
"""

import json
import sys
from typing import Any

# Beside what a request is given for its letters: importing, and a file that is read.
SECONDS, MEMORY_BYTES = 1, 500_000_000
# Of processor time and memory for a letter; real tokenizers take a tenth of both.
SECONDS_A_LETTER, BYTES_A_LETTER = 20e-6, 5_000
# For a byte of tokenizer.json, as objects.
BYTES_A_BYTE = 100
LONGEST_ANSWER = 50_000_000


def allow(letters: int, file_bytes: int) -> None:
    """Sets what the next request may take, where the system has limits. Past them the process ends."""
    try:
        import resource
    except ImportError:  # not POSIX
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime + SECONDS + (letters + file_bytes) * SECONDS_A_LETTER) + 1
    memory = MEMORY_BYTES + BYTES_A_LETTER * letters + BYTES_A_BYTE * file_bytes
    limits = {resource.RLIMIT_CPU: seconds, resource.RLIMIT_AS: memory, resource.RLIMIT_CORE: 0}
    # After the first request nothing more is opened or written.
    limits |= {resource.RLIMIT_FSIZE: 0, resource.RLIMIT_NOFILE: 0}
    for kind, soft in limits.items():
        try:
            resource.setrlimit(kind, (soft, resource.getrlimit(kind)[1]))
        except (ValueError, OSError):  # macOS refuses some
            continue


class Holder:
    """The tokenizer, and what can be asked of it."""

    def __init__(self, content: str) -> None:
        import tokenizers

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
        return [(number, token.content, {name: getattr(token, name) for name in names}) for number, token in found]

    def size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=False)

    def number(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool, parse_special: bool) -> list[int]:
        self.backend.encode_special_tokens = not parse_special
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)


def main() -> None:
    holder: Any = None
    for line in sys.stdin:
        name, *words = json.loads(line)
        try:
            if name == "load":
                sys.path.extend(words[1])
                import tokenizers  # noqa: F401  # while files can be opened

                allow(0, len(words[0]))
                holder, answer = Holder(words[0]), None
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
