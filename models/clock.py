"""Time per named phase, measured without stopping the device."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


class Clock:
    """Wall-clock time, summed per phase name.

    On CUDA two events bracket a phase. They are read only when its time is asked for, so measuring never makes the
    device wait. On other devices the host's clock is read.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self.on_cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self.events.append((name, start, end))
        else:
            began = time.perf_counter()
            yield
            self.seconds[name] += time.perf_counter() - began

    def milliseconds(self, name: str) -> float:
        """Return the time spent in a phase so far, in milliseconds. Waits for the device to finish."""
        for phase, start, end in self.events:
            end.synchronize()
            self.seconds[phase] += start.elapsed_time(end) / 1000
        self.events.clear()
        return self.seconds[name] * 1000


def phase(clock: Clock | None, name: str) -> AbstractContextManager[None]:
    """Time the enclosed code under this name. Without a clock (in steps, which may be compiled) nothing is timed."""
    return nullcontext() if clock is None else clock.phase(name)
