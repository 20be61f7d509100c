"""The command: python -m popengine.score --ckpt ... --text FILE --method pop --prune-ratio 0.2

Perplexity through the path that generation takes: each window's prompt is prefilled, which makes the partition, and
its continuation is decoded token by token with the text's own tokens (or in parallel, with the same result). Scoring a
text by one forward pass would never decode, and could not see what online pruning does.

T prompt tokens, S scored tokens, V vocabulary.
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from popengine.command import (
    OneLineParser,
    add_checkpoint_flag,
    add_machine_flags,
    add_pruning_flags,
    pruning_settings,
    run_as_command,
)
from weights.errors import InputError

# PyTorch takes seconds to import: it is imported once the flags have been understood.
if TYPE_CHECKING:
    from torch import Tensor

    from models.llama import LlamaForCausalLM
    from models.parallel import PickObserver
    from models.pruning.settings import Pruning
    from popengine.engine import Engine
    from popengine.methods.calibration import Calibration
    from popengine.text.tokenizer import TextTokenizer

CALIBRATION_WINDOW = 128
CALIBRATION_WINDOWS = 64


@dataclass(frozen=True)
class Window:
    """A piece of text: the prompt's tokens, and those of its continuation that are scored."""

    prompt: list[int]
    continuation: list[int]

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.continuation


@dataclass(frozen=True)
class WindowScore:
    """How well a continuation was foreseen, one number per scored token.

    losses       negative log-probability of the token, nats
    agreed       the likeliest token is the dense model's likeliest
    divergences  KL divergence of the distribution from the dense model's, nats
    """

    losses: list[float]
    agreed: list[bool]
    divergences: list[float]


@dataclass(frozen=True)
class Summary:
    """Over all windows. standard_error is of mean_loss, over windows; nan for a single one."""

    windows: int
    perplexity: float
    mean_loss: float
    standard_error: float
    agreement: float
    divergence: float


@dataclass(frozen=True)
class Text:
    """A text file as tokens. name and digest say which text a result is of."""

    name: str
    digest: str
    ids: list[int]


def read_text(path: Path, tokenizer: "TextTokenizer") -> Text:
    """Raises InputError for a file that cannot be read or is not UTF-8."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except OSError as error:
        raise InputError(f"{path}: the text cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: the text is not UTF-8 (at byte {error.start})") from None
    return Text(path.name, hashlib.sha256(data).hexdigest()[:16], tokenizer.encode(text, add_special_tokens=False))


def cut_windows(
    text: Text, tokenizer: "TextTokenizer", prompt_tokens: int, score_tokens: int, count: int
) -> list[Window]:
    """`count` windows spread evenly over the text, none overlapping another.

    A tokenizer that begins texts with a special token begins every prompt with it, as one of its tokens. Raises
    InputError when the text is too short.
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


def dense_log_probabilities(model: "LlamaForCausalLM", window: Window) -> "Tensor":
    """The dense model's for every scored token, by one forward pass: float32 [S, V]"""
    import torch

    ids = torch.tensor([window.ids[:-1]], device=model.lm_head.weight.device)
    logits = model(ids)[0, len(window.prompt) - 1 :]                                # [S, V]
    return logits.float().log_softmax(dim=-1)


def log_probabilities(
    model: "LlamaForCausalLM",
    window: Window,
    pruning: "Pruning",
    step_by_step: bool = False,
    observe: "PickObserver | None" = None,
) -> "Tensor":
    """The pruned model's for every scored token: the first from prefill, the others from decode. float32 [S, V]

    observe  is told every pick of the parallel evaluation
    """
    import torch

    from models.parallel import decode_in_parallel

    device = model.lm_head.weight.device
    prompt = torch.tensor([window.prompt], device=device)                           # [1, T]
    given = torch.tensor(window.continuation[:-1], device=device)                   # [S - 1]
    state = model.new_state(1, len(window.ids), pruning)
    logits = [model.prefill(model.embed(prompt), state)]                            # S times [1, V], or two pieces
    if step_by_step:
        logits += [model.decode(token[None], state) for token in given]
    elif len(given):
        logits.append(decode_in_parallel(model, given, state, observe))
    return torch.cat(logits).float().log_softmax(dim=-1)


