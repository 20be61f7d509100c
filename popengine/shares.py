"""A rank's share of a model's weights: which part of each tensor of a checkpoint it reads.

Heads of attention and channels of feed-forward networks are shared: rows of what makes them, columns of what reads
them. Embedding, norms, routers, output projection and vision tower are everybody's.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from models.attention import Attention
from models.feed_forward import FeedForward
from models.llama import LlamaForCausalLM
from models.matrix import Matrix
from models.ranks import Ranks
from weights.entries import TensorEntry
from weights.load import Share


def shared_config(config: Any, ranks: Ranks) -> Any:
    """One rank's, of a text model or of the text model that reads pictures."""
    return replace(config, text=config.text.shared_by(ranks)) if hasattr(config, "text") else config.shared_by(ranks)


def shared_matrices(language_model: LlamaForCausalLM) -> Iterator[tuple[list[Matrix], Matrix]]:
    """Of every block: the matrices whose rows are shared, and the one whose columns are."""
    for module in language_model.modules():
        if isinstance(module, Attention):
            yield [module.q_proj, module.k_proj, module.v_proj], module.o_proj
        elif isinstance(module, FeedForward):
            yield [module.gate_proj, module.up_proj], module.down_proj


def share_of(language_model: LlamaForCausalLM, ranks: Ranks) -> Share:
    """Where this rank's part of each parameter lies."""
    sides: dict[int, int] = {}          # of a parameter: which side is shared
    for by_rows, by_columns in shared_matrices(language_model):
        sides |= {id(parameter): 0 for matrix in by_rows for parameter in matrix.parameters()}
        sides[id(by_columns.weight)] = 1

    def share(target: Tensor, index: tuple[Any, ...], entry: TensorEntry) -> tuple[tuple[Any, ...], int]:
        side = sides.get(id(target))
        if side is None:
            return index, 1
        length = target.shape[side]
        return narrowed(index, entry.shape, side, ranks.rank * length, length), ranks.size

    return share


def narrowed(
    index: tuple[Any, ...], shape: tuple[int, ...], side: int, first: int, length: int
) -> tuple[Any, ...]:
    """The index of a stretch along one side of what stands at `index` (whole numbers and slices) of such a tensor."""
    whole = [*index, *[slice(None)] * (len(shape) - len(index))]
    places = [place for place, one in enumerate(whole) if isinstance(one, slice)]
    if side < len(places):              # of another shape is found out later, with all that are
        start = (whole[places[side]].start or 0) + first
        whole[places[side]] = slice(start, start + length)
    return tuple(whole)


def drop_output_biases(language_model: LlamaForCausalLM) -> None:
    """Of what the ranks add up, one has the bias."""
    for _, by_columns in shared_matrices(language_model):
        if by_columns.bias is not None:
            by_columns.bias.data.zero_()
