"""A message on the terminal during work that no progress bar can measure."""

from contextlib import AbstractContextManager

from tqdm import tqdm


def waiting(words: str, shown: bool) -> AbstractContextManager[object]:
    """Show the words at once, and remove them at the end of the block."""
    return tqdm(desc=words, bar_format="{desc} ...", leave=False, disable=not shown)
