"""Parent side of the child process that holds a checkpoint's tokenizer and renders its chat template."""

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
WALL_SECONDS, WALL_SECONDS_PER_LETTER = 30.0, 1e-4      # limits on processor time come first, if the system has them


class Sandbox:
    """A child process with limits on time and memory that can open no file.

    A request beyond its limits ends the process. The next request starts a new one and first repeats the `kept` ones.

    package  "tokenizers" (content: the text of a tokenizer.json) or "sentencepiece" (a tokenizer.model in base64)
    where    name of the file in messages; hint: their end if the file cannot be read
    about    the child's description of the tokenizer
    """

    def __init__(self, package: str, content: str, where: str, hint: str = "") -> None:
        self.where, self.hint, self.lock = where, hint, threading.Lock()
        self.process: subprocess.Popen[str] | None = None
        self.kept: list[tuple[Any, ...]] = []
        self.about = self.ask("load", package, content, keep=True)

    def ask(self, *request: Any, keep: bool = False) -> Any:
        """Return the answer to a request; keep: repeat it to a new process. Raises InputError if it fails."""
        found = self.request(*request, keep=keep)
        if "answer" in found:
            return found["answer"]
        what, hint = ("reading it", self.hint) if request[0] == "load" else ("a request to it", "")
        if "ended" in found:
            raise InputError(f"{self.where}: {what} took more time or memory than any tokenizer needs{hint}")
        reason = found["error"].removeprefix("Cannot instantiate Tokenizer from string: ")
        raise InputError(f"{self.where}: its tokenizer cannot be built ({reason}){hint}")

    def request(self, *request: Any, keep: bool = False) -> dict[str, Any]:
        """Return {"answer": ...} or {"error": reason}, with "ended" if the process has ended."""
        with self.lock:
            try:
                for one in [request] if self.process else [*self.kept, request]:
                    found = self.exchange(one)
                    if "error" in found:
                        self.stop()             # a new process has no trace of the failure
                        break
            except BaseException:               # an abandoned answer must not be taken for the next one
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
        if request[0] != "decode":              # a thread per token would take as long as decoding
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
    """Kill the child process."""
    process.kill()
    process.communicate()


def environment() -> dict[str, str]:
    """Return the part of the environment that Python needs to start and to tell the time."""
    kept = ("SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")
    return {name: os.environ[name] for name in kept if name in os.environ}


def search_path() -> list[str]:
    """Return the package folders, except the current directory, which may contain files of the same names."""
    folders = [entry for entry in sys.path if os.path.isabs(entry) and os.path.exists(entry)]
    return [folder for folder in folders if not os.path.samefile(folder, ".")]
