"""Activations of the dense model's feed-forward networks on a text, one network after the other.

Calibrated methods and studies of the ranking of channels need every network's activation. A watch on a dense prompt
gives them (popengine/studies/recording.py).

T tokens, H hidden size, I FFN channels, n tokens that reach one network.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.cost_model import layer_weights
from models.experts import MixtureOfExperts
from models.feed_forward import FeedForward
from models.llama import LlamaForCausalLM
from models.passes import PictureRows
from models.pruning.resolve import resolve
from popengine.studies.recording import Watch, watched
from popengine.studies.settings import DENSE


@dataclass(frozen=True)
class Activation:
    """The activation of one feed-forward network.

    name       its place in the model, as checkpoints spell it: model.layers.0.mlp
    positions  int64 [n], the tokens that reach this network, in order
    h          [n, I], the input of down_proj for these tokens
    """

    name: str
    ffn: FeedForward
    positions: Tensor
    h: Tensor


def feed_forward_networks(model: LlamaForCausalLM) -> dict[str, FeedForward]:
    """Return every feed-forward network by its place in the model; in a mixture each expert is one."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FeedForward)}


def mixtures_of_experts(model: LlamaForCausalLM) -> dict[str, MixtureOfExperts]:
    """Return every mixture of experts by its place in the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MixtureOfExperts)}


def layer_of(name: str) -> int:
    """Return the layer index of a network, given its place in the model."""
    return int(name.split(".")[2])


@torch.inference_mode()
def watch_dense(
    model: LlamaForCausalLM, x: Tensor, watch: Callable[[Activation], None], pictures: PictureRows | None = None
) -> None:
    """Run the dense model over one text and call `watch` with every network's activation, layer by layer.

    x [1, T, H], embedded tokens; pictures: their extra inputs. A network that no token reaches is left out.
    """
    state = watched(model.new_state(1, x.shape[1], resolve(DENSE, layer_weights(model))), Activations(model, x, watch))
    model.prefill(x, state, pictures=pictures)


class Activations(Watch):
    """A Watch that passes the activations of a prompt x [1, T, H] to `watch`.

    watch_mixture  called with the place of every mixture of experts, and its input [T, H]
    """

    def __init__(
        self, model: LlamaForCausalLM, x: Tensor, watch: Callable[[Activation], None],
        watch_mixture: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        self.names: dict[nn.Module, str] = {ffn: name for name, ffn in feed_forward_networks(model).items()}
        self.mixtures: dict[nn.Module, str] = {mixture: name for name, mixture in mixtures_of_experts(model).items()}
        self.watch, self.watch_mixture = watch, watch_mixture
        self.everything = torch.arange(x.shape[1], device=x.device)                 # [T]

    def network(self, ffn: FeedForward, h: Tensor, gate: Tensor, up: Tensor, rows: Tensor | None) -> None:
        self.watch(Activation(self.names[ffn], ffn, self.everything if rows is None else rows, h[0]))

    def mixture(self, mixture: MixtureOfExperts, x: Tensor) -> None:
        if self.watch_mixture is not None:
            self.watch_mixture(self.mixtures[mixture], x[0])


def layer_by_layer(
    model: LlamaForCausalLM, x: Tensor, watch: Callable[[Activation], None],
    watch_mixture: Callable[[str, Tensor], None] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run the dense model over one text and yield every layer's input and output, [1, T, H] each.

    x [1, T, H], embedded tokens; watch, watch_mixture: see `Activations`
    """
    state = model.new_state(1, x.shape[1], resolve(DENSE, layer_weights(model)))
    watched(state, Activations(model, x, watch, watch_mixture))
    rows = model.begin_prompt(x, state, None, 0, PictureRows())
    for layer in state.layers:
        before, x = x, layer.prefill(x, rows)
        yield before, x


@torch.inference_mode()
def embedded(model: LlamaForCausalLM, ids: list[int]) -> Tensor:
    """Embed token ids for `watch_dense`: [1, T, H]. Raises InputError for a token without an embedding."""
    model.check_ids(ids)
    return model.embed(torch.tensor([ids], device=model.device))
