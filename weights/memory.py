"""Free and used memory, and the check before a checkpoint is loaded that does not fit."""

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import torch

from weights.errors import InputError

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None  # type: ignore[assignment]


# Bytes just below the 32 MB from which on glibc always asks the system.
KEPT_BELOW = (1 << 25) - (1 << 14)


def require_memory(needed: int, device: torch.device, what: str) -> None:
    """Raise InputError if `device` has fewer than `needed` bytes free; do nothing if that is unknown."""
    available = available_memory(device)
    if available is not None and needed > available:
        raise InputError(
            f"{what} needs about {gigabytes(needed)} of memory on {device}, and {gigabytes(available)} is available: "
            "use a smaller checkpoint, a --dtype with fewer bytes, or a machine with more memory"
        )


def available_memory(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated on a device, or None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if device.type != "cpu":
        return None
    if sys.platform == "darwin":
        return macos_available(subprocess.run(["vm_stat"], capture_output=True, text=True).stdout)
    return linux_available()


def give_back() -> None:
    """Give freed memory back to the system, where glibc keeps it.

    Copies of active weights have other sizes under every setting, and find no room in what earlier ones left behind. So
    a process that makes many of them grows to several times what it uses.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):       # musl has none
        libc.malloc_trim(0)


def keep_freed() -> None:
    """Let glibc keep freed memory for the next tensor; elsewhere do nothing.

    glibc takes a tensor larger than every tensor freed so far (up to 32 MB) from the system, and gives it back when it
    is freed. To take all pages of every intermediate result anew takes a tenth of the time of loading. One large tensor
    that is freed without being touched ends that.
    """
    torch.empty(KEPT_BELOW, dtype=torch.uint8)      # freed at once


def linux_available(root: Path = Path("/")) -> int | None:
    """Return the minimum of MemAvailable and the room in each enclosing cgroup (version 1 or 2); None without /proc."""
    try:
        meminfo = (root / "proc/meminfo").read_text()
    except OSError:
        return None
    match = re.search(r"^MemAvailable:\s*(\d+) kB$", meminfo, re.MULTILINE)
    limits = [int(match[1]) * 1024] if match else []

    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        # "0::/path" is the only tree of version 2; "5:memory:/path" is the memory controller's tree of version 1.
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            top = root / "sys/fs/cgroup"
            limit_file, usage_file = "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            limit_file, usage_file = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # The limits of all parent groups apply too. In a container the path may not exist; only the top is visible.
        here = top / group.lstrip("/")
        while True:
            limits += cgroup_available(here, limit_file, usage_file)
            if here == top or top not in here.parents:
                break
            here = here.parent
    return min(limits) if limits else None


def cgroup_available(group: Path, limit_file: str, usage_file: str) -> list[int]:
    """Return [bytes left under the group's own limit], or [] if it has none."""
    try:
        limit, usage = (group / limit_file).read_text().strip(), int((group / usage_file).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    if limit == "max":
        return []
    # Usage includes cached file pages; the system reclaims inactive ones on demand.
    reclaimable = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
    return [max(0, int(limit) - usage + reclaimable)]


def macos_available(vm_stat: str) -> int | None:
    """Return the bytes in pages that `vm_stat` reports as free or reclaimable."""
    page_size = re.search(r"page size of (\d+) bytes", vm_stat)
    counts = re.findall(r"^Pages (?:free|inactive|speculative|purgeable):\s+(\d+)\.", vm_stat, re.MULTILINE)
    return int(page_size[1]) * sum(map(int, counts)) if page_size and counts else None


def gigabytes(count: int) -> str:
    """Format a number of bytes in GB, or in MB below 0.1 GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far, in bytes: allocations on a CUDA device, otherwise the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
