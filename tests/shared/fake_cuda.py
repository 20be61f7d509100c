"""A CUDA device that computes nothing: where tensors live and when the host waits show without a card.

PyTorch's fake tensors have a shape, a dtype and a device, and no values. They refuse to mix devices. Two modes around
them do the rest: one stands in for what a build without CUDA cannot do on that device, the other notes the places that
make the host wait for it.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (f"{ROOT / 'models'}", f"{ROOT / 'popengine'}")
aten = torch.ops.aten


def viewed(x: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """The view that ints, slices, None and ... choose, and the index tensor of each of its dimensions."""
    parts = list(index) if isinstance(index, tuple) else [index]
    parts = [torch.tensor(part, device=x.device) if isinstance(part, list) else part for part in parts]
    named = sum(1 for part in parts if part is not None and part is not Ellipsis)
    place = next((at for at, part in enumerate(parts) if part is Ellipsis), len(parts))
    parts[place : place + 1] = [slice(None)] * (x.dim() - named)
    chosen: list[Tensor | None] = []
    for part in parts:
        if isinstance(part, int):
            x = x.select(len(chosen), part)
            continue
        if part is None:
            x = x.unsqueeze(len(chosen))
        elif isinstance(part, slice):
            x = aten.slice(x, len(chosen), part.start, part.stop, part.step or 1)
        chosen.append(part if isinstance(part, Tensor) else None)
    return x, chosen


class Python(TorchFunctionMode):
    """What Python's methods cannot do on that device, written as the operators that they are; addresses are alike."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            x, chosen = viewed(*args)
            return x if all(one is None for one in chosen) else aten.index(x, chosen)
        if func is Tensor.__setitem__:
            x, chosen = viewed(*args[:2])
            value = args[2] if isinstance(args[2], Tensor) else x.new_full((), args[2])
            return aten.copy_(x, value) if all(one is None for one in chosen) else aten.index_put_(x, chosen, value)
        if func is torch.arange and kwargs and "out" in kwargs:
            return aten.copy_(kwargs["out"], torch.arange(*args, device="cuda"))
        if func in OPERATORS:
            return OPERATORS[func](*args)
        return func(*args, **(kwargs or {}))


def listed(x: Tensor) -> Any:
    return [listed(one) for one in x.unbind()] if x.dim() else aten._local_scalar_dense(x)


OPERATORS: dict[Any, Callable[..., Any]] = {
    Tensor.copy_: aten.copy_,
    Tensor.__invert__: aten.bitwise_not,
    Tensor.__bool__: lambda x: bool(aten._local_scalar_dense(x)),
    Tensor.__int__: lambda x: int(aten._local_scalar_dense(x)),
    Tensor.__index__: lambda x: int(aten._local_scalar_dense(x)),
    Tensor.__float__: lambda x: float(aten._local_scalar_dense(x)),
    Tensor.item: listed,
    Tensor.tolist: listed,
    Tensor.data_ptr: lambda x: 1,
}


class Event:
    """Stands for torch.cuda.Event: nothing is timed."""

    def __init__(self, **_: Any) -> None:
        pass

    def record(self) -> None:
        pass


class Waits(TorchDispatchMode):
    """Notes where the host asks for what the device has computed, and answers in its place: yes, 1, or equal counts."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self.count = 1

    def note(self) -> None:
        frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(SOURCES)]
        where = f"{Path(frames[-1].filename).relative_to(ROOT)} {frames[-1].name}: {frames[-1].line}" if frames else "?"
        self.places.append(where)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args and isinstance(args[0], Tensor) else None
        if func is aten._local_scalar_dense.default and x is not None and x.is_cuda:
            self.note()
            return x.dtype == torch.bool or self.count
        if func is aten.sum.dim_IntList and x is not None and x.dtype == torch.bool and x.dim() == 2:
            self.count = x.shape[0] // x.shape[1]       # the counts of experts, which are read next
        if func is aten.upsample_bilinear2d.vec:        # whose fake kernel indexes
            return x.new_empty((*x.shape[:2], *args[1]))
        made = func(*args, **kwargs)
        on_card = [one.is_cuda for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if any(on_card) and isinstance(made, Tensor) and not made.is_cuda:
            self.note()
        return made


@contextmanager
def fake_cuda() -> Iterator[Waits]:
    """Inside, device="cuda" may be asked for; what is on it has no values."""
    modes = FakeTensorMode(allow_non_fake_inputs=True), Python(), Waits()
    with pytest.MonkeyPatch.context() as patch, modes[0], modes[1], modes[2] as waits:
        patch.setattr(torch.cuda, "Event", Event)
        yield waits


def moved(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters and buffers of a model on the fake device; integers and float32 buffers keep their dtype."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(torch.empty(value.shape, dtype=dtype, device="cuda"), False)
        for name, buffer in part._buffers.items():
            part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
