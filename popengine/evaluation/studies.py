"""Two studies of POP: the drift of the ranking of channels while decoding, and the candidates that steps pick.

T prompt tokens, S decode steps, I FFN channels, C candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.feed_forward import FeedForward
from models.llama import LlamaForCausalLM
from models.pruning.evidence import channel_scores
from models.pruning.partition import ChannelPartition
from popengine.engine.loaded import LoadedModel
from popengine.evaluation.by_position import position_groups
from popengine.evaluation.scoring import Window, log_probabilities
from popengine.studies.activations import Activation, embedded, feed_forward_networks, watch_dense
from popengine.studies.recording import recorded
from popengine.studies.resolve import StudyPruning


@dataclass(frozen=True)
class RankDrift:
    """Distance of each decode step's ranking from the prompt's, per network; nan if a step did not reach an expert.

    names            the networks, including experts that the prompt did not reach
    rank_difference  [networks, S]  mean over channels of |rank - rank in the prompt| / I; 1/3 by chance
    overlap          [networks, S]  share of the prompt's top half that is in the step's top half; 1/2 by chance
    """

    names: list[str]
    rank_difference: Tensor
    overlap: Tensor


@torch.inference_mode()
def rank_drift(model: LlamaForCausalLM, window: Window) -> RankDrift:
    """Measure the drift in the dense model, on one window of text (POP, arXiv 2602.06822, Figure 2)."""
    names = list(feed_forward_networks(model))
    split, steps = len(window.prompt), len(window.continuation)
    differences = torch.full((len(names), steps), torch.nan)
    overlaps = differences.clone()

    def watch(activation: Activation) -> None:
        in_prompt = activation.positions < split                                    # [n]
        if not in_prompt.any():
            return
        h, norms = activation.h, activation.ffn.down_norms()
        before = ranks(channel_scores(h[None, in_prompt], norms))                   # [I]
        now = ranks(h[~in_prompt].float().abs() * norms)                            # [n, I]
        half = len(before) // 2
        row, reached = names.index(activation.name), activation.positions[~in_prompt].cpu() - split
        differences[row, reached] = (now - before).abs().float().mean(dim=-1).cpu() / len(before)
        overlaps[row, reached] = ((now < half) & (before < half)).sum(dim=-1).cpu() / half

    watch_dense(model, embedded(model, window.ids), watch)
    return RankDrift(names, differences, overlaps)


def drift_figures(drifts: Sequence[RankDrift]) -> dict[str, float]:
    """Average over windows, networks and steps: all steps, the first 16 and the last 16."""
    figures = {}
    for name in ("rank_difference", "overlap"):
        values = torch.stack([getattr(drift, name) for drift in drifts])            # [windows, networks, S]
        for part, steps in (("", slice(None)), ("_first_16", slice(16)), ("_last_16", slice(-16, None))):
            figures[name + part] = float(values[..., steps].nanmean())
    return figures


def drift_of_networks(drifts: Sequence[RankDrift]) -> list[dict[str, Any]]:
    """Average the drift over windows, per network: over all steps, and over groups of positions.

    A figure is None where no step reached an expert.
    """
    found = []
    for row, name in enumerate(drifts[0].names):
        figures: dict[str, Any] = {"network": name}
        for of in ("rank_difference", "overlap"):
            values = torch.stack([getattr(drift, of)[row] for drift in drifts])     # [windows, S]
            figures[of] = mean_of_known(values)
            figures[f"{of}_by_position"] = [
                {"first": first, "last": last, "mean": mean_of_known(values[:, first - 1 : last])}
                for first, last in position_groups(values.shape[1])
            ]
        found.append(figures)
    return found


def mean_of_known(values: Tensor) -> float | None:
    """Average the values that are not nan; None if all are."""
    mean = float(values.nanmean())
    return mean if mean == mean else None


def ranks(scores: Tensor) -> Tensor:
    """Rank each channel by falling score, 0 for the best; ties: lower channel first. [..., I] -> int64"""
    return scores.sort(dim=-1, descending=True, stable=True).indices.argsort(dim=-1)


@dataclass(frozen=True)
class NetworkPicks:
    """One network's partition, and how often the steps that reached it picked each candidate.

    picked   int64 [C]; steps  number of steps
    changed  for every step but the first, the share of its picks that the step before it had not picked
    """

    name: str
    partition: ChannelPartition
    picked: Tensor
    steps: int
    changed: Sequence[float] = ()


@torch.inference_mode()
def picks(engine: LoadedModel, window: Window, pruning: StudyPruning) -> list[NetworkPicks]:
    """Record POP's picks on one window. Networks that no step reached are left out."""
    names = {ffn: name for name, ffn in feed_forward_networks(engine.model).items()}
    seen: list[NetworkPicks] = []

    def observe(ffn: FeedForward, partition: ChannelPartition, keep: Tensor) -> None:
        keep = keep.flatten(0, -2)                                                  # [n, C]
        new = (keep[1:] & ~keep[:-1]).sum(dim=1) / keep[1:].sum(dim=1).clamp(min=1)     # [n - 1]
        seen.append(NetworkPicks(names[ffn], partition, keep.sum(dim=0), len(keep), new.tolist()))

    log_probabilities(engine, window, recorded(pruning, observe))
    return seen


def pick_figures(networks: Sequence[NetworkPicks]) -> dict[str, float]:
    """Compute quantiles of the share of steps that pick a candidate, and how many are picked always or never.

    new_at_a_step is the share of a step's picks that the step before it had not picked; nan for a single step.
    """
    changed = [share for network in networks for share in network.changed]
    shares = torch.cat([network.picked / network.steps for network in networks if network.steps])
    low, middle, high = shares.quantile(shares.new_tensor([0.05, 0.5, 0.95])).tolist()
    return {
        "quantile_5": low,
        "median": middle,
        "quantile_95": high,
        "always": float((shares == 1).float().mean()),
        "never": float((shares == 0).float().mean()),
        "new_at_a_step": sum(changed) / len(changed) if changed else float("nan"),
    }
