"""Rank of this process according to torchrun, without PyTorch: commands need it before they import PyTorch."""

import os


def is_one_of_several() -> bool:
    """Return True if torchrun has started several processes and this is one of them."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ


def is_first() -> bool:
    """Return True in the process that reads standard input and writes results and messages."""
    return not is_one_of_several() or os.environ["RANK"] == "0"
