"""A mixture of experts: a router sends each token to a few experts, each of them an ordinary FeedForward.

Online pruning (POP, arXiv 2602.06822) keeps one ChannelPartition per layer and expert, made from the prompt tokens that
were routed to that expert. The router itself is never touched. An expert is prefilled and decoded by FeedForward's own
code; here stands only who gets which tokens, and which experts have a copy of their active weights.

B batch, T rows, M rows of the batch one after the other (B T), E experts, X experts per token, H hidden size, n tokens
routed to one expert.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.clock import Clock
from models.feed_forward import ActiveFeedForward, FeedForward
from models.layers import at_least_float32
from models.matrix import Matrix
from models.passes import DecodePass, PrefillPass
from models.pruning.resolve import Pruning
from models.pruning.rules import POP


@dataclass(frozen=True)
class Routing:
    """Which experts each token goes to, and the tokens in the order of their experts.

    probabilities  [M, E], float32 or float64, the router's softmax over all experts
    experts        int64 [M, X]
    weights        [M, X], likewise, what each expert's output counts
    order          int64 [M X], the (token, expert) pairs sorted by expert: an expert's tokens are one segment
    counts         per expert, the length of its segment
    """

    probabilities: Tensor
    experts: Tensor
    weights: Tensor
    order: Tensor
    counts: list[int]

    def segments(self, per_token: Tensor) -> tuple[Tensor, ...]:
        """What belongs to each expert's tokens: [M, ...] -> E tensors [n, ...], n = 0 for an expert without tokens."""
        return per_token[self.order // self.experts.shape[1]].split(self.counts)

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        """The experts' outputs, [n, H] each, back in the order of the tokens and weighted -> [M, H]"""
        by_expert = torch.cat(list(outputs))                                        # [M X, H]
        by_token = torch.empty_like(by_expert).index_copy(0, self.order, by_expert)
        by_token = by_token.unflatten(0, self.weights.shape)                        # [M, X, H]
        return (by_token * self.weights.unsqueeze(-1)).sum(dim=1).to(by_expert.dtype)


class ActiveExperts:
    """What decode steps read of one mixture of experts, and what was seen of each expert.

    An expert gets a copy of its active weights when it is first needed, in buffers that are kept for every later
    prompt: an expert that no token reaches costs neither memory nor time. With too little memory for all,
    `copy_limit` experts get one, those with most prompt tokens; a step on any other multiplies with its full weights
    instead, with the same result and nothing saved.
    """

    def __init__(self, mixture: "MixtureOfExperts", pruning: Pruning) -> None:
        left = None if pruning.experts is None else pruning.experts.of[mixture]
        self.gate: Matrix = mixture.gate if left is None else left[0]
        self.experts: Sequence[FeedForward] = mixture.experts if left is None else left[1]
        experts = len(self.experts)
        self.pruning = pruning
        self.spares_unseen = pruning.rule.follows_prompt and pruning.settings.unseen_experts == "dense"
        self.copy_limit = experts
        self.active: list[ActiveFeedForward | None] = [None] * experts
        self.spare: list[ActiveFeedForward] = []                                    # copies of earlier prompts
        self.shared: ActiveFeedForward | None = None
        if mixture.shared_expert is not None:
            self.shared = ActiveFeedForward(mixture.shared_expert, pruning.rule)
        self.prompt_tokens = [0] * experts                  # of the prompt, those that count as evidence
        self.picks = [0] * experts                          # decoded tokens, those of ended sequences included
        self.met = 0                                        # of these the ones that met others of their step there
        self.may_copy: list[int] = []

    def restart(self) -> None:
        """Forget the last prompt."""
        experts = len(self.active)
        if self.pruning.rule.follows_prompt:
            self.spare += [one for one in self.active if one is not None and one.copied_bytes()]
            self.active = [None] * experts
        self.prompt_tokens, self.picks, self.met = [0] * experts, [0] * experts, 0
        self.may_copy = list(range(experts))[: self.copy_limit]
        if self.shared is not None:
            self.shared.restart()

    def expect(self, tokens: list[int], of_prompt: bool) -> None:
        """Before a pass: per expert, how many of its rows count as evidence, of the prompt or of a step after it."""
        if not of_prompt:
            self.picks = [old + new for old, new in zip(self.picks, tokens, strict=True)]
            return
        self.prompt_tokens = [old + new for old, new in zip(self.prompt_tokens, tokens, strict=True)]
        if self.spares_unseen:          # what an earlier turn left whole is cut once a later one reaches it
            seen = [count >= self.pruning.settings.min_tokens for count in self.prompt_tokens]
            self.active = [
                None if now and one is not None and not one.prunes else one
                for one, now in zip(self.active, seen, strict=True)
            ]
        most_first = sorted(range(len(tokens)), key=lambda expert: -self.prompt_tokens[expert])
        self.may_copy = most_first[: self.copy_limit]

    def of(self, expert: int, ffn: FeedForward) -> ActiveFeedForward:
        """What steps read of one expert; of one that is new, its channels are yet to be drawn."""
        active = self.active[expert]
        if active is None:
            if self.spares_unseen and self.prompt_tokens[expert] < self.pruning.settings.min_tokens:
                active = ActiveFeedForward(ffn, POP(0.0, 0.0))                      # all of it
            elif expert not in self.may_copy:
                active = ActiveFeedForward(ffn, self.pruning.rule, copies=False)
            else:
                active = self.spare.pop() if self.spare else ActiveFeedForward(ffn, self.pruning.rule)
                active.restart()
            self.active[expert] = active
        return active

    def drawn(self, expert: int, ffn: FeedForward, clock: Clock) -> ActiveFeedForward:
        """The same after the prompt: an expert that the prompt did not reach is cut now, by no evidence."""
        is_new = self.active[expert] is None
        active = self.of(expert, ffn)
        if is_new and active.follows_prompt:
            active.draw(ffn, clock)
        return active

    def draw_others(self, reached: list[int], clock: Clock) -> None:
        """Draw the experts anew that a pass did not reach: earlier ones may have shown something of them."""
        for ffn, active, rows in zip(self.experts, self.active, reached, strict=True):
            if active is not None and not rows and active.follows_prompt:
                active.draw(ffn, clock)

    def is_whole(self, expert: int) -> bool:
        """Whether steps multiply with all the weights of an expert: it was left dense, or has no copy."""
        active = self.active[expert]
        return active is not None and active.multiplies_whole

    def copied_bytes(self) -> int:
        """Memory that copies of weights take so far."""
        held = [*self.active, *self.spare, self.shared]
        return sum(active.copied_bytes() for active in held if active is not None)


class MixtureOfExperts(nn.Module):
    """The feed-forward network of a sparse layer: a router, its experts, in Qwen2-MoE also one for all tokens."""

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
        counts = experts.flatten().bincount(minlength=gate.out_features).tolist()
        return Routing(probabilities, experts, weights, order, counts)

    def spread(
        self, x: Tensor, routing: Routing, experts: Sequence[FeedForward],
        run: Callable[[int, FeedForward, Tensor], Tensor], run_shared: Callable[[FeedForward], Tensor],
    ) -> Tensor:
        """Every token through the experts it was sent to, and through the shared one.

        x [B, T, H]; experts, those of the routing; run takes an expert's tokens, [n, H] -> [n, H]; run_shared gives
        [B, T, H]
        """
        outputs = [
            run(index, expert, tokens) if len(tokens) else tokens
            for index, (expert, tokens) in enumerate(zip(experts, routing.segments(x.flatten(0, 1)), strict=True))
        ]
        y = routing.combine(outputs).view_as(x)
        if self.shared_expert is None:
            return y
        return y + self.shared_expert_gate(x).sigmoid() * run_shared(self.shared_expert)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, H] -> [B, T, H]"""
        return self.run(x, self.route(x.flatten(0, 1)))

    def run(self, x: Tensor, routing: Routing) -> Tensor:
        """The dense network under a routing that is known. x [B, T, H] -> [B, T, H]"""
        return self.spread(x, routing, self.experts, lambda _, expert, own: expert(own), lambda shared: shared(x))

    def prefill(self, x: Tensor, active: ActiveExperts, step: PrefillPass) -> Tensor:
        """Run the prompt, deciding for each expert which channels stay from the tokens routed to it.

        x [B, T, H] -> [B, T, H]. An observer is told the mixture and x.
        """
        if step.observe is not None:
            step.observe(self, x, None, None, None)
        routing = self.route(x.flatten(0, 1), active.gate)
        rows = routing.segments(torch.arange(len(routing.experts), device=x.device))            # E times [n]
        counted: Sequence[Tensor | None] = [None] * len(rows)
        tokens = routing.counts
        if step.counted is not None:
            counted = [mask[None] for mask in routing.segments(step.counted.flatten())]         # E times [1, n]
            tokens = torch.stack([mask.sum() for mask in counted if mask is not None]).tolist()
        active.expect(tokens, step.of_prompt)

        def run(index: int, expert: FeedForward, own: Tensor) -> Tensor:
            part = step.part(rows[index], counted[index], tokens[index])
            weights = active.of(index, expert) if step.draws else active.drawn(index, expert, step.clock)
            return expert.prefill(own[None], weights, part)[0]

        y = self.spread(
            x, routing, active.experts, run,
            lambda shared: shared.prefill(x, active.shared, step),  # type: ignore[arg-type]
        )
        if step.draws:
            active.draw_others(routing.counts, step.clock)
        return y

    def decode(self, x: Tensor, active: ActiveExperts, step: DecodePass) -> Tensor:
        """Run rows on what stays of their experts. x [B, T, H] -> [B, T, H]"""
        routing = self.route(x.flatten(0, 1), active.gate)
        live = routing.segments(step.live.expand(x.shape[:2]).reshape(-1, 1))       # E times [n, 1]

        def run(index: int, expert: FeedForward, own: Tensor) -> Tensor:
            active.picks[index] += len(own)
            active.met += len(own) if len(own) > 1 else 0
            weights = active.drawn(index, expert, Clock(x.device))
            return expert.decode(own[:, None], weights, step.part(live[index]))[:, 0]

        return self.spread(
            x, routing, active.experts, run,
            lambda shared: shared.decode(x, active.shared, step),  # type: ignore[arg-type]
        )
