"""The input of a pruning method, and the functions by which methods build a Pruning.

I FFN channels, H hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from models.cost_model import layer_weights
from models.feed_forward import FeedForward
from models.llama import LlamaForCausalLM
from models.pruning.partition import PartitionSizes, channels_of_group, partition_channels, partition_sizes
from models.pruning.settings import DEFAULT_PRUNE_RATIO, MLP
from popengine.studies.activations import feed_forward_networks, layer_of
from popengine.studies.calibration import Calibration
from popengine.studies.left_out import Half, read_halves, written_halves
from popengine.studies.resolve import StudyPruning, resolve_study, share_of_halves
from popengine.studies.rules import StaticChannels, StaticRule
from popengine.studies.settings import PruningSettings
from weights.errors import InputError


@dataclass(frozen=True)
class Request:
    """The input of a pruning method.

    calibration  None if none was given
    seed         for methods that draw random numbers
    resolve      the engine's, which makes a prior if the settings ask for one; None: they ask for none
    """

    model: LlamaForCausalLM
    settings: PruningSettings
    calibration: Calibration | None = None
    seed: int = 0
    resolve: Callable[[PruningSettings], StudyPruning] | None = None

    @cached_property
    def networks(self) -> dict[str, FeedForward]:
        """The feed-forward networks that run, by their place in the model."""
        gone = {half.layer for half in read_halves(str(self.settings.leave_out)) if half.part == MLP}
        return {name: ffn for name, ffn in feed_forward_networks(self.model).items() if layer_of(name) not in gone}

    def pruning(self, **changes: Any) -> StudyPruning:
        """Resolve the settings for this model, with some of them changed."""
        settings = replace(self.settings, **changes)
        return resolve_study(settings, layer_weights(self.model)) if self.resolve is None else self.resolve(settings)

    @cached_property
    def ffn_ratio(self) -> float:
        """r, the share of FFN channels to prune."""
        return self.pruning().ffn_ratio

    def calibrated(self, method: str) -> Calibration:
        """Return the calibration. Raises InputError if none was given."""
        if self.calibration is None:
            raise InputError(f"method {method} is calibrated on a text: give --calibration-text or --calibration")
        return self.calibration

    def layer_budget(self, method: str) -> float:
        """Return the share of all layers' parameters that a method may leave out. InputError if leave_out is set."""
        if self.settings.leave_out:
            raise InputError(f"method {method} chooses what is left out: give no --leave-out")
        return self.asked_ratio * self.settings.layer_share

    @property
    def parts(self) -> int:
        """Number of equal groups of a network's channels that are partitioned independently: ranks times groups."""
        return self.model.config.ranks.count * self.settings.groups

    def channels(self, of: Tensor) -> int:
        """Return the channels of a whole network. of [I of this rank]: any values per channel"""
        return self.model.config.ranks.count * len(of)

    def count_kept(self, of: Tensor) -> int:
        """Return the number of channels of a whole network that the ratio keeps. of [I of this rank]"""
        of_part = channels_of_group(self.channels(of), self.parts)
        return self.parts * partition_sizes(of_part, self.ffn_ratio, 0.0).retained

    @property
    def asked_ratio(self) -> float:
        """The headline ratio that the settings ask for, even if it is more than the channels hold."""
        if self.settings.ffn_ratio is not None:
            return self.pruning().ratio
        return DEFAULT_PRUNE_RATIO if self.settings.prune_ratio is None else self.settings.prune_ratio

    def without(self, halves: Sequence[Half]) -> StudyPruning:
        """Leave out these halves, and prune channels of the others up to the asked ratio if layer_share is below 1."""
        weights = layer_weights(self.model)
        networks = sum(half.part == MLP for half in halves) / weights.layers
        rest = 0.0
        if self.settings.layer_share < 1:
            rest = max(0.0, (self.asked_ratio - share_of_halves(halves, weights)) / (1 - networks))
        return self.pruning(
            prune_ratio=rest, ffn_ratio=None, head_ratio=self.settings.head_ratio if rest else 0.0,
            leave_out=written_halves(halves),
        )

    def keep_highest(self, scores: dict[str, Tensor]) -> StudyPruning:
        """Keep the (1 - r) I channels of every network that score highest, whatever the prompt. scores [I] by name"""
        return self.keep(scores, {name: self.count_kept(of) for name, of in scores.items()})

    def keep(
        self, scores: dict[str, Tensor], kept: dict[str, int], biases: dict[str, Tensor] | None = None
    ) -> StudyPruning:
        """Keep `kept` channels of each whole network, the same number in each part. scores, biases [I] by name

        biases  constants that replace removed channels (FLAP's means); None: zeros
        """
        if self.settings.head_ratio > 0:
            raise InputError("static methods prune no heads: leave the head ratio at 0")
        static: dict[nn.Module, StaticChannels] = {}
        for name, ffn in self.networks.items():
            stay = max(1, round(kept[name] / self.parts))
            gone = channels_of_group(self.channels(scores[name]), self.parts) - stay
            sizes = PartitionSizes(stay, 0, gone, 0).times(self.settings.groups)
            partition = partition_channels(scores[name], sizes)
            bias = None
            if biases is not None:
                off = torch.zeros_like(biases[name]).index_fill(0, partition.pruned, 1) * biases[name]      # [I]
                weight = ffn.down_proj.values()                                     # [H, I]
                bias = (weight.float() @ off).to(weight.dtype)                      # [H]
            static[ffn] = StaticChannels(partition, bias)
        return replace(self.pruning(candidate_width=0.0, retained_share=None), rule=StaticRule(of=static))
