"""Peak memory of this process, for the statistics."""

import sys

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far, in bytes: on the GPU that computes, otherwise the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:                     # not a POSIX system
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
