"""A function of objects as a function of a flat list of tensors, which can be exported and compiled once for all.

A walk through the objects collects their tensors and describes everything else. What is compiled depends on the
description, and on nothing of the tensors but their layout.
"""

import functools
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.compiled import CPU_OPTIONS

# The largest capacity of a cache that a package serves.
MOST_SLOTS = 1 << 20
# Attributes that no step reads: they change from prompt to prompt, belong to one layer, or only make partitions.
UNREAD = {
    "index", "rule", "derived", "order", "stacked_at", "training",
    "filled", "capacity", "dropped", "missing", "held",
}
# Parts of a module that the walk looks into; its other private attributes belong to PyTorch.
OF_MODULES = ("_parameters", "_buffers", "_modules")


class NotPackable(Exception):
    """A step has no package. The message says why."""


class Walk:
    """A walk through objects: the tensors in them, each once, and a description of everything else.

    tensors  in the order of the walk; places[i]: the dictionaries and lists that hold tensor i, with its key there
    lines    one line per tensor, value and object
    """

    def __init__(self, thing: Any, unread: set[str], dynamic: dict[int, dict[int, str]]) -> None:
        """unread: names of attributes to leave out; dynamic: by id of a tensor, its dimensions that are capacities"""
        self.unread, self.dynamic = unread, dynamic
        self.tensors: list[Tensor] = []
        self.places: list[list[tuple[Any, Any]]] = []
        self.lines: list[str] = []
        self.numbers: dict[int, int] = {}
        self.visit(thing, "", None, None)

    def visit(self, thing: Any, path: str, holder: Any, key: Any) -> None:
        if thing is None or isinstance(thing, (bool, int, float, str, torch.dtype, torch.device, type)):
            self.lines.append(f"{path} {thing!r}")
        elif id(thing) in self.numbers:
            self.lines.append(f"{path} is {self.numbers[id(thing)]}")
            if isinstance(thing, Tensor):
                self.places[self.tensor_number(thing)].append((holder, key))
        elif isinstance(thing, Tensor):
            if not isinstance(holder, (dict, list)):
                raise NotPackable(f"{path} is a tensor that cannot be replaced")
            self.number(thing, path, self.described(thing, path))
            self.tensors.append(thing)
            self.places.append([(holder, key)])
        elif isinstance(thing, (types.FunctionType, types.BuiltinFunctionType)):
            line = getattr(getattr(thing, "__code__", None), "co_firstlineno", 0)       # tells lambdas apart
            if getattr(thing, "__closure__", None):
                raise NotPackable(f"{path} is a function with variables of its own")
            self.lines.append(f"{path} {thing.__module__}.{thing.__qualname__} {line}")
        else:
            self.visit_parts(thing, path)

    def visit_parts(self, thing: Any, path: str) -> None:
        self.number(thing, path, f"{type(thing).__module__}.{type(thing).__qualname__}")
        if isinstance(thing, (list, tuple)):
            for index, part in enumerate(thing):
                self.visit(part, f"{path}.{index}", thing, index)
        elif isinstance(thing, dict):
            for key, part in thing.items():
                self.visit(part, f"{path}.{key!r}", thing, key)
        elif isinstance(thing, functools.partial):
            self.visit([thing.func, list(thing.args), thing.keywords], path, None, None)
        elif hasattr(thing, "__dict__"):
            self.visit_attributes(thing, path)
        else:
            raise NotPackable(f"{path} is a {type(thing).__qualname__}")

    def visit_attributes(self, thing: Any, path: str) -> None:
        attributes = vars(thing)
        for name, part in attributes.items():
            if name in OF_MODULES and isinstance(thing, nn.Module):
                for inner, one in part.items():
                    if inner not in self.unread:
                        self.visit(one, f"{path}.{inner}", part, inner)
            elif name not in self.unread and not (isinstance(thing, nn.Module) and name.startswith("_")):
                self.visit(part, f"{path}.{name}", attributes, name)

    def number(self, thing: Any, path: str, words: str) -> None:
        self.numbers[id(thing)] = len(self.numbers)
        self.lines.append(f"{path} {words}")

    def tensor_number(self, tensor: Tensor) -> int:
        return next(number for number, one in enumerate(self.tensors) if one is tensor)

    def described(self, tensor: Tensor, path: str) -> str:
        """Describe dtype and layout of a tensor; capacities by their names."""
        names = self.dynamic.get(id(tensor), {})
        shape = [names.get(dimension, size) for dimension, size in enumerate(tensor.shape)]
        if names and not tensor.is_contiguous():
            raise NotPackable(f"{path} is not contiguous")
        return f"{tensor.dtype} {shape} {'' if names else tensor.stride()} {tensor.device}"


class Function:
    """One function of a step, as a package computes it.

    name         begin, layers or head
    inputs       its tensors, in order
    description  everything beside the values of its inputs: equal descriptions have equal code
    """

    def __init__(
        self, name: str, compute: Callable[..., list[Tensor]], objects: dict[str, Any],
        dynamic: dict[int, dict[int, str]], unread: tuple[str, ...] = (),
    ) -> None:
        """objects: the arguments of `compute`, which returns the outputs; unread: more attributes to leave out"""
        self.name, self.compute, self.objects = name, compute, objects
        walk = Walk(objects, UNREAD | {*unread}, dynamic)
        self.inputs, self.places = walk.tensors, walk.places
        self.capacities = [dynamic.get(id(tensor), {}) for tensor in self.inputs]
        self.description = "\n".join([name, *walk.lines])

    def inputs_named(self, name: str) -> list[int]:
        """Return the places of the inputs that are attributes of this name."""
        return [place for place, holders in enumerate(self.places) if any(key == name for _, key in holders)]

    @contextmanager
    def inputs_replaced(self, inputs: list[Tensor]) -> Iterator[None]:
        """Put other tensors in the places of the inputs, and the inputs back at the end."""
        try:
            self.put(inputs)
            yield
        finally:
            self.put(self.inputs)

    def put(self, tensors: list[Tensor]) -> None:
        for tensor, places in zip(tensors, self.places, strict=True):
            for holder, key in places:
                holder[key] = tensor

    @torch.no_grad()
    def exported(self) -> torch.export.ExportedProgram:
        """Trace the function. Raises NotPackable if it reads a tensor that is none of its inputs."""
        names = sorted({name for capacity in self.capacities for name in capacity.values()})
        slots = {name: torch.export.Dim(name, min=2, max=MOST_SLOTS) for name in names}
        shapes = [{at: slots[name] for at, name in capacity.items()} or None for capacity in self.capacities]
        program = torch.export.export(Flat(self), (self.inputs,), dynamic_shapes=(shapes,), strict=False)
        read = [name for name, tensor in program.constants.items() if isinstance(tensor, Tensor) and tensor.numel() > 1]
        if read:
            raise NotPackable(f"{self.name} reads a tensor that is none of its inputs, of {read[0]}")
        return program

    def package(self, path: Path, about: dict[str, str]) -> None:
        """Compile the function into a package. about: metadata"""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")             # PyTorch's, about its own functions
            torch._inductor.aoti_compile_and_package(
                self.exported(), package_path=str(path), inductor_configs=CPU_OPTIONS | {
                    "aot_inductor.metadata": about, "aot_inductor.enable_line_tables": False,
                    "aot_inductor.enable_frame_pointer": False,
                },
            )


class Flat(nn.Module):
    """A function of a list of tensors, for torch.export."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = (function,)         # in a tuple: none of its parts are submodules

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        (function,) = self.function
        with function.inputs_replaced(inputs):
            return function.compute(**function.objects)
