"""Evidence after the prompt: regular dense steps, which may partition the channels again."""

from models.pruning.refresh import RefreshSchedule


class RegularRefresh(RefreshSchedule):
    """One step in `dense_every` runs dense; the first dense step after `redraw_every` steps partitions again.

    redraws  number of steps that partitioned the channels again
    """

    def __init__(self, least: int, live: int, dense_every: int, redraw_every: int | None) -> None:
        super().__init__(least, live)
        self.dense_every, self.redraw_every, self.drawn_at = dense_every, redraw_every, 0

    @property
    def ever_dense(self) -> bool:
        return True

    def prompt(self, tokens: int) -> bool:
        self.drawn_at = self.steps
        return super().prompt(tokens)

    @property
    def next_is_dense(self) -> bool:
        return super().next_is_dense or not (self.steps + 1) % self.dense_every

    def next_step(self) -> tuple[bool, bool]:
        lacking = self.tokens < self.least
        dense, enough = super().next_step()
        due = self.redraw_every is not None and self.steps - self.drawn_at >= self.redraw_every
        partitions = dense and enough and (lacking or due)
        if partitions:
            self.redraws += not lacking
            self.drawn_at = self.steps
        return dense, partitions
