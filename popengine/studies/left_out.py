"""Halves of layers that neither prompts nor steps run: how they are written, and what is left to run.

Nothing here imports PyTorch: a wrong flag should not wait for it.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from models.pruning.settings import SUBLAYERS
from weights.errors import InputError


class Half(NamedTuple):
    """One of the two halves of a layer, by the layer's place."""

    layer: int
    part: str


def read_halves(words: str) -> tuple[Half, ...]:
    """"20-22+25.attention": layers 20, 21 and 22, and the attention of layer 25. InputError for anything else."""
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
    """The shortest words that `read_halves` takes back, but for ranges of layers."""
    parts: dict[int, list[str]] = {}
    for half in sorted(halves):
        parts.setdefault(half.layer, []).append(half.part)
    return "+".join(str(layer) if len(own) == 2 else f"{layer}.{own[0]}" for layer, own in parts.items())


def check_halves(halves: tuple[Half, ...], layers: int) -> tuple[Half, ...]:
    """The same halves. InputError where the model has no such layer, and where nothing would be left of it."""
    if halves and halves[-1].layer >= layers:
        raise InputError(f"leave out names layer {halves[-1].layer}, and the model's layers are 0 to {layers - 1}")
    if len(halves) == len(SUBLAYERS) * layers:
        raise InputError(f"leave out leaves nothing of the {layers} layers: at least one half of a layer has to run")
    return halves