def score_window(log_p: "Tensor", dense_log_p: "Tensor", window: Window) -> WindowScore:
    """Compare what was foreseen, [S, V], with what the text says and with what the dense model foresaw."""
    import torch

    said = torch.tensor(window.continuation, device=log_p.device)                   # [S]
    divergences = (dense_log_p.exp() * (dense_log_p - log_p)).sum(dim=-1)           # [S]
    return WindowScore(
        losses=(-log_p.gather(1, said[:, None])[:, 0]).tolist(),
        agreed=(log_p.argmax(dim=-1) == dense_log_p.argmax(dim=-1)).tolist(),
        divergences=divergences.tolist(),
    )


def summarise(scores: Sequence[WindowScore]) -> Summary:
    means = [sum(score.losses) / len(score.losses) for score in scores]
    mean = sum(means) / len(means)
    spread = sum((value - mean) ** 2 for value in means)
    error = math.sqrt(spread / (len(means) - 1) / len(means)) if len(means) > 1 else math.nan
    tokens = sum(len(score.losses) for score in scores)
    return Summary(
        windows=len(scores),
        perplexity=math.exp(mean),
        mean_loss=mean,
        standard_error=error,
        agreement=sum(sum(score.agreed) for score in scores) / tokens,
        divergence=sum(sum(score.divergences) for score in scores) / tokens,
    )


def add_scoring_flags(flags: argparse.ArgumentParser) -> None:
    """What the commands that score share."""
    flags.add_argument("--prompt-tokens", type=int, default=128, metavar="N")
    flags.add_argument("--score-tokens", type=int, default=128, metavar="N")
    flags.add_argument("--windows", type=int, default=12, metavar="N", help="pieces of the text, spread over it")
    flags.add_argument("--seed", type=int, default=0, metavar="N", help="for the method `random`")
    calibration = flags.add_argument_group("calibration (methods wanda-sp and flap)")
    calibration.add_argument("--calibration-text", type=Path, metavar="FILE", help="calibrate on this text")
    calibration.add_argument("--save-calibration", type=Path, metavar="FILE.safetensors")
    calibration.add_argument("--calibration", type=Path, metavar="FILE.safetensors", help="one that was saved")


