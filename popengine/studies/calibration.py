"""Calibration: statistics of a model's channels and layers on a text, for static pruning methods, and their file.

I FFN channels, H hidden size, L layers, n tokens, W windows of T tokens.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from models.llama import LlamaForCausalLM
from popengine.studies.activations import (
    Activation,
    embedded,
    feed_forward_networks,
    layer_by_layer,
    mixtures_of_experts,
)
from weights.errors import InputError, one_line
from weights.output_file import write_output

FORMAT = "popengine calibration 2"
# Windows of the text kept for searches, and tokens of each: the cost of a search is proportional to both.
HELD_WINDOWS, HELD_TOKENS = 1, 256
# Bound on activations, far above any model's; squares and sums of many remain finite.
LARGEST = 1e12


@dataclass(frozen=True)
class Moments:
    """Moments of one network's activation h, over the tokens that reached it.

    tokens          number of these tokens
    mean, variance  float32 [I]; variance with n - 1 in the denominator, 0 for fewer than two tokens
    """

    tokens: int
    mean: Tensor
    variance: Tensor

    @property
    def mean_square(self) -> Tensor:
        """Mean of the squares, float32 [I]."""
        return self.variance * ((self.tokens - 1) / max(self.tokens, 1)) + self.mean.square()


@dataclass(frozen=True)
class RouterStatistics:
    """Statistics of one mixture's router, over the tokens that reached it.

    weights   float32 [E], sum of the routing weights of each expert
    likeness  float32 [E, E], correlation of the experts' logits over tokens, after subtracting each token's mean
    """

    weights: Tensor
    likeness: Tensor


@dataclass(frozen=True)
class Calibration:
    """Statistics of a model on a text.

    moments          of every feed-forward network, by its place in the model
    influence        float32 [L], 1 - cosine of a layer's input and output, mean over tokens (ShortGPT)
    angles           float32 [L], angle between the two in half turns, mean over tokens (CFSP)
    windows          int64 [W, T], a small part of the text, for searches
    made_from, model the text and the model (fingerprint) it belongs to
    routers          of every mixture of experts, by its place in the model
    measured         results of searches on the windows, reused by a search at another ratio
    """

    moments: dict[str, Moments]
    influence: Tensor
    angles: Tensor
    windows: Tensor
    made_from: str
    model: str
    routers: dict[str, RouterStatistics]
    measured: dict[Any, float] = field(default_factory=dict)


def fingerprint(model: LlamaForCausalLM) -> str:
    """Hash places, shapes and some weights of the feed-forward networks, to distinguish models."""
    digest, ranks = hashlib.sha256(), model.config.ranks
    for name, ffn in feed_forward_networks(model).items():
        weight = ffn.down_proj.values()
        row = ranks.join(weight[0].float())                                         # [I], of all ranks
        digest.update(f"{name} {(len(weight), len(row))}".encode())
        digest.update(row.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def calibrate(model: LlamaForCausalLM, windows: Iterable[list[int]], made_from: str) -> Calibration:
    """Run the dense model over windows of equal length. made_from: description of the texts for people"""
    return calibrate_on(model, ((ids, embedded(model, ids)) for ids in windows), made_from)


@torch.inference_mode()
def calibrate_on(model: LlamaForCausalLM, texts: Iterable[tuple[list[int], Tensor]], made_from: str) -> Calibration:
    """Run the dense model over texts of any length: pairs of ids without pictures, and embeddings [1, T, H]."""
    networks, mixtures = feed_forward_networks(model), mixtures_of_experts(model)
    weights = {name: torch.zeros(len(one.experts), device=model.device) for name, one in mixtures.items()}
    logits: dict[str, list[Tensor]] = {name: [] for name in mixtures}
    tokens = dict.fromkeys(networks, 0)
    sums = {
        name: torch.zeros(2, ffn.channels, dtype=torch.float64, device=ffn.device)
        for name, ffn in networks.items()
    }                                                                               # of h and of its square, [2, I]

    def add(activation: Activation) -> None:
        h = activation.h.double()                                                   # [n, I]
        tokens[activation.name] += len(h)
        sums[activation.name] += torch.stack([h.sum(dim=0), h.square().sum(dim=0)])

    def add_routing(name: str, x: Tensor) -> None:
        routing = mixtures[name].route(x)
        weights[name].index_add_(0, routing.experts.flatten(), routing.weights.flatten())
        logits[name].append(mixtures[name].gate(x).float())                         # [T, E]

    held: list[list[int]] = []
    cosines = torch.zeros(2, len(model.model.layers), dtype=torch.float64)          # sums of cosines, and of angles
    for ids, rows in texts:
        held.append(ids)
        for index, ways in enumerate(layer_by_layer(model, rows, add, add_routing)):
            before, after = (x[0].float() for x in ways)                            # [T, H]
            cosine = F.cosine_similarity(before, after, dim=-1).clamp(-1, 1)        # [T]
            cosines[:, index] += torch.stack([cosine.mean(), cosine.acos().mean() / math.pi]).cpu()
    moments = {}
    for name, (total, squares) in sums.items():
        n = tokens[name]
        mean = total / max(n, 1)
        variance = (squares - n * mean.square()).clamp(min=0) / max(n - 1, 1)
        moments[name] = Moments(n, mean.float(), variance.float())
    influence, angles = (cosines / max(1, len(held))).float()
    spread = held[:: max(1, len(held) // HELD_WINDOWS)][:HELD_WINDOWS]
    shortest = min([HELD_TOKENS, *map(len, spread)])
    routers = {name: RouterStatistics(weights[name], likeness(torch.cat(of))) for name, of in logits.items()}
    return Calibration(
        moments, 1 - influence, angles, torch.tensor([ids[:shortest] for ids in spread]), made_from, fingerprint(model),
        routers,
    )


def likeness(logits: Tensor) -> Tensor:
    """Compute RouterStatistics.likeness. logits [T, E] -> [E, E]"""
    centred = (logits - logits.mean(dim=1, keepdim=True)).double()
    centred = centred - centred.mean(dim=0)
    unit = centred / torch.linalg.vector_norm(centred, dim=0).clamp(min=1e-12)
    return (unit.T @ unit).float()


def save_calibration(calibration: Calibration, model: LlamaForCausalLM, path: Path) -> None:
    """Write a .safetensors file of whole networks, on any rank. Raises InputError if the file cannot be written."""
    layers = {"influence": calibration.influence, "angles": calibration.angles, "windows": calibration.windows}
    tensors: dict[str, Tensor] = {f"{name}.layers": values for name, values in layers.items()}
    for name, one in calibration.moments.items():
        mean, variance = model.config.ranks.join(one.mean), model.config.ranks.join(one.variance)
        tensors |= {f"{name}.mean": mean.cpu(), f"{name}.variance": variance.cpu()}
        tensors[f"{name}.tokens"] = torch.tensor(one.tokens)
    for name, router in calibration.routers.items():
        tensors |= {f"{name}.weights": router.weights.cpu(), f"{name}.likeness": router.likeness.cpu()}
    metadata = {"format": FORMAT, "made_from": calibration.made_from, "model": calibration.model}
    write_output(path, save(tensors, metadata))


def load_calibration(path: Path, model: LlamaForCausalLM) -> Calibration:
    """Read a file of `save_calibration`. Raises InputError for a file of another kind or of another model."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; a calibration is made with --calibration-text and --save-calibration")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping: has only keys()
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a calibration of popengine ({error})") from None
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path}: not a calibration of popengine (its format is {metadata.get('format')!r})")
    networks, mixtures, ranks = feed_forward_networks(model), mixtures_of_experts(model), model.config.ranks
    places = {key.rsplit(".", 1)[0] for key in tensors} - {"influence", "angles", "windows"}
    if metadata.get("model") != fingerprint(model) or places != {*networks, *mixtures}:
        raise InputError(
            f"{path}: this calibration was made for another model, or for another dtype of it (from "
            f"{metadata.get('made_from')}); make one with --calibration-text"
        )

    def saved(key: str, shape: Sequence[int], least: float, most: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a tensor of the file. Raises InputError unless dtype, shape and range are possible."""
        found = tensors.get(key)
        if found is None or found.dtype != dtype or found.shape != torch.Size(shape) or not bool(
            ((found >= least) & (found <= most)).all()
        ):
            raise InputError(
                f"{path}: what it says of {key} is damaged: it should be {dtype} of shape {[*shape]}, each from "
                f"{least:g} to {most:g}; make it again with --calibration-text"
            )
        return found

    layers = [len(model.model.layers)]
    influence, angles = saved("influence.layers", layers, 0, 2), saved("angles.layers", layers, 0, 1)
    held = tensors.get("windows.layers", torch.zeros(0)).numel() // HELD_WINDOWS    # tokens of a window
    held = min(max(2, held), HELD_TOKENS, model.config.max_position_embeddings)
    windows = saved("windows.layers", [HELD_WINDOWS, held], 0, model.config.vocab_size - 1, torch.int64)
    moments = {}
    for name, ffn in networks.items():
        tokens = int(saved(f"{name}.tokens", [], 0, math.inf, torch.int64))
        channels = [ranks.count * ffn.channels]
        whole_ones = (
            saved(f"{name}.mean", channels, -LARGEST, LARGEST), saved(f"{name}.variance", channels, 0, LARGEST**2)
        )
        mean, variance = (one[ranks.stretch(len(one))].to(ffn.device) for one in whole_ones)
        moments[name] = Moments(tokens, mean, variance)
    routers = {}
    for name, mixture in mixtures.items():
        count = len(mixture.experts)
        weights = saved(f"{name}.weights", [count], 0, LARGEST)
        alike = saved(f"{name}.likeness", [count, count], -1.01, 1.01)              # to rounding
        routers[name] = RouterStatistics(weights.to(model.device), alike.to(model.device))
    made_from = one_line(metadata.get("made_from", ""))
    return Calibration(moments, influence, angles, windows, made_from, metadata["model"], routers)
