"""Output files: the only way to write a result to a path, completely or not at all.

A path may be a new name or lead to a regular file. A folder, a pipe, a socket or a device is never replaced. A link is
followed: its target is replaced, and the link stays.
"""

import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weights.errors import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new, empty file beside `path` to write to. At the end of the block it replaces `path` in one step.

    If the block fails or is interrupted, the new file is removed and `path` stays unchanged. Raises InputError if
    `path` is neither a regular file nor a new name, or if it cannot be written.
    """
    target, mode = target_of(path)
    try:
        unfinished = new_file_beside(target)
        try:
            yield unfinished
            if mode is not None:
                unfinished.chmod(mode)
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_be_written(path, error) from None


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a new, empty folder beside `path` to fill. At the end of the block it is renamed to `path` in one step.

    If another process has made `path` meanwhile, that folder stays. If the block fails or is interrupted, the new
    folder is removed. Raises InputError if it cannot be written.
    """
    unfinished = path.with_name(f".unfinished-{secrets.token_hex(8)}")
    try:
        try:
            unfinished.mkdir()
            yield unfinished
            if not path.exists():
                unfinished.rename(path)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise cannot_be_written(path, error) from None


def write_output(path: Path, content: str | bytes) -> None:
    """Write a whole file, text as UTF-8. Raises InputError as `replacing` does."""
    data = content if isinstance(content, bytes) else content.encode("utf-8")
    with replacing(path) as unfinished:
        unfinished.write_bytes(data)


def append_output(path: Path, text: str) -> None:
    """Append lines to a file. An interruption may tear the last line. Raises InputError as `replacing` does."""
    target, _ = target_of(path)
    try:
        with target.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise cannot_be_written(path, error) from None


def check_output(path: Path) -> None:
    """Raise InputError if `write_output` would. Commands call this before the work whose results go there."""
    target, _ = target_of(path)
    try:
        new_file_beside(target).unlink()
    except OSError as error:
        raise cannot_be_written(path, error) from None


def make_folder(folder: Path, *names: str) -> None:
    """Make a folder. Raises InputError if this fails, or if files of these names cannot be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: the output folder cannot be made: {error.strerror}") from None
    for name in names:
        check_output(folder / name)


def target_of(path: Path) -> tuple[Path, int | None]:
    """Return the file that `path` leads to through links, and its permissions; None: it does not exist yet."""
    try:
        target = Path(os.path.realpath(path))
        status = target.stat()
    except FileNotFoundError:
        return target, None
    except OSError as error:
        raise cannot_be_written(path, error) from None
    except ValueError:                  # a NUL, or a character that the system cannot encode
        raise InputError(f"no file can have the name {str(path)!r}") from None
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is not a file, and is not replaced by one")
    if not os.access(target, os.W_OK):
        raise InputError(f"{path} cannot be written: it is read-only")
    return target, stat.S_IMODE(status.st_mode)


def new_file_beside(target: Path) -> Path:
    # The name is short, because that of the target may have the maximum length.
    """Create a new, empty file in the folder of `target`."""
    unfinished = target.with_name(f".unfinished-{secrets.token_hex(8)}")
    os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return unfinished


def cannot_be_written(path: Path, error: OSError) -> InputError:
    """Return the InputError for a failed write."""
    return InputError(f"{path} cannot be written: {error.strerror or error}")
