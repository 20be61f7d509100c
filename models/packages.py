"""Decode steps as packages of native code, which AOTInductor makes once and which load in milliseconds.

A step is three kinds of function: begin (embedding and pass), a group of layers, head. A package computes one of them.
All tensors that it reads or writes are its inputs: weights, copies of active weights, cache. Everything else that
shapes its code is in the function's description (models/flat_functions.py), a part of the key of its package. Groups of
layers of equal description share a package.

B batch, H hidden size, S cache slots, V vocabulary.
"""

import types
import weakref
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from models.compiled import MOST_LAYERS_PER_CALL
from models.flat_functions import MOST_SLOTS, Function, NotPackable, Walk
from models.llama import LlamaForCausalLM
from models.passes import DecodePass
from models.state import DecodeState
from models.walks import decode_layers

# Largest difference of what a package adds to its input, relative to what eager layers add, in norm.
CLOSE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


class Loader(Protocol):
    """A loaded package."""

    def run(self, inputs: list[Tensor], /) -> list[Tensor]:
        """Compute the outputs; inputs that the function changes are changed in place."""


class Kept(Protocol):
    """The packages of this machine (popengine/engine/packages.py)."""

    def load(self, function: Function) -> Loader | None:
        """Load the package of a function; None if there is none that can be used."""

    def refuse(self, problem: str) -> None:
        """Say in one line why steps run eagerly although there are packages."""


@dataclass
class StepFunctions:
    """The functions of a state's pruned steps: begin, one per group of layers, head."""

    begin: Function
    layers: list[Function]
    head: Function

    @property
    def all(self) -> list[Function]:
        return [self.begin, *self.layers, self.head]

    @property
    def names(self) -> frozenset[str]:
        """The descriptions of all functions: steps of equal names have the same packages."""
        return frozenset(one.description for one in self.all)


def step_functions(model: LlamaForCausalLM, state: DecodeState) -> StepFunctions:
    """Return the functions of a state's steps. Raises NotPackable if its steps read what has no fixed place."""
    dynamic, names = {}, {}
    for number, (pattern, slot_map) in enumerate(state.cache.maps.items()):
        names[pattern] = f"S{number}"
        dynamic[id(slot_map.tokens)] = {slot_map.tokens.dim() - 1: names[pattern]}
        if not 2 <= slot_map.tokens.shape[-1] <= MOST_SLOTS:
            raise NotPackable("the capacity of its cache is out of range")
    for layer in state.cache.layers:
        for buffer in (layer.keys, layer.values):
            if buffer.numel():                          # empty: no attention runs on it
                dynamic[id(buffer)] = {2: names[layer.pattern]}
    tokens = torch.zeros(len(state.live), dtype=torch.int64, device=state.live.device)
    part = types.SimpleNamespace(cache=state.cache, live=state.live)                # all that begin reads of a state
    x, step = model.begin(tokens, part)  # type: ignore[arg-type]
    for pattern, mask in step.masks.items():
        dynamic[id(mask)] = {3: names[pattern]}
    begin = Function(
        "begin", begun, {"tokens": tokens, "model": model, "state": part}, dynamic, ("layers", "lm_head", "norm")
    )
    common = {"x": x, "step": as_lists(step), "live": state.live}

    def groups(size: int) -> list[Function]:
        starts = range(0, len(state.layers), size)
        parts = (state.layers[first : first + size] for first in starts)
        return [Function("layers", through_layers, common | {"layers": part}, dynamic) for part in parts]

    layers = groups(1)
    size = common_group_size([one.description for one in layers])
    return StepFunctions(begin, layers if size == 1 else groups(size), head_function(model, x))


def common_group_size(kinds: list[str]) -> int:
    """Return the number of layers in one call, for layers of these kinds: calls take time, and so does compiling.

    All groups together have at most MOST_LAYERS_PER_CALL layers to compile, where there are several kinds.
    """
    for size in range(MOST_LAYERS_PER_CALL, 1, -1):
        groups = {tuple(kinds[first : first + size]) for first in range(0, len(kinds), size)}
        if len(kinds) % size == 0 and len(groups) * size <= MOST_LAYERS_PER_CALL:
            return size
    return 1


