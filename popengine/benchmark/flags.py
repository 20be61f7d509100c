"""Flags of `popengine bench` for studies, and checks before the first engine is loaded. Imports no PyTorch."""

import argparse
from pathlib import Path

from models.pruning.settings import share
from popengine.studies.settings import PruningSettings
from weights.errors import InputError
from weights.output_file import check_output

PEERS = ("transformers", "llama.cpp")
# Most tokens, sequences or rounds.
MOST = 1_000_000
DTYPES = ("float32", "bfloat16", "float16")


def add_study_flags(flags: argparse.ArgumentParser) -> None:
    """Add the flags of methods and settings that are timed besides."""
    timed = flags.add_argument_group("also timed")
    timed.add_argument(
        "--method", nargs="+", default=[], metavar="M",
        help="also time these methods of score and compare at every ratio: shortgpt, probe-pruning, ...",
    )
    timed.add_argument(
        "--calibration", type=Path, metavar="FILE.safetensors", help="for methods that are calibrated on a text"
    )
    timed.add_argument(
        "--leave-out", nargs="+", default=[], metavar="LAYERS",
        help="also time every setting without these layers or half-layers, like 20-22+25.attention (default: no)",
    )
    timed.add_argument(
        "--input-sparsity", nargs="+", default=[], metavar="SHARES",
        help="also time dense steps and rule pop with products that leave out inputs, a share like 0.3 (default: no)",
    )
    timed.add_argument("--input-score", default="wina", metavar="wina|teal", help="(default: wina)")
    timed.add_argument(
        "--prefill-skip", type=share, nargs="+", default=[], metavar="SHARE",
        help="also time every setting with prompts that skip the deepest layers, a share like 1/3 (default: no)",
    )
    timed.add_argument(
        "--boundary-tokens", type=int, default=1, metavar="K",
        help="number of last prompt tokens that run through the skipped layers (default: 1)",
    )
    timed.add_argument(
        "--pictures", type=int, default=0, metavar="N", help="pictures before every prompt (default: 0)"
    )
    timed.add_argument(
        "--visual-tokens", type=share, nargs="+", default=[], metavar="SHARE|N",
        help="also time every setting with this share or number of tokens per picture (default: no)",
    )
    timed.add_argument("--visual-tokens-by", default="attention", metavar="attention|diversity")
    timed.add_argument("--visual-tokens-layer", type=int, default=2, metavar="K", help="for attention (default: 2)")


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
    for one in flags.input_sparsity:
        PruningSettings(input_sparsity=one, input_score=flags.input_score)
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
    if flags.products and flags.device != "cpu":
        raise InputError(f"--products times products of a CPU, not of {flags.device}")
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
