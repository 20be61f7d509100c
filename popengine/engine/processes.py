"""What torchrun says of the processes that it has started. No PyTorch: commands ask before they import it."""

import os


def is_one_of_several() -> bool:
    """Whether torchrun has started this process, and others beside it."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ


def is_first() -> bool:
    """Whether this is the process that reads standard input, writes results and speaks."""
    return not is_one_of_several() or os.environ["RANK"] == "0"
