"""Checkpoints that need no path: the default one, SmolLM2-135M-Instruct, and the small ones that come along."""

from pathlib import Path

from weights.errors import InputError

DEFAULT_DIRECTORY = Path(__file__).resolve().parent / "default"
# In order of preference: the Hub's own files, else the same weights quantised to 4 bits in one file.
FROM_HUB = "SmolLM2-135M-Instruct"
FROM_PACKAGE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def default_checkpoint(directory: Path = DEFAULT_DIRECTORY) -> Path:
    """Where the default checkpoint is, a Hugging Face directory or a .gguf file; InputError when it was not fetched."""
    for path in (directory / FROM_HUB, directory / FROM_PACKAGE):
        # Both appear by a rename once they are complete, so being there means being whole.
        if path.exists():
            return path
    raise InputError(
        f"the default checkpoint is not in {directory}: run `make checkpoint`, or name a checkpoint with --ckpt (the "
        "Hub has it as HuggingFaceTB/SmolLM2-135M-Instruct)"
    )


def small_checkpoint(name: str) -> Path | None:
    """A small trained checkpoint, as `llava-tiny` or `weights/llava-tiny`, from whichever folder; None: not one."""
    for folder in Path(__file__).resolve().parent.glob("*-tiny"):
        if name in (folder.name, f"weights/{folder.name}"):
            return folder
    return None
