"""Perplexity through the same code path as generation.

Each window's prompt is prefilled, which makes the partition. Its continuation is decoded token by token with the text's
own tokens (or all at once, with the same result). Scoring a text by one forward pass would not measure online pruning,
because it never decodes.

T prompt tokens, S scored tokens, H hidden size, V vocabulary.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from models.cost_model import bytes_per_token
from models.llama import LlamaForCausalLM
from models.state import DecodeState
from popengine.engine.engine import Engine
from popengine.engine.loaded import LoadedModel
from popengine.engine.run import next_logits
from popengine.engine.sampling import require_finite
from popengine.studies.known_text import evaluate, evaluate_branches
from popengine.studies.resolve import StudyPruning
from popengine.studies.settings import DENSE
from popengine.text.tokenizer import TextTokenizer
from weights.errors import InputError
from weights.mapped_file import read_text as read_file

# Most bytes of a scored text: tokenizing takes some 500 times as much memory.
LARGEST_TEXT = 20_000_000
# Largest loss whose perplexity is finite.
MOST_LOSS = 700.0


@dataclass(frozen=True)
class Window:
    """A piece of text: the tokens of the prompt, and those of the continuation, which are scored."""

    prompt: list[int]
    continuation: list[int]

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.continuation


@dataclass(frozen=True)
class WindowScore:
    """The score of a continuation, one number per scored token.

    losses       negative log-probability of the token, nats
    agreed       True if the likeliest token is the dense model's likeliest
    divergences  KL divergence of the distribution from the dense model's, nats
    """

    losses: list[float]
    agreed: list[bool]
    divergences: list[float]


@dataclass(frozen=True)
class Summary:
    """Scores over all windows. standard_error: of mean_loss, over windows; nan for a single window"""

    windows: int
    perplexity: float
    mean_loss: float
    standard_error: float
    agreement: float
    divergence: float


@dataclass(frozen=True)
class Text:
    """A text file as tokens. name and digest identify the text."""

    name: str
    digest: str
    ids: list[int]


def read_text(path: Path, tokenizer: TextTokenizer) -> Text:
    """Read and tokenize a text file. Raises InputError for a file that cannot be read or is not UTF-8."""
    text = read_file(path, LARGEST_TEXT)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Text(path.name, digest, tokenizer.encode(text, add_special_tokens=False))


def cut_windows(
    text: Text, tokenizer: TextTokenizer, prompt_tokens: int, score_tokens: int, count: int
) -> list[Window]:
    """Cut `count` windows without overlap, spread evenly over the text.

    If the tokenizer begins texts with a special token, every prompt begins with it, and it counts as a prompt token.
    Raises InputError if the text is too short.
    """
    for name, value in (("prompt tokens", prompt_tokens), ("score tokens", score_tokens), ("windows", count)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    start = tokenizer.encode("", add_special_tokens=True)[:1]
    if prompt_tokens <= len(start):
        raise InputError(f"prompt tokens must be more than {len(start)}: the first is the tokenizer's own")
    size = prompt_tokens - len(start) + score_tokens
    most = len(text.ids) // size
    if most < count:
        room = "not even one window" if most == 0 else f"{most} windows at most"
        raise InputError(
            f"{text.name}: the text has {len(text.ids)} tokens, and {count} windows of {prompt_tokens} + "
            f"{score_tokens} need {count * size}: {room} fit; give a longer text or smaller windows"
        )
    stride = (len(text.ids) - size) // max(count - 1, 1)
    pieces = [text.ids[index * stride : index * stride + size] for index in range(count)]
    split = prompt_tokens - len(start)
    return [Window(start + piece[:split], piece[split:]) for piece in pieces]


def dense_log_probabilities(model: LlamaForCausalLM, window: Window) -> Tensor:
    """Compute the dense model's log-probabilities for every scored token, by one forward pass: float32 [S, V]"""
    model.check_ids(window.ids)
    ids = torch.tensor([window.ids[:-1]], device=model.device)
    logits = model(ids)[0, len(window.prompt) - 1 :]                                # [S, V]
    require_finite(logits, "scored token", 1)
    return logits.float().log_softmax(dim=-1)


def log_probabilities(
    engine: LoadedModel,
    window: Window,
    pruning: StudyPruning,
    step_by_step: bool = False,
) -> Tensor:
    """Compute the pruned model's log-probabilities: the first from prefill, the others from decode. float32 [S, V]"""
    (found,) = after_prompt(engine, window.prompt, [window.continuation], pruning, step_by_step)
    return found


