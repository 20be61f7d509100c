"""A rank's matrices communicate in every product, and everything else is a question to its part."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from tolerance import assert_same
from torch import Tensor

from models.layers import Embedding
from models.matrices.forms import ChosenColumns, ColumnMatrix, by_columns
from models.matrices.packed import Int4Matrix, Int8Matrix, draft_of
from models.matrices.plain import Matrix
from models.matrices.ranked import JoinedMatrix, RankEmbedding, SummedMatrix
from models.pruning.active_weights import view_of_columns
from models.ranks import Ranks

COLUMNS = torch.tensor([1, 4, 6, 33])


@dataclass(frozen=True)
class TwoAlike(Ranks):
    """Two ranks that hold the same part, without another process."""

    count: int = 2

    def add_up(self, part: Tensor) -> Tensor:
        return 2 * part

    def join_rows(self, part: Tensor, size: int) -> Tensor:
        return torch.cat([part, part], dim=-1)[..., :size]


def part(kind: str = "plain") -> Matrix:
    plain = Matrix.of(torch.randn(48, 64, generator=torch.Generator().manual_seed(0)), torch.arange(48.0))
    if kind == "int8":
        return Int8Matrix.nearest(plain.values(), torch.float32, plain.bias)
    return draft_of(Matrix.of(plain.values().bfloat16(), None)) if kind == "int4" else plain


@pytest.mark.parametrize("kind", ["plain", "int8", "int4"])
def test_products_copies_and_views_sum_over_ranks(kind: str) -> None:
    own = part(kind)
    assert (type(own) is Int4Matrix) is (kind == "int4")
    whole, dtype = SummedMatrix(own, TwoAlike()), torch.bfloat16 if kind == "int4" else torch.float32
    x, few = torch.randn(1, 64).to(dtype), torch.randn(1, 4).to(dtype)
    assert_same(whole(x), 2 * own(x))
    keep = torch.zeros(64, dtype=torch.bool).index_fill(0, COLUMNS, True)
    assert_same(whole.multiply_kept(x, keep, 4), 2 * own.multiply_kept(x, keep, 4))
    copy, of_part = whole.empty_columns(4), own.empty_columns(4)
    copy.copy_columns(whole, COLUMNS)
    of_part.copy_columns(own, COLUMNS)
    assert_same(copy(few), 2 * of_part(few))
    view, of_part_view = view_of_columns(whole, 4), ChosenColumns(own, 4)
    view.copy_columns(whole, COLUMNS)
    of_part_view.copy_columns(own, COLUMNS)
    assert_same(view(few), 2 * of_part_view(few))
    assert whole.read_bytes() == own.read_bytes() and whole.held_bytes() == own.held_bytes()
    assert torch.equal(whole.column_norms(), own.column_norms()) and whole.kind() != own.kind()


def test_chosen_columns_stored_by_columns_sum_too() -> None:
    whole = SummedMatrix(part(), TwoAlike())
    stored = whole.in_form(by_columns)
    assert isinstance(stored, SummedMatrix) and type(stored.part) is ColumnMatrix and stored.reads_chosen_columns(1)
    x = torch.randn(1, 4)
    assert_same(stored.multiply_columns(x, COLUMNS), 2 * whole.part.multiply_columns(x, COLUMNS))


@pytest.mark.parametrize("make", [SummedMatrix, lambda one, ranks: JoinedMatrix(one, ranks, 96)])
def test_a_bias_that_is_set_is_that_of_the_part(make: Callable[..., Matrix]) -> None:
    own, x = part(), torch.zeros(1, 64)
    whole = make(own, TwoAlike())
    whole.bias = torch.ones(48)
    assert own.bias is whole.bias and torch.equal(own(x), torch.ones(1, 48))


def test_outputs_are_joined_up_to_the_rows_of_the_whole() -> None:
    own, x = part(), torch.randn(3, 64)
    assert torch.equal(JoinedMatrix(own, TwoAlike(), 95)(x), torch.cat([own(x), own(x)], dim=-1)[:, :95])


def test_tokens_of_other_ranks_are_zero_before_the_sum() -> None:
    for index, own in enumerate(([0, 1], [2, 3, 4])):               # the stretches of five tokens
        embedding = Embedding(len(own), 8)
        found = RankEmbedding(embedding, TwoAlike(index), 5)(torch.arange(5)[None])
        assert torch.equal(found[0, own], 2 * embedding.weight)
        assert not found[0, [token for token in range(5) if token not in own]].any()
