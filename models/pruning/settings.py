"""What the user asks for. Flags, arguments of the harness, JSON and the columns of tables derive from these fields.

A new setting is one field here, with its default, its bounds and its help; what it does stands where it is read.
Nothing here imports PyTorch: a wrong flag should not wait for it.
"""

from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass, field, fields
from fractions import Fraction
from typing import Any

from models.pruning.left_out import read_halves
from weights.errors import InputError

DEFAULT_PRUNE_RATIO = 0.2
# Of popengine/studies/rules.py, which imports PyTorch and therefore is not asked here.
RULE_NAMES = ("pop", "all-channels", "up", "gate", "cats", "teal", "glass", "draft")
# Those whose candidates are as many as the width says; under the others all that is not retained is a candidate.
WIDTH_RULES = ("pop", "glass")
# Methods that leave out layers or halves of them (popengine/methods).
LAYER_METHODS = ("shortgpt", "finercut")


def setting(
    default: Any, words: str, kind: Callable[[str], Any], *, metavar: str | None = None, least: float | None = None,
    below: float | None = None, most: float | None = None, choices: tuple[str, ...] = (), column: str | None = None,
    matters: str = "to all",
) -> Any:
    """A field of the settings.

    words             help of its flag
    kind              makes its value from a flag's word; metavar: what the help shows (choices speak for themselves)
    least .. choices  values it may have
    column            its heading in tables that compare settings; None: it is compared in none
    matters           to which of the methods that are compared: "to all", "to widths" (rules that choose within the
                      width), "to rules", "to prompts" (methods that follow the prompt), "to experts" (those, where a
                      model has experts), "to skipping" (where prompts skip layers), "to layers" (methods that leave out
                      layers), "to pictures" (models that read them) or "to thinning" (where pictures lose tokens)
    """
    bounds = {"least": least, "below": below, "most": most, "choices": choices}
    metavar = metavar or "|".join(choices)
    about = {"help": words, "type": kind, "metavar": metavar, "column": column, "matters": matters}
    return field(default=default, metadata=bounds | about)


def share(words: str) -> float | str:
    """A share as a flag gives it: decimals become a number, a fraction stays as it is written, and so exact."""
    try:
        return float(words)
    except ValueError:
        return words


def exact_share(value: float | str) -> Fraction:
    """0.3 and "3/10" alike, 1/3 and "1/3" too, without the rounding of a float. ValueError for what is no number."""
    try:
        return Fraction(value).limit_denominator(1_000_000) if isinstance(value, float) else Fraction(str(value))
    except (ZeroDivisionError, OverflowError):
        raise ValueError(f"{value} is no number") from None


