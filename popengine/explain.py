"""The command: python -m popengine.explain --prompt ... --out page.html

One real run becomes one page that explains it: data, style and script in a single file that fetches nothing.
"""

import argparse
import base64
import hashlib
import json
import math
from pathlib import Path
from typing import Any, NoReturn

from popengine.command import (
    OneLineParser,
    add_checkpoint_flag,
    add_generation_flags,
    generation_settings,
    load_with_warnings,
    run_as_command,
    start_pytorch,
)
from popengine.generate import read_prompt
from popengine.processes import is_one_of_several
from weights.errors import InputError
from weights.output_file import check_output, write_output

PARTS = Path(__file__).parent / "page"
MOST_BYTES = 5_000_000


def parser() -> argparse.ArgumentParser:
    flags = OneLineParser(
        "explain", "One real run as a page that explains it: one file, to be opened in a browser.",
        'explain --prompt "Why is the sky blue?" --prune-ratio 0.4 --out page.html',
        "--prompt --image --out -n --prune-ratio --paper --dtype --weights --json",
    )
    add_checkpoint_flag(flags)
    flags.add_argument("--prompt", required=True, metavar="TEXT|-", help="the prompt; - reads it from standard input")
    flags.add_argument(
        "--image", action="append", default=[], metavar="PATH", help="an image the prompt is about; may be repeated"
    )
    flags.add_argument(
        "--out", type=Path, default=Path("explained.html"), metavar="FILE", help="(default: explained.html)"
    )
    flags.add_argument("--system-prompt", metavar="TEXT", help="what the model is told first")
    flags.add_argument("--raw", action="store_true", help="the prompt as it stands, without the chat template")
    flags.add_argument("--ignore-eos", action="store_true", help="go on after the end of the sequence")
    add_generation_flags(flags, new_tokens=128)
    flags.add_argument("--json", action="store_true", help="also print what the page is drawn from, as one JSON object")
    return flags


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry of `python -m popengine.explain`."""
    run_as_command(run, parser(), arguments)


def run(flags: argparse.Namespace) -> None:
    if is_one_of_several():
        raise InputError("a page is of a run in one process, which holds all channels: start explain without torchrun")
    prompt = read_prompt(flags.prompt)
    pruning = generation_settings(flags)
    if pruning.leave_out:
        raise InputError("the page shows every layer: give no --leave-out")
    check_output(flags.out)
    start_pytorch(flags)
    from popengine import loading
    from popengine.measure.explained_run import explained_run
    from popengine.sampling import Sampling

    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p, flags.seed)
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


def fitted(found: dict[str, Any]) -> dict[str, Any]:
    """The run with as many layers as its page has room for, evenly spread. InputError where not even one fits."""
    layers, room = found["layers"], MOST_BYTES - len(page(found | {"layers": []}).encode())
    weights = [len(json.dumps(layer)) + len(", ") for layer in layers]
    for count in range(len(layers), 0, -1):
        chosen = sorted({round(index * (len(layers) - 1) / max(1, count - 1)) for index in range(count)})
        if sum(weights[index] for index in chosen) <= room:
            return found | {"layers": [layers[index] for index in chosen]}
    over = weights[0] - room
    raise InputError(
        f"the page would have {(MOST_BYTES + over) / 1e6:.1f} MB with one layer alone, and {MOST_BYTES / 1e6:g} MB is "
        f"the most: {what_would_fit(found, over)} would fit"
    )


def what_would_fit(found: dict[str, Any], over: int) -> str:
    """Fewer new tokens or fewer pictures, how many, for a page of one layer that has so many bytes too many."""
    steps = [one | {"drawings": []} for one in found["layers"][0]["networks"]]
    of_pictures = [found["pictures"], [one for one in found["prompt"] if one["image"]]]
    tokens, pictures = len(found["frames"]), len(found["pictures"])
    each_token = len(json.dumps([found["frames"], found["experts"], steps])) / tokens
    each_picture = len(json.dumps(of_pictures)) / max(1, pictures)
    fewer = [
        f"{math.floor(count - over / each)} of the {count} {what}"
        for count, each, what in ((tokens, each_token, "new tokens"), (pictures, each_picture, "pictures"))
        if count * each > over + each
    ]
    return "at most " + " or ".join(fewer) if fewer else "a shorter prompt or a narrower model"


def page(found: dict[str, Any]) -> str:
    """The page of a recorded run. Its text is data to the script: `<` is written so that none of it is markup."""
    template, style, script = ((PARTS / f"explain.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    digests = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for name, text in (("STYLE_DIGEST", style), ("SCRIPT_DIGEST", script))
    }
    data = json.dumps(found).replace("<", "\\u003c")
    for name, text in {**digests, "STYLE": style, "SCRIPT": script, "DATA": data}.items():
        template = template.replace(f"%{name}%", text, 1)
    return template


if __name__ == "__main__":
    main()
