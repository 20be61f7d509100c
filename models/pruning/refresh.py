"""When evidence is gathered after the prompt: which steps are dense, and which of them partition the channels again."""

from models.pruning.resolve import Pruning


class RefreshSchedule:
    """Counts tokens and steps on the host; the model never asks it.

    tokens       real tokens that the scores have seen, of the layer that has seen fewest (a prompt may skip some)
    live         sequences that have not ended
    steps        decode steps so far, dense_steps of them dense, redraws of these partitioned again
    """

    def __init__(self, pruning: Pruning, live: int) -> None:
        settings = pruning.settings
        prunes = pruning.rule.follows_prompt and pruning.cuts
        self.least = settings.min_evidence if prunes else 0
        self.dense_every = settings.dense_every if prunes else None
        self.redraw_every = settings.redraw_every
        self.live, self.tokens, self.steps, self.dense_steps, self.redraws = live, 0, 0, 0, 0
        self.drawn_at = 0

    @property
    def ever_dense(self) -> bool:
        """Whether any step can be dense."""
        return self.least > 0 or self.dense_every is not None

    def prompt(self, tokens: int) -> bool:
        """Count a prompt of so many tokens, or more of one: whether there is enough evidence to partition."""
        self.tokens += tokens
        self.drawn_at = self.steps
        return self.tokens >= self.least

    @property
    def next_is_dense(self) -> bool:
        """Whether the next step runs dense."""
        return self.tokens < self.least or (self.dense_every is not None and not (self.steps + 1) % self.dense_every)

    def next_step(self) -> tuple[bool, bool]:
        """Count a step: whether it runs dense, and whether it then partitions the channels again."""
        dense, lacking = self.next_is_dense, self.tokens < self.least
        self.steps += 1
        if not dense:
            return False, False
        self.dense_steps += 1
        self.tokens += self.live
        due = self.redraw_every is not None and self.steps - self.drawn_at >= self.redraw_every
        partitions = self.tokens >= self.least and (lacking or due)
        if partitions:
            self.redraws += not lacking
            self.drawn_at = self.steps
        return True, partitions
