"""The number of multiplications of a prompt, for the ideal speed-ups of the benchmark."""

from typing import Any

from models.cost_model import weight_count
from models.experts import MixtureOfExperts
from models.feed_forward import FeedForward
from models.pruning.pruning import Pruning
from models.pruning.settings import ATTENTION, MLP
from popengine.studies.resolve import StudyPruning


def prompt_work(model: Any, pruning: StudyPruning, tokens: int, missing: int = 0) -> tuple[int, int]:
    """Count the multiplications of a prompt: with weights, and in attention (queries, keys, values).

    A skipped layer computes keys and values of every token, and runs only the boundary. Layers that drop picture tokens
    run `missing` fewer.
    """
    linear, attention = weight_count(model.lm_head), 0
    for index, layer in enumerate(model.model.layers):
        if pruning.is_thin(index):
            tokens, missing = tokens - missing, 0
        skipped = pruning.skipped_by(tokens)
        rows, one, running = pruning.boundary if index in skipped else tokens, layer.self_attn, pruning.sublayers(index)
        if MLP in running:
            linear += rows * prompt_ffn_weights(layer.mlp, pruning)
        if ATTENTION not in running:
            continue
        keys_and_values = weight_count(one.k_proj) + weight_count(one.v_proj)
        linear += tokens * keys_and_values + rows * (weight_count(one.q_proj) + weight_count(one.o_proj))
        seen = sum(min(place, one.window or place) for place in range(tokens - rows + 1, tokens + 1))
        attention += 2 * one.heads * one.head_dim * seen
    return linear, attention


def prompt_ffn_weights(mlp: FeedForward | MixtureOfExperts, pruning: Pruning) -> int:
    """Count the weights that one prompt token is multiplied with; pruned prompts use fewer columns of down_proj."""
    if isinstance(mlp, MixtureOfExperts):
        shared = 0 if mlp.shared_expert is None else prompt_ffn_weights(mlp.shared_expert, pruning)
        return weight_count(mlp.gate) + mlp.experts_per_token * prompt_ffn_weights(mlp.experts[0], pruning) + shared
    return pruning.rule.prompt_weights(mlp, pruning.settings.prefill == "dense")
