"""Time POP, the dense network and, on request, other engines, all in one process and in turns.

    python -m popengine.bench -p 128 -n 64 --prune-ratio 0 0.2 0.4 --compile --against transformers,llama.cpp

popengine/benchmark/benchmark.py says how. Compare figures of one run with each other, never with another run's.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from models.pruning.settings import share
from popengine.benchmark.flags import PEERS, check
from popengine.command import OneLineParser, add_checkpoint_flag, add_paper_flag, run_as_command, start_pytorch
from popengine.engine.dtypes import dtype_name
from popengine.studies.settings import RULE_NAMES
from weights.output_file import write_output


def parser() -> argparse.ArgumentParser:
    flags = OneLineParser(
        "bench", __doc__.splitlines()[0],
        "bench --compile --against transformers,llama.cpp\nbench --shape llama-3.2-1b --dtype bfloat16",
        "--shape -p -n --prune-ratio --dtype --weights --compile --against --rounds --json",
    )
    add_checkpoint_flag(flags)
    flags.add_argument("--shape", metavar="NAME", help="instead: random weights, for example llama-3.2-1b")
    flags.add_argument("-p", "--prompt-tokens", type=int, default=128, metavar="N", help="(default: 128)")
    flags.add_argument("-b", "--batch", type=int, default=1, metavar="N", help="sequences at once (default: 1)")
    flags.add_argument("-n", "--new-tokens", type=int, default=64, metavar="N", help="(default: 64)")
    flags.add_argument(
        "--prune-ratio", "--ratio", type=float, nargs="+", default=[0.0, 0.2, 0.4], metavar="R",
        help="settings to time; the dense network always is among them (default: 0 0.2 0.4)",
    )  # fmt: skip
    flags.add_argument(
        "--rule", nargs="+", default=["pop"], metavar="RULE", help=f"{', '.join(RULE_NAMES)} (default: pop)"
    )
    add_paper_flag(flags)
    flags.add_argument(
        "--method", nargs="+", default=[], metavar="M",
        help="time these methods too, at every ratio, as score and compare name them: shortgpt, probe-pruning, ...",
    )  # fmt: skip
    flags.add_argument(
        "--calibration", type=Path, metavar="FILE.safetensors", help="for methods that learn from a text"
    )
    flags.add_argument(
        "--leave-out", nargs="+", default=[], metavar="LAYERS",
        help="time all of these again without layers or halves of them, like 20-22+25.attention (default: no)",
    )  # fmt: skip
    flags.add_argument(
        "--prefill-skip", type=share, nargs="+", default=[], metavar="SHARE",
        help="time all of these again with prompts that skip the deepest layers, like 1/3 (default: no)",
    )  # fmt: skip
    flags.add_argument("--boundary-tokens", type=int, default=1, metavar="K", help="which skip none (default: 1)")
    flags.add_argument("--pictures", type=int, default=0, metavar="N", help="at the front of every prompt (default: 0)")
    flags.add_argument(
        "--visual-tokens", type=share, nargs="+", default=[], metavar="SHARE|N",
        help="time all of these again with so many tokens of each picture (default: no)",
    )  # fmt: skip
    flags.add_argument("--visual-tokens-by", default="attention", metavar="attention|diversity")
    flags.add_argument("--visual-tokens-layer", type=int, default=2, metavar="K", help="for attention (default: 2)")
    flags.add_argument(
        "--dtype", type=dtype_name, nargs="+", default=["float32", "bfloat16"], metavar="DTYPE", help="(default: both)"
    )
    flags.add_argument(
        "--weights", nargs="+", default=["auto"], metavar="FORM",
        help="plain, int8, int4 (not in float32), auto: as the checkpoint is (default: auto)",
    )  # fmt: skip
    flags.add_argument("--device", default="cpu", metavar="cpu|cuda[:i]|mps")
    flags.add_argument("--compile", action="store_true", help="time compiled decode steps beside eager ones")
    flags.add_argument("--compile-only", action="store_true", help="compiled decode steps alone: half the memory")
    flags.add_argument("--against", default="", metavar="PEER,PEER", help=f"other engines: {', '.join(PEERS)}")
    flags.add_argument("--threads", type=int, metavar="N", help="of every engine (default: what PyTorch chooses)")
    flags.add_argument("--rounds", type=int, default=5, metavar="N", help="(default: 5)")
    flags.add_argument("--json", metavar="FILE", help="write every figure to FILE as well")
    return flags


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry of `python -m popengine.bench`."""
    flags = parser()
    flags.set_defaults(words=sys.argv[1:] if arguments is None else arguments)
    run_as_command(run, flags, arguments)


def run(flags: argparse.Namespace) -> None:
    check(flags)
    start_pytorch(flags)
    from popengine.benchmark import benchmark
    from popengine.benchmark import table as bench_table

    with tempfile.TemporaryDirectory(prefix="popengine-bench-") as folder:
        result = benchmark.measure(flags, Path(folder))
    if flags.json:
        write_output(Path(flags.json), json.dumps(result, indent=1) + "\n")
    print(bench_table.describe(result, benchmark.SUMMED_BYTES))


if __name__ == "__main__":
    main()
