"""What the feed-forward networks of the dense model compute on a text, one network after the other.

Calibrated methods and studies of the ranking of channels need every network's activation. The layers are walked here
in plain sight instead of hooking into the model.

T tokens, H hidden size, I FFN channels, n tokens that one network sees.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from models.clock import Clock
from models.feed_forward import FeedForward
from models.llama import LlamaForCausalLM
from models.mixtral import MixtureOfExperts


@dataclass(frozen=True)
class Activation:
    """What one feed-forward network computes.

    name       its place in the model, as checkpoints spell it: model.layers.0.mlp
    positions  int64 [n], the tokens that reach this network, in their order
    h          [n, I], what down_proj reads, for these tokens
    """

    name: str
    ffn: FeedForward
    positions: Tensor
    h: Tensor


def feed_forward_networks(model: LlamaForCausalLM) -> dict[str, FeedForward]:
    """Every feed-forward network by its place in the model; in a mixture every expert is one."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FeedForward)}


def dense_activations(model: LlamaForCausalLM, x: Tensor) -> Iterator[Activation]:
    """Run the dense model over one text and yield every network's activation on the way, layer by layer.

    x  [1, T, H]  embedded tokens. A network that no token reaches is left out.
    """
    step = model.prefill_step(x, None, None, finish_dense=True, clock=Clock(x.device))
    for index, layer in enumerate(model.model.layers):
        x = x + layer.self_attn(layer.input_layernorm(x), step)
        seen = layer.post_attention_layernorm(x)                                    # [1, T, H]
        for name, ffn, positions in reached(f"model.layers.{index}.mlp", layer.mlp, seen[0]):
            if len(positions):
                yield Activation(name, ffn, positions, ffn.activation(seen[0, positions]))
        x = x + layer.mlp(seen)


def reached(name: str, mlp: FeedForward | MixtureOfExperts, x: Tensor) -> Iterator[tuple[str, FeedForward, Tensor]]:
    """The networks behind one layer's mlp, and which of its tokens x [T, H] reach each: int64 [n]."""
    everything = torch.arange(len(x), device=x.device)                              # [T]
    if isinstance(mlp, FeedForward):
        yield name, mlp, everything
        return
    for index, positions in enumerate(mlp.route(x).segments(everything)):
        yield f"{name}.experts.{index}", mlp.experts[index], positions
    if mlp.shared_expert is not None:
        yield f"{name}.shared_expert", mlp.shared_expert, everything


@torch.inference_mode()
def embedded(model: LlamaForCausalLM, ids: list[int]) -> Tensor:
    """Token ids as `dense_activations` takes them: [1, T, H]"""
    return model.embed(torch.tensor([ids], device=model.lm_head.weight.device))
