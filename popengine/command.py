"""What the commands share: errors in one line, flags for pruning, a look at what stands in the way of our packages.

Nothing here imports PyTorch, which takes seconds: a wrong flag should not wait for it.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from weights.errors import InputError

if TYPE_CHECKING:
    from models.pruning.settings import PruningSettings


class OneLineParser(argparse.ArgumentParser):
    """Errors as one line, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def run_as_command(
    run: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser, arguments: list[str] | None
) -> NoReturn:
    """Run a command with these arguments (None: those of the process) and exit with its status."""
    try:
        flags = parser.parse_args(arguments)
        refuse_shadowed_packages()
        run(flags)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has gone: nothing is left to say, not even by the interpreter's flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    sys.exit(0)


def refuse_shadowed_packages() -> None:
    """`models` and `weights` are common names: say so when another package of that name stands in front of ours."""
    ours = Path(__file__).resolve().parent.parent
    for name in ("models", "weights"):
        spec = importlib.util.find_spec(name)
        places = [] if spec is None else [*(spec.submodule_search_locations or []), spec.origin or ""]
        if not any(Path(place).resolve() in (ours / name, ours / name / "__init__.py") for place in places):
            found = places[0] if places else "nothing"
            raise InputError(
                f"the package `{name}` of popengine is hidden by {found}; run from another directory, "
                "or use the command popengine-generate"
            )


def add_checkpoint_flag(flags: argparse.ArgumentParser) -> None:
    flags.add_argument(
        "--ckpt", metavar="DIR|HUB_ID|FILE.gguf", help="checkpoint (default: what `make checkpoint` has fetched)"
    )


def add_pruning_flags(flags: argparse.ArgumentParser) -> None:
    pruning = flags.add_argument_group("pruning")
    pruning.add_argument(
        "--prune-ratio", type=float, metavar="R", help="share of a decoder layer's parameters; 0: dense (default: 0.2)"
    )
    pruning.add_argument("--ffn-ratio", type=float, metavar="R", help="instead: share of the FFN channels")
    pruning.add_argument("--candidate-width", type=float, default=0.1, metavar="W", help="candidates, of all channels")
    pruning.add_argument("--head-ratio", type=float, default=0.0, metavar="R", help="share of the query heads")
    pruning.add_argument(
        "--prefill", default="pruned", metavar="pruned|dense", help="finish the prompt on what stays, or on everything"
    )
    pruning.add_argument(
        "--in-place", action="store_true", help="reorder the loaded weights instead of copying the active ones"
    )
    pruning.add_argument(
        "--scored-tokens", default="all", metavar="all|text", help="count image tokens in the scores, or only text"
    )
    pruning.add_argument(
        "--unseen-experts", default="weights", metavar="weights|dense",
        help="experts that no prompt token reached: cut by their weights alone, or leave them whole",
    )


def pruning_settings(flags: argparse.Namespace) -> "PruningSettings":
    """What the flags of `add_pruning_flags` ask for."""
    from models.pruning.settings import PruningSettings

    return PruningSettings(
        prune_ratio=flags.prune_ratio,
        ffn_ratio=flags.ffn_ratio,
        candidate_width=flags.candidate_width,
        head_ratio=flags.head_ratio,
        prefill=flags.prefill,
        in_place=flags.in_place,
        scored_tokens=flags.scored_tokens,
        unseen_experts=flags.unseen_experts,
    )


def add_machine_flags(flags: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    machine = flags.add_argument_group("machine")
    machine.add_argument("--dtype", default="auto", metavar="auto|float32|bfloat16|float16")
    machine.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:i]|mps")
    return machine
