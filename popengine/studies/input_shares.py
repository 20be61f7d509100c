"""Shares of the inputs that each kind of product leaves out at a decode step: parsing and writing them.

Nothing here imports PyTorch: a wrong flag is reported without waiting for it.
"""

from dataclasses import asdict, dataclass, fields

from models.pruning.settings import exact_share, share
from weights.errors import InputError

# What methods teal and wina leave out if no shares are given. down_proj loses least by it, q, k, v, gate and up most
# (docs/measurements/other_methods.md).
USUAL_INPUTS = "0.2,o=0.3,down=0.6"


@dataclass(frozen=True)
class InputShares:
    """The share of its inputs that each kind of product leaves out. q, k and v are one product.

    head  of the output projection, which belongs to no layer: only a share of its own leaves out its inputs
    """

    qkv: float = 0.0
    o: float = 0.0
    gate: float = 0.0
    up: float = 0.0
    down: float = 0.0
    head: float = 0.0

    def of_network(self, ffn_ratio: float) -> float:
        """Return the share of a network's weights left out, if `ffn_ratio` of its channels are off as well."""
        rows = (1 - ffn_ratio) * (self.gate + self.up) / 3
        return ffn_ratio + rows + max(0.0, self.down - ffn_ratio) / 3

    def __str__(self) -> str:
        kinds: dict[float, list[str]] = {}
        for kind, left_out in asdict(self).items():
            kinds.setdefault(left_out, []).append(kind)
        return ", ".join(f"{left_out:g} of {', '.join(own)}" for left_out, own in kinds.items() if left_out)


KINDS = tuple(one.name for one in fields(InputShares))              # the head is the last


def read_input_shares(words: str) -> InputShares | None:
    """Parse words like "0.3", one share for all products of the layers, or "0.2,o=0.3,down=0.6,head=0.3".

    In the second 0.2 holds for the products of the layers that are not named.

    Returns None if nothing is left out. Raises InputError for anything else, and for a share outside 0 <= share < 1.
    """
    others, named = 0.0, dict[str, float]()
    for number, word in enumerate(words.split(",") if words else ()):
        kind, is_named, value = word.rpartition("=")
        try:
            left_out = float(exact_share(share(value.strip())))
        except ValueError:
            left_out = -1.0
        known = kind.strip() in KINDS if is_named else number == 0
        if not known or kind.strip() in named or not 0 <= left_out < 1:
            raise InputError(
                "input sparsity must be a share below 1 like 0.3, or one with shares of products like "
                f"{USUAL_INPUTS} (products: {', '.join(KINDS)}), not {words!r}"
            )
        if is_named:
            named[kind.strip()] = left_out
        else:
            others = left_out
    shares = InputShares(**dict.fromkeys(KINDS[:-1], others) | named)
    return None if shares == InputShares() else shares
