"""A file mapped into memory, whose pages are given back after use."""

import hashlib
import mmap
import os
import stat
import warnings
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from weights.errors import InputError

# Bytes that Linux maps at most around a touched one, a multiple of the page size.
MAPPED_AT_ONCE = 1 << 21


class MappedFile:
    """The bytes of a file, read from disk on access. Read-only."""

    def __init__(self, path: Path) -> None:
        with open_binary(path) as file:
            self.size = file.seek(0, 2)
            if self.size == 0:
                raise InputError(f"{path} is empty")
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def view(self, begin: int, end: int) -> Tensor:
        """Return bytes `begin` to `end` as a uint8 tensor on the file's own pages, read-only."""
        if begin == end:
            return torch.empty(0, dtype=torch.uint8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch warns that the buffer is read-only
            return torch.frombuffer(self.data, dtype=torch.uint8, count=end - begin, offset=begin)

    def release(self, begin: int, end: int) -> None:
        """Give back the pages between two bytes, which otherwise count as this process's memory.

        Pages around them that the system has mapped too are included. Pages still in use are mapped again.
        """
        start, stop = begin // MAPPED_AT_ONCE * MAPPED_AT_ONCE, -(-end // MAPPED_AT_ONCE) * MAPPED_AT_ONCE
        if end > begin and hasattr(mmap, "MADV_DONTNEED"):  # Windows has no such call
            self.data.madvise(mmap.MADV_DONTNEED, start, min(stop, self.size) - start)


def open_binary(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raises InputError; for a pipe, a device or a socket without waiting for it."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            return open(path, "rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:         # a NUL, or a character that the system cannot encode
        raise InputError(f"no file can have the name {str(path)!r}") from error
    raise InputError(f"{path} is not a file, but a {'directory' if stat.S_ISDIR(mode) else 'pipe or device'}")


def read_bytes(path: Path, most: int) -> bytes:
    """Read a whole file of at most `most` bytes. Raises InputError."""
    with open_binary(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise InputError(f"{path} has more than {most} bytes, which no file of its kind has")
    return data


def read_text(path: Path, most: int) -> str:
    """Read a whole file of UTF-8 text, at most `most` bytes. Raises InputError."""
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (at byte {error.start})") from error


def contents_digest(path: Path) -> str:
    """Hash a file's contents block by block, so that files of any size can be compared."""
    made = hashlib.sha256()
    with path.open("rb") as file:
        while stretch := file.read(1 << 20):
            made.update(stretch)
    return made.hexdigest()[:16]
