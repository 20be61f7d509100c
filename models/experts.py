"""A mixture of experts: a router sends each token to a few experts, each of them an ordinary FeedForward.

This file holds the weights, the router and the dense forward; models/pruning/experts.py prunes the experts.

B batch, T tokens, M tokens of the whole batch (B T), E experts, X experts per token, H hidden size, n tokens routed to
one expert.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.feed_forward import FeedForward
from models.layers import at_least_float32
from models.matrices.plain import Matrix


@dataclass(frozen=True)
class Routing:
    """The experts that each token is routed to, and the tokens sorted by expert.

    probabilities  [M, E], float32 or float64, the router's softmax over all experts
    experts        int64 [M, X]
    weights        [M, X], float32 or float64, weight of each expert's output
    order          int64 [M X], the (token, expert) pairs sorted by expert: an expert's tokens are one segment
    counts         per expert, the length of its segment
    """

    probabilities: Tensor
    experts: Tensor
    weights: Tensor
    order: Tensor
    counts: list[int]

    def segments(self, per_token: Tensor) -> tuple[Tensor, ...]:
        """Split a per-token tensor by expert: [M, ...] -> E tensors [n, ...], n = 0 for an expert without tokens."""
        return per_token[self.order // self.experts.shape[1]].split(self.counts)

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        """Sum the experts' weighted outputs per token, in the order of the tokens. E tensors [n, H] -> [M, H]"""
        by_expert = torch.cat(list(outputs))                                        # [M X, H]
        by_token = torch.empty_like(by_expert).index_copy(0, self.order, by_expert)
        by_token = by_token.unflatten(0, self.weights.shape)                        # [M, X, H]
        return (by_token * self.weights.unsqueeze(-1)).sum(dim=1).to(by_expert.dtype)


class MixtureOfExperts(nn.Module):
    """The feed-forward network of a sparse layer: a router, its experts, in Qwen2-MoE also one shared expert."""

    experts: Sequence[FeedForward]

    def __init__(
        self, hidden: int, channels: int, act: str, experts: int, experts_per_token: int, renormalise: bool,
        shared_channels: int,
    ) -> None:
        super().__init__()
        self.experts_per_token, self.renormalise = experts_per_token, renormalise
        self.gate = Matrix(hidden, experts, bias=False)
        networks = (FeedForward(hidden, channels, act, bias=False) for _ in range(experts))
        self.experts = nn.ModuleList(networks)  # type: ignore[assignment]  # iterates as what it holds
        self.shared_expert: FeedForward | None = None
        if shared_channels:
            self.shared_expert = FeedForward(hidden, shared_channels, act, bias=False)
            self.shared_expert_gate = Matrix(hidden, 1, bias=False)

    def route(self, x: Tensor, gate: Matrix | None = None) -> Routing:
        """Choose each token's experts: softmax over all of them, the best X, renormalised if the model does so.

        x [M, H]; gate [E, H], None: the model's own
        """
        gate = self.gate if gate is None else gate
        probabilities = at_least_float32(gate(x)).softmax(dim=-1)                   # [M, E]
        weights, experts = probabilities.topk(self.experts_per_token, dim=-1)       # [M, X]
        if self.renormalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        order = experts.flatten().argsort(stable=True)                              # [M X]
        each = torch.arange(gate.out_features, device=x.device)                     # [E]
        counts = (experts.flatten()[:, None] == each).sum(dim=0).tolist()           # the only wait for the device
        return Routing(probabilities, experts, weights, order, counts)

    def spread(
        self, x: Tensor, routing: Routing, run: Callable[[int, Tensor], Tensor],
        run_shared: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        """Run every token through its experts, and through the shared expert if there is one.

        x [B, T, H]; run takes an expert's index and its tokens, [n, H] -> [n, H]; run_shared [B, T, H] -> [B, T, H]
        """
        segments = enumerate(routing.segments(x.flatten(0, 1)))
        y = routing.combine([run(index, own) if len(own) else own for index, own in segments]).view_as(x)
        if run_shared is None:
            return y
        return y + self.shared_expert_gate(x).sigmoid() * run_shared(x)

    def forward(self, x: Tensor) -> Tensor:
        """Route and run the dense network. x [B, T, H] -> [B, T, H]"""
        return self.run(x, self.route(x.flatten(0, 1)))

    def run(self, x: Tensor, routing: Routing) -> Tensor:
        """Run the dense network under a given routing. x [B, T, H] -> [B, T, H]"""
        return self.spread(x, routing, lambda index, own: self.experts[index](own), self.shared_expert)
