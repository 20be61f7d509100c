"""This machine as part of a name of kept files, and whether a kept file is the user's own."""

import contextlib
import hashlib
import os
import platform
import stat
from functools import lru_cache
from pathlib import Path

import torch


def not_trusted(path: Path) -> str | None:
    """Return why this file or folder may not be used; None if it may: it is the user's own."""
    try:
        about = path.lstat()
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if stat.S_ISLNK(about.st_mode):
        return f"{path} is a link"
    if hasattr(os, "geteuid") and about.st_uid != os.geteuid():
        return f"{path} belongs to another user"
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} may be written by other users"
    return None


def digest(content: bytes) -> str:
    """Return a digest of some bytes."""
    return hashlib.sha256(content).hexdigest()[:32]


def machine() -> list[str]:
    """Return what shapes compiled code beside the step: the processor, PyTorch, and the number of threads."""
    return [
        torch.__version__, torch.backends.cpu.get_cpu_capability(), platform.machine(), instructions(),
        f"{torch.get_num_threads()} threads", str(torch.are_deterministic_algorithms_enabled()),
    ]


def instructions() -> str:
    """Return the instructions that the processor has; the compiler makes use of all of them."""
    return about_processor("flags", "Features")


def processor() -> str:
    """Return the name of the processor's model; empty if the system does not tell."""
    return about_processor("model name")


@lru_cache(maxsize=2)
def about_processor(*fields: str) -> str:
    """Return the first line of the system's description of the processor that begins with one of these fields."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next((line for line in lines if line.startswith(fields)), "")
    return ""
