"""The layers that a prompt skips instead of the deepest ones, for one model (popengine/studies/skipped_layers.py)."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from models.pruning.resolve import LayerWeights
from popengine.studies.skipped_layers import NAMED, layer_count, named_layers, require_file, share_and_file
from weights.errors import InputError
from weights.mapped_file import read_text

LARGEST_GATES = 10_000_000


def skipped_layers(skip: str, layer: LayerWeights) -> tuple[int, ...]:
    """Return the layers that words name or choose, for a model. Raises InputError for a layer that it lacks."""
    if skip.startswith(NAMED):
        found = named_layers(skip)
        if found[-1] >= layer.layers:
            most = layer.layers - 1
            raise InputError(f"prefill skip names layer {found[-1]}, and the model's layers are 0 to {most}")
        return found
    wanted, file = share_and_file(skip)
    count = layer_count(wanted, layer.layers)
    if not 0 < count <= layer.layers:
        raise InputError(f"prefill skip {skip} skips {count} of {layer.layers} layers: give 1 to {layer.layers}")
    return least_important(file, layer)[:count]


def least_important(file: Path, layer: LayerWeights) -> tuple[int, ...]:
    """Return all layers, those first whose gates of prompt positions matter least; of equals the deeper first.

    Raises InputError for a file that is missing, damaged, or of a model of other sizes.
    """
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
