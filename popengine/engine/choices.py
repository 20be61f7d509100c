"""The fastest product of one row for each weight on this machine, measured once and kept in the user's cache.

models/matrices/candidates.py names the candidates. Eager products are measured when a model is loaded, one choice for
each weight format and shape, on the model's own weights. Compiled products are measured when steps are first compiled:
one choice for each shape of int8, and one for each plain format, on its largest FFN weight. Without a folder of the
user nothing is measured, and every choice is the default.
"""

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from models.attention import Attention
from models.compiled import CPU_OPTIONS
from models.feed_forward import FeedForward
from models.llama import LlamaForCausalLM
from models.matrices.candidates import (
    CLOCK,
    COMPILED,
    PER_SHAPE,
    PLAIN,
    compiled_calls,
    eager_calls,
    fastest,
    format_of,
    in_turns,
    stretches_of,
)
from models.matrices.forms import ColumnMatrix, RowMatrix
from models.matrices.plain import Matrix
from models.matrices.ranked import RankMatrix
from popengine.engine.machine import digest, machine, not_trusted, processor
from weights.errors import InputError
from weights.output_file import write_output
from weights.user_folders import cache_folder

# A change here leaves older choices unused.
FORMAT = "popengine products 3"
# Seconds for the candidates of one shape, and for those of one format compiled, without the compiler's time.
EAGER_SECONDS, COMPILED_SECONDS = 0.06, 0.5
# Seconds after which no further candidate of a format is compiled.
COMPILER_SECONDS = 15.0
# Smaller weights stay in a cache, and their products take little of a step: they have the default.
LEAST_BYTES = 1 << 18
# Matrices of which a partition copies rows. The default is the layout whose copies are of whole lines: of these the
# rows, of down_proj the columns. Copies against the layout take three times as long.
COPIED_BY_ROWS = ("gate_proj", "up_proj")
# A matrix by its parent and attribute.
Place = tuple[nn.Module, str]
# Seconds of every call, by candidate.
Times = dict[str, list[float]]
Measure = Callable[[], Times]
Clock = Callable[[], float]


class Choices:
    """The names of the chosen candidates on this machine, as kept in the user's cache.

    path   the file, named by processor, PyTorch and threads; None: the user has no folder
    known  choices by format and shape; empty if the file is missing, damaged or not the user's own
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self.known: dict[str, str] = {}
        with contextlib.suppress(InputError):
            key = digest("\n".join([FORMAT, processor(), *machine()]).encode())
            self.path = cache_folder("products") / f"{key}.json"
            self.known = read(self.path)

    def choose(self, key: str, table: Mapping[str, object], measure: Measure | None) -> str:
        """Return the kept choice among the names of a table, or measure it and remember it.

        measure  returns the seconds of each name, or nothing if that fails; None: the default, unless a choice is kept
        """
        default = next(iter(table))
        if self.known.get(key) in table:
            return self.known[key]
        if len(table) == 1 or self.path is None or measure is None:
            return default
        times = measure()
        if not times:
            return default
        self.known[key] = fastest(times)
        return self.known[key]

    def keep(self) -> None:
        """Write all choices. If that fails, they are measured again next time."""
        if self.path is None or not self.known or read(self.path) == self.known:
            return
        with contextlib.suppress(OSError, InputError):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not not_trusted(self.path.parent):
                content = {"format": FORMAT, "machine": [processor(), *machine()], "choices": self.known}
                write_output(self.path, json.dumps(content, indent=1) + "\n")
                self.path.chmod(0o600)


def read(path: Path) -> dict[str, str]:
    """Read kept choices; none if the file is missing, damaged or not the user's own."""
    if not_trusted(path.parent) or not_trusted(path):
        return {}
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_bytes())
        choices = content.get("choices") if isinstance(content, dict) and content.get("format") == FORMAT else None
        if isinstance(choices, dict) and all(isinstance(name, str) for name in choices.values()):
            return choices
    return {}


