"""When evidence is gathered after the prompt."""

from models.pruning.resolve import Pruning


class Gathering:
    """Evidence after the prompt, counted on the host: which steps are dense, and which of them draw the partitions.

    tokens       real tokens that the scores have seen, of the layer that has seen fewest (a prompt may skip some);
                 live: sequences that have not ended
    steps        decode steps so far, dense_steps of them dense, redraws of these drew anew
    """

    def __init__(self, pruning: Pruning, live: int) -> None:
        settings = pruning.settings
        prunes = pruning.rule.follows_prompt and pruning.ratio > 0
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
        """A prompt of so many tokens is seen: whether it is enough to draw partitions from."""
        self.tokens += tokens
        return self.tokens >= self.least

    def next_step(self) -> tuple[bool, bool]:
        """Count a step: whether it runs dense, and whether it then draws the partitions."""
        self.steps += 1
        lacking = self.tokens < self.least
        if not lacking and (self.dense_every is None or self.steps % self.dense_every):
            return False, False
        self.dense_steps += 1
        self.tokens += self.live
        due = self.redraw_every is not None and self.steps - self.drawn_at >= self.redraw_every
        draws = self.tokens >= self.least and (lacking or due)
        if draws:
            self.redraws += not lacking
            self.drawn_at = self.steps
        return True, draws
