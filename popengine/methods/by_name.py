"""Pruning methods by name: each is one small function that says how a ChannelPartition is made or used.

A method turns what the user asked for into PruningSettings. Those that follow the prompt change a setting; static ones
rank every network's channels in advance and hand the partitions over. Everything after that, prefill, decode steps,
generation, scoring and byte counts, is the same code for all of them.

To add one, write a function that takes a Request and add it to METHODS. For example, ranking channels by the norm of
their down_proj column alone:

    def down_norm(request: Request) -> PruningSettings:
        return request.keep_highest({name: ffn.down_norms() for name, ffn in request.networks.items()})

I FFN channels, H hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from models.feed_forward import FeedForward
from models.llama import LlamaForCausalLM
from models.mixtral import weight_scores
from models.pruning.partition import PartitionSizes, StaticChannels, partition_channels, partition_sizes
from models.pruning.settings import PruningSettings, StaticPartitions, resolve
from popengine.methods.activations import feed_forward_networks
from popengine.methods.calibration import Calibration
from weights.errors import InputError


@dataclass(frozen=True)
class Request:
    """What a method works from.

    calibration  None when none was given
    seed         for methods that draw numbers
    """

    model: LlamaForCausalLM
    settings: PruningSettings
    calibration: Calibration | None = None
    seed: int = 0

    @cached_property
    def networks(self) -> dict[str, FeedForward]:
        """The feed-forward networks by their place in the model."""
        return feed_forward_networks(self.model)

    @cached_property
    def ffn_ratio(self) -> float:
        """r, the share of FFN channels to prune."""
        return resolve(self.settings, self.model.layer_weights()).ffn_ratio

    def calibrated(self, method: str) -> Calibration:
        if self.calibration is None:
            raise InputError(f"method {method} is calibrated on a text: give --calibration-text or --calibration")
        return self.calibration

    def keep_highest(self, scores: dict[str, Tensor]) -> PruningSettings:
        """Keep the (1 - r) I channels of every network that score highest, whatever the prompt. scores [I] by name"""
        kept = {name: partition_sizes(len(of), self.ffn_ratio, 0.0).retained for name, of in scores.items()}
        return self.keep(scores, kept)

    def keep(
        self, scores: dict[str, Tensor], kept: dict[str, int], biases: dict[str, Tensor] | None = None
    ) -> PruningSettings:
        """Keep `kept` channels of each network. biases  [H] by name, see StaticChannels"""
        if self.settings.head_ratio > 0:
            raise InputError("static methods prune no heads: leave the head ratio at 0")
        static: dict[nn.Module, StaticChannels] = {}
        for name, ffn in self.networks.items():
            sizes = PartitionSizes(kept[name], 0, len(scores[name]) - kept[name], 0)
            partition = partition_channels(scores[name], sizes)
            bias = None
            if biases is not None:
                off = torch.zeros_like(biases[name]).index_fill(0, partition.pruned, 1) * biases[name]      # [I]
                bias = (ffn.down_proj.weight.float() @ off).to(ffn.down_proj.weight.dtype)  # [H]
            static[ffn] = StaticChannels(partition, bias)
        return replace(self.settings, candidate_width=0.0, static=StaticPartitions(static))


def dense(request: Request) -> PruningSettings:
    """Nothing is pruned."""
    return replace(request.settings, prune_ratio=0.0, ffn_ratio=None, head_ratio=0.0)


def pop(request: Request) -> PruningSettings:
    """Partition from the prompt, candidates picked anew at every step."""
    return request.settings


def frozen(request: Request) -> PruningSettings:
    """The prompt's mask at every step: POP of width 0."""
    return replace(request.settings, candidate_width=0.0)


def all_channels(request: Request) -> PruningSettings:
    """Every step picks among all channels: the quality ceiling, which saves next to nothing."""
    return replace(request.settings, all_channels=True)


def random(request: Request) -> PruningSettings:
    """Channels drawn at random: what any method has to beat."""
    generator = torch.Generator().manual_seed(request.seed)
    return request.keep_highest(
        {
            name: torch.rand(ffn.gate_proj.out_features, generator=generator).to(ffn.gate_proj.weight.device)
            for name, ffn in request.networks.items()
        }
    )


def magnitude(request: Request) -> PruningSettings:
    """The largest absolute weight of a channel's rows of gate and up, as width pruning of gated networks does."""
    return request.keep_highest(
        {
            name: torch.maximum(ffn.gate_proj.weight.abs().amax(dim=1), ffn.up_proj.weight.abs().amax(dim=1)).float()
            for name, ffn in request.networks.items()
        }
    )


def wanda_sp(request: Request) -> PruningSettings:
    """Wanda's |weight| times activation norm (arXiv 2306.11695), summed over a channel's column of down_proj.

    As "Wanda-sp" in FLAP (arXiv 2312.11983). Networks that the calibration never reached are ranked by weights alone.
    """
    calibration = request.calibrated("wanda-sp")
    scores = {}
    for name, ffn in request.networks.items():
        moments = calibration.moments[name]
        scores[name] = ffn.down_proj.weight.float().abs().sum(dim=0) * moments.mean_square.sqrt()   # [I]
        if moments.tokens == 0:
            scores[name] = weight_scores(ffn)
    return request.keep_highest(scores)


def flap(request: Request) -> PruningSettings:
    """FLAP (arXiv 2312.11983): channels that fluctuate little go, and their mean stays as a bias of down_proj.

    Score: variance of the channel times the squared norm of its down_proj column, standardised inside each network
    and compared over all of them, so that networks give up unequal shares. A network keeps one channel at least.
    """
    calibration = request.calibrated("flap")
    scores = {}
    for name, ffn in request.networks.items():
        moments = calibration.moments[name]
        raw = moments.variance * ffn.down_norms().square()                          # [I]
        if moments.tokens < 2:
            raw = weight_scores(ffn)
        scores[name] = (raw - raw.mean()) / raw.std().clamp(min=1e-12)
    together = torch.cat(list(scores.values()))
    budget = sum(partition_sizes(len(of), request.ffn_ratio, 0.0).retained for of in scores.values())
    order = together.sort(descending=True, stable=True).indices[:budget]
    owner = torch.repeat_interleave(torch.tensor([len(of) for of in scores.values()], device=order.device))
    counts = owner[order].bincount(minlength=len(scores)).tolist()
    kept = {name: max(1, count) for name, count in zip(scores, counts, strict=True)}
    return request.keep(scores, kept, {name: moments.mean for name, moments in calibration.moments.items()})


METHODS: dict[str, Callable[[Request], PruningSettings]] = {
    "dense": dense,
    "pop": pop,
    "frozen": frozen,
    "all-channels": all_channels,
    "random": random,
    "magnitude": magnitude,
    "wanda-sp": wanda_sp,
    "flap": flap,
}


def settings_for(method: str, request: Request) -> PruningSettings:
    """What `method` makes of the request. Raises InputError for an unknown method."""
    check_method(method)
    return METHODS[method](request)


def check_method(method: str) -> None:
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; the methods are {', '.join(METHODS)}")
