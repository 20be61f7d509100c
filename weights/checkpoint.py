"""Opening a checkpoint from any source: a Hugging Face directory, a .gguf file, or the id of a Hub repository."""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from weights.default_checkpoint import small_checkpoint
from weights.errors import InputError, one_line
from weights.gguf_file import GGUFCheckpoint
from weights.hub import download, is_hub_id
from weights.json_files import JsonObject, shown
from weights.mapped_file import contents_digest
from weights.safetensors_files import SafetensorsCheckpoint

__all__ = [
    "Checkpoint", "GGUFCheckpoint", "SafetensorsCheckpoint", "checkpoint_dtype", "fingerprint", "open_checkpoint",
]

# Common interface: path, config, generation_config, entries, mapped, read(name), read_groups(name), stored_bytes(name),
# release(name), close(), and `with`.
Checkpoint = SafetensorsCheckpoint | GGUFCheckpoint

COMPUTING_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Read a checkpoint's configuration and the shapes of its tensors; no tensor is read yet.

    source  a directory as `save_pretrained` writes it, or a .gguf file. If no such path exists: the name of a small
            checkpoint in this repository, or the id (`organisation/name`) of a Hub repository. Its files are
            downloaded with a progress bar unless they are in the cache
    errors  InputError: no such path or repository, no network, or anything wrong with the files themselves
    """
    if os.path.isdir(source):
        return SafetensorsCheckpoint(Path(source))
    if os.path.exists(source):
        return open_file(Path(source))
    if small := small_checkpoint(str(source)):
        return SafetensorsCheckpoint(small)
    if not isinstance(source, Path) and is_hub_id(source):
        return SafetensorsCheckpoint(download(source))
    raise InputError(
        f"{one_line(str(source), 200)!r}: no such path, and not the id of a Hub repository (organisation/name) either"
    )


def open_file(path: Path) -> GGUFCheckpoint:
    """Open a .gguf file. Raises InputError for any other file, with advice."""
    if path.suffix == ".gguf":
        return GGUFCheckpoint(path)
    if path.name.endswith((".safetensors", ".json")):
        raise InputError(f"{path} is one file of a checkpoint: name its folder, {path.parent}")
    raise InputError(f"{path} is not a checkpoint: name a Hugging Face directory, a .gguf file or a Hub id")


def fingerprint(checkpoint: Checkpoint) -> str:
    """Hash names, shapes and some bytes of all tensors, to distinguish checkpoints however they are loaded."""
    made = hashlib.sha256()
    for name, entry in sorted(checkpoint.entries.items()):
        stored = checkpoint.stored_bytes(name)
        made.update(f"{name} {entry.shape} {len(stored)} ".encode())
        made.update(torch.cat([stored[:64], stored[-64:]]).numpy().tobytes())
        checkpoint.release(name)
    return made.hexdigest()[:32]


def description_digest(checkpoint: Checkpoint) -> str:
    """Hash everything beside the weights: config, tokenizer, chat template, settings of generation and of pictures."""
    made = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    if isinstance(checkpoint, GGUFCheckpoint):
        made.update(f"{checkpoint.tokenizer_json} {checkpoint.chat_template}".encode())
        return made.hexdigest()[:32]
    for path in sorted(checkpoint.path.iterdir()):
        if path.suffix in (".json", ".jinja", ".model", ".txt") and path.is_file():
            made.update(f"{path.name} {contents_digest(path)}".encode())
    return made.hexdigest()[:32]


def checkpoint_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype of `--dtype auto`: the config's dtype or torch_dtype, else the dtype of most elements.

    Raises InputError unless it is float32, bfloat16 or float16.
    """
    config = JsonObject(checkpoint.config, str(checkpoint.path))
    for fields in (config, config.section("text_config")):
        name = fields.text("dtype", fields.text("torch_dtype", "auto")).removeprefix("torch.")
        if name != "auto":
            break
    else:
        elements: Counter[torch.dtype] = Counter()
        for entry in checkpoint.entries.values():
            elements[entry.dtype] += entry.elements
        name = str(elements.most_common(1)[0][0]).removeprefix("torch.") if elements else "float32"
    dtype: Any = getattr(torch, name, None)     # PyTorch also has the names "half" and "float"
    if dtype not in COMPUTING_DTYPES.values():
        choices = ", ".join(COMPUTING_DTYPES)
        raise InputError(f"{checkpoint.path} is in the dtype {shown(name)}; choose one of {choices} with --dtype")
    return dtype
