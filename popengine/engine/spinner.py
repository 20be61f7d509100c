"""A word on the terminal while something takes time that no bar can measure."""

from contextlib import AbstractContextManager

from tqdm import tqdm


def waiting(words: str, shown: bool) -> AbstractContextManager[object]:
    """The words at once, and gone afterwards."""
    return tqdm(desc=words, bar_format="{desc} ...", leave=False, disable=not shown)
