"""Choosing the next token from logits. B sequences, V vocabulary."""

import torch
from torch import Tensor

from popengine.engine.distributed import broadcast
from popengine.engine.sampling_settings import Sampling as Sampling
from weights.errors import InputError

# Lower bound on a divisor in float32.
COLDEST = 1e-30


def new_generator(sampling: Sampling, device: torch.device) -> torch.Generator | None:
    """Return the random generator of a run; None for greedy decoding."""
    if sampling.temperature == 0:
        return None
    generator = torch.Generator(device)
    generator.manual_seed(broadcast(generator.seed()) if sampling.seed is None else sampling.seed)
    return generator


def require_finite(logits: Tensor, kind: str, first: int) -> None:
    """Raise InputError if logits [n, V] have no finite maximum. They belong to tokens from number `first` on."""
    sound = logits.max(dim=-1).values.isfinite()                                    # [n], a maximum propagates NaN
    if not sound.all():
        raise InputError(
            f"the model gave logits that are not finite for {kind} {first + int((~sound).nonzero()[0])}: its weights "
            "are damaged, or the dtype is too small for them (--dtype float32)"
        )


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
