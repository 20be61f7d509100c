"""Names of weights in checkpoints, mapped to ours. Their prefix depends on the program that saved the file."""

import re
from collections.abc import Iterable

# Pairs of a pattern for the prefix of a key, and our prefix.
Spellings = tuple[tuple[str, str], ...]

# A saved base model has no prefix model., a wrapped one has it twice, and a language model taken out of one that reads
# pictures has language_model. instead.
TEXT_SPELLINGS: Spellings = (
    (r"((model|language_model)\.)*(?=(embed_tokens|layers|norm)\.)", "model."),
    (r"((model|language_model)\.)*(?=lm_head\.)", ""),
)
# TEXT_SPELLINGS for the language model inside a model that reads pictures.
INNER_TEXT_SPELLINGS: Spellings = tuple((pattern, f"language_model.{ours}") for pattern, ours in TEXT_SPELLINGS)


def our_name(key: str, spellings: Spellings) -> str:
    """Return the name of the parameter that a checkpoint's key stands for; an unknown key is returned as it is."""
    for pattern, ours in spellings:
        matched = re.match(pattern, key)
        if matched:
            return ours + key[matched.end() :]
    return key


def keys_by_our_names(keys: Iterable[str], spellings: Spellings) -> dict[str, str]:
    """Return {our name: key}. If two keys stand for one parameter, the key that equals our name is used."""
    found: dict[str, str] = {}
    for key in keys:
        ours = our_name(key, spellings)
        if ours == key or ours not in found:
            found[ours] = key
    return found
