"""What a script of ours that runs isolated (`python -I -S`) is given to start with."""

import os
import sys


def environment() -> dict[str, str]:
    """Of the environment only what Python itself may need to start and to tell the time."""
    kept = ("SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")
    return {name: os.environ[name] for name in kept if name in os.environ}


def package_folders(*packages: str) -> list[str]:
    """The folders that hold these packages, for a Python that starts without site-packages.

    Taken from this process's search path without the current directory, where a file of such a name may lie.
    """
    try:
        here = os.path.realpath(os.getcwd())
    except FileNotFoundError:  # the current directory was deleted
        here = ""
    folders = [entry for entry in sys.path if os.path.isabs(entry) and os.path.realpath(entry) != here]
    found = [
        next((folder for folder in folders if os.path.isfile(os.path.join(folder, package, "__init__.py"))), None)
        for package in packages
    ]
    return [folder for folder in found if folder is not None]
