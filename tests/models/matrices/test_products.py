"""The products of a step: each way of computing one gives the plain product."""

import pytest
import torch

from models.matrices.products import (
    COLUMNS_AT_ONCE,
    STREAMS,
    add_up_columns,
    best_places,
    fused_gemv,
    fused_gemv_rows,
    keep_best,
    places,
    row_streams,
)


@pytest.mark.parametrize("rows", [1, 7, 511, 512, 516, 1026, 1536, 5347])
def test_streams_cover_every_row_once_and_are_of_one_length_but_for_a_rest(rows: int) -> None:
    parts = row_streams(rows)
    lengths = [part.stop - part.start for part in parts]
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(rows))
    if rows < 512:
        assert lengths == [rows]
    else:
        assert lengths[:STREAMS] == [rows // STREAMS] * STREAMS
        assert lengths[STREAMS:] == [rows % STREAMS] * (rows % STREAMS > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("rows", "columns"), [(96, 40), (1536, 64), (1029, 24)])
def test_a_written_out_product_is_the_product(rows: int, columns: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(rows, columns, generator=generator) * 20).to(dtype)
    x = torch.randn(1, 1, columns, generator=generator)
    # A float32 sum of n products is off by at most n roundings of the sum of their sizes.
    bound = columns * torch.finfo(torch.float32).eps * (weight.double().abs() @ x.double().abs().flatten())
    exact = weight.double() @ x.double().flatten()                                  # [out]
    assert (fused_gemv(x, weight).flatten().double() - exact).abs().le(bound).all()
    which = torch.randperm(rows, generator=generator)[: rows // 2].sort().values
    chosen = fused_gemv_rows(x, weight, which).flatten().double()
    assert (chosen - exact[which]).abs().le(bound[which]).all()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 3, COLUMNS_AT_ONCE, COLUMNS_AT_ONCE + 1, 5 * COLUMNS_AT_ONCE + 7])
@torch.inference_mode()
def test_columns_added_up_in_stretches_are_the_product(count: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    columns, factors = torch.randn(2000, 24, generator=generator), torch.randn(count, generator=generator)
    which = torch.randperm(2000, generator=generator)[:count]
    found = add_up_columns(columns, which, factors, threads).double()
    exact = factors.double() @ columns.double()[which]
    bound = count * torch.finfo(torch.float32).eps * (factors.double().abs() @ columns.double()[which].abs())
    assert (found - exact).abs().le(bound).all()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@torch.inference_mode()
def test_the_best_places_are_those_of_the_highest_scores_and_of_equal_ones_the_earlier(compiled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    few = torch.randint(0, 4, (300,), generator=generator).float()                  # most scores are equal
    close = 1 + torch.randint(0, 40, (300,), generator=generator) * torch.finfo(torch.float32).eps
    far = torch.randn(300, generator=generator).abs() * 10.0 ** torch.arange(-30, 30).repeat(5)
    far[7], far[9] = torch.inf, 1e-45
    of = torch.compile(best_places, dynamic=False) if compiled else best_places
    for scores in (few, close, far, torch.zeros(300)):
        for count in (1, 150, 299, 300):
            wanted = scores.double().sort(descending=True, stable=True).indices[:count].sort().values
            assert torch.equal(of(scores, count).sort().values, wanted)
            assert torch.equal(places(keep_best(scores, count), count), wanted)
