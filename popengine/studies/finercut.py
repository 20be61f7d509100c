"""FinerCut (arXiv 2405.18218): attentions and feed-forward networks are removed one by one, from prompts and steps.

Each step removes the block that changes the model's output least, on top of those removed before. As in the paper: the
candidates, the greedy order, no training afterwards. Ours: the change is the Jensen-Shannon divergence of the next
token's distribution from the dense model's, mean over the tokens of a window of the calibration text. Blocks (halves of
layers) are removed while one fits the ratio; the paper counts blocks. So methods are compared at equal parameters.

W windows, T tokens, H hidden size, V vocabulary.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from models.cost_model import layer_weights
from models.llama import LlamaForCausalLM
from models.passes import PrefillPass, prefill_pass
from models.pruning.settings import SUBLAYERS
from models.slots import AttentionPattern
from popengine.studies.left_out import Half
from popengine.studies.request import Request
from popengine.studies.resolve import StudyPruning, share_of_halves
from weights.errors import InputError


@torch.inference_mode()
def finercut(request: Request) -> StudyPruning:
    """Leave out halves of layers, greedily by the change of the model's output (arXiv 2405.18218)."""
    calibration, model = request.calibrated("finercut"), request.model
    budget, weights = request.layer_budget("finercut"), layer_weights(model)
    removed: list[Half] = []
    running = [Half(layer, part) for layer in range(weights.layers) for part in SUBLAYERS]
    while candidates := [
        half for half in running if share_of_halves([*removed, half], weights) <= budget + 1e-9 and len(running) > 1
    ]:
        missing = [half for half in candidates if frozenset([*removed, half]) not in calibration.measured]
        for half, change in changes(model, calibration.windows, running, missing):
            calibration.measured[frozenset([*removed, half])] = change
        least = min(candidates, key=lambda half: calibration.measured[frozenset([*removed, half])])
        removed.append(least)
        running.remove(least)
    if budget > 0 and not removed:
        raise InputError(f"a share of {budget:.3g} is less than any half of a layer holds: raise the prune ratio")
    return request.without(sorted(removed))


def changes(
    model: LlamaForCausalLM, windows: Tensor, running: list[Half], candidates: list[Half]
) -> Iterable[tuple[Half, float]]:
    """Yield each candidate with the change of the output if it is removed too. windows int64 [W, T]

    The halves before a candidate are computed only once.
    """
    if not candidates:
        return
    x = model.embed(windows.to(model.device))                                       # [W, T, H]
    step = prefill_pass(model.model.rotary, map(AttentionPattern, model.config.windows), x, None)
    whole = [Half(layer, part) for layer in range(len(model.model.layers)) for part in SUBLAYERS]
    dense = log_probabilities(model, through(model, whole, x, step))                # [W, T, V]
    for place, half in enumerate(running):
        if half in candidates:
            yield half, divergence(dense, log_probabilities(model, through(model, running[place + 1 :], x, step)))
        x = through(model, [half], x, step)


def through(model: LlamaForCausalLM, halves: list[Half], x: Tensor, step: PrefillPass) -> Tensor:
    """Run the given halves. x [W, T, H] -> [W, T, H]"""
    for half in halves:
        x = getattr(model.model.layers[half.layer], f"forward_{half.part}")(x, step)
    return x


def log_probabilities(model: LlamaForCausalLM, x: Tensor) -> Tensor:
    """Compute log-probabilities of the next token. x [W, T, H] -> float32 [W, T, V]"""
    return model.head(x).float().log_softmax(dim=-1)


def divergence(one: Tensor, other: Tensor) -> float:
    """Compute the Jensen-Shannon divergence in nats, mean over tokens. one, other: log-probabilities [W, T, V]"""
    middle = torch.logaddexp(one, other) - math.log(2)
    halves = (part.exp().mul_(part - middle).sum(dim=-1) for part in (one, other))  # [W, T] each
    return float(sum(halves).mean()) / 2  # type: ignore[union-attr]  # two tensors are no number
