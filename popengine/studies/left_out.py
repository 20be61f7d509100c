"""Halves of layers that neither prompts nor steps run: parsing, writing and checking them.

Nothing here imports PyTorch: a wrong flag is reported without waiting for it.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from models.pruning.settings import SUBLAYERS
from weights.errors import InputError


class Half(NamedTuple):
    """One of the two halves of a layer: index of the layer, "attention" or "mlp"."""

    layer: int
    part: str


def read_halves(words: str) -> tuple[Half, ...]:
    """Parse words like "20-22+25.attention": layers 20, 21 and 22, and the attention of layer 25.

    Raises InputError for anything else.
    """
    found: set[Half] = set()
    for word in words.split("+") if words else ():
        written = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?(?:\.(attention|mlp))?\s*", word)
        first, last, part = written.groups() if written else (None, None, None)
        if first is None or (last is not None and int(last) < int(first)):
            raise InputError(f"leave out must be layers or halves of them like 20-22+25.attention+26.mlp, not {word!r}")
        for layer in range(int(first), int(last or first) + 1):
            found.update(Half(layer, own) for own in ([part] if part else SUBLAYERS))
    return tuple(sorted(found))


def written_halves(halves: Iterable[Half]) -> str:
    """Write halves in the shortest words that `read_halves` parses, without ranges of layers."""
    parts: dict[int, list[str]] = {}
    for half in sorted(halves):
        parts.setdefault(half.layer, []).append(half.part)
    return "+".join(str(layer) if len(own) == 2 else f"{layer}.{own[0]}" for layer, own in parts.items())


def check_halves(halves: tuple[Half, ...], layers: int) -> tuple[Half, ...]:
    """Return the halves. Raises InputError for a layer that the model lacks, and if nothing would be left to run."""
    if halves and halves[-1].layer >= layers:
        raise InputError(f"leave out names layer {halves[-1].layer}, and the model's layers are 0 to {layers - 1}")
    if len(halves) == len(SUBLAYERS) * layers:
        raise InputError(f"leave out leaves nothing of the {layers} layers: at least one half of a layer has to run")
    return halves
