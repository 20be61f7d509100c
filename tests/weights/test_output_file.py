"""Files that are written: whole or not at all, never in the place of what is no file, and nothing left beside them."""

import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from weights.errors import InputError
from weights.output_file import append_output, check_output, make_folder, new_folder, replacing, write_output

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_new_file_and_one_in_the_place_of_another(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 250 + ".json")                         # as long as names may be
    write_output(path, "één\n")
    assert path.read_bytes() == "één\n".encode()
    write_output(path, b"\x00\xff")
    append_output(path, "more\n")
    assert path.read_bytes() == b"\x00\xffmore\n"
    append_output(tmp_path / "new", "line\n")
    assert (tmp_path / "new").read_text() == "line\n"
    assert {one.name for one in tmp_path.iterdir()} == {path.name, "new"}


def test_permissions_are_the_system_s_own_and_those_of_a_file_are_kept(tmp_path: Path) -> None:
    plain, kept = tmp_path / "plain", tmp_path / "kept"
    plain.touch()
    kept.touch()
    kept.chmod(0o640)
    for path in (tmp_path / "new", kept):
        write_output(path, "x")
    assert (tmp_path / "new").stat().st_mode == plain.stat().st_mode
    assert stat.S_IMODE(kept.stat().st_mode) == 0o640


def test_what_is_not_a_file_is_refused_and_stays(tmp_path: Path) -> None:
    pipe, device, folder, unix = tmp_path / "pipe", Path("/dev/null"), tmp_path / "folder", tmp_path / "socket"
    os.mkfifo(pipe)
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(unix))
    links = [tmp_path / "to_pipe", tmp_path / "to_device", tmp_path / "to_folder"]
    for link, target in zip(links, (pipe, device, folder), strict=True):
        link.symlink_to(target)
    before = sorted(tmp_path.iterdir())
    for path in (pipe, device, folder, unix, *links, Path("/"), Path(), tmp_path / ".."):
        for write in (check_output, lambda path: write_output(path, "x"), lambda path: append_output(path, "x")):
            with pytest.raises(InputError, match="is not a file, and is not replaced by one"):
                write(path)
    assert pipe.is_fifo() and unix.is_socket() and stat.S_ISCHR(device.stat().st_mode)
    assert sorted(tmp_path.iterdir()) == before and not [*folder.iterdir()]


@pytest.mark.parametrize(("name", "why"), [
    ("n" * 300, "name too long"), ("a\0b", "no file can have the name"), ("none/at/all", "No such file"),
    ("file/below", "Not a directory"), ("\ud800", "no file can have the name"), ("/proc/none", "cannot be written"),
])
def test_names_that_cannot_be_are_one_line(name: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for write in (check_output, lambda path: write_output(path, "x"), lambda path: append_output(path, "x")):
        with pytest.raises(InputError, match=f"(?i){why}") as raised:
            write(tmp_path / name)
        assert "\n" not in str(raised.value)
    assert [one.name for one in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "kept"


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    file, new, link, dangling = (tmp_path / name for name in ("elsewhere/file", "elsewhere/new", "link", "dangling"))
    file.write_text("old")
    link.symlink_to(file)
    dangling.symlink_to(new)
    write_output(link, "whole")
    write_output(dangling, "made")
    assert link.is_symlink() and dangling.is_symlink()
    assert (file.read_text(), new.read_text()) == ("whole", "made")
    ring = tmp_path / "ring"
    ring.symlink_to(ring)
    with pytest.raises(InputError, match="ring cannot be written"):
        write_output(ring, "x")


@contextmanager
def without_privileges() -> Iterator[Path]:
    """A folder, and a process that may do in it what its permissions say: root, who may all, becomes nobody."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        root = os.geteuid() == 0
        try:
            yield Path(folder)
        finally:
            os.seteuid(0) if root else None
            Path(folder).chmod(0o700)


def test_a_folder_or_a_file_that_is_read_only(tmp_path: Path) -> None:
    with without_privileges() as folder:
        (folder / "file").write_text("kept")
        (folder / "file").chmod(0o666)
        (folder / "read_only").write_text("kept")
        (folder / "read_only").chmod(0o444)
        folder.chmod(0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)
        for name in ("file", "read_only", "new"):
            for write in (check_output, lambda path: write_output(path, "x")):
                with pytest.raises(InputError, match=r"cannot be written: (Permission denied|it is read-only)"):
                    write(folder / name)
        with pytest.raises(InputError, match="new cannot be written: Permission denied"):
            make_folder(folder, "new")
        with pytest.raises(InputError, match="cannot be made: Permission denied"):
            make_folder(folder / "below")
        assert (folder / "file").read_text() == (folder / "read_only").read_text() == "kept"
        assert len([*folder.iterdir()]) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), ValueError])
def test_an_interrupted_write_leaves_what_was_there(error: BaseException, tmp_path: Path) -> None:
    for name in ("old", "new"):
        path = tmp_path / name
        if name == "old":
            path.write_text("kept")
        with pytest.raises((KeyboardInterrupt, ValueError)), replacing(path) as unfinished:
            unfinished.write_text("half of it")
            raise error
    assert [one.name for one in tmp_path.iterdir()] == ["old"] and (tmp_path / "old").read_text() == "kept"


KILLED = """
import os, signal, sys
from pathlib import Path
from weights.output_file import replacing
with replacing(Path(sys.argv[1])) as unfinished:
    unfinished.write_text("half of it")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_write_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    subprocess.run([sys.executable, "-c", KILLED, tmp_path / "file"], cwd=REPOSITORY, check=False, timeout=60)
    assert (tmp_path / "file").read_text() == "kept"


WRITES = re.compile(r"""write_text\(|write_bytes\(|save_file\(|savefig\(|\.rename\(|os\.replace\(|open\(.*"[wax]b?\"""")


def test_nothing_else_of_the_project_writes_files() -> None:
    """But for what is made in folders of its own: random checkpoints to time, /dev/null, /proc and standard output."""
    found = {
        path.name
        for package in ("popengine", "models", "weights") for path in (REPOSITORY / package).rglob("*.py")
        for line in path.read_text("utf-8").splitlines()
        if WRITES.search(line) and not re.search(r"unfinished|os.devnull|clear_refs|os\.dup\(1\)", line)
    }
    assert found == {"shapes.py", "output_file.py"}


def test_a_new_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    with new_folder(tmp_path / "made") as unfinished:
        (unfinished / "file").write_text("x")
        assert not (tmp_path / "made").exists()
    assert (tmp_path / "made" / "file").read_text() == "x"
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "other") as unfinished:
        (unfinished / "file").write_text("x")
        raise KeyboardInterrupt
    with new_folder(tmp_path / "made") as unfinished:               # another process was first: its folder stays
        (unfinished / "file").write_text("y")
    assert (tmp_path / "made" / "file").read_text() == "x"
    assert [one.name for one in tmp_path.iterdir()] == ["made"]
    with pytest.raises(InputError, match="cannot be written"), new_folder(tmp_path / "none" / "below"):
        pass
