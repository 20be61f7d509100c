"""The schedule of dense decode steps, which gather evidence."""


class RefreshSchedule:
    """Counts tokens and steps on the host. It says which kind a step is; what a step computes does not depend on it.

    tokens   real tokens in the scores, as the minimum over layers (a prompt may skip layers)
    live     sequences that have not ended
    steps    decode steps so far; dense_steps: the dense ones; redraws: dense steps that partitioned again
    """

    def __init__(self, least: int, live: int) -> None:
        """least: steps run dense until the scores have seen this many tokens"""
        self.least, self.live = least, live
        self.tokens, self.steps, self.dense_steps, self.redraws = 0, 0, 0, 0

    @property
    def ever_dense(self) -> bool:
        """True if any step can be dense."""
        return self.least > 0

    def prompt(self, tokens: int) -> bool:
        """Count tokens of a prompt. Returns True if there is enough evidence to partition."""
        self.tokens += tokens
        return self.tokens >= self.least

    @property
    def next_is_dense(self) -> bool:
        """True if the next step runs dense."""
        return self.tokens < self.least

    def next_step(self) -> tuple[bool, bool]:
        """Count a step. Returns two flags: it runs dense; it then partitions the channels."""
        dense = self.next_is_dense
        self.steps += 1
        if not dense:
            return False, False
        self.dense_steps += 1
        self.tokens += self.live
        return True, self.tokens >= self.least
