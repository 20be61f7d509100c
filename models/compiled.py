"""Decode steps of a model through torch.compile.

Only the products know about compilation: they choose their form where they are computed (models/matrices/products.py).

B batch, H hidden size, V vocabulary.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.llama import LlamaForCausalLM
from models.passes import DecodePass, PrefillPass
from models.pruning.partition import ChannelPartition
from models.pruning.pruning import Pruning
from models.state import DecodeState
from models.walks import decode_layers, prefill_layers

# Layers that one call of compiled code runs at most.
MOST_LAYERS_PER_CALL = 5
# Inductor's options on a CPU.
CPU_OPTIONS = {
    # Guards have checked the shapes of inputs already; checking again takes 4 % of a step.
    "size_asserts": False,
    # Chosen channels are always in range; a check in the inner loop would cost more than the sum.
    "assert_indirect_indexing": False,
}


class CompiledDecode:
    """Compiled decode steps: one function for each group of layers, and one each for embedding and head.

    A call of a compiled function costs some 60 microseconds whatever it computes, and compiling takes time for each
    layer in it. All groups have the same size, so that they share one compiled function.

    steps  the steps compiled so far (see step_of), with the seconds that compiling took. Another prompt or another
           capacity needs no new step. `prepare` adds a step before its first run.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model
        self.steps: dict[tuple[int, Pruning, int], float] = {}
        # Every step of the one function counts towards these limits, in every engine of the process.
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
        layers = len(model.model.layers)
        self.group_size = max(size for size in range(1, MOST_LAYERS_PER_CALL + 1) if layers % size == 0)
        compile = partial(torch.compile, dynamic=False, fullgraph=True, options=compile_options(model))
        self.begin: Callable[..., tuple[Tensor, DecodePass]] = compile(LlamaForCausalLM.begin)
        self.layers: Callable[..., Tensor] = compile(decode_layers)
        self.begin_dense: Callable[..., tuple[Tensor, PrefillPass]] = compile(LlamaForCausalLM.begin_dense)
        self.dense_layers: Callable[..., Tensor] = compile(prefill_layers)
        self.head: Callable[..., Tensor] = compile(type(model).head)

    @property
    def in_graphs(self) -> bool:
        """True if steps are replayed as CUDA graphs, which a GPU launches at once instead of kernel by kernel."""
        return self.model.device.type == "cuda"

    def prepare(self, state: DecodeState) -> float:
        """Compile the steps of this state, so that no step of a run waits for it. Returns the seconds it took."""
        cache = state.cache
        if self.in_graphs:
            for tensor in tensors_of([cache, state.layers, state.live]).values():
                torch._dynamo.mark_static_address(tensor, guard=False)
        for slot_map in cache.maps.values():            # one compiled step serves every capacity
            torch._dynamo.mark_dynamic(slot_map.tokens, slot_map.tokens.dim() - 1)
        for buffer in cache.keys + cache.values:
            if buffer.numel():                          # empty: no attention runs on it
                torch._dynamo.mark_dynamic(buffer, 2)
        if self.knows(state):
            return 0.0
        began = time.perf_counter()
        with torch.inference_mode():
            tokens = torch.zeros(len(state.live), dtype=torch.int64, device=state.live.device)
            self.model.prefill(self.model.embed(tokens.unsqueeze(1)), state)
            self.step(tokens, state, dense=False)
            if state.schedule.ever_dense:
                self.step(tokens, state, dense=True)
        return self.steps.setdefault(step_of(state), time.perf_counter() - began)

    def knows(self, state: DecodeState) -> bool:
        """Return True if the steps of this state have been compiled."""
        return step_of(state) in self.steps

    def decode(self, tokens: Tensor, state: DecodeState) -> Tensor:
        """Compute the model's `decode`. tokens int64 [B] -> logits [B, V]"""
        return self.step(tokens, state, dense=False)

    def dense_step(self, tokens: Tensor, state: DecodeState, partitions: bool) -> Tensor:
        """Compute the model's `dense_step`. A step that partitions is rare and runs eagerly."""
        if partitions:
            return self.model.dense_step(tokens, state, partitions)
        return self.step(tokens, state, dense=True)

    def step(self, tokens: Tensor, state: DecodeState, dense: bool) -> Tensor:
        """Run one compiled step, pruned or dense. tokens int64 [B] -> logits [B, V]"""
        state.cache.make_room()
        if self.in_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        step: DecodePass | PrefillPass
        if dense:       # its tokens are counted below: a changing number would be recompiled
            (x, step), run = self.begin_dense(self.model, tokens, state, False, 0), self.dense_layers
        else:
            (x, step), run = self.begin(self.model, tokens, state), self.layers     # [B, 1, H]
        for mask in step.masks.values():
            torch._dynamo.mark_dynamic(mask, 3)
        for first in range(0, len(state.layers), self.group_size):
            x = run(state.layers[first : first + self.group_size], x, step)
        state.cache.advance()
        if dense:
            for layer in state.layers:
                layer.ffn.count(state.schedule.live)
        logits = self.head(self.model, x, None if dense else state.lm_head)[:, 0]   # [B, V]
        return logits.clone() if self.in_graphs else logits     # a graph's next step overwrites this memory

    def kind(self, state: DecodeState) -> str:
        """Return how the steps of a state run."""
        return "compiled"

    def trusting_guards(self) -> AbstractContextManager[object]:
        """Return a context manager that skips most guards, for steps that `prepare` has compiled.

        PyTorch then checks only the guards that differ between its compiled functions. The other 250 or so take 5 % of
        a step.
        """
        return torch.compiler.set_stance("default", skip_guard_eval_unsafe=True)