@dataclass(frozen=True)
class PruningSettings:
    """How much to prune, and how.

    prune_ratio      share of a decoder layer's parameters that a decode step leaves out; 0 is the dense model.
                     None: 0.2, unless ffn_ratio says how much
    ffn_ratio        instead of prune_ratio: the share of FFN channels off at a decode step (r)
    candidate_width  candidates as a share of the channels (the paper's gamma); 0 freezes the prefill's mask
    retained_share   share of the FFN channels that always run. Candidates are then all others (under rules pop and
                     glass up to the candidate width), and picked is what the ratio leaves. None: the paper's sizes, or
                     none under rules that choose among all channels
    head_ratio       share of query heads off at a decode step; counts towards prune_ratio
    prefill          "pruned": the prompt is finished on the channels that stay (the paper);
                     "dense": on all of them, so that prompt and first token are the dense model's
    scored_tokens    prompt tokens that count in the scores: "all", or "text" without the image tokens
    unseen_experts   what becomes of an expert that fewer than min_tokens prompt tokens were routed to: "weights" cuts
                     it by the prior, else by scores from its weights alone, so that the budget still holds; "dense"
                     leaves it whole
    prior            tokens that the model's own sampled text counts for as evidence (popengine/prior.py)
    min_evidence     until the scores have seen so many real tokens, steps run dense and add to them
    dense_every      one step in so many runs dense and adds to the evidence; None: no step does
    redraw_every     at the first dense step after so many steps the partitions are drawn anew; None: they stay
    rule             how channels are scored and cut (popengine/studies/rules.py)
    prefill_skip     Prefill-Only pruning (arXiv 2602.03295): the deepest layers, floor(share of them), are skipped for
                     the prompt, all but its last tokens; steps run every layer. A number or a fraction like "1/3"
    boundary_tokens  how many of the last prompt tokens run through the skipped layers all the same
    visual_tokens    how many of a picture's tokens stay in the prompt: a share below 1, a number, or "all"
    visual_tokens_by which: by the last prompt token's "attention" after the layer visual_tokens_layer, or by
                     "diversity" before the first (popengine/studies/visual_tokens.py)
    groups           equal stretches of a network's channels that are cut alike, each by itself: what as many ranks do
    leave_out        layers, or halves of them, that neither prompts nor steps run: "20-22+25.attention+26.mlp". The
                     prune ratio is a share of what is left
    layer_share      what methods that leave out layers take of the prune ratio; the rest are channels by the rule
    Raises InputError for a value out of bounds.
    """

    prune_ratio: float | None = setting(
        None, "share of a decoder layer's parameters; 0: dense (default: 0.2)", float, metavar="R", least=0, below=1,
        column="",
    )
    ffn_ratio: float | None = setting(
        None, "instead: share of the FFN channels", float, metavar="R", least=0, below=1, column=""
    )
    candidate_width: float = setting(
        0.1, "candidates, of all channels (the paper: 0.1)", float, metavar="W", least=0, most=2, column="width",
        matters="to widths",
    )
    retained_share: float | None = setting(
        None, "FFN channels that always run, of all; a step then chooses among the others", float, metavar="SHARE",
        least=0, below=1, column="retained", matters="to rules",
    )
    head_ratio: float = setting(
        0.0, "share of the query heads", float, metavar="R", least=0, below=1, column="heads off", matters="to prompts"
    )
    prefill: str = setting(
        "pruned", "finish the prompt on what stays, or on everything", str, choices=("pruned", "dense"),
        column="prefill",
    )
    scored_tokens: str = setting("all", "count image tokens in the scores, or only text", str, choices=("all", "text"))
    unseen_experts: str = setting(
        "weights", "experts that no prompt token reached: cut by their weights alone, or leave them whole", str,
        choices=("weights", "dense"), column="unseen experts", matters="to experts",
    )
    prior: int = setting(
        0, "text that the model sampled itself counts as N tokens of evidence, before any real one", int, metavar="N",
        least=0, most=1_000_000, column="prior", matters="to prompts",
    )
    min_evidence: int = setting(
        0, "steps run dense until N real tokens were seen", int, metavar="N", least=0, column="min evidence",
        matters="to prompts",
    )
    dense_every: int | None = setting(
        None, "one step in M runs dense and adds to the evidence", int, metavar="M", least=1, column="dense every",
        matters="to prompts",
    )
    redraw_every: int | None = setting(
        None, "every T steps partitions are drawn anew from all evidence so far", int, metavar="T", least=1,
        column="redraw every", matters="to prompts",
    )
    min_tokens: int = setting(1, "prompt tokens below which an expert counts as not reached", int, metavar="N", least=1)
    rule: str = setting(
        "pop", "how channels are scored and cut (all-channels: as WINA does for down_proj; glass: needs a prior)", str,
        choices=RULE_NAMES,
    )
    prefill_skip: float | str = setting(
        0.0, "share of the layers, the deepest, that the prompt skips, like 1/3 (default: 0, none)", share,
        metavar="SHARE", least=0, below=1, column="prompt skips",
    )
    boundary_tokens: int = setting(
        1, "the last K prompt tokens run through skipped layers too (default: 1)", int, metavar="K", least=1,
        column="boundary tokens", matters="to skipping",
    )
    visual_tokens: float | str = setting(
        "all", "tokens of each picture that stay: a share below 1, a number, or all (default)", share,
        metavar="SHARE|N|all", least=0, column="visual tokens", matters="to pictures",
    )
    visual_tokens_by: str = setting(
        "attention", "those attended to most (FastV), or those furthest from each other", str,
        choices=("attention", "diversity"), column="chosen by", matters="to thinning",
    )
    visual_tokens_layer: int = setting(
        2, "by attention: all of them stay up to this layer (default: 2)", int, metavar="K", least=1,
        column="after layer", matters="to thinning",
    )
    groups: int = setting(
        1, "channels are cut alike in so many equal stretches, as so many ranks do", int, metavar="N", least=1,
        column="groups",
    )
    leave_out: str = setting(
        "", "layers or halves of them that neither prompts nor steps run, like 20-22+25.attention+26.mlp", str,
        metavar="LAYERS", column="left out",
    )
    layer_share: float = setting(
        1.0, "methods shortgpt and finercut: what of the prune ratio layers give, channels give the rest (default: 1)",
        float, metavar="SHARE", least=0, most=1, column="of layers", matters="to layers",
    )

    def __post_init__(self) -> None:
        if self.prune_ratio is not None and self.ffn_ratio is not None:
            raise InputError("give a prune ratio or an FFN ratio, not both")
        if self.redraw_every is not None and self.dense_every is None:
            raise InputError("redraw every needs dense every: without dense steps there is no new evidence")
        if self.rule == "glass" and self.prior == 0:
            raise InputError("rule glass needs a prior of 1 or more, whose ranks it joins with the prompt's")
        read_halves(str(self.leave_out))
        for one in fields(self):
            check(one, getattr(self, one.name))
        left = 1 if self.visual_tokens == "all" else exact_share(self.visual_tokens)
        if left == 0 or (left > 1 and left.denominator > 1):
            raise InputError(
                f"visual tokens must be a share between 0 and 1, a number of tokens or all, not {self.visual_tokens}"
            )


def check(one: Field[Any], value: Any) -> None:
    """Raises InputError for a value that a field may not have; None stands for a default that is not a value."""
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


def compared_fields() -> Iterator[Field[Any]]:
    """The fields that tables compare."""
    return (one for one in fields(PruningSettings) if one.metadata["column"] is not None)


DENSE = PruningSettings(prune_ratio=0.0)
# What generation does where nothing is said. Until 64 tokens are seen steps run dense, so that a short
# prompt costs no quality; nothing is sampled at first use. PruningSettings() itself is the paper's rule to the letter.
RECOMMENDED = PruningSettings(candidate_width=0.5, min_evidence=64)
