"""Run a program that a model wrote, in a separate process: the program on stdin, "passed" or nothing on stdout.

`popengine.evaluation.code_trials` runs this file as a script, isolated (`python -I -S`), in an empty folder. It limits
what a program does by mistake. It does not stop a program written to break out; docs/threat_model.md lists the risks.
"""

import io
import os
import sys
from typing import Any

SECONDS, MEMORY_BYTES, OPEN_FILES = 3, 1_000_000_000, 32
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
# Prefixes of audit events that are refused. A program only needs to read modules.
REFUSED = ("os.", "shutil.", "subprocess.", "socket.", "ctypes.", "tempfile.", "pty.", "signal.", "mmap.", "sqlite3.")
ALLOWED = ("os.listdir", "os.scandir")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def limit_resources() -> None:
    """Limit processor time, memory and open files; no file may grow, no process may start (root may start some)."""
    try:
        import resource
    except ImportError:  # not POSIX: only the parent's time limit applies
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
    """Move into an empty network namespace, if the system allows users to create one."""
    import ctypes

    try:
        ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET)
    except (AttributeError, OSError, TypeError):  # not Linux
        return


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse writes and REFUSED events with a PermissionError, as an audit hook, which cannot be removed again."""
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
    if writes or (event.startswith(REFUSED) and event not in ALLOWED):
        raise PermissionError(f"a program under test may not do this: {event}")


def main() -> None:
    """Run the program from stdin and write "passed" if it ends without an error."""
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
