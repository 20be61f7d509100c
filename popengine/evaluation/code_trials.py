"""Test of a program that a model wrote, run in a separate process (code_sandbox.py)."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from popengine.text.sandbox.process import environment
from weights.errors import InputError

SANDBOX = Path(__file__).resolve().with_name("code_sandbox.py")
# Wall-clock limit; the sandbox itself has a lower limit on processor time.
SECONDS = 6.0


def passes(program: str) -> bool:
    """Return True if a program, which includes its tests, runs to its end within the limits."""
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
    """Kill the process and everything it started."""
    try:
        os.killpg(process.pid, 9)
    except (AttributeError, ProcessLookupError, PermissionError):   # not POSIX, or all have ended
        process.kill()
    process.communicate()
