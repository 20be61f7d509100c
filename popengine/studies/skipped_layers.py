"""Layers that a prompt skips instead of the deepest ones: named one by one, or chosen by a saved gate study.

    layers:3,7,9            these layers; also layers:3-7+9, as --leave-out writes them
    auto:1/4                the floor(L / 4) layers whose gates of the prompt matter least, by gates/gates.json
    auto:7:DIR/gates.json   7 of L layers, by another file that `popengine gates` wrote

Nothing here imports PyTorch: a wrong flag is reported without waiting for it.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.pruning.settings import exact_share
from weights.errors import InputError

if TYPE_CHECKING:
    from models.pruning.resolve import LayerWeights

GATES = "gates/gates.json"
LARGEST_GATES = 10_000_000
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


def share_and_file(words: str) -> tuple[float | str, Path]:
    """Read "auto:1/4" or "auto:7:FILE". Raises InputError for anything else."""
    share, _, file = words.removeprefix(CHOSEN).partition(":")
    try:
        wanted = exact_share(share)
    except ValueError:
        wanted = exact_share(0.0)
    if wanted <= 0 or (wanted >= 1 and wanted.denominator > 1):
        raise InputError(f"prefill skip auto takes a share or a number of layers, like auto:1/4 or auto:7, not {words}")
    return share, Path(file or GATES)


def skipped_layers(skip: str, layer: "LayerWeights") -> tuple[int, ...]:
    """Return the layers that words name or choose, for a model. Raises InputError for a layer that it lacks."""
    if skip.startswith(NAMED):
        found = named_layers(skip)
        if found[-1] >= layer.layers:
            most = layer.layers - 1
            raise InputError(f"prefill skip names layer {found[-1]}, and the model's layers are 0 to {most}")
        return found
    share, file = share_and_file(skip)
    wanted = exact_share(share)
    count = int(wanted * layer.layers) if wanted < 1 else int(wanted)
    if not 0 < count <= layer.layers:
        raise InputError(f"prefill skip {skip} skips {count} of {layer.layers} layers: give 1 to {layer.layers}")
    return least_important(file, layer)[:count]


def require_file(file: Path) -> None:
    """Raise InputError if there is no file of a gate study."""
    if not file.is_file():
        raise InputError(f"{file}: no such file; `popengine gates --out {file.parent}` measures it")


def least_important(file: Path, layer: "LayerWeights") -> tuple[int, ...]:
    """Return all layers, those first whose gates of prompt positions matter least; of equals the deeper first.

    Raises InputError for a file that is missing, damaged, or of a model of other sizes.
    """
    from weights.mapped_file import read_text  # imports PyTorch

    require_file(file)
    try:
        found = json.loads(read_text(file, LARGEST_GATES))
        sizes, importance = found["about"].get("layer_weights"), [importance_of(row) for row in found["rows"]]
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        raise InputError(f"{file}: not a file of `popengine gates`, or a damaged one; measure it again") from None
    if sizes != asdict(layer) or len(importance) != layer.layers:
        raise InputError(
            f"{file}: these gates are of a model of other sizes, or were measured before sizes were written down; "
            "measure them again with `popengine gates`"
        )
    return tuple(sorted(range(layer.layers), key=lambda index: (importance[index], -index)))


def importance_of(row: dict[str, Any]) -> float:
    """Return the importance of a row of a gate study to the prompt. Raises ValueError for what is none."""
    importance = row["prompt"]
    if type(importance) not in (int, float) or not 0 <= importance < math.inf:
        raise ValueError(f"{importance!r} is no importance")
    return float(importance)
