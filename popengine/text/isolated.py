"""A checkpoint's tokenizer in a process of its own (tokenizer_sandbox.py): what can be asked of it."""

import base64
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from popengine.text.scripts import environment, package_folders
from weights.errors import InputError
from weights.json_files import lfs_hint

SANDBOX = Path(__file__).resolve().with_name("tokenizer_sandbox.py")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class Isolated:
    """A process that holds a tokenizer, with bounds on time and memory.

    A request past the bounds ends the process, and is an InputError; the next one finds a new process, which is told
    all that the last one was told. where: how messages call the file
    """

    def __init__(self, package: str, content: str, where: str) -> None:
        self.where = where
        self.told: list[list[Any]] = [["load", package, content, package_folders(package)]]
        self.process: subprocess.Popen[str] | None = None
        self.lock = threading.Lock()

    def ask(self, *request: Any, keep: bool = False) -> Any:
        """One request and its answer. keep: a new process has to be told it, too"""
        with self.lock:
            try:
                if self.process is None:
                    self.start()
                answer = self.exchange(request)
            except BaseException:
                self.stop()                     # an answer that nobody waits for must not become the next one's
                raise
        if keep:
            self.told.append(list(request))
        return answer

    def start(self) -> None:
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(SANDBOX)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, encoding="ascii", start_new_session=True,
                env=environment() | {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"},
            )
        except OSError as error:
            raise InputError(f"{self.where}: Python could not be started for it: {error}") from error
        self.finalizer = weakref.finalize(self, end, self.process)
        for request in self.told:
            self.exchange(request)

    def exchange(self, request: Sequence[Any]) -> Any:
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            found = json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            what = "reading it" if request[0] == "load" else "what was asked of it"
            raise InputError(f"{self.where}: {what} took more time or memory than any tokenizer needs") from None
        if "error" in found:
            reason = found["error"].removeprefix("Cannot instantiate Tokenizer from string: ")
            raise InputError(f"{self.where}: its tokenizer cannot be built ({reason})")
        return found["answer"]

    def stop(self) -> None:
        if self.process is not None:
            self.process = None
            self.finalizer()


class IsolatedTokenizer(Isolated):
    """That of a tokenizer.json. content: the file's text"""

    def __init__(self, content: str, where: str) -> None:
        super().__init__("tokenizers", content, where)
        self.added: dict[int, AddedToken] | None = None
        try:
            self.size: int = self.ask("size")       # of the vocabulary, without added tokens
        except InputError as error:
            raise InputError(f"{error}{lfs_hint(content[:100].encode())}") from None

    def add_tokens(self, tokens: Sequence[AddedToken], special: bool = False) -> None:
        told = [(token.content, {name: getattr(token, name) for name in FLAGS}) for token in tokens]
        if told:
            self.ask("add", told, special, keep=True)
            self.added = None

    def added_tokens(self) -> dict[int, AddedToken]:
        if self.added is None:
            self.added = {number: AddedToken(content, **flags) for number, content, flags in self.ask("added")}
        return self.added

    def token_to_id(self, token: str) -> int | None:
        return self.ask("number", token)

    def encode(self, text: str, add_special_tokens: bool, parse_special: bool, begins: bool) -> list[int]:
        return self.ask("encode", text, add_special_tokens, parse_special, begins)

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self.ask("decode", ids, skip_special_tokens)


class IsolatedSentencePiece(Isolated):
    """That of a tokenizer.model.

    texts           every piece, by its id
    controls        ids of control tokens and the unknown one; byte_ids: of raw bytes
    bos_id, eos_id  -1 where the model has none
    """

    def __init__(self, content: bytes, where: str) -> None:
        super().__init__("sentencepiece", base64.b64encode(content or b"\0").decode(), where)
        try:
            found = self.ask("pieces")
        except InputError as error:
            raise InputError(
                f"{error}; a checkpoint whose tokenizer.model is not sentencepiece's needs tokenizer.json beside "
                f"it{lfs_hint(content)}"
            ) from None
        self.texts: list[str] = found["texts"]
        self.controls: list[int] = found["controls"]
        self.byte_ids: list[int] = found["bytes"]
        self.bos_id: int = found["bos"]
        self.eos_id: int = found["eos"]

    def encode(self, text: str) -> list[int]:
        return self.ask("encode", text)


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
