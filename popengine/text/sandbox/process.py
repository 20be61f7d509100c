"""This process's end of the child process that holds a checkpoint's tokenizer and renders its chat template."""

import json
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

from weights.errors import InputError

CHILD = Path(__file__).with_name("child.py")
WALL_SECONDS, WALL_SECONDS_PER_LETTER = 30.0, 1e-4      # limits on processor time come first, where the system has them


class Sandbox:
    """A child process with limits on time and memory, which can open nothing.

    A request past its limits ends the process. The next request starts a new one, which is told the `kept` ones first.

    package  "tokenizers" (content: the text of a tokenizer.json) or "sentencepiece" (a tokenizer.model in base64)
    where    how messages name the file; hint: what they add where it cannot be read
    about    what the child says of the tokenizer
    """

    def __init__(self, package: str, content: str, where: str, hint: str = "") -> None:
        self.where, self.hint, self.lock = where, hint, threading.Lock()
        self.process: subprocess.Popen[str] | None = None
        self.kept: list[tuple[Any, ...]] = []
        self.about = self.ask("load", package, content, keep=True)

    def ask(self, *request: Any, keep: bool = False) -> Any:
        """The tokenizer's answer to a request; keep: a new process has to be told it, too. InputError if it fails."""
        found = self.request(*request, keep=keep)
        if "answer" in found:
            return found["answer"]
        what, hint = ("reading it", self.hint) if request[0] == "load" else ("what was asked of it", "")
        if "ended" in found:
            raise InputError(f"{self.where}: {what} took more time or memory than any tokenizer needs{hint}")
        reason = found["error"].removeprefix("Cannot instantiate Tokenizer from string: ")
        raise InputError(f"{self.where}: its tokenizer cannot be built ({reason}){hint}")

    def request(self, *request: Any, keep: bool = False) -> dict[str, Any]:
        """{"answer": ...}, or {"error": why there is none}, with "ended" where that was the end of the process."""
        with self.lock:
            try:
                for one in [request] if self.process else [*self.kept, request]:
                    found = self.exchange(one)
                    if "error" in found:
                        self.stop()             # a new process knows nothing of what went wrong
                        break
            except BaseException:               # an answer that nobody waits for must not become the next one's
                self.stop()
                raise
        if keep and "answer" in found:
            self.kept.append(request)
        return found

    def exchange(self, request: tuple[Any, ...]) -> dict[str, Any]:
        try:
            process = self.process or self.start()
        except OSError as error:
            return {"error": f"Python could not be started for it: {error}"}
        line = json.dumps(request) + "\n"
        seconds = WALL_SECONDS + WALL_SECONDS_PER_LETTER * len(line)
        clock = threading.Timer(seconds, process.kill)
        if request[0] != "decode":              # a thread for every token would take as long as its text
            clock.start()
        try:
            process.stdin.write(line)           # type: ignore[union-attr]
            process.stdin.flush()               # type: ignore[union-attr]
            return json.loads(process.stdout.readline())        # type: ignore[union-attr]
        except (OSError, ValueError):
            late = f"it took longer than {seconds:.0f} seconds" if clock.finished.is_set() else ""
            return {"ended": True, "error": late or "it ran too long, nested too deeply or took too much memory"}
        finally:
            clock.cancel()

    def start(self) -> "subprocess.Popen[str]":
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(CHILD), json.dumps(search_path())], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="ascii", start_new_session=True,
            env=environment() | {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"},
        )
        self.finalizer = weakref.finalize(self, end, self.process)
        return self.process

    def stop(self) -> None:
        if self.process is not None:
            self.process = None
            self.finalizer()


def end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate()


def environment() -> dict[str, str]:
    """Of the environment only what Python itself may need to start and to tell the time."""
    kept = ("SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")
    return {name: os.environ[name] for name in kept if name in os.environ}


def search_path() -> list[str]:
    """Where packages lie, but for the current directory: files of their names may lie there."""
    folders = [entry for entry in sys.path if os.path.isabs(entry) and os.path.exists(entry)]
    return [folder for folder in folders if not os.path.samefile(folder, ".")]
