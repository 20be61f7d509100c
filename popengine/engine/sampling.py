"""Choosing the next token from logits. B sequences, V vocabulary."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from popengine.engine.distributed import broadcast
from weights.errors import InputError

# Lower bound on a divisor in float32.
COLDEST = 1e-30


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

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        if not all(isinstance(one, str) and one for one in stop):
            raise InputError(f"stop must be strings of at least one character, not {self.stop!r}")
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

    def generator(self, device: torch.device) -> torch.Generator | None:
        """Return the random generator of a run; None for greedy decoding."""
        if self.temperature == 0:
            return None
        generator = torch.Generator(device)
        generator.manual_seed(broadcast(generator.seed()) if self.seed is None else self.seed)
        return generator


def require_finite(logits: Tensor, kind: str, first: int) -> None:
    """Raise InputError if logits [n, V] have no finite maximum. They belong to tokens from number `first` on."""
    sound = logits.max(dim=-1).values.isfinite()                                    # [n], a maximum propagates NaN
    if not sound.all():
        raise InputError(
            f"the model gave logits that are not finite for {kind} {first + int((~sound).nonzero()[0])}: its weights "
            "are damaged, or the dtype is too small for them (--dtype float32)"
        )


def sampling_of(sampling: Sampling | None, named: dict[str, Any]) -> Sampling:
    """Return Sampling with the named fields replaced. Raises InputError for an unknown name."""
    known = [one.name for one in fields(Sampling)]
    for name in named:
        if name not in known:
            raise InputError(f"there is no argument {name!r}; arguments of sampling are {', '.join(known)}")
    return replace(sampling or Sampling(), **named)


def next_tokens(
    logits: Tensor, sampling: Sampling, generator: torch.Generator | None, seen: Tensor | None = None
) -> Tensor:
    """Choose the next tokens. logits [B, V] -> int64 [B]

    seen  bool [B, V], tokens under the repetition penalty; None: no penalty
    """
    if seen is not None:
        logits = penalised(logits, sampling.repetition_penalty, seen)
    if sampling.temperature == 0:
        return logits.max(dim=-1).indices       # argmax is slower on a CPU, in bfloat16 by a factor of five
    return torch.multinomial(kept_probabilities(logits, sampling), 1, generator=generator).squeeze(-1)


def penalised(logits: Tensor, penalty: float, seen: Tensor) -> Tensor:
    """Apply the repetition penalty to tokens seen before (arXiv 1909.05858). [B, V] -> float32 [B, V]"""
    logits = logits.float()
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def kept_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return unnormalised probabilities after top-k, top-p and min-p. [B, V] -> float32 [B, V]"""
    # Relative to the maximum, so that no temperature is too small: tokens far below it underflow to 0.
    logits = (logits - logits.max(dim=-1, keepdim=True).values).float() / max(sampling.temperature, COLDEST)
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]                  # [B, 1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(dim=-1)                                          # [B, V]
    if sampling.top_p < 1:
        falling, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = falling.cumsum(dim=-1) - falling                                   # probability of likelier tokens
        falling = falling.masked_fill((before >= sampling.top_p) & (before > 0), 0)     # the likeliest always stays
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, falling)
    if sampling.min_p > 0:
        least = sampling.min_p * probabilities.max(dim=-1, keepdim=True).values     # [B, 1]
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    return probabilities
