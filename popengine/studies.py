"""Two looks inside: how the ranking of channels drifts while decoding, and which candidates the steps pick.

T prompt tokens, S decode steps, I FFN channels, C candidates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.layers import FeedForward
from models.llama import LlamaForCausalLM
from popengine.activations import dense_activations, embedded, feed_forward_networks
from popengine.partition import ChannelPartition, channel_scores
from popengine.pruning import Pruning
from popengine.score import Window, log_probabilities


@dataclass(frozen=True)
class RankDrift:
    """How far each decode step's ranking is from the prompt's, per network that sees every token (no experts).

    names            the networks
    rank_difference  [networks, S]  mean over channels of |rank - rank in the prompt| / I; 1/3 by chance
    overlap          [networks, S]  share of the prompt's top half that is in the step's top half; 1/2 by chance
    """

    names: list[str]
    rank_difference: Tensor
    overlap: Tensor


@torch.inference_mode()
def rank_drift(model: LlamaForCausalLM, window: Window) -> RankDrift:
    """Of the dense model, on one window of text (POP, arXiv 2602.06822, Figure 2)."""
    names, differences, overlaps = [], [], []
    split = len(window.prompt)
    for activation in dense_activations(model, embedded(model, window.ids)):
        if len(activation.h) < len(window.ids):
            continue
        h, norms = activation.h, activation.ffn.down_norms()
        prompt = channel_scores(h[None, :split], norms)                             # [I]
        steps = h[split:].float().abs() * norms                                     # [S, I]
        before, now = ranks(prompt), ranks(steps)                                   # [I], [S, I]
        channels = len(prompt)
        half = channels // 2
        names.append(activation.name)
        differences.append((now - before).abs().float().mean(dim=-1) / channels)    # [S]
        overlaps.append(((now < half) & (before < half)).sum(dim=-1) / half)        # [S]
    if not names:
        return RankDrift([], torch.empty(0, 0), torch.empty(0, 0))
    return RankDrift(names, torch.stack(differences), torch.stack(overlaps))


def ranks(scores: Tensor) -> Tensor:
    """Rank of each channel by falling score, 0 for the best; ties: lower channel first. [..., I] -> int64"""
    return scores.sort(dim=-1, descending=True, stable=True).indices.argsort(dim=-1)


@dataclass(frozen=True)
class NetworkPicks:
    """One network's partition, and how often the steps that reached it picked each candidate.

    picked  int64 [C]; steps  how many there were
    """

    name: str
    partition: ChannelPartition
    picked: Tensor
    steps: int


@torch.inference_mode()
def picks(model: LlamaForCausalLM, window: Window, pruning: Pruning) -> list[NetworkPicks]:
    """What POP decides on one window. Networks that no step reached are left out."""
    names = {ffn: name for name, ffn in feed_forward_networks(model).items()}
    seen: list[NetworkPicks] = []

    def observe(ffn: FeedForward, partition: ChannelPartition, keep: Tensor) -> None:
        seen.append(NetworkPicks(names[ffn], partition, keep.sum(dim=0), len(keep)))

    log_probabilities(model, window, pruning, observe=observe)
    return seen
