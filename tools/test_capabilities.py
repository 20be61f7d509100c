"""Run the tests that compare numbers as on other processors: fewer vector instructions, one and two threads.

    python tools/test_capabilities.py [--short] [arguments of pytest]

The instructions of PyTorch, oneDNN and MKL are set to each set that this machine supports. --short runs two
combinations: the fewest instructions with one thread, and all with two. (`make test` runs all with one thread.)
With one thread two processes share the files.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

# PyTorch's name, oneDNN's and MKL's, each including those before.
SETS = [("default", "SSE41", "SSE4_2"), ("avx2", "AVX2", "AVX2"), ("avx512", "AVX512_CORE", "AVX512")]


def main() -> int:
    own = torch.backends.cpu.get_cpu_capability().lower()
    names = [name for name, _, _ in SETS]
    tried = SETS[: names.index(own) + 1 if own in names else 1]
    tests = Path(__file__).resolve().parents[1] / "tests"
    files = [path for path in sorted(tests.rglob("test_*.py")) if "mark.numeric" in path.read_text(encoding="utf-8")]
    arguments = [argument for argument in sys.argv[1:] if argument != "--short"]
    command = [sys.executable, "-m", "pytest", "-m", "numeric", *arguments, *map(str, files)]
    pairs = [(one, threads) for one in tried for threads in (1, 2)]
    if "--short" in sys.argv:
        pairs = [pairs[0], pairs[-1]]
    failed = 0
    for (name, onednn, mkl), threads in pairs:
        settings = {
            "ATEN_CPU_CAPABILITY": name, "ONEDNN_MAX_CPU_ISA": onednn, "MKL_ENABLE_INSTRUCTIONS": mkl,
            "OMP_NUM_THREADS": str(threads),
        }
        began = time.perf_counter()
        apart = ["--numprocesses", "2", "--dist", "loadfile"] if threads == 1 else []
        with tempfile.TemporaryDirectory() as cache:        # a shared one has code for other instructions
            settings["TORCHINDUCTOR_CACHE_DIR"] = cache
            run = subprocess.run([*command, *apart], env=os.environ | settings)
        verdict = "failed" if run.returncode else "passed"
        print(f"{name}, {threads} thread(s): {verdict} in {time.perf_counter() - began:.0f} s", flush=True)
        failed |= run.returncode
    return failed


if __name__ == "__main__":
    sys.exit(main())
