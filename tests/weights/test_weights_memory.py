"""What is taken for free memory: the least of what the machine and each enclosing control group leave."""

import ctypes
import mmap
from pathlib import Path

import pytest
import torch

from weights import memory
from weights.errors import InputError

GIGABYTE = 10**9


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:       9000000 kB\nMemFree:          10 kB\nMemAvailable:    4000000 kB\n"}


def version_2(group: str, limit: str, used: int, inactive_file: int = 0) -> dict[str, str]:
    return {
        f"sys/fs/cgroup/{group}memory.max": f"{limit}\n",
        f"sys/fs/cgroup/{group}memory.current": f"{used}\n",
        f"sys/fs/cgroup/{group}memory.stat": f"anon 5\ninactive_file {inactive_file}\n",
    }


def test_memory_without_control_groups_is_mem_available(tmp_path: Path) -> None:
    assert memory.linux_available(write(tmp_path, MEMINFO)) == 4_096_000_000
    assert memory.linux_available(tmp_path / "nothing") is None


def test_a_version_2_limit_counts_and_so_does_one_above_it(tmp_path: Path) -> None:
    root = write(tmp_path, MEMINFO | {"proc/self/cgroup": "0::/a/b\n"} | version_2("a/b/", "max", 10))
    assert memory.linux_available(root) == 4_096_000_000
    write(root, version_2("a/b/", str(3 * GIGABYTE), GIGABYTE, inactive_file=GIGABYTE // 2))
    assert memory.linux_available(root) == 2 * GIGABYTE + GIGABYTE // 2
    write(root, version_2("a/", str(2 * GIGABYTE), GIGABYTE))
    assert memory.linux_available(root) == GIGABYTE
    write(root, version_2("", str(GIGABYTE), 2 * GIGABYTE))
    assert memory.linux_available(root) == 0


def test_a_container_sees_its_limit_at_the_top(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/../somewhere/else\n"} | version_2("", str(GIGABYTE), GIGABYTE // 4)
    assert memory.linux_available(write(tmp_path, MEMINFO | files)) == 3 * GIGABYTE // 4


def test_a_version_1_limit_counts(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory/docker/abc/"
    files = {
        "proc/self/cgroup": "12:cpu,cpuacct:/x\n5:memory:/docker/abc\n0::/\n",
        f"{group}memory.limit_in_bytes": f"{2 * GIGABYTE}\n",
        f"{group}memory.usage_in_bytes": f"{GIGABYTE}\n",
        f"{group}memory.stat": f"cache 7\ntotal_inactive_file {GIGABYTE // 10}\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "5\n",
        "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0\n",
    }
    assert memory.linux_available(write(tmp_path, MEMINFO | files)) == GIGABYTE + GIGABYTE // 10


def test_macos_counts_pages_that_are_free_or_given_up_on_demand() -> None:
    text = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
        "Pages free:                               1000.\nPages active:                           9999.\n"
        "Pages inactive:                           2000.\nPages speculative:                        30.\n"
    )
    assert memory.macos_available(text) == 16384 * 3030
    assert memory.macos_available("") is None


def test_what_does_not_fit_is_refused_with_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda device: 2 * GIGABYTE)
    memory.require_memory(2 * GIGABYTE, torch.device("cpu"), "it")
    with pytest.raises(InputError, match=r"it needs about 2\.5 GB of memory on cpu, and 2\.0 GB is available"):
        memory.require_memory(5 * GIGABYTE // 2, torch.device("cpu"), "it")


def test_this_machine_says_what_it_has() -> None:
    available = memory.available_memory(torch.device("cpu"))
    assert available is None or 0 < available < 2**50
    assert memory.available_memory(torch.device("meta")) is None


@pytest.mark.skipif(not Path("/proc/self/statm").exists() or not hasattr(ctypes.CDLL(None), "malloc_trim"),
                    reason="only glibc keeps freed memory, and only Linux tells how much a process holds")
def test_freed_memory_is_given_back() -> None:
    """Between small tensors that stay; glibc keeps it after a size was freed once."""
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    kept = []
    for _ in range(2):
        freed = []
        for _ in range(32):
            freed.append(torch.ones(1 << 20))
            kept.append(torch.ones(2000))
        del freed
        held = resident()
        memory.give_back()
    assert held - resident() > 64 << 20
