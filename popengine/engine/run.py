"""The run, the module to read first: prompts -> prefill -> token -> decode -> token -> ... for one batch.

B batch, T prompt tokens, V vocabulary.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from models.llama import LlamaForCausalLM
from models.state import DecodeState
from popengine.engine.sampling import Sampling, next_tokens, require_finite
from popengine.images.vision import ImageInputs, TextOnly, Vision
from popengine.studies.resolve import StudyPruning
from popengine.studies.settings import PruningSettings


class RunningEngine(Protocol):
    """Interface of the engine for a run (popengine/engine/engine.py)."""

    model: LlamaForCausalLM
    pictures: TextOnly | Vision
    device: torch.device
    dtype: torch.dtype
    weights: str

    def resolve(self, pruning: PruningSettings | StudyPruning) -> StudyPruning: ...

    def borrowed_state(
        self, batch: int, tokens: int, pruning: StudyPruning, missing: int = 0
    ) -> AbstractContextManager[DecodeState]: ...

    def prepare(self, state: DecodeState) -> float: ...

    def kind_of_steps(self, state: DecodeState) -> str: ...

    def stepping(self) -> AbstractContextManager[object]: ...

    def decode(self, tokens: Tensor, state: DecodeState) -> Tensor: ...


class Run:
    """One batch in progress. Nothing is computed before iteration; the first step computes the prompt.

    Iterating yields, per step, the new token of each sequence, or None for sequences that had ended before.

    missing   cache slots saved in layers that leave out rows of pictures
    logprobs  of the last step's tokens under the model itself, before temperature and penalty, if requested
    held      state of a conversation with the first `kept` tokens of its one prompt; None: the engine lends a state
    """

    def __init__(
        self,
        engine: RunningEngine,
        prompts: list[list[int]],
        max_new_tokens: int,
        pruning: StudyPruning,
        sampling: Sampling,
        stop_ids: frozenset[int],
        given: ImageInputs,
        held: DecodeState | None = None,
        kept: int = 0,
        logprobs: bool = False,
    ) -> None:
        self.engine, self.prompts, self.sampling, self.stop_ids = engine, prompts, sampling, stop_ids
        self.max_new_tokens, self.pruning, self.given = max_new_tokens, pruning, given
        self.held, self.kept = held, kept
        self.wants_logprobs, self.logprobs = logprobs, list[float]()
        self.seen: Tensor | None = None
        lengths = [len(ids) for ids in prompts]
        self.missing = pruning.dropped_rows(given.stretches, lengths)
        self.generator = sampling.generator(engine.device)
        self.finish_reasons: list[str | None] = [None] * len(prompts)
        self.new_tokens = self.decode_steps = 0
        self.compile_s = self.image_s = self.prefill_s = self.decode_s = 0.0

    def __iter__(self) -> Iterator[list[int | None]]:
        engine = self.engine
        longest = max(map(len, self.prompts))
        lent = engine.borrowed_state(len(self.prompts), longest + self.max_new_tokens, self.pruning, self.missing)
        with lent if self.held is None else nullcontext(self.held) as self.state:
            self.compile_s = engine.prepare(self.state)
            tokens, real = pad_left(self.prompts, engine.device)
            with torch.inference_mode():
                x, counted, pictures, self.image_s = engine.pictures.embed(
                    tokens, real, self.given, self.pruning.settings.scored_tokens, self.kept
                )
                began = time.perf_counter()
                logits = engine.model.prefill(
                    x, self.state, real, counted, kept=self.kept, pictures=pictures
                )                                                                   # [B, V]
                chosen = self.choose(logits)                                        # [B]
                new = self.accept(chosen)
            self.prefill_s = time.perf_counter() - began
            yield new
            while None in self.finish_reasons:
                began = time.perf_counter()
                with torch.inference_mode(), engine.stepping():
                    logits = engine.decode(chosen, self.state)                      # [B, V]
                    chosen = self.choose(logits)                                    # [B]
                    new = self.accept(chosen)
                self.decode_s += time.perf_counter() - began
                self.decode_steps += 1
                yield new

    def choose(self, logits: Tensor) -> Tensor:
        """Choose the next tokens. logits [B, V] -> int64 [B]"""
        require_finite(logits, f"new token {self.new_tokens + 1} of prompt", 1)
        if self.sampling.repetition_penalty != 1 and self.seen is None:
            self.seen = seen_tokens(self.prompts, logits)
        chosen = next_tokens(logits, self.sampling, self.generator, self.seen)
        if self.seen is not None:
            self.seen.scatter_(1, chosen[:, None], True)
        if self.wants_logprobs:
            log_p = logits.float().log_softmax(dim=-1)                              # [B, V]
            self.logprobs = log_p.gather(1, chosen[:, None])[:, 0].tolist()
        return chosen

    def accept(self, chosen: Tensor) -> list[int | None]:
        """Add one token to each running sequence, and end the sequences that are complete."""
        self.new_tokens += 1
        new: list[int | None] = []
        for index, token in enumerate(chosen.tolist()):
            if self.finish_reasons[index] is not None:
                new.append(None)
                continue
            new.append(token)
            if token in self.stop_ids:
                self.end(index)
            elif self.new_tokens == self.max_new_tokens:
                self.finish_reasons[index] = "length"
        return new

    @torch.inference_mode()
    def end(self, index: int) -> None:
        """End one sequence: it yields no more tokens and no longer counts in the choice of candidates."""
        if self.finish_reasons[index] != "stop":
            self.finish_reasons[index] = "stop"
            self.state.end(index)


def seen_tokens(prompts: list[list[int]], logits: Tensor) -> Tensor:
    """Return the tokens of each prompt, bool [B, V] for logits [B, V]. An image token may exceed the vocabulary."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, ids in zip(seen, prompts, strict=True):
        row[[token for token in set(ids) if token < len(row)]] = True
    return seen


class Decoder(Protocol):
    """Interface of a model or its compiled steps. tokens int64 [B] -> logits [B, V]"""

    def decode(self, tokens: Tensor, state: DecodeState) -> Tensor: ...

    def dense_step(self, tokens: Tensor, state: DecodeState, partitions: bool) -> Tensor: ...


def next_logits(decoder: Decoder, tokens: Tensor, state: DecodeState) -> Tensor:
    """Compute one step, pruned, or dense while evidence is gathered. tokens int64 [B] -> logits [B, V]"""
    dense, partitions = state.schedule.next_step()
    return decoder.dense_step(tokens, state, partitions) if dense else decoder.decode(tokens, state)


def pad_left(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return prompts as one tensor, int64 [B, T], and its real slots, bool [B, T] (None without padding).

    Padding is on the left, so that every sequence ends in the same slot. No real token attends to it, so its token id
    can be 0.
    """
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts], device=device)
    if all(len(ids) == longest for ids in prompts):
        return tokens, None
    lengths = torch.tensor([len(ids) for ids in prompts], device=device)
    real = torch.arange(longest, device=device) >= (longest - lengths)[:, None]    # [B, T]
    return tokens, real