def alike(model: nn.Module) -> dict[tuple[str, int, int], list[Place]]:
    """Group the matrices of a model by format and shape [out, in] of their product: (parent, attribute) of each.

    q_proj, k_proj and v_proj become one matrix, and therefore count as one.
    """
    stacked = {
        id(one): attention for attention in model.modules() if isinstance(attention, Attention)
        for one in (attention.q_proj, attention.k_proj, attention.v_proj)
    }
    groups: dict[tuple[str, int, int], list[Place]] = {}
    for parent in model.modules():
        for name, matrix in parent.named_children():
            if not isinstance(matrix, Matrix) or isinstance(matrix, RankMatrix) or (kind := format_of(matrix)) is None:
                continue
            out = matrix.out_features
            if (attention := stacked.get(id(matrix))) is not None:
                out = sum(one.out_features for one in (attention.q_proj, attention.k_proj, attention.v_proj))
            groups.setdefault((kind, out, matrix.in_features), []).append((parent, name))
    return groups


def measured_on(places: list[Place]) -> list[Tensor]:
    """Return weights of one shape to time products on: those of the given matrices, or stretches of large ones."""
    weights = [part for parent, name in places for part in stretches_of(getattr(parent, name).weight)]
    return [one for one in weights if one.shape == weights[0].shape]


def layouts(places: list[Place]) -> Mapping[str, type[ColumnMatrix] | type[RowMatrix]]:
    """Return the eager candidates of a plain format for these matrices, with their default first."""
    return dict(reversed(PLAIN.items())) if places[0][1] in COPIED_BY_ROWS else PLAIN


def lay_out(model: LlamaForCausalLM, choices: Choices, clock: Clock = CLOCK) -> None:
    """Store every plain matrix of a model on a CPU as its eager product reads it fastest.

    Several ranks on one machine would disturb each other's measurement: they take kept choices, or the default.
    """
    for (kind, out, columns), found in alike(model).items():
        places = [(parent, name) for parent, name in found if type(getattr(parent, name)) is Matrix]
        if not places:
            continue
        table = layouts(places)
        weights, measure = measured_on(places), None
        if model.config.ranks.count == 1 and weights[0].nbytes >= LEAST_BYTES:
            calls = eager_calls(weights)
            measure = partial(in_turns, {name: calls[name] for name in table}, EAGER_SECONDS, clock)
        chosen = choices.choose(f"eager {kind} {out} x {columns}", table, measure)
        for parent, name in places:
            setattr(parent, name, table[chosen].from_rows(getattr(parent, name)))
    choices.keep()


def set_streams(model: LlamaForCausalLM, choices: Choices, measures: bool) -> None:
    """Set the rows that compiled products of a model read at once. measures: measure what no choice is kept of"""
    groups = alike(model)
    for (kind, out, columns), places in groups.items():
        if len(COMPILED[kind]) == 1:
            continue
        key, measured = f"compiled {kind} {out} x {columns}", places
        if kind not in PER_SHAPE:
            key, measured = f"compiled {kind}", largest_of_format(kind, groups)
        weights = measured_on(measured)
        worth = measures and weights[0].nbytes >= LEAST_BYTES
        measure = partial(measure_compiled, kind, weights) if worth else None
        streams = COMPILED[kind][choices.choose(key, COMPILED[kind], measure)]
        for parent, name in places:
            getattr(parent, name).set_streams(streams)
    choices.keep()


def largest_of_format(kind: str, groups: dict[tuple[str, int, int], list[Place]]) -> list[Place]:
    """Return the matrices of a format with the largest shape in a network; if it has none there, of the largest."""

    def size(shape: tuple[str, int, int]) -> tuple[bool, int]:
        return isinstance(groups[shape][0][0], FeedForward), shape[1] * shape[2]

    return groups[max((shape for shape in groups if shape[0] == kind), key=size)]


def measure_compiled(kind: str, weights: list[Tensor]) -> Times:
    """Compile the candidates of a format, as many as time allows, and time them. Returns nothing if that fails."""
    began, ready = time.perf_counter(), {}
    try:
        for name, call in compiled_calls(kind, weights, CPU_OPTIONS).items():
            if time.perf_counter() - began < COMPILER_SECONDS:
                call(0)
                ready[name] = call
        return in_turns(ready, COMPILED_SECONDS)
    except Exception:       # a missing or broken compiler may raise anything; compiled steps will say so
        return {}
