"""When evidence is gathered after the prompt.

B batch, T rows, H hidden size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.pruning.resolve import Pruning


class Drift:
    """How far the last layer's attention output has turned: 1 - cosine of its mean since the last look and before.

    After DART (arXiv 2601.22632), whose authors' code compares the mean of ten tokens behind o_proj of the last layer
    with that of the tokens the mask was made from. There a mask goes once enough of such windows lie below a bound from
    the prompt's own windows; here the bound is the user's, and a window is what lies between two dense steps.

    most           drift beyond which partitions are drawn anew
    before, since  float32 [H], sums: the cosine does not ask how many tokens they are of
    """

    def __init__(self, most: float, hidden: int, device: torch.device) -> None:
        self.most = most
        self.before, self.since = (torch.zeros(hidden, device=device) for _ in range(2))

    def restart(self) -> None:
        """Forget the last prompt."""
        self.before.zero_()
        self.since.zero_()

    def see(self, attention: Tensor, real: Tensor | None, of_prompt: bool) -> None:
        """attention [B, T, H], behind o_proj; real bool [B, T] or [B, 1] (None: all), as for Evidence"""
        if real is not None:
            attention = attention.masked_fill(~real.unsqueeze(-1), 0)
        (self.before if of_prompt else self.since).add_(attention.float().sum(dim=(0, 1)))

    def is_too_far(self) -> bool:
        """Whether it has turned too far since the last look. Waits for the device."""
        turned = (1 - F.cosine_similarity(self.before, self.since, dim=0)) * self.since.any()
        self.before.add_(self.since)
        self.since.zero_()
        return float(turned) > self.most


class Gathering:
    """Evidence after the prompt, counted on the host: which steps are dense, and which of them draw the partitions.

    tokens       real tokens that the scores have seen, of the layer that has seen fewest (a prompt may skip some);
                 live: sequences that have not ended
    steps        decode steps so far, dense_steps of them dense, redraws of these drew anew
    """

    def __init__(self, pruning: Pruning, live: int, drift: Drift | None = None) -> None:
        settings = pruning.settings
        prunes = pruning.rule.follows_prompt and pruning.cuts
        self.least = settings.min_evidence if prunes else 0
        self.dense_every = settings.dense_every if prunes else None
        self.redraw_every = settings.redraw_every
        self.live, self.tokens, self.steps, self.dense_steps, self.redraws = live, 0, 0, 0, 0
        self.drawn_at, self.drift = 0, drift

    @property
    def ever_dense(self) -> bool:
        """Whether any step can be dense."""
        return self.least > 0 or self.dense_every is not None

    def prompt(self, tokens: int) -> bool:
        """A prompt of so many tokens is seen, or more of one: whether there is enough to draw partitions from."""
        self.tokens += tokens
        self.drawn_at = self.steps
        return self.tokens >= self.least

    @property
    def next_is_dense(self) -> bool:
        """Whether the next step runs dense."""
        return self.tokens < self.least or (self.dense_every is not None and not (self.steps + 1) % self.dense_every)

    def next_step(self) -> tuple[bool, bool]:
        """Count a step: whether it runs dense, and whether it then draws the partitions.

        What the steps before it have shown is asked here: all of them have run.
        """
        dense, lacking = self.next_is_dense, self.tokens < self.least
        self.steps += 1
        if not dense:
            return False, False
        self.dense_steps += 1
        self.tokens += self.live
        due = self.redraw_every is not None and self.steps - self.drawn_at >= self.redraw_every
        if self.drift is not None:
            due = self.drift.is_too_far() or due
        draws = self.tokens >= self.least and (lacking or due)
        if draws:
            self.redraws += not lacking
            self.drawn_at = self.steps
        return True, draws
