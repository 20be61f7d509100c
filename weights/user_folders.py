"""The user's folders that outlive a run: a cache for fetched or computed files, and state such as typed lines."""

import os
from pathlib import Path

from weights.errors import InputError


def cache_folder(name: str) -> Path:
    """Return $XDG_CACHE_HOME/popengine/`name`, for files that can be made again; may not exist. Default: ~/.cache"""
    return folder("XDG_CACHE_HOME", ".cache") / name


def state_folder() -> Path:
    """Return $XDG_STATE_HOME/popengine, for files that cannot be made again; may not exist. Default: ~/.local/state"""
    return folder("XDG_STATE_HOME", ".local/state")


def folder(variable: str, otherwise: str) -> Path:
    """Return popengine's folder. Raises InputError if the variable is not set and the user has no home folder."""
    named = os.environ.get(variable)
    try:
        return (Path(named) if named else Path.home() / otherwise) / "popengine"
    except RuntimeError:
        raise InputError(f"there is no home folder to keep files in: set {variable} to a folder") from None
