"""Settings of the two papers' methods. Flags, arguments of the harness, JSON and columns of tables derive from them.

A new setting is one field, with its default, its bounds and its help text. Settings of studies are in
popengine/studies/settings.py. Nothing here imports PyTorch: a wrong flag is reported without waiting for it.
"""

from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from fractions import Fraction
from typing import Any, TypeVar

from weights.errors import InputError

DEFAULT_PRUNE_RATIO = 0.2
# Where POP's paper differs from the recommended defaults: few candidates, and evidence from the prompt alone. Otherwise
# steps run dense until the scores have seen 64 tokens, so that a short prompt costs no quality.
PAPER: dict[str, Any] = {"candidate_width": 0.1, "min_evidence": 0}
# The two residual blocks of a decoder layer.
ATTENTION, MLP = SUBLAYERS = ("attention", "mlp")


Settings = TypeVar("Settings", bound="POPSettings")


def setting(
    default: Any, words: str, kind: Callable[[str], Any], *, metavar: str | None = None, least: float | None = None,
    below: float | None = None, most: float | None = None, choices: tuple[str, ...] = (), column: str | None = None,
    matters: str = "to all",
) -> Any:
    """Define a field of the settings.

    words             help text of its flag
    kind              parses a flag's word; metavar: how the help names the value (None: by its choices)
    least .. choices  allowed values
    column            heading in tables that compare settings; None: no table compares it
    matters           methods of a comparison that the field changes: "to all", "to widths" (rules that choose within
                      the width), "to rules", "to prompts" (methods that follow the prompt), "to experts" (the same, in
                      a mixture of experts), "to inputs" (methods that may leave out inputs), "to skipping" (prompts
                      that skip layers), "to layers" (methods that leave out layers), "to pictures" (models that read
                      them) or "to thinning" (pictures that lose tokens)
    """
    bounds = {"least": least, "below": below, "most": most, "choices": choices}
    metavar = metavar or "|".join(choices)
    about = {"help": words, "type": kind, "metavar": metavar, "column": column, "matters": matters}
    return field(default=default, metadata=bounds | about)


def share(words: str) -> float | str:
    """Parse a flag's share: decimals become a float; a fraction stays a string and therefore exact."""
    try:
        return float(words)
    except ValueError:
        return words


def exact_share(value: float | str) -> Fraction:
    """Convert 0.3, "3/10" or "1/3" to an exact fraction. Raises ValueError for anything else."""
    try:
        return Fraction(value).limit_denominator(1_000_000) if isinstance(value, float) else Fraction(str(value))
    except (ZeroDivisionError, OverflowError):
        raise ValueError(f"{value} is no number") from None


@dataclass(frozen=True)
class POPSettings:
    """Pruning settings of the two papers' methods. The defaults are the recommended values.

    prune_ratio      share of a decoder layer's parameters that a decode step leaves out; 0 is the dense model.
                     None: 0.2, unless ffn_ratio is given
    ffn_ratio        instead of prune_ratio: the share of FFN channels off at a decode step (r)
    candidate_width  candidates as a share of the channels (the paper's gamma); 0 freezes the prefill's mask
    head_ratio       share of query heads off at a decode step; counts towards prune_ratio
    prefill          "pruned": the prompt is finished on the active channels (the paper); "dense": on all channels, so
                     that prompt and first token equal the dense model's
    min_evidence     decode steps run dense and add to the scores until these have seen this many tokens
    prefill_skip     Prefill-Only pruning (arXiv 2602.03295): prompts skip the deepest floor(share * L) layers, except
                     for their last tokens. A number or a fraction like "1/3"
    boundary_tokens  number of last prompt tokens that run through the skipped layers
    Raises InputError for a value out of bounds.
    """

    prune_ratio: float | None = setting(
        None, "share of a decoder layer's parameters; 0: dense (default: 0.2)", float, metavar="R", least=0, below=1,
        column="",
    )
    ffn_ratio: float | None = setting(
        None, "instead of a prune ratio: share of the FFN channels", float, metavar="R", least=0, below=1, column=""
    )
    candidate_width: float = setting(
        0.5, "candidates, of all channels (default: 0.5; the paper: 0.1)", float, metavar="W", least=0, most=2,
        column="width", matters="to widths",
    )
    head_ratio: float = setting(
        0.0, "share of the query heads", float, metavar="R", least=0, below=1, column="heads off", matters="to prompts"
    )
    prefill: str = setting(
        "pruned", "finish the prompt on the active channels, or on all", str, choices=("pruned", "dense"),
        column="prefill",
    )
    min_evidence: int = setting(
        64, "decode steps run dense until the scores have seen N tokens (default: 64; the paper: 0)", int, metavar="N",
        least=0, column="min evidence", matters="to prompts",
    )
    prefill_skip: float | str = setting(
        0.0, "share of the layers, the deepest, that the prompt skips, like 1/3 (default: 0, none); or layers:3,7,9, "
        "or auto:1/4, by `popengine gates`", share, metavar="SHARE", least=0, below=1, column="prompt skips",
    )
    boundary_tokens: int = setting(
        1, "the last K prompt tokens run through skipped layers too (default: 1)", int, metavar="K", least=1,
        column="boundary tokens", matters="to skipping",
    )

    @classmethod
    def paper(cls: type[Settings], prune_ratio: float | None = None, **others: Any) -> Settings:
        """Give the settings of POP's paper (arXiv 2602.06822) to the letter, but for those that are named."""
        return cls(prune_ratio, **PAPER | others)

    def __post_init__(self) -> None:
        if self.prune_ratio is not None and self.ffn_ratio is not None:
            raise InputError("give a prune ratio or an FFN ratio, not both")
        for one in fields(self):
            self._check_field(one)

    def _check_field(self, one: Field[Any]) -> None:
        """Raise InputError for a value that a field does not allow. A study may allow more."""
        check(one, getattr(self, one.name))


def check(one: Field[Any], value: Any) -> None:
    """Raise InputError for a value that a field does not allow. A value equal to the default is always allowed."""
    bounds, name = one.metadata, one.name.replace("_", " ")
    if bounds["choices"]:
        if value not in bounds["choices"]:
            raise InputError(f"{name} must be one of {', '.join(bounds['choices'])}, not {value!r}")
        return
    if (type(value) is type(one.default) and value == one.default) or bounds["type"] is str:
        return
    least, below, most = bounds["least"], bounds["below"], bounds["most"]
    if bounds["type"] is share:
        try:
            value = exact_share(value)
        except ValueError:
            raise InputError(f"{name} must be a number or a fraction like 1/3, not {value}") from None
    elif type(value) not in (int, float) or (bounds["type"] is int and type(value) is not int):
        raise InputError(f"{name} must be a {'whole ' if bounds['type'] is int else ''}number, not {value!r}")
    sound = least <= value and (below is None or value < below) and (most is None or value <= most)
    if not sound:       # nan is not sound either
        allowed = f"at least {least}" if most is None else f"between {least} and {most}"
        raise InputError(f"{name} must be {allowed}{f' and below {below}' if below is not None else ''}, not {value}")
