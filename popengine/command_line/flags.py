"""Flags that several commands share."""

import argparse
import sys
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from popengine.command_line.setting_flags import add_setting_flag, add_setting_flags
from popengine.engine.dtypes import FORMS
from popengine.engine.sampling_settings import Sampling
from weights.errors import InputError

# Bytes on standard input: no context holds more.
LARGEST_PROMPT = 64_000_000


def add_checkpoint_flag(flags: argparse.ArgumentParser) -> None:
    """Add --ckpt."""
    flags.add_argument(
        "--ckpt", metavar="DIR|HUB_ID|FILE.gguf", help="checkpoint (default: SmolLM2-135M-Instruct)"
    )


def add_prompt_flags(flags: argparse.ArgumentParser) -> None:
    """Add the flags of commands that answer one prompt."""
    flags.add_argument("--prompt", required=True, metavar="TEXT|-", help="the prompt; - reads it from standard input")
    flags.add_argument(
        "--image", action="append", default=[], metavar="PATH", help="an image of the prompt; may be repeated"
    )
    flags.add_argument("--system-prompt", metavar="TEXT", help="instructions before the prompt")
    flags.add_argument("--raw", action="store_true", help="encode the prompt without the chat template")
    flags.add_argument("--ignore-eos", action="store_true", help="continue after the end of the sequence")


def read_prompt(text: str) -> str:
    """Return the prompt; - reads it from standard input."""
    if text != "-":
        return text
    try:
        return sys.stdin.buffer.read(LARGEST_PROMPT).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt on standard input is not UTF-8 (at byte {error.start})") from None


def add_generation_flags(flags: argparse.ArgumentParser, new_tokens: int) -> None:
    """Add the flags of commands that generate."""
    flags.add_argument(
        "-n", "--max-new-tokens", type=int, default=new_tokens, metavar="N", help=f"(default: {new_tokens})"
    )
    sampling = flags.add_argument_group("sampling")
    for one in of_numbers():
        add_setting_flag(sampling, one, default=one.default)
    add_setting_flags(flags)
    machine = add_machine_flags(flags)
    machine.add_argument("--max-seq-len", type=int, metavar="N", help="a shorter context than the model's")
    machine.add_argument(
        "--compile", action="store_true", default=None, help="compile the decode step: only the first run waits for it"
    )
    flags.add_argument("--quiet", action="store_true", help="no statistics, no progress bars")


def add_stop_flag(flags: argparse.ArgumentParser) -> None:
    """Add --stop."""
    flags.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text; may be repeated"
    )


def sampling_fields(flags: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of Sampling from the flags."""
    return {one.name: getattr(flags, one.name) for one in of_numbers()} | {"stop": tuple(getattr(flags, "stop", ()))}


def of_numbers() -> list[Field[Any]]:
    """Return the fields of Sampling but for `stop`, which not every command has."""
    return [one for one in fields(Sampling) if one.name != "stop"]


def add_machine_flags(flags: argparse.ArgumentParser, several_forms: bool = False) -> argparse._ArgumentGroup:
    """Add dtype, device, weights and threads; several_forms: --weights takes several values."""
    machine = flags.add_argument_group("machine")
    machine.add_argument("--dtype", default="auto", metavar="auto|float32|bfloat16|float16", help="or bf16, fp16, fp32")
    machine.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:i]|mps")
    forms = {"nargs": "+", "default": ["auto"]} if several_forms else {"default": "auto"}
    machine.add_argument(
        "--weights", metavar="|".join(FORMS), help="format (auto: as stored in the checkpoint)", **forms
    )
    machine.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    return machine


def add_scoring_flags(flags: argparse.ArgumentParser) -> None:
    """Add the flags of commands that score a text."""
    flags.add_argument("--prompt-tokens", type=int, default=128, metavar="N")
    flags.add_argument("--score-tokens", type=int, default=128, metavar="N")
    flags.add_argument("--windows", type=int, default=12, metavar="N", help="number of windows, spread over the text")
    flags.add_argument("--seed", type=int, default=0, metavar="N", help="for the methods `random` and `tyr`")
    add_calibration_flags(flags)


def add_calibration_flags(flags: argparse.ArgumentParser) -> None:
    """Add the flags of methods that are calibrated on a text."""
    calibration = flags.add_argument_group("calibration (for methods that need one)")
    calibration.add_argument("--calibration-text", type=Path, metavar="FILE", help="calibrate on this text")
    calibration.add_argument(
        "--calibration-tasks", metavar="text|pictures", help="or on training questions of these tasks and their answers"
    )
    calibration.add_argument("--save-calibration", type=Path, metavar="FILE.safetensors")
    calibration.add_argument("--calibration", type=Path, metavar="FILE.safetensors", help="read a saved calibration")
