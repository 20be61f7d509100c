"""Answers to the requests of a task through online pruning, for the harness and `popengine.tasks`.

A scored continuation runs through decode steps after its context was prefilled. A generated answer ends at a stop
string.
"""

from collections.abc import Sequence

import torch

from popengine.engine.engine import Engine
from popengine.engine.run import next_logits, pad_left
from popengine.engine.sampling import require_finite
from popengine.engine.sampling_settings import Sampling
from popengine.evaluation.scoring import Window, after_prompt
from popengine.studies.resolve import StudyPruning
from popengine.studies.separate import keep_sequences
from weights.errors import InputError

# Sequences that ended leave a batch once at most this share of it goes on: leaving copies the others' keys and values.
GOING_ON = 0.9


def encode(engine: Engine, text: str) -> list[int]:
    """Tokenize a text; add the tokenizer's begin token only if the text does not begin with it already."""
    begin = engine.tokenizer.bos_token
    return engine.tokenizer.encode(text, not (begin and text.startswith(begin)))


def encoded_pair(engine: Engine, context: str, continuation: str) -> Window:
    """Tokenize both together and split after the context's own tokens, as lm_eval does.

    Spaces at the end of the context belong to the continuation.
    """
    bare = context.rstrip()
    prompt = encode(engine, bare)
    return fitting(engine, prompt, encode(engine, context + continuation)[len(prompt) :])


def fitting(engine: Engine, context: list[int], continuation: list[int]) -> Window:
    """Make a window of context and continuation, truncated on the left to the model's context.

    The last token is scored and never run, so one token more than the context fits.
    """
    whole = (context + continuation)[-(engine.max_seq_len + 1) :]
    scored = min(len(continuation), len(whole) - 1)
    return Window(whole[: len(whole) - scored], whole[len(whole) - scored :])


@torch.inference_mode()
def log_likelihoods(engine: Engine, windows: Sequence[Window], pruning: StudyPruning) -> list[tuple[float, bool]]:
    """Compute each continuation's log-likelihood, and whether greedy decoding gives it; equal prompts run only once."""
    found: dict[int, tuple[float, bool]] = {}
    prompts = {tuple(window.prompt): window.prompt for window in windows}
    for prompt in prompts.values():
        own = [number for number, window in enumerate(windows) if window.prompt == prompt]
        continuations = [windows[number].continuation for number in own]
        for number, log_p in zip(own, after_prompt(engine, prompt, continuations, pruning), strict=True):
            said = torch.tensor(windows[number].continuation, device=log_p.device)  # [S]
            greedy = bool((log_p.argmax(dim=-1) == said).all())                     # log_p [S, V]
            found[number] = float(log_p.gather(1, said[:, None]).sum()), greedy
    return [found[number] for number in range(len(windows))]


def generate_until(
    engine: Engine, prompts: Sequence[list[int]], new_tokens: int, pruning: StudyPruning, sampling: Sampling,
    stops: Sequence[str],
) -> list[str]:
    """Generate a text for each prompt, up to the first stop string or the end of sequence.

    Prompts that are too long are truncated on the left. Raises InputError if no room is left for a prompt.
    """
    run = engine.run(truncated(engine, prompts, new_tokens), new_tokens, pruning, sampling)
    token_ids: list[list[int]] = [[] for _ in prompts]
    for step in run:
        for index, token in enumerate(step):
            if token is None:
                continue
            token_ids[index].append(token)
            if first_stop(engine.tokenizer.decode(token_ids[index]), stops) is not None:
                run.end(index)
    texts = [engine.tokenizer.decode(ids) for ids in token_ids]
    return [text[: first_stop(text, stops)] for text in texts]


@torch.inference_mode()
def generate_together(
    engine: Engine, prompts: Sequence[list[int]], new_tokens: int, pruning: StudyPruning, stops: Sequence[str]
) -> list[str]:
    """Generate the likeliest text of each prompt as `generate_until` does for it alone, many at once.

    A sequence that ended leaves the batch. pruning: one of popengine/studies/separate.py. Errors as `generate_until`
    """
    model = engine.model
    tokens, real = pad_left(truncated(engine, prompts, new_tokens), engine.device)
    said: list[list[int]] = [[] for _ in prompts]
    running, ended = list(range(len(prompts))), set[int]()      # the prompt of each row of the batch
    with engine.borrowed_state(len(prompts), tokens.shape[1] + new_tokens, pruning) as state:
        logits = model.prefill(model.embed(tokens), state, real)                    # [B, V]
        for number in range(1, new_tokens + 1):
            require_finite(logits, f"new token {number} of prompt", 1)
            chosen = logits.argmax(dim=-1)                                          # [B]
            for index, token in zip(running, chosen.tolist(), strict=True):
                if index not in ended:
                    said[index].append(token)
                    stopped = first_stop(engine.tokenizer.decode(said[index]), stops) is not None
                    if stopped or token in engine.stop_ids:
                        ended.add(index)
            going = [row for row, index in enumerate(running) if index not in ended]
            if not going or number == new_tokens:
                break
            if len(going) <= GOING_ON * len(running):
                rows = torch.tensor(going, device=engine.device)
                keep_sequences(state, rows)
                running, chosen = [running[row] for row in going], chosen[rows]
            logits = next_logits(model, chosen, state)                              # [B, V]
    texts = [engine.tokenizer.decode(ids) for ids in said]
    return [text[: first_stop(text, stops)] for text in texts]


def truncated(engine: Engine, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
    """Truncate prompts on the left, so that so many new tokens fit. Raises InputError if no prompt would."""
    room = engine.max_seq_len - new_tokens
    if room < 1:
        raise InputError(f"generating {new_tokens} tokens leaves no room in the context of {engine.max_seq_len}")
    return [ids[-room:] for ids in prompts]


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return the index where the first stop string begins; None if there is none."""
    places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return min(places, default=None)
