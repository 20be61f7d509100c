"""Names that checkpoints give to weights, and ours: what stands before them depends on who saved the file."""

import re
from collections.abc import Iterable

# Patterns of the beginnings of keys, and what ours are instead.
Spellings = tuple[tuple[str, str], ...]

# A base model that was saved has no model. in front, a wrapped one has it twice, a model taken out of one that reads
# pictures has language_model. there.
TEXT_SPELLINGS: Spellings = (
    (r"((model|language_model)\.)*(?=(embed_tokens|layers|norm)\.)", "model."),
    (r"((model|language_model)\.)*(?=lm_head\.)", ""),
)
# The same inside a model that reads pictures.
INNER_TEXT_SPELLINGS: Spellings = tuple((pattern, f"language_model.{ours}") for pattern, ours in TEXT_SPELLINGS)


def our_name(key: str, spellings: Spellings) -> str:
    """The parameter that a checkpoint's key stands for; nobody's stays as it is."""
    for pattern, ours in spellings:
        matched = re.match(pattern, key)
        if matched:
            return ours + key[matched.end() :]
    return key


def keys_by_our_names(keys: Iterable[str], spellings: Spellings) -> dict[str, str]:
    """{our name: key}. Where two keys stand for one parameter, the one that is spelled as ours counts."""
    found: dict[str, str] = {}
    for key in keys:
        ours = our_name(key, spellings)
        if ours == key or ours not in found:
            found[ours] = key
    return found
