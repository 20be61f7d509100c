"""The slow truth for halves of layers that are left out: Hugging Face's model without them."""

from typing import Any

import torch
from torch import Tensor, nn

from popengine.studies.left_out import Half


class AddsNothing(nn.Module):
    """In the place of an attention (which gives its weights too) or of a feed-forward network."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part, self.layer_type, self.is_sliding = part, None, False

    def forward(self, hidden_states: Tensor | None = None, *_: Any, **others: Any) -> Any:
        x = others["hidden_states"] if hidden_states is None else hidden_states
        return (torch.zeros_like(x), None) if self.part == "attention" else torch.zeros_like(x)


def without(reference: Any, halves: tuple[Half, ...]) -> Any:
    """Hugging Face's model without these halves; whole layers are deleted from its list."""
    layers = reference.model.layers
    for half in halves:
        setattr(layers[half.layer], {"attention": "self_attn", "mlp": "mlp"}[half.part], AddsNothing(half.part))
    kept = [index for index in range(len(layers)) if sum(half.layer == index for half in halves) < 2]
    reference.model.layers = nn.ModuleList(layers[index] for index in kept)
    reference.config.num_hidden_layers = len(kept)
    if getattr(reference.config, "layer_types", None):
        kinds = [reference.config.layer_types[index] for index in kept]
        reference.config.layer_types = reference.model.config.layer_types = kinds
    return reference