@torch.inference_mode()
def after_prompt(
    engine: LoadedModel,
    prompt: list[int],
    continuations: Sequence[list[int]],
    pruning: StudyPruning,
    step_by_step: bool = False,
) -> Iterator[Tensor]:
    """Yield `log_probabilities` of several continuations of one prompt, which is prefilled once: float32 [S, V] each"""
    model, room = engine.model, len(prompt) + sum(map(len, continuations))
    model.check_ids([*prompt, *itertools.chain(*continuations)])
    x = model.embed(torch.tensor([prompt], device=model.device))                    # [1, T, H]
    given = [torch.tensor(one[:-1], dtype=torch.int64, device=model.device) for one in continuations]    # [S - 1] each
    with engine.borrowed_state(1, min(room, engine.max_seq_len), pruning) as state:
        first = model.prefill(x, state)                                             # [1, V]
        if step_by_step or state.schedule.ever_dense or room > engine.max_seq_len or len(given) == 1:
            found = one_by_one(model, x, given, state, step_by_step)
        else:
            found = iter(evaluate_branches(model, given, state) if any(map(len, given)) else [first[:0]] * len(given))
        for logits in found:
            together = torch.cat([first, logits])                                   # [S, V]
            require_finite(together, "scored token", 1)
            yield together.float().log_softmax(dim=-1)


def one_by_one(
    model: LlamaForCausalLM, x: Tensor, texts: Sequence[Tensor], state: DecodeState, step_by_step: bool
) -> Iterator[Tensor]:
    """Yield the logits of each text after the prompt x, which was prefilled.

    x [1, T, H]; texts int64 [S - 1] each -> [S - 1, V] each
    """
    for number, text in enumerate(texts):
        if number and state.schedule.ever_dense:        # dense steps of the last text added evidence
            model.prefill(x, state)
        state.cache.go_back(x.shape[1])
        if not len(text):
            yield x.new_empty(0, model.config.vocab_size)
        elif step_by_step:
            yield torch.cat([next_logits(model, token[None], state) for token in text])
        else:
            yield evaluate(model, text, state)


def score_window(log_p: Tensor, dense_log_p: Tensor, window: Window) -> WindowScore:
    """Compare log-probabilities [S, V] with the text's tokens and with the dense model's log-probabilities."""
    said = torch.tensor(window.continuation, device=log_p.device)                   # [S]
    divergences = (dense_log_p.exp() * (dense_log_p - log_p)).sum(dim=-1)           # [S]
    return WindowScore(
        losses=(-log_p.gather(1, said[:, None])[:, 0]).tolist(),
        agreed=(log_p.argmax(dim=-1) == dense_log_p.argmax(dim=-1)).tolist(),
        divergences=divergences.tolist(),
    )


def summarise(scores: Sequence[WindowScore]) -> Summary:
    """Average the scores of windows. Raises InputError for a loss that no sound model has."""
    loss = mean_and_error([sum(score.losses) / len(score.losses) for score in scores])
    if loss["mean"] > MOST_LOSS:
        raise InputError(f"a loss of {loss['mean']:.3g} nats per token is no language model's: its weights are damaged")
    tokens = sum(len(score.losses) for score in scores)
    return Summary(
        windows=len(scores),
        perplexity=math.exp(loss["mean"]),
        mean_loss=loss["mean"],
        standard_error=loss["error"],
        agreement=sum(sum(score.agreed) for score in scores) / tokens,
        divergence=sum(sum(score.divergences) for score in scores) / tokens,
    )


def mean_and_error(values: Sequence[float]) -> dict[str, float]:
    """Compute the mean and its standard error; nan for a single value."""
    mean = sum(values) / len(values)
    spread = sum((value - mean) ** 2 for value in values)
    return {"mean": mean, "error": math.sqrt(spread / (len(values) - 1) / len(values)) if len(values) > 1 else math.nan}


@torch.inference_mode()
def score_text(
    engine: LoadedModel, windows: Sequence[Window], pruning: StudyPruning, step_by_step: bool, bar: str | None
) -> Summary:
    """Score every window under one pruning. bar: label of the progress bar, None: no bar"""
    scores = []
    for window in tqdm(windows, desc=bar, unit="window", disable=bar is None):
        log_p = log_probabilities(engine, window, pruning, step_by_step)
        scores.append(score_window(log_p, dense_log_probabilities(engine.model, window), window))
    return summarise(scores)


def read_per_token(engine: Engine, pruning: StudyPruning) -> tuple[int, int]:
    """Return the bytes of weights that a decode step reads under a pruning, and in the dense model."""
    return bytes_per_token(engine.model, pruning), bytes_per_token(engine.model, engine.resolve(DENSE))


def check_context(engine: Engine, prompt_tokens: int, score_tokens: int) -> None:
    """Raise InputError if a window does not fit the context."""
    if prompt_tokens + score_tokens > engine.max_seq_len:
        raise InputError(
            f"windows of {prompt_tokens} + {score_tokens} tokens are longer than the context of {engine.max_seq_len}"
        )
