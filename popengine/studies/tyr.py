"""A small Tyr-the-Pruner (arXiv 2503.09657): a coarse-to-fine search for the shares of layers, at an equal total.

As in the paper: the search starts from equal shares. Every generation moves channels between a few layers, in steps
that get finer. The child (or the parent) whose next-token distribution is nearest to the dense model's by KL divergence
is the next parent. Smaller than the paper: only channels move, ranked once by activation times the norm of down_proj's
column. The paper also prunes heads, corrects the remaining weights (with a model ready for every share), and searches
for hours.

W windows, T tokens, V vocabulary.
"""

import random

import torch
from torch import Tensor

from models.llama import LlamaForCausalLM
from popengine.studies.activations import layer_of
from popengine.studies.known_text import evaluate
from popengine.studies.request import Request
from popengine.studies.resolve import StudyPruning

# One move takes one in this many channels from a layer and gives them to another; one entry per phase.
STEPS = (8, 16, 32)
GENERATIONS, OFFSPRING, MOST_MOVES = 8, 5, 4


@torch.inference_mode()
def tyr(request: Request) -> StudyPruning:
    """Find shares per layer by a coarse-to-fine evolutionary search at an equal total (arXiv 2503.09657)."""
    calibration, model, draws = request.calibrated("tyr"), request.model, random.Random(request.seed)
    scores = {
        name: ffn.down_norms() * calibration.moments[name].mean_square.sqrt() if calibration.moments[name].tokens
        else ffn.weight_scores() for name, ffn in request.networks.items()
    }
    channels = {layer_of(name): request.channels(of) for name, of in scores.items()}
    parent = {layer_of(name): request.count_kept(of) for name, of in scores.items()}
    if request.ffn_ratio == 0 or len(parent) < 2:
        return request.keep(scores, {name: parent[layer_of(name)] for name in scores})
    dense = [predictions(model, window, request.pruning(prune_ratio=0.0, ffn_ratio=None, head_ratio=0.0))
             for window in calibration.windows]

    def cut(kept: dict[int, int]) -> StudyPruning:
        return request.keep(scores, {name: kept[layer_of(name)] for name in scores})

    def fitness(kept: dict[int, int]) -> float:
        own = (predictions(model, window, cut(kept)) for window in calibration.windows)
        return sum(float((one.exp() * (one - other)).sum()) for one, other in zip(dense, own, strict=True))

    best = fitness(parent)
    for step in STEPS:
        for _ in range(GENERATIONS):
            for child in [moved(parent, channels, step, draws) for _ in range(OFFSPRING)]:
                found = fitness(child)
                if found < best:
                    best, parent = found, child
    return cut(parent)


def moved(kept: dict[int, int], channels: dict[int, int], step: int, draws: random.Random) -> dict[int, int]:
    """Move channels between one to four random pairs of layers, most often one. A layer keeps at least one channel."""
    child = dict(kept)
    for _ in range(min(draws.randint(1, MOST_MOVES), draws.randint(1, MOST_MOVES))):
        giver, taker = draws.sample(sorted(child), 2)
        count = min(channels[giver] // step, child[giver] - 1, channels[taker] - child[taker])
        child[giver], child[taker] = child[giver] - count, child[taker] + count
    return child


def predictions(model: LlamaForCausalLM, window: Tensor, pruning: StudyPruning) -> Tensor:
    """Compute log-probabilities of the next tokens with the decode steps. window int64 [T] -> [T - 1, V]"""
    ids = window.to(model.device)
    state = model.new_state(1, len(ids), pruning)
    model.prefill(model.embed(ids[None, :1]), state)
    return evaluate(model, ids[1:], state).float().log_softmax(dim=-1)
