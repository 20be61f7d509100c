"""Sandboxes forked from a process that has imported what they need: starting one anew takes six times an engine's load.

Each is still a process of its own that runs child.py's `main` under its limits.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import weakref
from typing import Any

from popengine.text.sandbox.process import CHILD, Sandbox, end, environment, search_path

# A request is a number of 4 bytes: 0, with two descriptors, for a new process, whose number is the answer, else that of
# the process to kill. Only then is it waited for, so that no other process can have its number.
SERVER = """
import importlib.util, os, signal, socket, sys
spec = importlib.util.spec_from_file_location("child", sys.argv[2])
child = importlib.util.module_from_spec(spec)
spec.loader.exec_module(child)
import tokenizers
control = socket.socket(fileno=0)
while True:
    request, descriptors, _, _ = socket.recv_fds(control, 4, 2)
    if not request:
        break
    number = int.from_bytes(request, "little")
    if number:
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        continue
    number = os.fork()
    if number == 0:
        os.setsid()
        control.detach()
        os.dup2(descriptors[0], 0)
        os.dup2(descriptors[1], 1)
        os.closerange(3, 100)
        sys.stdin, sys.stdout = open(0, encoding="ascii"), open(1, "w", encoding="ascii")
        child.main()
        os._exit(0)
    for descriptor in descriptors:
        os.close(descriptor)
    control.send(number.to_bytes(4, "little"))
"""


class ForkServer:
    """The process that forks them, started for the first one."""

    def __init__(self) -> None:
        self.lock = threading.RLock()   # a Sandbox may be collected, and its process ended, amid a request
        self.control: socket.socket | None = None

    def send(self, number: int, *descriptors: int) -> int:
        """A request, and the answer to 0."""
        with self.lock:
            if self.control is None:
                self.control, theirs = socket.socketpair()
                self.process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", SERVER, json.dumps(search_path()), str(CHILD)], stdin=theirs,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
                    env=environment() | {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"},
                )
                theirs.close()
            socket.send_fds(self.control, [number.to_bytes(4, "little")], list(descriptors))
            if number:
                return 0
            made = int.from_bytes(self.control.recv(4), "little")
            assert made, "the process that forks sandboxes has ended"
            return made


class Forked:
    """What a Sandbox uses of its process."""

    def __init__(self, server: ForkServer) -> None:
        self.server = server
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        self.pid = server.send(0, theirs_in, theirs_out)
        os.close(theirs_in)
        os.close(theirs_out)
        self.stdin, self.stdout = os.fdopen(ours_out, "w", encoding="ascii"), os.fdopen(ours_in, encoding="ascii")
        self.killed = False

    def kill(self) -> None:
        if not self.killed:             # another process may have its number now
            self.killed = True
            self.server.send(self.pid)

    def communicate(self) -> None:
        """Close both ends of a process that was killed."""
        for one in (self.stdin, self.stdout):
            with contextlib.suppress(OSError):
                one.close()


SERVER_OF_ALL = ForkServer()


def start_forked(sandbox: Sandbox) -> Any:
    """In place of Sandbox.start."""
    sandbox.process = Forked(SERVER_OF_ALL)  # type: ignore[assignment]
    sandbox.finalizer = weakref.finalize(sandbox, end, sandbox.process)
    return sandbox.process