def head_function(model: LlamaForCausalLM, x: Tensor) -> Function:
    """Return the function of final norm and output projection. x [B, 1, H]"""
    return Function("head", last_logits, {"x": x, "model": model}, {}, ("layers", "embed_tokens", "rotary"))


def begun(tokens: Tensor, model: LlamaForCausalLM, state: Any) -> list[Tensor]:
    """Compute the embedded tokens of a step, and the tensors of its pass in the order of a walk."""
    x, step = model.begin(tokens, state)
    return [x, *tensors_of_pass(step)]


def through_layers(x: Tensor, step: DecodePass, live: Tensor, layers: list[Any]) -> list[Tensor]:
    """Run a group of layers. x [B, 1, H] -> [B, 1, H]"""
    return [decode_layers(layers, x, replace(step, live=live))]


def last_logits(x: Tensor, model: LlamaForCausalLM) -> list[Tensor]:
    """Compute the logits of a step. x [B, 1, H] -> [B, V]"""
    return [type(model).head(model, x)[:, 0]]


def as_lists(step: DecodePass) -> DecodePass:
    """Return a pass whose rotary embeddings are in lists, so that they can be replaced, without `live`."""
    rotary: dict[Any, Any] = {pattern: [*pair] for pattern, pair in step.rotary.items()}
    return replace(step, rotary=rotary, live=None)  # type: ignore[arg-type]


class Steps:
    """The packages of one state's steps, with their inputs."""

    def __init__(self, functions: StepFunctions, loaders: dict[str, Loader]) -> None:
        given = 1 + len(tensors_of_pass(functions.layers[0].objects["step"]))            # x and the tensors of a pass
        self.begin, self.fixed = loaders[functions.begin.description], functions.begin.inputs[1:]
        self.layers = [(loaders[one.description], one.inputs[given:]) for one in functions.layers]
        self.head, self.weights = loaders[functions.head.description], functions.head.inputs[1:]
        self.names = functions.names

    def logits(self, tokens: Tensor) -> Tensor:
        """Compute one step, without counting its slot as filled. tokens int64 [B] -> logits [B, V]"""
        x, *step = self.begin.run([tokens, *self.fixed])
        for loader, inputs in self.layers:
            (x,) = loader.run([x, *step, *inputs])                                  # [B, 1, H]
        return self.head.run([x, *self.weights])[0]


