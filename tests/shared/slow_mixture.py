"""POP on a mixture of experts the slow way: Hugging Face's Mixtral, one token, one expert, one channel at a time.

Written from the method's description alone and sharing no code with the engine, so that the two check each other.
"""

from collections import defaultdict
from typing import Any

import torch
from slow_pop import slow_order, slow_sizes
from torch import Tensor


class SlowMixturePOP:
    """Greedy generation with a Hugging Face Mixtral whose experts' outputs are computed anew in forward hooks."""

    def __init__(self, model: Any, prune_ratio: float, width: float, prefill: str = "pruned") -> None:
        config = model.config
        head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        attention = 2 * config.hidden_size * head_dim * (config.num_attention_heads + config.num_key_value_heads)
        ffn = 3 * config.hidden_size * config.intermediate_size * config.num_experts_per_tok
        self.ratio = prune_ratio * (attention + ffn) / ffn
        self.model, self.width, self.dense_prefill = model, width, prefill == "dense"
        self.act = model.model.layers[0].mlp.experts.act_fn
        self.prefilling = True
        self.regions: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
        for index, layer in enumerate(model.model.layers):
            layer.mlp.experts.register_forward_hook(self.hook(index))

    def hook(self, layer: int) -> Any:
        def replace_output(experts: Any, arguments: tuple[Tensor, Tensor, Tensor], _: Tensor) -> Tensor:
            hidden, chosen, weights = arguments
            if self.prefilling:
                self.regions = {place: cut for place, cut in self.regions.items() if place[0] != layer}
            activations: dict[int, list[Tensor]] = defaultdict(list)
            routed = [
                (token, expert, weights[token, slot], self.activation(experts, expert, hidden[token]))
                for token in range(len(hidden))
                for slot, expert in enumerate(chosen[token].tolist())
            ]
            for _, expert, _, h in routed:
                activations[expert].append(h)
            on = {expert: self.channels(experts, layer, expert, hs) for expert, hs in activations.items()}
            output = torch.zeros_like(hidden)
            for token, expert, weight, h in routed:
                output[token] += weight * (experts.down_proj[expert] @ (h * on[expert]))
            return output

        return replace_output

    def activation(self, experts: Any, expert: int, x: Tensor) -> Tensor:
        gate, up = experts.gate_up_proj[expert].chunk(2)
        return self.act(gate @ x) * (up @ x)

    def channels(self, experts: Any, layer: int, expert: int, hs: list[Tensor]) -> Tensor:
        """1 for the channels this expert finishes on, 0 for the others."""
        norms = experts.down_proj[expert].double().norm(dim=0)
        scores = (torch.stack(hs).double().norm(dim=0) * norms).tolist()
        _, pick, _ = slow_sizes(len(scores), self.ratio, self.width)
        if self.prefilling:
            self.regions[layer, expert] = self.cut(scores)
        elif (layer, expert) not in self.regions:
            gate, up = experts.gate_up_proj[expert].double().chunk(2)
            self.regions[layer, expert] = self.cut((norms * gate.norm(dim=1) * up.norm(dim=1)).tolist())
        retained, candidates = self.regions[layer, expert]
        by_score = slow_order([scores[channel] for channel in candidates])
        keep = candidates if self.prefilling else [candidates[place] for place in by_score[:pick]]
        on = torch.zeros(len(scores))
        on[retained + keep] = 1
        return torch.ones_like(on) if self.prefilling and self.dense_prefill else on

    def cut(self, scores: list[float]) -> tuple[list[int], list[int]]:
        _, pick, retained = slow_sizes(len(scores), self.ratio, self.width)
        order = slow_order(scores)
        return sorted(order[:retained]), sorted(order[retained : retained + 2 * pick])

    @torch.inference_mode()
    def generate(self, prompt: list[int], count: int) -> list[int]:
        self.prefilling = True
        out = self.model(torch.tensor([prompt]), use_cache=True)
        self.prefilling = False
        new = [int(out.logits[0, -1].argmax())]
        while len(new) < count:
            out = self.model(torch.tensor([new[-1:]]), past_key_values=out.past_key_values, use_cache=True)
            new.append(int(out.logits[0, -1].argmax()))
        return new
