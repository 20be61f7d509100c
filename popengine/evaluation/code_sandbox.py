"""Runs a program that a model wrote, in a process of its own: the program on stdin, "passed" or nothing on stdout.

`popengine.evaluation.code_trials` runs this file as a script, isolated (`python -I -S`), in an empty folder. It bounds
what a program does by mistake. It is no jail for one that is written to break out: docs/threat_model.md says what is
left.
"""

import io
import os
import sys
from typing import Any

SECONDS, MEMORY_BYTES, OPEN_FILES = 3, 1_000_000_000, 32
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
# What Python reports before it happens. Reading modules is all that a program needs.
REFUSED = ("os.", "shutil.", "subprocess.", "socket.", "ctypes.", "tempfile.", "pty.", "signal.", "mmap.", "sqlite3.")
ALLOWED = ("os.listdir", "os.scandir")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def limit_resources() -> None:
    """Processor time, memory, open files; no file grows, no process starts (root may still start some)."""
    try:
        import resource
    except ImportError:  # not POSIX: the time limit of the parent remains
        return
    limits = {
        resource.RLIMIT_CPU: SECONDS, resource.RLIMIT_AS: MEMORY_BYTES, resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0, resource.RLIMIT_NPROC: 0,
    }
    for kind, most in limits.items():
        try:
            resource.setrlimit(kind, (most, most))
        except (ValueError, OSError):  # macOS refuses some
            continue


def leave_the_network() -> None:
    """Into a network that has nothing in it, where the system lets its users have one of their own."""
    import ctypes

    try:
        ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET)
    except (AttributeError, OSError, TypeError):  # not Linux
        return


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: nothing can take it out again."""
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
    if writes or (event.startswith(REFUSED) and event not in ALLOWED):
        raise PermissionError(f"a program under test may not do this: {event}")


def main() -> None:
    program, out = sys.stdin.read(), sys.stdout
    leave_the_network()
    limit_resources()
    sys.stdin, sys.stdout, sys.stderr = io.StringIO(), io.StringIO(), io.StringIO()
    sys.addaudithook(refuse)
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    out.write("passed")
    out.flush()


if __name__ == "__main__":
    main()
