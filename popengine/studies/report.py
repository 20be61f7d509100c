"""What the studies add to the report of a run: counts, parts of the JSON object, and words for people."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from popengine.studies.resolve import StudyPruning
from popengine.studies.settings import WIDTH_RULES, PruningSettings


@dataclass(frozen=True)
class StudyStatistics:
    """Counts of a run that depend on studies.

    image_tokens     prompt tokens that stand for pictures
    left_out_tokens  those that layers from `pruning.thin_from` on leave out
    evidence_tokens  real tokens in the scores; dense_steps of the decode steps were dense and added tokens to them,
                     redraws counts new partitions
    """

    pruning: StudyPruning
    image_tokens: int
    left_out_tokens: int
    evidence_tokens: int
    dense_steps: int
    redraws: int


def visual_tokens_report(ran: StudyStatistics) -> dict[str, Any]:
    """Return the number of image tokens that stay, as JSON."""
    return {
        "of_pictures": ran.image_tokens, "left_out": ran.left_out_tokens,
        "from_layer": ran.pruning.thin_from if ran.left_out_tokens else None,
    }


def evidence_report(ran: StudyStatistics) -> dict[str, Any]:
    """Return the evidence and the steps that gathered it, as JSON."""
    return {
        "tokens": ran.evidence_tokens, "prior": ran.pruning.settings.prior, "dense_steps": ran.dense_steps,
        "redraws": ran.redraws,
    }


def visual_tokens_lines(ran: StudyStatistics) -> list[str]:
    """Format the number of image tokens that stay; no line if all do."""
    settings, of = ran.pruning.settings, ran.image_tokens
    if not ran.left_out_tokens:
        return []
    where = f"after layer {settings.visual_tokens_layer}" if ran.pruning.thin_from else "from the first layer on"
    return [f"pictures  {of - ran.left_out_tokens} of {of} image tokens stay {where}, by {settings.visual_tokens_by}"]


def evidence_lines(ran: StudyStatistics) -> list[str]:
    """Format the evidence; no line if nothing is pruned."""
    if not ran.pruning.cuts:
        return []
    prior = f" and a prior of {ran.pruning.settings.prior}" if ran.pruning.settings.prior else ""
    return [
        f"evidence  {ran.evidence_tokens} tokens{prior}, {ran.dense_steps} dense steps, {ran.redraws} redraws"
    ]


def unseen_experts_words(ran: StudyStatistics, prompt_tokens: Iterable[int]) -> str:
    """Format how many experts count as unseen in the prompt, and their treatment. prompt_tokens: of each expert"""
    settings = ran.pruning.settings
    unseen = sum(tokens < settings.min_tokens for tokens in prompt_tokens)
    fate = "cut by their weights alone" if settings.unseen_experts == "weights" else "left dense"
    return f"{unseen} unseen in the prompt{f' ({fate})' if unseen and ran.pruning.ffn_ratio > 0 else ''}"


def input_lines(ran: StudyStatistics) -> list[str]:
    """Format the inputs that steps leave out; no line if they read all."""
    words = input_words(ran.pruning.settings)
    return [f"inputs    {words}"] if words else []


def input_words(settings: PruningSettings) -> str:
    """Return the shares of the inputs that steps leave out, and the score; "" if they read all."""
    if settings.input_shares is None:
        return ""
    return f"every step leaves out {settings.input_shares}, by {settings.input_score}"


def why_all_is_read(pruning: StudyPruning) -> str:
    """Return why steps that leave something out read as much as dense steps, evidence aside."""
    if pruning.settings.input_shares is not None and not pruning.cuts:
        return "only plain weights stored by columns, multiplied by one token, are read in part"
    return "copies of what stays would save too little"


def rule_words(settings: PruningSettings) -> str:
    """Return the rule, with its width if it has one."""
    width = f", width {settings.candidate_width:g}" if settings.rule in WIDTH_RULES else ""
    return f"rule {settings.rule}{width}"
