"""POP the straightforward slow way: Hugging Face's own modules, forward hooks, full weights and zeros.

Written from the method's description alone and sharing no code with the engine, so that the two check each other.
"""

import math
from typing import Any

import torch
from torch import Tensor


def slow_sizes(channels: int, ratio: float, width: float) -> tuple[int, int, int]:
    """active, pick, retained."""
    active = round((1 - ratio) * channels)
    pick = min(round(width * channels / 2), active, channels - active)
    return active, pick, active - pick


def slow_order(scores: list[float]) -> list[int]:
    """Indices by falling score, of equal scores the lower index first."""
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))


def slow_scores(h: Tensor, down: Tensor) -> list[float]:
    """Norm of column i of down_proj times norm of channel i over all tokens, one channel at a time."""
    scores = []
    for channel in range(down.shape[1]):
        column = math.sqrt(sum(value * value for value in down[:, channel].tolist()))
        activation = math.sqrt(sum(value * value for value in h[..., channel].flatten().tolist()))
        scores.append(column * activation)
    return scores


class SlowPOP:
    """Greedy generation with a Hugging Face Llama whose down_proj inputs are zeroed by forward pre-hooks."""

    def __init__(self, model: Any, ffn_ratio: float, width: float, prefill: str, layers: Any = None) -> None:
        self.model, self.ratio, self.width, self.dense_prefill = model, ffn_ratio, width, prefill == "dense"
        self.prefilling, self.handles = True, []
        self.regions: dict[int, tuple[list[int], list[int]]] = {}
        for index, layer in enumerate(model.model.layers if layers is None else layers):
            hook = self.hook(index, layer.mlp.down_proj)
            self.handles.append(layer.mlp.down_proj.register_forward_pre_hook(hook))

    def remove_hooks(self) -> None:
        for handle in self.handles:
            handle.remove()

    def hook(self, index: int, down_proj: Any) -> Any:
        norms = down_proj.weight.detach().double().norm(dim=0)

        def mask(_: Any, arguments: tuple[Tensor]) -> tuple[Tensor]:
            (h,) = arguments
            channels = h.shape[-1]
            scores = (h.double().flatten(0, -2).norm(dim=0) * norms).tolist()
            _, pick, retained = slow_sizes(channels, self.ratio, self.width)
            if self.prefilling:
                order = slow_order(scores)
                self.regions[index] = (sorted(order[:retained]), sorted(order[retained : retained + 2 * pick]))
                keep = self.regions[index][0] + self.regions[index][1]
                if self.dense_prefill:
                    return arguments
            else:
                kept, candidates = self.regions[index]
                by_score = slow_order([scores[channel] for channel in candidates])
                keep = kept + [candidates[place] for place in by_score[:pick]]
            on = torch.zeros(channels, dtype=h.dtype)
            on[keep] = 1
            return (h * on,)

        return mask

    @torch.inference_mode()
    def generate(self, prompt: list[int], count: int, **prompt_inputs: Any) -> list[int]:
        self.prefilling = True
        out = self.model(torch.tensor([prompt]), use_cache=True, **prompt_inputs)
        self.prefilling = False
        new = [int(out.logits[0, -1].argmax())]
        while len(new) < count:
            out = self.model(torch.tensor([new[-1:]]), past_key_values=out.past_key_values, use_cache=True)
            new.append(int(out.logits[0, -1].argmax()))
        return new