def step_of(state: DecodeState) -> tuple[int, Pruning, int]:
    """Return the key of a compiled step: batch size, pruning and number of distinct capacities.

    The compiler treats equal capacities as one number.
    """
    return len(state.live), state.pruning, len({slot_map.tokens.shape[-1] for slot_map in state.cache.maps.values()})


def compile_options(model: LlamaForCausalLM) -> dict[str, bool]:
    """Return Inductor's options for the steps of a model on its device."""
    if model.device.type == "cuda":
        return {"triton.cudagraphs": True, "coordinate_descent_tuning": True}   # the first is "reduce-overhead"
    return CPU_OPTIONS | {
        # Compile the wrapper that calls the loops too: in Python it takes 7 % of a step on packed weights. The compiled
        # wrapper cannot call a sum over ranks.
        "cpp_wrapper": model.device.type == "cpu" and model.config.ranks.count == 1,
    }


def tensors_of(thing: Any, path: str = "", seen: set[int] | None = None) -> dict[str, Tensor]:
    """Collect every tensor that steps read and that is no parameter of the model, keyed by its path from `thing`.

    A step never reads the order of a partition: partitioning has copied what the step needs.
    """
    seen = set() if seen is None else seen
    if isinstance(thing, Tensor):
        return {path: thing}
    if id(thing) in seen or isinstance(thing, ChannelPartition):
        return {}
    seen.add(id(thing))
    if isinstance(thing, nn.Module):
        return {f"{path}.{name}": one for name, one in vars(thing).items() if isinstance(one, Tensor)}
    if isinstance(thing, list | tuple):
        parts: dict[Any, Any] = dict(enumerate(thing))
    else:
        parts = thing if isinstance(thing, dict) else getattr(thing, "__dict__", {})
    found: dict[str, Tensor] = {}
    for name, part in parts.items():
        found |= tensors_of(part, f"{path}.{name}", seen)
    return found


def compiler_problem(device: torch.device) -> str | None:
    """Return in one line why torch.compile does not work on this machine; None if it does."""
    try:
        torch.compile(torch.neg, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:      # a missing or broken compiler may raise anything
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None
