"""Settings of the studies beside the two papers' methods: one small class per study, joined in PruningSettings.

A study's own settings are fields of its class here; everything else derives from them (see models/pruning/settings.py).
Nothing here imports PyTorch: a wrong flag is reported without waiting for it.
"""

from collections.abc import Iterator
from dataclasses import Field, dataclass, fields
from typing import Any

from models.pruning.settings import POPSettings, exact_share, setting, share
from popengine.studies.input_shares import InputShares, read_input_shares
from popengine.studies.left_out import read_halves
from popengine.studies.skipped_layers import check_skip, names_layers
from weights.errors import InputError

# Names of popengine/studies/rules.py, which is not imported here because it imports PyTorch.
RULE_NAMES = ("pop", "all-channels", "up", "gate", "cats", "glass", "draft")
# Rules with candidates by the width; under the others every channel that is not retained is a candidate.
WIDTH_RULES = ("pop", "glass")
# Methods that leave out layers or halves of them.
LAYER_METHODS = ("shortgpt", "finercut")
# Methods that leave out inputs and nothing else, by the names of their scores.
INPUT_METHODS = ("teal", "wina")


@dataclass(frozen=True)
class RuleSettings:
    """Settings of how channels are scored and partitioned (popengine/studies/rules.py).

    rule            name of the rule
    retained_share  share of the FFN channels that always run. All other channels are candidates then (under rules pop
                    and glass up to the candidate width), and a step picks as many as the ratio leaves. None: the
                    paper's sizes, or no retained channels under rules that choose among all
    groups          number of equal, independent groups that a network's channels are partitioned in, as N-way tensor
                    parallelism does
    """

    rule: str = setting(
        "pop", "how channels are scored and cut (all-channels: as WINA does for down_proj; glass: needs a prior)", str,
        choices=RULE_NAMES,
    )
    retained_share: float | None = setting(
        None, "FFN channels that always run, of all; a step then chooses among the others", float, metavar="SHARE",
        least=0, below=1, column="retained", matters="to rules",
    )
    groups: int = setting(
        1, "partition channels in N independent equal groups, as N-way tensor parallelism does", int, metavar="N",
        least=1, column="groups",
    )


@dataclass(frozen=True)
class EvidenceSettings:
    """Settings of which tokens count in the scores, and when channels are partitioned again.

    prior           number of tokens that the model's own sampled text counts as (popengine/engine/prior.py)
    dense_every     one decode step in this many runs dense and adds to the scores; None: no step does
    redraw_every    the first dense step after this many steps partitions the channels again; None: no step does
    scored_tokens   prompt tokens that count in the scores: "all", or "text" without the image tokens
    min_tokens      an expert with fewer prompt tokens counts as unseen
    unseen_experts  treatment of unseen experts: "weights" scores their channels by the prior, or by their weights
                    alone, so that the budget still holds; "dense" leaves them whole
    """

    prior: int = setting(
        0, "text that the model sampled itself counts as N tokens of evidence, before any real one", int, metavar="N",
        least=0, most=1_000_000, column="prior", matters="to prompts",
    )
    dense_every: int | None = setting(
        None, "one step in M runs dense and adds to the evidence", int, metavar="M", least=1, column="dense every",
        matters="to prompts",
    )
    redraw_every: int | None = setting(
        None, "every T steps channels are partitioned again from all evidence so far", int, metavar="T", least=1,
        column="redraw every", matters="to prompts",
    )
    scored_tokens: str = setting("all", "count image tokens in the scores, or only text", str, choices=("all", "text"))
    min_tokens: int = setting(1, "prompt tokens below which an expert counts as not reached", int, metavar="N", least=1)
    unseen_experts: str = setting(
        "weights", "experts that no prompt token reached: prune by weights alone, or leave them whole", str,
        choices=("weights", "dense"), column="unseen experts", matters="to experts",
    )


@dataclass(frozen=True)
class LayerSettings:
    """Layers, or halves of layers, that neither prompts nor steps run (popengine/studies/left_out.py).

    leave_out    "20-22+25.attention+26.mlp". The prune ratio is a share of the rest
    layer_share  share of the prune ratio that methods which leave out layers use; the rule prunes channels for the rest
    """

    leave_out: str = setting(
        "", "layers or halves of them that neither prompts nor steps run, like 20-22+25.attention+26.mlp", str,
        metavar="LAYERS", column="left out",
    )
    layer_share: float = setting(
        1.0, "methods shortgpt and finercut: share of the prune ratio taken from layers, not channels (default: 1)",
        float, metavar="SHARE", least=0, most=1, column="of layers", matters="to layers",
    )


