"""Settings of sampling. Nothing here imports PyTorch: a wrong flag is reported without waiting for it."""

from dataclasses import dataclass, fields, replace
from typing import Any

from models.pruning.settings import setting
from weights.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """Choice of the next token, and strings that end the answer; temperature 0 is greedy.

    top_k               keep the k most likely tokens (0: all)
    top_p               of those, keep the smallest set whose probability reaches p (1: all)
    seed                makes sampling reproducible (None: a new seed each time)
    min_p               drop tokens below this share of the highest probability (0: none). arXiv 2407.01082
    repetition_penalty  divide positive and multiply negative logits of tokens in the prompt or the answer by this
                        number, before anything else and also if greedy (1: no change). CTRL, arXiv 1909.05858
    stop                one or several strings that end the answer. Its text ends before the first of them, its token
                        ids with the token that completed it
    """

    temperature: float = setting(0.0, "0 is greedy", float, metavar="T")
    top_k: int = setting(0, "keep the K most likely tokens; 0: all", int, metavar="K")
    top_p: float = setting(1.0, "keep the most likely tokens up to probability P; 1: all", float, metavar="P")
    seed: int | None = setting(None, "makes sampling reproducible", int, metavar="N")
    min_p: float = setting(0.0, "drop tokens below this share of the highest probability", float, metavar="P")
    repetition_penalty: float = setting(1.0, "above 1: tokens seen before become less likely", float, metavar="P")
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        if not all(isinstance(one, str) and one for one in stop):
            raise InputError("stop must be strings of at least one character")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min-p must be between 0 (no token is dropped) and 1, not {self.min_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise InputError(f"repetition penalty must be a positive number (1: none), not {self.repetition_penalty}")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature must be 0 (greedy) or a positive number, not {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"top-k must be 0 (all tokens) or a positive integer, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p must be above 0 and at most 1, not {self.top_p}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be at least 0 and below 2**63, not {self.seed}")


def sampling_of(sampling: Sampling | None, named: dict[str, Any]) -> Sampling:
    """Return Sampling with the named fields replaced. Raises InputError for an unknown name."""
    known = [one.name for one in fields(Sampling)]
    for name in named:
        if name not in known:
            raise InputError(f"there is no argument {name!r}; arguments of sampling are {', '.join(known)}")
    return replace(sampling or Sampling(), **named)