def calibration_from(flags: argparse.Namespace, engine: "Engine") -> "Calibration | None":
    """Made from a text or read from a file, as the flags say; None when they say nothing."""
    from popengine.methods.activations import embedded
    from popengine.methods.calibration import calibrate, load_calibration, save_calibration

    if flags.calibration_text is not None and flags.calibration is not None:
        raise InputError("give --calibration-text or --calibration, not both")
    if flags.save_calibration is not None and flags.calibration_text is None:
        raise InputError("--save-calibration needs --calibration-text")
    if flags.calibration is not None:
        return load_calibration(flags.calibration, engine.model)
    if flags.calibration_text is None:
        return None
    text = read_text(flags.calibration_text, engine.tokenizer)
    count = min(CALIBRATION_WINDOWS, max(1, len(text.ids) // CALIBRATION_WINDOW))
    windows = cut_windows(text, engine.tokenizer, CALIBRATION_WINDOW // 2, CALIBRATION_WINDOW // 2, count)
    made_from = f"{text.name} ({text.digest}), {count} windows of {CALIBRATION_WINDOW} tokens"
    made = calibrate(engine.model, (embedded(engine.model, window.ids) for window in windows), made_from)
    if flags.save_calibration is not None:
        save_calibration(made, flags.save_calibration)
    return made


def check_context(engine: "Engine", prompt_tokens: int, score_tokens: int) -> None:
    if prompt_tokens + score_tokens > engine.max_seq_len:
        raise InputError(
            f"windows of {prompt_tokens} + {score_tokens} tokens are longer than the context of {engine.max_seq_len}"
        )


def parser() -> argparse.ArgumentParser:
    flags = OneLineParser(
        prog="popengine-score",
        description="Perplexity of a text through prefill and decode steps, under a pruning method.",
        allow_abbrev=False,
    )
    add_checkpoint_flag(flags)
    flags.add_argument("--text", type=Path, required=True, metavar="FILE", help="the text to score, UTF-8")
    flags.add_argument("--method", default="pop", metavar="M", help="pop, dense, frozen, ...; an unknown one lists all")
    flags.add_argument("--step-by-step", action="store_true", help="one token after the other instead of in parallel")
    add_scoring_flags(flags)
    add_pruning_flags(flags)
    add_machine_flags(flags)
    output = flags.add_argument_group("output")
    output.add_argument("--quiet", action="store_true", help="no progress bar")
    output.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return flags


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry of `python -m popengine.score` and of the console script `popengine-score`."""
    run_as_command(run, parser(), arguments)


def run(flags: argparse.Namespace) -> None:
    settings = pruning_settings(flags)
    import torch
    from tqdm import tqdm

    from models.pruning.settings import DENSE
    from popengine.engine import load
    from popengine.methods.by_name import Request, check_method, settings_for

    check_method(flags.method)
    progress = sys.stderr.isatty() and not flags.quiet
    engine = load(flags.ckpt, dtype=flags.dtype, device=flags.device, progress=progress)
    check_context(engine, flags.prompt_tokens, flags.score_tokens)
    text = read_text(flags.text, engine.tokenizer)
    windows = cut_windows(text, engine.tokenizer, flags.prompt_tokens, flags.score_tokens, flags.windows)
    calibration = calibration_from(flags, engine)
    pruning = engine.resolve(settings_for(flags.method, Request(engine.model, settings, calibration, flags.seed)))
    scores = []
    with torch.inference_mode():
        for window in tqdm(windows, desc=flags.method, unit="window", disable=not progress):
            log_p = log_probabilities(engine.model, window, pruning, flags.step_by_step)
            scores.append(score_window(log_p, dense_log_probabilities(engine.model, window), window))
    summary = summarise(scores)
    read = engine.model.weight_bytes_per_token(pruning)
    dense = engine.model.weight_bytes_per_token(engine.resolve(DENSE))
    report: dict[str, Any] = {
        "method": flags.method,
        **{name: None if math.isnan(value) else value for name, value in asdict(summary).items()},
        "pruning": {
            "ratio": pruning.ratio,
            "ffn_ratio": pruning.ffn_ratio,
            "candidate_width": pruning.candidate_width,
            "head_ratio": pruning.head_ratio,
            "prefill": pruning.prefill,
            "unseen_experts": pruning.unseen_experts,
        },
        "weight_bytes_per_token": read,
        "weight_share": read / dense,
        "text": {"name": text.name, "digest": text.digest, "tokens": len(text.ids)},
        "prompt_tokens": flags.prompt_tokens,
        "score_tokens": flags.score_tokens,
        "evaluation": "step by step" if flags.step_by_step else "parallel",
        "calibration": None if calibration is None else calibration.made_from,
        "seed": flags.seed,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "device": str(engine.device),
    }
    if flags.json:
        print(json.dumps(report))
        return
    print(f"perplexity  {summary.perplexity:.3f}")
    loss = f"{summary.mean_loss:.4f} +- {summary.standard_error:.4f}"
    print(f"loss        {loss} nats per token, {summary.windows} windows")
    print(f"dense model {summary.agreement:.1%} same top token, KL {summary.divergence:.4f} nats")
    print(f"weights     {read / 1e6:.0f} MB read per token, {read / dense:.1%} of dense")


if __name__ == "__main__":
    main()
