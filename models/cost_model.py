"""The cost model: weights of a model, and bytes that a step reads.

Every report uses it: bytes of weights per token = attention + lm_head + active channels of feed-forward networks. Of
down_proj only the picked columns count if its matrix can read them alone. Biases, norms, routers, the embedding's row
and the cache do not count.
"""

from typing import Any

from models.experts import MixtureOfExperts
from models.feed_forward import FeedForward
from models.matrices.plain import Matrix
from models.pruning.active_weights import channel_bytes
from models.pruning.experts import PartitionedExperts
from models.pruning.partition import PartitionSizes
from models.pruning.pop import POP
from models.pruning.pruning import Pruning
from models.pruning.resolve import LayerWeights
from models.pruning.settings import ATTENTION, MLP


def weight_count(matrix: Matrix) -> int:
    """Return the number of weights of a matrix."""
    return matrix.in_features * matrix.out_features


def layer_weights(model: Any) -> LayerWeights:
    """Count the weights per decoder layer of a language model, averaged over layers if they differ."""
    layers = model.model.layers
    attention, first = 0, layers[0].self_attn
    for layer in layers:
        one = layer.self_attn
        attention += sum(map(weight_count, (one.q_proj, one.k_proj, one.v_proj, one.o_proj)))
    return LayerWeights(
        attention=attention // len(layers),
        ffn=sum(ffn_weights(layer.mlp) for layer in layers) // len(layers),
        head=2 * first.head_dim * first.q_proj.in_features,
        head_groups=first.head_groups,
        heads_per_group=first.heads // first.head_groups,
        layers=len(layers),
    )


def ffn_weights(mlp: FeedForward | MixtureOfExperts) -> int:
    """Count the weights that the prune ratio refers to; in a mixture, those of the experts one token is routed to.

    As in the paper (POP, Table 8) the shared expert does not count, although it is pruned at the same rate.
    """
    if isinstance(mlp, MixtureOfExperts):
        return mlp.experts_per_token * ffn_weights(mlp.experts[0])
    return 3 * weight_count(mlp.gate_proj)


def bytes_per_token(model: Any, pruning: Pruning, batch: int = 1, state: Any = None) -> int:
    """Compute the bytes of weights that one sequence needs at a decode step of `batch` sequences, which share one read.

    state  the DecodeState of a run, which knows the experts without a copy of their active weights; None: all have one
    """
    read = pruning.rule.head_bytes(model.lm_head, batch)
    for index, layer in enumerate(model.model.layers):
        running = pruning.sublayers(index)
        active = None if state is None else state.layers[index].ffn
        if ATTENTION in running:
            read += pruning.rule.attention_bytes(layer.self_attn, batch)
        if MLP in running:
            read += mlp_bytes(layer.mlp, pruning.rule, batch, active)
    return read


def mlp_bytes(mlp: FeedForward | MixtureOfExperts, rule: POP, batch: int, active: PartitionedExperts | None) -> int:
    """Compute the bytes of weights that a step reads per token of one feed-forward network or mixture."""
    if isinstance(mlp, FeedForward):
        return rule.step_bytes(mlp, batch)
    networks = mlp.experts if active is None else active.experts
    # Tokens that share an expert are masked; a token alone may read chosen columns. Without a run: all share experts.
    meeting = float(batch > 1) if active is None or not any(active.picks) else active.met / sum(active.picks)
    each = 0.0
    for index, expert in enumerate(networks):
        if active is not None and rule.sizes(expert).prunes and active.multiplies_whole(index):
            each += channel_bytes(expert)
        else:
            each += (1 - meeting) * rule.step_bytes(expert, 1) + meeting * rule.step_bytes(expert, batch)
    shared = 0 if mlp.shared_expert is None else rule.step_bytes(mlp.shared_expert, batch)
    return round(mlp.experts_per_token * each / len(networks)) + shared


def copy_bytes(mlp: FeedForward | MixtureOfExperts, pruning: Pruning) -> int:
    """Compute the bytes of active copies of a network (in a mixture: of all its experts); 0 if nothing is copied."""
    if isinstance(mlp, MixtureOfExperts):
        networks = [*mlp.experts] if mlp.shared_expert is None else [*mlp.experts, mlp.shared_expert]
        return sum(copy_bytes(ffn, pruning) for ffn in networks)
    sizes = pruning.rule.sizes(mlp)
    if not sizes.copied:
        return 0
    rows = mlp.gate_proj.read_bytes(rows=sizes.active) + mlp.up_proj.read_bytes(rows=sizes.active)
    pays = mlp.down_proj.copying_pays(sizes.active)
    return rows + (mlp.down_proj.read_bytes(columns=sizes.active) if pays else 0)


def all_copy_bytes(model: Any, pruning: Pruning) -> int:
    """Compute the bytes of active copies over all layers of a language model."""
    return sum(
        copy_bytes(layer.mlp, pruning) for index, layer in enumerate(model.model.layers)
        if MLP in pruning.sublayers(index)
        and (isinstance(layer.mlp, MixtureOfExperts) or pruning.rule.copying_saves(layer.mlp))
    )


def cache_bytes(model: Any, batch: int, capacity: int, pruning: Pruning | None = None) -> int:
    """Compute the bytes of a cache, over all layers, or over those whose attention runs under a pruning."""
    config = model.config
    one = config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    layers = range(config.num_hidden_layers)
    attending = len(layers) if pruning is None else sum(ATTENTION in pruning.sublayers(index) for index in layers)
    return 2 * attending * batch * capacity * one


def ffn_sizes(model: Any, pruning: Pruning) -> PartitionSizes:
    """Return the region sizes of the first network or expert that runs; if none runs, of the first layer's, dense.

    In a model with mixtures the first expert counts, even if a layer before it has none.
    """
    layers = model.model.layers
    running = [layer.mlp for index, layer in enumerate(layers) if MLP in pruning.sublayers(index)]
    mixture = next((mlp for mlp in running if isinstance(mlp, MixtureOfExperts)), None)
    if mixture is not None:
        return pruning.rule.sizes(mixture.experts[0])
    if running:
        return pruning.rule.sizes(running[0])
    first = layers[0].mlp
    return POP(0.0, 0.0).sizes(first.experts[0] if isinstance(first, MixtureOfExperts) else first)
