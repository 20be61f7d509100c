"""Decode steps as packages of native code, which AOTInductor makes once and which load in milliseconds.

A step, pruned or dense, is three kinds of function: begin (embedding and pass), a group of layers, head. A package
computes one of them.
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
from models.passes import DecodePass, PrefillPass
from models.pruning.active_weights import AnyMatrix
from models.state import DecodeState
from models.walks import decode_layers, prefill_layers

Pass = DecodePass | PrefillPass

# Attributes that steps of one kind do not read. A dense step counts its tokens outside, and needs no active weights.
UNREAD_BY_PRUNED = ("evidence", "watched")
UNREAD_BY_DENSE = ("tokens", "weights", "gate", "up", "down", "candidate_norms", "partition", "sizes")
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
    """The functions of a state's pruned or dense steps: begin, one per group of layers, head."""

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


def step_functions(model: LlamaForCausalLM, state: DecodeState, dense: bool) -> StepFunctions:
    """Return the functions of a state's pruned or dense steps.

    Raises NotPackable if these steps read what has no fixed place.
    """
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
    x, step = begin_step(model, tokens, part, dense)
    for pattern, mask in step.masks.items():
        dynamic[id(mask)] = {3: names[pattern]}
    objects = {"tokens": tokens, "model": model, "state": part, "dense": dense}
    begin = Function("begin", begun, objects, dynamic, ("layers", "lm_head", "norm"))
    common = {"x": x, "step": as_lists(step), "live": state.live}
    unread = UNREAD_BY_DENSE if dense else UNREAD_BY_PRUNED

    def groups(size: int) -> list[Function]:
        starts = range(0, len(state.layers), size)
        parts = (state.layers[first : first + size] for first in starts)
        return [Function("layers", through_layers, common | {"layers": part}, dynamic, unread) for part in parts]

    layers, product = groups(1), model.lm_head if dense else state.lm_head
    size = common_group_size([one.description for one in layers])
    return StepFunctions(begin, layers if size == 1 else groups(size), head_function(model, x, product))


def common_group_size(kinds: list[str]) -> int:
    """Return the number of layers in one call, for layers of these kinds: calls take time, and so does compiling.

    All groups together have at most MOST_LAYERS_PER_CALL layers to compile, where there are several kinds.
    """
    for size in range(MOST_LAYERS_PER_CALL, 1, -1):
        groups = {tuple(kinds[first : first + size]) for first in range(0, len(kinds), size)}
        if len(kinds) % size == 0 and len(groups) * size <= MOST_LAYERS_PER_CALL:
            return size
    return 1


def head_function(model: LlamaForCausalLM, x: Tensor, product: AnyMatrix) -> Function:
    """Return the function of final norm and output projection. x [B, 1, H]; product: what the head multiplies with"""
    objects = {"x": x, "product": product, "model": model}
    return Function("head", last_logits, objects, {}, ("layers", "embed_tokens", "rotary", "lm_head"))


def begin_step(model: LlamaForCausalLM, tokens: Tensor, state: Any, dense: bool) -> tuple[Tensor, Pass]:
    """Embed the tokens of a pruned or dense step and build its pass. The pass of a dense step counts no tokens."""
    return model.begin_dense(tokens, state, False, 0) if dense else model.begin(tokens, state)


def begun(tokens: Tensor, model: LlamaForCausalLM, state: Any, dense: bool) -> list[Tensor]:
    """Compute the embedded tokens of a step, and the tensors of its pass in the order of a walk."""
    x, step = begin_step(model, tokens, state, dense)
    return [x, *tensors_of_pass(step)]


def through_layers(x: Tensor, step: Pass, live: Tensor, layers: list[Any]) -> list[Tensor]:
    """Run a group of layers. x [B, 1, H] -> [B, 1, H]"""
    if isinstance(step, PrefillPass):
        return [run_layers(layers, x, replace(step, counted=live))]
    return [run_layers(layers, x, replace(step, live=live))]


def run_layers(layers: list[Any], x: Tensor, step: Pass) -> Tensor:
    """Run layers with the pass of a dense or a pruned step. x [B, 1, H] -> [B, 1, H]"""
    return prefill_layers(layers, x, step) if isinstance(step, PrefillPass) else decode_layers(layers, x, step)


def last_logits(x: Tensor, product: AnyMatrix, model: LlamaForCausalLM) -> list[Tensor]:
    """Compute the logits of a step; `product` is its output projection. x [B, 1, H] -> [B, V]"""
    return [type(model).head(model, x, product)[:, 0]]


def as_lists(step: Pass) -> Pass:
    """Return a pass whose rotary embeddings are in lists, so that they can be replaced, without the state's `live`."""
    rotary: dict[Any, Any] = {pattern: [*pair] for pattern, pair in step.rotary.items()}
    if isinstance(step, PrefillPass):
        return replace(step, rotary=rotary, counted=None)
    return replace(step, rotary=rotary, live=None)  # type: ignore[arg-type]


