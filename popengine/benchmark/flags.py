"""Checks of `popengine bench` before the first engine is loaded. Imports no PyTorch."""

import argparse
import os
from pathlib import Path

from popengine.studies.settings import PruningSettings
from weights.errors import InputError
from weights.output_file import check_output

PEERS = ("transformers", "llama.cpp")
# Most tokens, sequences or rounds.
MOST = 1_000_000
DTYPES = ("float32", "bfloat16", "float16")


def check(flags: argparse.Namespace) -> None:
    """Raise InputError for flags that would otherwise fail after hours."""
    flags.peers = peers(flags)
    for name in ("prompt_tokens", "new_tokens", "batch", "rounds"):
        least, value = 2 if name == "new_tokens" else 1, getattr(flags, name)
        if not least <= value <= MOST:
            allowed = f"at least {least}" if value < least else f"at most {MOST}"
            raise InputError(f"{name.replace('_', ' ')} must be {allowed}, not {value}")
    for rule in flags.rule:
        PruningSettings(rule=rule)
    for one in flags.leave_out:
        PruningSettings(leave_out=one)
    for one in flags.prefill_skip:
        PruningSettings(prefill_skip=one, boundary_tokens=flags.boundary_tokens)
    for one in flags.visual_tokens:
        PruningSettings(
            visual_tokens=one, visual_tokens_by=flags.visual_tokens_by, visual_tokens_layer=flags.visual_tokens_layer
        )
    if not 0 <= flags.pictures <= MOST or (flags.pictures and (flags.shape or flags.peers)):
        raise InputError("pictures must be a number of at least 0, and are for a checkpoint's own timing alone")
    if flags.visual_tokens and not flags.pictures:
        raise InputError("--visual-tokens leaves out tokens of pictures: give --pictures a number of them")
    processors = os.cpu_count() or 1
    if flags.threads is not None and not 1 <= flags.threads <= processors:
        raise InputError(f"threads must be at least 1, not {flags.threads}, and at most the {processors} processors")
    if flags.shape and flags.ckpt:
        raise InputError("give a checkpoint or a shape, not both")
    for peer in flags.peers:
        if peer not in PEERS:
            raise InputError(f"there is no peer named {peer!r}; peers are {', '.join(PEERS)}")
    if flags.json:
        check_output(Path(flags.json))
    for dtype in flags.dtype:
        if dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")


def peers(flags: argparse.Namespace) -> list[str]:
    """Return the names in --against."""
    return [name.strip() for name in flags.against.split(",") if name.strip()]
