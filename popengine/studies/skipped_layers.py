"""How prefill_skip names layers that a prompt skips instead of the deepest ones, or lets a gate study choose them.

    layers:3,7,9            these layers; also layers:3-7+9, as --leave-out writes them
    auto:1/4                the floor(L / 4) layers whose gates of the prompt matter least, by gates/gates.json
    auto:7:DIR/gates.json   7 of L layers, by another file that `popengine gates` wrote

Nothing here imports PyTorch: a wrong flag is reported without waiting for it.
"""

import re
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

from models.pruning.settings import exact_share
from weights.errors import InputError

GATES = "gates/gates.json"
NAMED, CHOSEN = "layers:", "auto:"


def names_layers(skip: float | str) -> bool:
    """Return True if a value of prefill_skip names or chooses layers, and is no share of the deepest."""
    return str(skip).startswith((NAMED, CHOSEN))


def skips_layers(skip: float | str) -> bool:
    """Return True if a checked value of prefill_skip skips any layer."""
    return names_layers(skip) or exact_share(skip) > 0


def check_skip(skip: float | str) -> None:
    """Raise InputError for words that are none of the three forms, and for a file that is missing."""
    words = str(skip)
    if words.startswith(NAMED):
        named_layers(words)
    else:
        require_file(share_and_file(words)[1])


def named_layers(words: str) -> tuple[int, ...]:
    """Read "layers:3,7,9" or "layers:3-7+9". Raises InputError for anything else."""
    found: set[int] = set()
    for word in words.removeprefix(NAMED).replace("+", ",").split(","):
        written = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", word)
        first, last = (int(written[1]), int(written[2] or written[1])) if written else (0, -1)
        if last < first:
            raise InputError(f"prefill skip must name layers like layers:3,7,9 or layers:3-7+9, not {words!r}")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def written_layers(layers: Iterable[int]) -> str:
    """Write layers in words that `named_layers` reads."""
    return NAMED + "+".join(map(str, sorted(layers)))


def share_and_file(words: str) -> tuple[Fraction, Path]:
    """Read "auto:1/4" or "auto:7:FILE". Raises InputError for anything else."""
    share, _, file = words.removeprefix(CHOSEN).partition(":")
    if (wanted := share_or_number(share)) is None:
        raise InputError(f"prefill skip auto takes a share or a number of layers, like auto:1/4 or auto:7, not {words}")
    return wanted, Path(file or GATES)


def share_or_number(words: str) -> Fraction | None:
    """Read a share of layers below 1, like 1/4, or a number of layers, like 7. Returns None for anything else."""
    try:
        wanted = exact_share(words)
    except ValueError:
        return None
    return wanted if 0 < wanted < 1 or (wanted >= 1 and wanted.denominator == 1) else None


def layer_count(wanted: Fraction, layers: int) -> int:
    """Return how many of `layers` layers a share or number is: of a share the floor."""
    return int(wanted * layers) if wanted < 1 else int(wanted)


def require_file(file: Path) -> None:
    """Raise InputError if there is no file of a gate study."""
    if not file.is_file():
        raise InputError(f"{file}: no such file; `popengine gates --out {file.parent}` measures it")