class Steps:
    """The packages of one state's pruned or dense steps, with their inputs.

    evidence  per group of layers, the places of its evidence among its inputs, to which a dense step adds
    product   the output projection
    """

    def __init__(self, functions: StepFunctions, loaders: dict[str, Loader]) -> None:
        step = functions.layers[0].objects["step"]
        self.dense = isinstance(step, PrefillPass)
        given = 1 + len(tensors_of_pass(step))                                      # x and the tensors of a pass
        self.begin, self.fixed = loaders[functions.begin.description], functions.begin.inputs[1:]
        self.layers = [(loaders[one.description], one.inputs[given:]) for one in functions.layers]
        self.head, self.weights = loaders[functions.head.description], functions.head.inputs[1:]
        self.product = functions.head.objects["product"]
        self.evidence = [[place - given for place in one.inputs_named("squares")] for one in functions.layers]
        self.names = functions.names

    def logits(self, tokens: Tensor) -> Tensor:
        """Compute one step, without counting its slot as filled. tokens int64 [B] -> logits [B, V]"""
        x, *step = self.begin.run([tokens, *self.fixed])
        for loader, inputs in self.layers:
            (x,) = loader.run([x, *step, *inputs])                                  # [B, 1, H]
        return self.head.run([x, *self.weights])[0]


class PackagedDecode:
    """Decode steps from packages where there are packages, eager steps elsewhere.

    A dense step that partitions is rare and runs eagerly. Packages are compared with an eager step before their first
    use in a process.
    """

    def __init__(self, model: LlamaForCausalLM, kept: Kept) -> None:
        self.model, self.kept = model, kept
        self.loaders: dict[str, Loader] = {}            # by the description of their function
        self.verified: set[frozenset[str]] = set()
        self.refused: set[frozenset[str]] = set()
        self.steps: dict[int, dict[bool, Steps | None]] = {}    # by id of a state and `dense`; None until a first step

    @torch.inference_mode()
    def missing(self, state: DecodeState) -> list[Function]:
        """Return the functions of a state's steps without a usable package, each once. Raises NotPackable."""
        functions = {
            one.description: one for dense in kinds_of_steps(state)
            for one in step_functions(self.model, state, dense).all
        }
        return [one for one in functions.values() if not self.load(one)]

    @torch.inference_mode()
    def prepare(self, state: DecodeState) -> bool:
        """Load the packages of a state's steps. Returns False if pruned steps will run eagerly."""
        found: dict[bool, Steps | None] = {}
        for dense in kinds_of_steps(state):
            try:
                if self.load_all(step_functions(self.model, state, dense)):
                    found[dense] = None
            except NotPackable:
                pass
        if False not in found:
            self.steps.pop(id(state), None)
            return False
        if id(state) not in self.steps:
            weakref.finalize(state, self.steps.pop, id(state), None)    # the inputs must not outlive the state
        self.steps[id(state)] = found
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
        """Return True if the pruned steps of this state run from packages."""
        return id(state) in self.steps

    def decode(self, tokens: Tensor, state: DecodeState) -> Tensor:
        """Compute the model's `decode`. tokens int64 [B] -> logits [B, V]"""
        steps = self.steps_of(state, dense=False)
        return self.model.decode(tokens, state) if steps is None else self.step(steps, tokens, state)

    def dense_step(self, tokens: Tensor, state: DecodeState, partitions: bool) -> Tensor:
        """Compute the model's `dense_step`. tokens int64 [B] -> logits [B, V]"""
        steps = None if partitions else self.steps_of(state, dense=True)
        if steps is None:
            return self.model.dense_step(tokens, state, partitions)
        logits = self.step(steps, tokens, state)
        for layer in state.layers:
            layer.ffn.count(state.schedule.live)
        return logits

    def step(self, steps: Steps, tokens: Tensor, state: DecodeState) -> Tensor:
        """Run one step from packages, verified the first time. tokens int64 [B] -> logits [B, V]"""
        state.cache.make_room()
        logits = steps.logits(tokens) if steps.names in self.verified else self.verify(steps, tokens, state)
        state.cache.advance()
        return logits

    def steps_of(self, state: DecodeState, dense: bool) -> Steps | None:
        """Return the packages of a state's steps; None: they run eagerly.

        Inputs are collected after the prompt, which may have replaced some.
        """
        found = self.steps.get(id(state), {})
        if dense in found and found[dense] is None:
            functions = step_functions(self.model, state, dense)
            if self.load_all(functions):
                found[dense] = Steps(functions, self.loaders)
            else:
                self.forget(state, dense)
        return found.get(dense)

    def forget(self, state: DecodeState, dense: bool) -> None:
        """Run the steps of this kind eagerly from now on, and without pruned ones all steps."""
        self.steps[id(state)].pop(dense)
        if not dense:
            self.steps.pop(id(state))

    def verify(self, steps: Steps, tokens: Tensor, state: DecodeState) -> Tensor:
        """Compare every package of a step with its eager function. Returns the eager logits [B, V]."""
        layers = zip(steps.layers, steps.evidence, strict=True)
        evidence = [inputs[place] for (_, inputs), places in layers for place in places]
        before = [one.clone() for one in evidence]
        try:
            close, logits = self.compared(steps, tokens, state)
        except RuntimeError:
            for one, was in zip(evidence, before, strict=True):
                one.copy_(was)
            x, step = begin_step(self.model, tokens, state, steps.dense)
            (logits,), close = last_logits(run_layers(state.layers, x, step), steps.product, self.model), False
        if close:
            self.verified.add(steps.names)
        else:
            self.refused.add(steps.names)
            self.forget(state, steps.dense)
            self.kept.refuse("their first step differs from the eager one")
        return logits

    def compared(self, steps: Steps, tokens: Tensor, state: DecodeState) -> tuple[bool, Tensor]:
        """Run a step eagerly, and every package on the inputs of its eager function.

        Both write their keys and values into the same slot, the eager functions last. Packages add to copies of the
        evidence. Returns True if they agree, and the eager logits [B, V].
        """
        x, step = begin_step(self.model, tokens, state, steps.dense)
        given = [x, *tensors_of_pass(step)]
        close = all(map(equal_but_for_rounding, steps.begin.run([tokens, *steps.fixed]), given))
        size = len(state.layers) // len(steps.layers)
        for index, ((loader, inputs), places) in enumerate(zip(steps.layers, steps.evidence, strict=True)):
            before = {place: inputs[place].clone() for place in places}
            copied = [before[place].clone() if place in before else one for place, one in enumerate(inputs)]
            (found,) = loader.run([x, *given[1:], *copied])
            layers = state.layers[index * size : (index + 1) * size]
            y = run_layers(layers, x, step)                                         # [B, 1, H]
            same = adds_the_same(found, y, x, x.dtype)
            if not same and not steps.dense:
                nudged = run_layers(layers, last_bits_changed(x), step)
                same = differs_as_little(found, nudged, run_layers(layers, x, step), x)
            close = close and same and all(
                adds_the_same(copied[place], inputs[place], was, x.dtype) for place, was in before.items()
            )
            x = y
        (found_logits,), (logits,) = steps.head.run([x, *steps.weights]), last_logits(x, steps.product, self.model)
        return close and adds_the_same(found_logits, logits, torch.zeros_like(logits), logits.dtype), logits


