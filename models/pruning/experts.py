"""POP for a mixture of experts: one partition per expert, from the prompt tokens that are routed to it.

Each expert runs as any feed-forward network does (models/pruning/pop.py). The router is never pruned.

B batch, T tokens, M tokens of the whole batch (B T), E experts, H hidden size, n tokens of one expert.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.clock import Clock
from models.experts import MixtureOfExperts
from models.feed_forward import FeedForward
from models.matrices.plain import Matrix
from models.passes import DecodePass, PrefillPass, repartition
from models.pruning.active_weights import ActiveWeights, LookedUpWeights
from models.pruning.interface import PrunedFFN
from models.pruning.pop import POP


class PartitionedExperts:
    """Runs in place of one mixture of experts.

    An expert gets a copy of its active weights when a token first reaches it. If memory is too small for all copies,
    the `copy_limit` experts with most prompt tokens get one. A step on any other expert multiplies with its full
    weights: the same result, with nothing saved. Only the buffers of copies are kept from prompt to prompt.

    prompt_tokens  per expert, its tokens of the prompt that count as evidence
    picks          per expert, its decoded tokens, those of ended sequences included
    met            decoded tokens that shared this expert with another token of the same step
    """

    def __init__(self, mixture: MixtureOfExperts, rule: POP) -> None:
        self.mixture, self.rule = mixture, rule
        self.gate: Matrix
        self.experts: Sequence[FeedForward]
        self.gate, self.experts = rule.experts_of(mixture)
        self.copy_limit = len(self.experts)
        self.active: list[PrunedFFN | None] = [None] * len(self.experts)
        self.spare: list[ActiveWeights] = []
        self.shared = None if mixture.shared_expert is None else rule.new_ffn(mixture.shared_expert)
        self.restart()

    def prefill(self, x: Tensor, rows: PrefillPass) -> Tensor:
        """Route the tokens of a prompt and run each expert's part. x [B, T, H] -> [B, T, H]"""
        routing = self.mixture.route(x.flatten(0, 1), self.gate)
        counted: Sequence[Tensor | None] = [None] * len(self.experts)
        tokens = routing.counts
        if rows.counted is not None:
            counted = [mask[None] for mask in routing.segments(rows.counted.flatten())]             # E times [1, n]
            tokens = torch.stack([mask.sum() for mask in counted if mask is not None]).tolist()
        self.expect(tokens, rows.of_prompt)

        def run(index: int, own: Tensor) -> Tensor:
            part = rows.part(counted[index], tokens[index])
            active = self.of(index) if rows.partitions else self.partitioned(index, rows.clock)
            return active.prefill(own[None], part)[0]

        shared = self.shared
        y = self.mixture.spread(x, routing, run, None if shared is None else lambda x: shared.prefill(x, rows))
        if rows.partitions:             # experts without tokens here may have evidence from earlier tokens
            for active, reached in zip(self.active, routing.counts, strict=True):
                if active is not None and not reached:
                    rows.repartition(active)
        return y

    def decode(self, x: Tensor, step: DecodePass) -> Tensor:
        """Route the tokens of a step and run each expert's part. x [B, T, H] -> [B, T, H]"""
        routing = self.mixture.route(x.flatten(0, 1), self.gate)
        live = routing.segments(step.live.expand(x.shape[:2]).reshape(-1, 1))       # E times [n, 1]

        def run(index: int, own: Tensor) -> Tensor:
            self.picks[index] += len(own)
            self.met += len(own) if len(own) > 1 else 0
            return self.partitioned(index).decode(own[:, None], step.part(live[index]))[:, 0]

        shared = self.shared
        return self.mixture.spread(x, routing, run, None if shared is None else lambda x: shared.decode(x, step))

    def restart(self) -> None:
        """Forget the last prompt, except for the buffers of its copies."""
        if self.rule.follows_prompt:
            self.spare += [one.weights for one in self.active if one is not None and one.weights.held_bytes()]
            self.active = [None] * len(self.experts)
        self.prompt_tokens, self.picks, self.met = [0] * len(self.experts), [0] * len(self.experts), 0
        self.may_copy = set(range(len(self.experts))[: self.copy_limit])
        if self.shared is not None:
            self.shared.restart()

    def expect(self, tokens: list[int], of_prompt: bool) -> None:
        """Count the coming tokens per expert and choose the experts that may have copies.

        tokens: per expert, tokens that count as evidence, of the prompt (`of_prompt`) or of a step after it
        """
        if not of_prompt:
            self.picks = [old + new for old, new in zip(self.picks, tokens, strict=True)]
            return
        self.prompt_tokens = [old + new for old, new in zip(self.prompt_tokens, tokens, strict=True)]
        most_first = sorted(range(len(tokens)), key=lambda expert: -self.prompt_tokens[expert])
        self.may_copy = set(most_first[: self.copy_limit])

    def of(self, index: int) -> PrunedFFN:
        """Return what runs in place of one expert; a new one has no partition yet."""
        active = self.active[index]
        if active is None:
            active = self.active[index] = self.rule.new_ffn(self.experts[index], self.weights_for(index))
        return active

    def weights_for(self, index: int) -> ActiveWeights | None:
        """Return weights for one expert: no copies if it may have none, else buffers of the last prompt; None: new."""
        ffn = self.experts[index]
        if index not in self.may_copy:
            return LookedUpWeights(ffn, self.rule.sizes(ffn).active)
        number = next((number for number, one in enumerate(self.spare) if one.fits(ffn)), None)
        return None if number is None else self.spare.pop(number)

    def partitioned(self, index: int, clock: Clock | None = None) -> PrunedFFN:
        """Return what runs in place of one expert; partition it without evidence if the prompt did not reach it."""
        is_new = self.active[index] is None
        active = self.of(index)
        if is_new:
            repartition(active, clock)
        return active

    def multiplies_whole(self, index: int) -> bool:
        """Return True if steps read all weights of an expert: it runs dense, or has no copy."""
        active = self.active[index]
        return active is not None and (not active.sizes.prunes or isinstance(active.weights, LookedUpWeights))

    def count(self, tokens: int) -> None:
        pass                            # steps of a mixture are never compiled

    def copied_bytes(self) -> int:
        held = [one.weights for one in (*self.active, self.shared) if one is not None] + self.spare
        return sum(weights.held_bytes() for weights in held)
