"""The command: python -m popengine.explain --prompt ... --out page.html

Turns one real run into a page that explains it: data, style and script in a single file that fetches nothing.
"""

import argparse
import json
from pathlib import Path
from typing import NoReturn

from popengine.command_line.flags import (
    add_checkpoint_flag,
    add_generation_flags,
    add_prompt_flags,
    read_prompt,
    sampling_fields,
)
from popengine.command_line.parser import OneLineParser
from popengine.command_line.setting_flags import pruning_settings
from popengine.command_line.start import load_with_warnings, run_as_command, start_pytorch
from popengine.engine.processes import is_one_of_several
from popengine.engine.sampling_settings import Sampling
from popengine.page.page import fitted, page
from weights.errors import InputError
from weights.output_file import check_output, write_output


def parser() -> argparse.ArgumentParser:
    """Make the command's parser."""
    flags = OneLineParser(
        "explain", "One real run as a page that explains it: one file for a browser.",
        'explain --prompt "Why is the sky blue?" --prune-ratio 0.4 --out page.html',
        "--prompt --image --out -n --prune-ratio --paper --dtype --weights --json",
    )
    add_checkpoint_flag(flags)
    add_prompt_flags(flags)
    flags.add_argument(
        "--out", type=Path, default=Path("explained.html"), metavar="FILE", help="(default: explained.html)"
    )
    add_generation_flags(flags, new_tokens=128)
    flags.set_defaults(compile=False)       # its dense and pruned times are compared: both compiled, or neither
    flags.add_argument("--json", action="store_true", help="also print the page's data as one JSON object")
    return flags


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run `python -m popengine.explain`."""
    run_as_command(run, parser(), arguments)


def run(flags: argparse.Namespace) -> None:
    """Record one run, and write its page."""
    if is_one_of_several():
        raise InputError("explain needs all channels in one process: start it without torchrun")
    prompt = read_prompt(flags.prompt)
    pruning, sampling = pruning_settings(flags), Sampling(**sampling_fields(flags))
    if pruning.leave_out:
        raise InputError("the page shows every layer: give no --leave-out")
    check_output(flags.out)
    start_pytorch(flags)
    from popengine.engine import loading
    from popengine.page.explained_run import explained_run

    engine = load_with_warnings(loading.load, flags)
    ids = engine.prompts.ids(prompt, raw=flags.raw, system_prompt=flags.system_prompt, images=flags.image)
    found = explained_run(engine, ids, flags.max_new_tokens, pruning, sampling, flags.image, flags.ignore_eos)
    found["model"] = Path(flags.ckpt).name if flags.ckpt else "SmolLM2-135M-Instruct"
    found = fitted(found)
    write_output(flags.out, page(found))
    if flags.json:
        print(json.dumps(found))
    elif not flags.quiet:
        left_out = found["layers_in_all"] - len(found["layers"])
        but = f"; {left_out} of {found['layers_in_all']} layers do not fit and are left out" if left_out else ""
        print(f"{flags.out}: {flags.out.stat().st_size / 1e6:.1f} MB, {len(found['frames'])} new tokens{but}")


if __name__ == "__main__":
    main()
