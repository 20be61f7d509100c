"""The prior: evidence before any token, from channel activations on texts that the model samples from its first token.

A short prompt is weak evidence. The prior needs no data. It is made once per checkpoint and stored beside it
(prior.safetensors) or in the user's cache, under the checkpoint's fingerprint. It counts as many tokens as the setting
`prior` says. GLASS (arXiv 2508.14302) fuses ranks for the same purpose; here squares are added like other evidence.

H hidden size, I channels of a network (or coordinates of an attention's heads), n rows that reach one network.
"""

import contextlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from models.attention import Attention
from models.experts import MixtureOfExperts
from models.feed_forward import FeedForward
from models.llama import LlamaForCausalLM
from popengine.engine.distributed import all_gather
from popengine.engine.loaded import LoadedModel
from popengine.engine.processes import is_first
from popengine.engine.run import Run
from popengine.engine.sampling_settings import Sampling
from popengine.studies.evidence import Prior
from popengine.studies.recording import Watch, watched
from weights.errors import InputError
from weights.output_file import write_output
from weights.user_folders import cache_folder

FORMAT = "popengine prior 1"
# A network or attention, and its part: "h", the input of down_proj or o_proj, or a factor of a network.
Part = tuple[nn.Module, str]
FILE = "prior.safetensors"
TEXTS, TEXT_TOKENS = 16, 160
PARTS = ("h", "gate", "up")
# Bound on a mean square, far above any model's; sums over tokens remain finite.
LARGEST = 1e24


def prior_for(engine: LoadedModel, tokens: int) -> Prior | None:
    """Return the model's prior that counts as `tokens` tokens: read it if stored, else make and store it. None for 0"""
    if tokens == 0 or tokens in engine.priors:
        return engine.priors.get(tokens)
    model, name = engine.model, engine.fingerprint
    kept = cache_folder("priors") / f"{name}.safetensors"
    found = read(engine.folder / FILE, name, model) or read(kept, name, model)
    everywhere = all_gather(found is not None)           # it may be missing on another machine
    if found is None or not all(everywhere):
        found = make(engine, engine.progress)
        write(kept, name, found, model)
    engine.priors[tokens] = Prior(found, tokens)
    return engine.priors[tokens]


def observed(model: LlamaForCausalLM) -> dict[str, FeedForward | Attention]:
    """Return the networks and attentions that a prior covers, by their place in the model."""
    return {name: one for name, one in model.named_modules() if isinstance(one, (FeedForward, Attention))}


@torch.inference_mode()
def make(engine: LoadedModel, progress: bool) -> dict[Part, Tensor]:
    """Sample texts at temperature 1 and return the mean square of every channel over them, float32 [I]."""
    model, tokenizer = engine.model, engine.tokenizer
    named = (tokenizer.token_id(token) for token in (tokenizer.bos_token, tokenizer.eos_token) if token)
    start = next((token for token in named if token is not None), 0)
    model.check_ids([start])
    length, sampling = max(1, min(TEXT_TOKENS, engine.max_seq_len - 1)), Sampling(temperature=1.0, seed=0)
    run = Run(engine, [[start]] * TEXTS, length, engine.dense, sampling, frozenset(), engine.pictures.given(()))
    bar = tqdm(total=length + TEXTS, desc="prior", unit="step", disable=not progress, leave=False)
    steps = []
    for step in run:
        steps.append(step)
        bar.update()
    engine.idle_state = None            # no other run has a batch of this size
    squares = MeanSquares()
    for text in zip(*steps, strict=True):
        state = watched(model.new_state(1, length + 1, engine.dense), squares)
        model.prefill(model.embed(torch.tensor([[start, *text]], device=engine.device)), state)
        bar.update()
    bar.close()
    return {(module, part): total / squares.rows[module] for (module, part), total in squares.sums.items()}


class MeanSquares(Watch):
    """Sums of squares of every channel, of both its factors, and of the coordinates of heads."""

    def __init__(self) -> None:
        self.sums: dict[Part, Tensor] = {}
        self.rows: dict[nn.Module, int] = {}

    def add(self, module: nn.Module, **parts: Tensor) -> None:
        """Add the squares of each part, [B, T, I] by name."""
        self.rows[module] = self.rows.get(module, 0) + next(iter(parts.values())).shape[:-1].numel()
        for part, values in parts.items():
            squares = values.float().square().flatten(0, -2).sum(dim=0)             # [I]
            self.sums[module, part] = self.sums.get((module, part), 0) + squares

    def network(self, ffn: FeedForward, h: Tensor, gate: Tensor, up: Tensor, rows: Tensor | None) -> None:
        self.add(ffn, h=h, gate=gate, up=up)

    def heads(self, attention: Any, a: Tensor) -> None:
        self.add(attention, h=a)


def read(path: Path, name: str, model: LlamaForCausalLM) -> dict[Part, Tensor] | None:
    """Read a stored prior; None if there is no valid one of this model, so that it is made again."""
    if not path.is_file():              # a pipe would block
        return None
    places, ranks = observed(model), model.config.ranks
    mixtures = (one for one in model.modules() if isinstance(one, MixtureOfExperts))
    unreached = {module for mixture in mixtures for module in mixture.modules()}     # experts that may have no data
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if (about.get("format"), about.get("model")) != (FORMAT, name):
                return None
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping: has only keys()
    except (OSError, SafetensorError):
        return None
    found: dict[Part, Tensor] = {}
    for place, one in places.items():
        size = one.channels if isinstance(one, FeedForward) else one.heads * one.head_dim
        parts = PARTS if isinstance(one, FeedForward) else PARTS[:1]
        keys = [f"{place} {part}" for part in parts]
        if one in unreached and not any(key in tensors for key in keys):
            continue
        for key, part in zip(keys, parts, strict=True):
            squares = tensors.pop(key, None)
            if squares is None or squares.dtype != torch.float32 or squares.shape != (ranks.count * size,) or not bool(
                ((squares >= 0) & (squares <= LARGEST)).all()
            ):
                return None
            found[one, part] = squares[ranks.stretch(len(squares))].to(model.device)
    return None if tensors else found


def write(path: Path, name: str, prior: dict[Part, Tensor], model: LlamaForCausalLM) -> None:
    """Store a prior. If that fails, it is made again next time."""
    places: dict[nn.Module, str] = {one: place for place, one in observed(model).items()}
    ranks = model.config.ranks
    tensors = {
        f"{places[one]} {part}": ranks.join(values).cpu().contiguous()
        for (one, part), values in prior.items()
    }
    if not is_first():
        return
    with contextlib.suppress(OSError, InputError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_output(path, save(tensors, {"format": FORMAT, "model": name}))