@dataclass(frozen=True)
class InputSettings:
    """Inputs that the products of decode steps leave out (popengine/studies/input_sparsity.py), beside what is pruned.

    input_sparsity  "0.3", a share of the inputs of every product of a layer, or "0.2,o=0.3,down=0.6,head=0.3" with
                    shares of products
    input_score     "wina" scores an input by its size times the norm of its column, "teal" by its size alone
    """

    input_sparsity: str = setting(
        "", "share of the inputs that products of a step leave out, like 0.3 (in layers) or 0.2,down=0.6,head=0.3", str,
        metavar="SHARES", column="inputs off", matters="to inputs",
    )
    input_score: str = setting(
        "wina", "score of an input: its size times the norm of its column, or its size", str, choices=INPUT_METHODS,
    )

    @property
    def input_shares(self) -> InputShares | None:
        """The share of its inputs that each product leaves out; None: nothing is left out."""
        return read_input_shares(str(self.input_sparsity))


@dataclass(frozen=True)
class VisualTokenSettings:
    """Tokens of pictures that a prompt drops (popengine/studies/visual_tokens.py).

    visual_tokens        tokens of each picture that are kept: a share below 1, a number, or "all"
    visual_tokens_by     criterion for keeping them: "attention" of the last prompt token, after the layer
                         visual_tokens_layer, or "diversity", before the first layer
    visual_tokens_layer  by attention, all tokens are kept up to this layer
    """

    visual_tokens: float | str = setting(
        "all", "tokens of each picture that stay: a share below 1, a number, or all (default)", share,
        metavar="SHARE|N|all", least=0, column="visual tokens", matters="to pictures",
    )
    visual_tokens_by: str = setting(
        "attention", "keep tokens attended to most (FastV), or tokens furthest from each other", str,
        choices=("attention", "diversity"), column="chosen by", matters="to thinning",
    )
    visual_tokens_layer: int = setting(
        2, "by attention: all tokens are kept up to this layer (default: 2)", int, metavar="K", least=1,
        column="after layer", matters="to thinning",
    )


@dataclass(frozen=True)
class PruningSettings(
    VisualTokenSettings, InputSettings, LayerSettings, EvidenceSettings, RuleSettings, POPSettings
):
    """All settings: of the two papers' methods, and of every study. Raises InputError for a value out of bounds.

    prefill_skip may also name or choose layers (popengine/studies/skipped_layers.py).
    PruningSettings() is what is recommended, PruningSettings.paper() what POP's paper does to the letter.
    """

    def _check_field(self, one: Field[Any]) -> None:
        if one.name != "prefill_skip":
            super()._check_field(one)
        elif names_layers(self.prefill_skip):
            check_skip(self.prefill_skip)
        else:
            try:
                super()._check_field(one)
            except InputError as error:
                raise InputError(f"{error}; layers are named like layers:3,7,9") from None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.redraw_every is not None and self.dense_every is None:
            raise InputError("redraw every needs dense every: without dense steps there is no new evidence")
        if self.rule == "glass" and self.prior == 0:
            raise InputError("rule glass needs a prior of 1 or more, whose ranks it joins with the prompt's")
        read_halves(str(self.leave_out))
        if self.input_shares is not None:
            check_beside_inputs(self)
        left = 1 if self.visual_tokens == "all" else exact_share(self.visual_tokens)
        if left == 0 or (left > 1 and left.denominator > 1):
            raise InputError(
                f"visual tokens must be a share between 0 and 1, a number of tokens or all, not {self.visual_tokens}"
            )


def check_beside_inputs(settings: PruningSettings) -> None:
    """Raise InputError for settings that do not combine with input sparsity."""
    if settings.rule != "pop":
        raise InputError(f"input sparsity combines with rule pop, not with rule {settings.rule}")
    if settings.head_ratio > 0:
        raise InputError("input sparsity prunes no heads: leave the head ratio at 0")
    if settings.unseen_experts == "dense":
        raise InputError("input sparsity leaves no expert whole: leave unseen experts at weights")


# Titles of the groups of flags in the help, in the order of the fields.
GROUPS = {
    "pruning": POPSettings, "rules": RuleSettings, "evidence": EvidenceSettings, "layers left out": LayerSettings,
    "inputs left out": InputSettings,
    "visual tokens": VisualTokenSettings,
}


def compared_fields() -> Iterator[Field[Any]]:
    """Yield the fields that tables compare."""
    return (one for one in fields(PruningSettings) if one.metadata["column"] is not None)


DENSE = PruningSettings.paper(prune_ratio=0.0)
