"""What static pruning methods know about a model: mean and variance of every channel over a text, and their file.

I FFN channels, H hidden size, n tokens.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.llama import LlamaForCausalLM
from popengine.methods.activations import Activation, feed_forward_networks, watch_dense
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
class Calibration:
    """Moments of every feed-forward network, by its place in the model; which text and which model they are of."""

    moments: dict[str, Moments]
    made_from: str
    model: str


def fingerprint(model: LlamaForCausalLM) -> str:
    """Tells models apart by places, shapes and some weights of their feed-forward networks."""
    digest = hashlib.sha256()
    for name, ffn in feed_forward_networks(model).items():
        weight = ffn.down_proj.values()
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight[0].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.inference_mode()
def calibrate(model: LlamaForCausalLM, texts: Iterable[Tensor], made_from: str) -> Calibration:
    """Run the dense model over texts, embedded [1, T, H] each. made_from says for people what texts they were."""
    networks = feed_forward_networks(model)
    tokens = dict.fromkeys(networks, 0)
    sums = {
        name: torch.zeros(2, ffn.channels, dtype=torch.float64, device=ffn.device)
        for name, ffn in networks.items()
    }                                                                               # of h and of its square, [2, I]

    def add(activation: Activation) -> None:
        h = activation.h.double()                                                   # [n, I]
        tokens[activation.name] += len(h)
        sums[activation.name] += torch.stack([h.sum(dim=0), h.square().sum(dim=0)])

    for x in texts:
        watch_dense(model, x, add)
    moments = {}
    for name, (total, squares) in sums.items():
        n = tokens[name]
        mean = total / max(n, 1)
        variance = (squares - n * mean.square()).clamp(min=0) / max(n - 1, 1)
        moments[name] = Moments(n, mean.float(), variance.float())
    return Calibration(moments, made_from, fingerprint(model))


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write a .safetensors file. Raises InputError where that cannot be done."""
    tensors: dict[str, Tensor] = {}
    for name, one in calibration.moments.items():
        tensors |= {f"{name}.mean": one.mean.cpu(), f"{name}.variance": one.variance.cpu()}
        tensors[f"{name}.tokens"] = torch.tensor(one.tokens)
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
    networks = feed_forward_networks(model)
    if metadata.get("model") != fingerprint(model) or {key.rsplit(".", 1)[0] for key in tensors} != set(networks):
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
    return Calibration(moments, one_line(metadata.get("made_from", "")), metadata["model"])
