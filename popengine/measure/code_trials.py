"""Whether a program that a model wrote passes its tests: run in a process of its own (code_sandbox.py)."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from popengine.text.sandbox.process import environment
from weights.errors import InputError

SANDBOX = Path(__file__).resolve().with_name("code_sandbox.py")
# Of the clock: the sandbox itself allows fewer of processor time.
SECONDS = 6.0


def passes(program: str) -> bool:
    """Whether it runs to its end within the bounds; its tests are part of it."""
    with tempfile.TemporaryDirectory(prefix="popengine-trial-") as folder:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(SANDBOX)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, cwd=folder, env=environment() | {"PYTHONHASHSEED": "0"},
                start_new_session=True,
            )
        except OSError as error:
            raise InputError(f"Python could not be started for a program to be tried: {error}") from error
        try:
            said, _ = process.communicate(program.encode("utf-8", "surrogatepass"), SECONDS)
        except subprocess.TimeoutExpired:
            return False
        finally:
            end_all(process)
    return process.returncode == 0 and said == b"passed"


def end_all(process: subprocess.Popen[bytes]) -> None:
    """The process and what it started."""
    try:
        os.killpg(process.pid, 9)
    except (AttributeError, ProcessLookupError, PermissionError):   # not POSIX; all are gone
        process.kill()
    process.communicate()
