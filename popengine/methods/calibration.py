"""What static pruning methods know about a model: mean and variance of every channel over a text, and their file.

I FFN channels, H hidden size, n tokens.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.experts import MixtureOfExperts
from models.llama import LlamaForCausalLM
from models.passes import PictureRows
from popengine.methods.activations import Activation, feed_forward_networks, mixtures_of_experts, watch_dense
from weights.errors import InputError, one_line

FORMAT = "popengine calibration 1"


@dataclass(frozen=True)
class Moments:
    """Of one network's activation h, over the tokens that reached it.

    tokens          how many they were
    mean, variance  float32 [I]; variance with n - 1 in the denominator, 0 for fewer than two tokens
    """

    tokens: int
    mean: Tensor
    variance: Tensor

    @property
    def mean_square(self) -> Tensor:
        """[I]"""
        return self.variance * ((self.tokens - 1) / max(self.tokens, 1)) + self.mean.square()


@dataclass(frozen=True)
class RouterStatistics:
    """Of one mixture's router, over the tokens that reached it.

    weights   float32 [E], what each expert's output counted, added up
    likeness  float32 [E, E], correlation of the experts' logits over the tokens, each token's mean taken off
    """

    weights: Tensor
    likeness: Tensor


@dataclass(frozen=True)
class Calibration:
    """Moments of every feed-forward network, and of mixtures their routers, by their place in the model; which text and
    which model they are of."""

    moments: dict[str, Moments]
    made_from: str
    model: str
    routers: dict[str, RouterStatistics] = field(default_factory=dict)


def fingerprint(model: LlamaForCausalLM) -> str:
    """Tells models apart by places, shapes and some weights of their feed-forward networks."""
    digest = hashlib.sha256()
    for name, ffn in feed_forward_networks(model).items():
        weight = ffn.down_proj.values()
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight[0].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.inference_mode()
def calibrate(
    model: LlamaForCausalLM, texts: Iterable[tuple[Tensor, PictureRows | None]], made_from: str
) -> Calibration:
    """Run the dense model over texts, embedded [1, T, H] each, and what they have because of pictures.

    made_from says for people what texts they were.
    """
    networks = feed_forward_networks(model)
    names = {mixture: name for name, mixture in mixtures_of_experts(model).items()}
    weights = {name: torch.zeros(len(one.experts), device=model.device) for one, name in names.items()}
    logits: dict[str, list[Tensor]] = {name: [] for name in weights}
    tokens = dict.fromkeys(networks, 0)
    sums = {
        name: torch.zeros(2, ffn.channels, dtype=torch.float64, device=ffn.device)
        for name, ffn in networks.items()
    }                                                                               # of h and of its square, [2, I]

    def add(activation: Activation) -> None:
        h = activation.h.double()                                                   # [n, I]
        tokens[activation.name] += len(h)
        sums[activation.name] += torch.stack([h.sum(dim=0), h.square().sum(dim=0)])

    def add_routing(mixture: MixtureOfExperts, x: Tensor) -> None:
        routing, name = mixture.route(x), names[mixture]
        weights[name].index_add_(0, routing.experts.flatten(), routing.weights.flatten())
        logits[name].append(mixture.gate(x).float())                                # [T, E]

    for x, pictures in texts:
        watch_dense(model, x, add, pictures, add_routing)
    moments = {}
    for name, (total, squares) in sums.items():
        n = tokens[name]
        mean = total / max(n, 1)
        variance = (squares - n * mean.square()).clamp(min=0) / max(n - 1, 1)
        moments[name] = Moments(n, mean.float(), variance.float())
    routers = {name: RouterStatistics(weights[name], likeness(torch.cat(of))) for name, of in logits.items()}
    return Calibration(moments, made_from, fingerprint(model), routers)


def likeness(logits: Tensor) -> Tensor:
    """See RouterStatistics. [T, E] -> [E, E]"""
    centred = (logits - logits.mean(dim=1, keepdim=True)).double()
    centred = centred - centred.mean(dim=0)
    unit = centred / torch.linalg.vector_norm(centred, dim=0).clamp(min=1e-12)
    return (unit.T @ unit).float()


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write a .safetensors file. Raises InputError where that cannot be done."""
    tensors: dict[str, Tensor] = {}
    for name, one in calibration.moments.items():
        tensors |= {f"{name}.mean": one.mean.cpu(), f"{name}.variance": one.variance.cpu()}
        tensors[f"{name}.tokens"] = torch.tensor(one.tokens)
    for name, router in calibration.routers.items():
        tensors |= {f"{name}.weights": router.weights.cpu(), f"{name}.likeness": router.likeness.cpu()}
    metadata = {"format": FORMAT, "made_from": calibration.made_from, "model": calibration.model}
    try:
        save_file(tensors, path, metadata)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: the calibration cannot be written: {error}") from None


def load_calibration(path: Path, model: LlamaForCausalLM) -> Calibration:
    """Read what `save_calibration` wrote. Raises InputError for a file of another kind and for another model's."""
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
    networks, mixtures = feed_forward_networks(model), mixtures_of_experts(model)
    places = {key.rsplit(".", 1)[0] for key in tensors}
    if metadata.get("model") != fingerprint(model) or places != {*networks, *mixtures}:
        raise InputError(
            f"{path}: this calibration was made for another model, or for another dtype of it (from "
            f"{metadata.get('made_from')}); make one with --calibration-text"
        )
    moments = {}
    for name, ffn in networks.items():
        mean, variance, tokens = (tensors.get(f"{name}.{key}") for key in ("mean", "variance", "tokens"))
        if mean is None or variance is None or tokens is None or not (
            mean.shape == variance.shape == (ffn.channels,) and tokens.numel() == 1 and int(tokens) >= 0
            and mean.isfinite().all() and variance.isfinite().all() and (variance >= 0).all()
        ):
            raise InputError(f"{path}: what it says of {name} is damaged; make it again with --calibration-text")
        moments[name] = Moments(int(tokens), mean.float().to(ffn.device), variance.float().to(ffn.device))
    routers = {}
    for name, mixture in mixtures.items():
        weights, alike, count = tensors.get(f"{name}.weights"), tensors.get(f"{name}.likeness"), len(mixture.experts)
        if weights is None or alike is None or not (
            weights.shape == (count,) and alike.shape == (count, count)
            and weights.isfinite().all() and alike.isfinite().all() and (weights >= 0).all()
        ):
            raise InputError(f"{path}: what it says of {name} is damaged; make it again with --calibration-text")
        routers[name] = RouterStatistics(weights.float().to(model.device), alike.float().to(model.device))
    return Calibration(moments, one_line(metadata.get("made_from", "")), metadata["model"], routers)
