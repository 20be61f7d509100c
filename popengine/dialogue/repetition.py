"""Detection of an answer that says the same again and again, as pruned and small models sometimes do."""

from collections.abc import Sequence

# Shorter phrases repeat in good answers too (a line of a table, "1, 1, 1"); a loop of them is found as a multiple.
LEAST_TOKENS = 8
# Longer loops end at the answer's own limit, and every token is compared with these many.
MOST_TOKENS = 200
# Three times may be meant (a refrain, three alike examples).
TIMES = 4


def repeated(tokens: Sequence[int]) -> int:
    """Return the length of the phrase that ends the tokens TIMES times in a row; 0 if there is none."""
    for size in range(LEAST_TOKENS, min(MOST_TOKENS, len(tokens) // TIMES) + 1):
        if tokens[-1] == tokens[-1 - size] and tokens[-(TIMES - 1) * size :] == tokens[-TIMES * size : -size]:
            return size
    return 0