def kinds_of_steps(state: DecodeState) -> list[bool]:
    """Return the kinds of steps of a state, by `dense`: pruned ones, and dense ones if any gather evidence."""
    return [False, True] if state.schedule.ever_dense else [False]


def tensors_of_pass(step: Pass) -> list[Tensor]:
    """Return the tensors of a pass, without `live`, in the order in which packages hand them on."""
    return Walk(as_lists(step), set(), {}).tensors


def equal_but_for_rounding(found: Tensor, wanted: Tensor) -> bool:
    """Return True if every number is the same, but for a few roundings."""
    if not wanted.is_floating_point():
        return torch.equal(found, wanted)
    bound = 8 * torch.finfo(wanted.dtype).eps
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=bound, atol=bound)


def last_bits_changed(x: Tensor) -> Tensor:
    """Change the last bit of two thirds of the numbers, up or down."""
    change = torch.arange(x.shape[-1], device=x.device) % 3 - 1
    return x * (1 + change * torch.finfo(x.dtype).eps).to(x.dtype)


def differs_as_little(found: Tensor, nudged: Tensor, wanted: Tensor, x: Tensor) -> bool:
    """Return True if a package differs no more from eager layers than they do where the last bits of x change.

    Layers that choose inputs or channels at every step are that sensitive: of scores near each other, rounding decides.
    A wrong package differs by about as much as is added, so half of that is the limit.
    """
    found, nudged, wanted, x = found.float(), nudged.float(), wanted.float(), x.float()
    difference = (found - wanted).norm()
    return bool(difference <= 2 * (nudged - wanted).norm() and difference <= (wanted - x).norm() / 2)


def adds_the_same(found: Tensor, wanted: Tensor, x: Tensor, dtype: torch.dtype) -> bool:
    """Return True if layers add the same to x, their input or their evidence, but for roundings of both in `dtype`.

    A wrong package adds something else: it differs by about as much as is added. A rounded score may choose another
    candidate, which changes a few per cent.
    """
    share, roundings = CLOSE[dtype], 4 * torch.finfo(dtype).eps
    found, wanted, x = found.float(), wanted.float(), x.float()
    return bool((found - wanted).norm() <= share * (wanted - x).norm() + roundings * x.norm())
