"""Choosing the next token from logits. B sequences, V vocabulary."""

from dataclasses import dataclass

import torch
from torch import Tensor

from popengine.engine.distributed import broadcast
from weights.errors import InputError

# The least that float32 can sensibly divide by.
COLDEST = 1e-30


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 is greedy.

    top_k  keep the k most likely tokens (0: all)
    top_p  of those, keep the smallest set whose probability reaches p (1: all)
    seed   makes sampling reproducible (None: a fresh one each time)
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature must be 0 (greedy) or a positive number, not {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"top-k must be 0 (all tokens) or a positive integer, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p must be above 0 and at most 1, not {self.top_p}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be at least 0 and below 2**63, not {self.seed}")

    def generator(self, device: torch.device) -> torch.Generator | None:
        """What draws the tokens of a run; None where nothing is drawn."""
        if self.temperature == 0:
            return None
        generator = torch.Generator(device)
        generator.manual_seed(broadcast(generator.seed()) if self.seed is None else self.seed)
        return generator


def require_finite(logits: Tensor, kind: str, first: int) -> None:
    """InputError where no token can be chosen by logits, [n, V], that are of tokens from number `first` on."""
    sound = logits.max(dim=-1).values.isfinite()                                    # [n], NaN comes through a maximum
    if not sound.all():
        raise InputError(
            f"the model gave logits that are not finite for {kind} {first + int((~sound).nonzero()[0])}: its weights "
            "are damaged, or the dtype is too small for them (--dtype float32)"
        )


def next_tokens(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """logits [B, V] -> int64 [B]"""
    if sampling.temperature == 0:
        return logits.max(dim=-1).indices       # the same as argmax, which on a CPU is slower, in bfloat16 five times
    # Relative to the best, so that no temperature is too small: what is far below it underflows, and the best stays.
    logits = (logits - logits.max(dim=-1, keepdim=True).values).float() / max(sampling.temperature, COLDEST)
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]                  # [B, 1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(dim=-1)                                          # [B, V]
    if sampling.top_p < 1:
        falling, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = falling.cumsum(dim=-1) - falling                                   # probability of the better ones
        falling = falling.masked_fill((before >= sampling.top_p) & (before > 0), 0)     # however small, one stays
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, falling)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