class PackagedDecode:
    """Decode steps from packages where there are packages, eager steps elsewhere.

    Dense steps run eagerly. Packages are compared with an eager step before their first use in a process.
    """

    def __init__(self, model: LlamaForCausalLM, kept: Kept) -> None:
        self.model, self.kept = model, kept
        self.loaders: dict[str, Loader] = {}            # by the description of their function
        self.verified: set[frozenset[str]] = set()
        self.refused: set[frozenset[str]] = set()
        self.steps: dict[int, Steps | None] = {}        # by id of a state; None until its first step

    @torch.inference_mode()
    def missing(self, state: DecodeState) -> list[Function]:
        """Return the functions of a state's steps without a usable package, each once. Raises NotPackable."""
        functions = {one.description: one for one in step_functions(self.model, state).all}
        return [one for one in functions.values() if not self.load(one)]

    @torch.inference_mode()
    def prepare(self, state: DecodeState) -> bool:
        """Load the packages of a state's steps. Returns False if these will run eagerly."""
        try:
            loaded = self.load_all(step_functions(self.model, state))
        except NotPackable:
            loaded = False
        if not loaded:
            self.steps.pop(id(state), None)
            return False
        if id(state) not in self.steps:
            weakref.finalize(state, self.steps.pop, id(state), None)    # the inputs must not outlive the state
        self.steps[id(state)] = None
        return True

    def load_all(self, functions: StepFunctions) -> bool:
        """Load the packages of all functions. Returns False if one cannot be used."""
        return all(map(self.load, functions.all)) and functions.names not in self.refused

    def load(self, function: Function) -> bool:
        """Load the package of a function, if it is not loaded yet. Returns False if there is none that can be used."""
        if function.description not in self.loaders:
            loader = self.kept.load(function)
            if loader is None:
                return False
            self.loaders[function.description] = loader
        return True

    def runs(self, state: DecodeState) -> bool:
        """Return True if the steps of this state run from packages."""
        return id(state) in self.steps

    def decode(self, tokens: Tensor, state: DecodeState) -> Tensor:
        """Compute the model's `decode`. tokens int64 [B] -> logits [B, V]"""
        steps = self.steps.get(id(state)) or self.first_step(state)
        if steps is None:
            return self.model.decode(tokens, state)
        state.cache.make_room()
        logits = steps.logits(tokens) if steps.names in self.verified else self.verify(steps, tokens, state)
        state.cache.advance()
        return logits

    def first_step(self, state: DecodeState) -> Steps | None:
        """Collect the inputs of steps after the prompt, which may have replaced some. None: steps run eagerly."""
        if not self.runs(state) or not self.load_all(functions := step_functions(self.model, state)):
            self.steps.pop(id(state), None)
            return None
        steps = self.steps[id(state)] = Steps(functions, self.loaders)
        return steps

    def dense_step(self, tokens: Tensor, state: DecodeState, partitions: bool) -> Tensor:
        """Compute the model's `dense_step`, eagerly."""
        return self.model.dense_step(tokens, state, partitions)

    def verify(self, steps: Steps, tokens: Tensor, state: DecodeState) -> Tensor:
        """Run a step eagerly, and every package on the inputs of its eager function. Returns the eager logits [B, V].

        Both write their keys and values into the same slot, the eager functions last.
        """
        try:
            found, x, step = steps.begin.run([tokens, *steps.fixed]), *self.model.begin(tokens, state)
            close = all(map(equal_but_for_rounding, found, [x, *tensors_of_pass(step)]))
            size = len(state.layers) // len(steps.layers)
            for index, (loader, inputs) in enumerate(steps.layers):
                (found_y,) = loader.run([x, *tensors_of_pass(step), *inputs])
                y = decode_layers(state.layers[index * size : (index + 1) * size], x, step)         # [B, 1, H]
                close, x = close and adds_the_same(found_y, y, x), y
            found_logits, logits = steps.head.run([x, *steps.weights])[0], self.model.head(x)[:, 0]
            close = close and adds_the_same(found_logits, logits, torch.zeros_like(logits))
        except RuntimeError:
            close, logits = False, self.eager_logits(tokens, state)
        if close:
            self.verified.add(steps.names)
        else:
            self.refused.add(steps.names)
            del self.steps[id(state)]
            self.kept.refuse("their first step differs from the eager one")
        return logits

    def eager_logits(self, tokens: Tensor, state: DecodeState) -> Tensor:
        """Compute one step, without counting its slot as filled. tokens int64 [B] -> logits [B, V]"""
        x, step = self.model.begin(tokens, state)
        return self.model.head(decode_layers(state.layers, x, step))[:, 0]


def tensors_of_pass(step: DecodePass) -> list[Tensor]:
    """Return the tensors of a pass, without `live`, in the order in which packages hand them on."""
    return Walk(as_lists(step), set(), {}).tensors


def equal_but_for_rounding(found: Tensor, wanted: Tensor) -> bool:
    """Return True if every number is the same, but for a few roundings."""
    if not wanted.is_floating_point():
        return torch.equal(found, wanted)
    bound = 8 * torch.finfo(wanted.dtype).eps
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=bound, atol=bound)


def adds_the_same(found: Tensor, wanted: Tensor, x: Tensor) -> bool:
    """Return True if layers add the same to their input x, but for roundings of both.

    A wrong package adds something else: it differs by about as much as is added. A rounded score may choose another
    candidate, which changes a few per cent.
    """
    share, roundings = CLOSE[wanted.dtype], 4 * torch.finfo(wanted.dtype).eps
    found, wanted, x = found.float(), wanted.float(), x.float()
    return bool((found - wanted).norm() <= share * (wanted - x).norm() + roundings * x.norm())
