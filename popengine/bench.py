"""Time POP, the dense network and optionally other engines, in turns.

    python -m popengine.bench -p 128 -n 64 --prune-ratio 0 0.2 0.4 --compile --against transformers,llama.cpp

popengine/benchmark/benchmark.py describes the method. Compare figures within one run only, never between runs.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from popengine.benchmark.flags import PEERS, add_study_flags, check
from popengine.command_line.flags import add_checkpoint_flag
from popengine.command_line.parser import OneLineParser
from popengine.command_line.setting_flags import add_paper_flag
from popengine.command_line.start import run_as_command, start_pytorch
from popengine.engine.dtypes import dtype_name
from popengine.studies.settings import RULE_NAMES
from weights.output_file import write_output


def parser() -> argparse.ArgumentParser:
    """Make the command's parser."""
    flags = OneLineParser(
        "bench", __doc__.splitlines()[0],
        "bench --compile --against transformers,llama.cpp\nbench --shape llama-3.2-1b --dtype bfloat16\n"
        "bench --products --dtype bfloat16",
        "--shape -p -n --prune-ratio --dtype --weights --compile --against --rounds --json",
    )
    add_checkpoint_flag(flags)
    flags.add_argument("--shape", metavar="NAME", help="random weights of this shape instead, like llama-3.2-1b")
    flags.add_argument("-p", "--prompt-tokens", type=int, default=128, metavar="N", help="(default: 128)")
    flags.add_argument("-b", "--batch", type=int, default=1, metavar="N", help="sequences at once (default: 1)")
    flags.add_argument("-n", "--new-tokens", type=int, default=64, metavar="N", help="(default: 64)")
    flags.add_argument(
        "--prune-ratio", "--ratio", type=float, nargs="+", default=[0.0, 0.2, 0.4], metavar="R",
        help="settings to time, always with the dense network (default: 0 0.2 0.4)",
    )  # fmt: skip
    flags.add_argument(
        "--rule", nargs="+", default=["pop"], metavar="RULE", help=f"{', '.join(RULE_NAMES)} (default: pop)"
    )
    add_paper_flag(flags)
    add_study_flags(flags)
    flags.add_argument(
        "--dtype", type=dtype_name, nargs="+", default=["float32", "bfloat16"], metavar="DTYPE", help="(default: both)"
    )
    flags.add_argument(
        "--weights", nargs="+", default=["auto"], metavar="FORM",
        help="plain, int8, int4 (not in float32), auto: as stored in the checkpoint (default: auto)",
    )  # fmt: skip
    flags.add_argument("--device", default="cpu", metavar="cpu|cuda[:i]|mps")
    flags.add_argument("--compile", action="store_true", help="time compiled decode steps beside eager ones")
    flags.add_argument("--compile-only", action="store_true", help="compiled decode steps alone: half the memory")
    flags.add_argument("--against", default="", metavar="PEER,PEER", help=f"other engines: {', '.join(PEERS)}")
    flags.add_argument("--threads", type=int, metavar="N", help="threads of every engine (default: PyTorch's choice)")
    flags.add_argument(
        "--products", action="store_true",
        help="time the ways to compute each product of one row instead, with --compile also compiled ones",
    )
    flags.add_argument("--rounds", type=int, default=5, metavar="N", help="(default: 5)")
    flags.add_argument("--json", metavar="FILE", help="write every figure to FILE as well")
    return flags


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run `python -m popengine.bench`."""
    flags = parser()
    flags.set_defaults(words=sys.argv[1:] if arguments is None else arguments)
    run_as_command(run, flags, arguments)


def run(flags: argparse.Namespace) -> None:
    """Measure all settings, and print the table."""
    check(flags)
    start_pytorch(flags)
    from popengine.benchmark import benchmark, products
    from popengine.benchmark import table as bench_table

    with tempfile.TemporaryDirectory(prefix="popengine-bench-") as folder:
        result = (products if flags.products else benchmark).measure(flags, Path(folder))
    if flags.json:
        write_output(Path(flags.json), json.dumps(result, indent=1) + "\n")
    print(products.describe(result) if flags.products else bench_table.describe(result, benchmark.SUMMED_BYTES))


if __name__ == "__main__":
    main()
