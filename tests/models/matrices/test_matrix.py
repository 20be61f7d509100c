"""Matrices: every way of multiplying is the same product, and a compact copy is an index into the whole."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_same, distance, rounding
from torch import Tensor, nn

from models.matrices.forms import ChosenColumns, ChosenRows, ColumnMatrix
from models.matrices.plain import Matrix, replace_matrices

OUT, IN = 40, 64
ROWS = (1, 2, 3, 4, 8, 16, 40)
DTYPES = (torch.float32, torch.bfloat16)
KINDS = (Matrix, ColumnMatrix)


def made(kind: type[Matrix], dtype: torch.dtype = torch.float32, bias: bool = True, out: int = OUT) -> Matrix:
    torch.manual_seed(0)
    weight = (torch.randn(out, IN) / IN**0.5).to(dtype)
    matrix = Matrix.of(weight, torch.randn(out).to(dtype) if bias else None)
    return matrix if kind is Matrix else ColumnMatrix.from_rows(matrix)


def rows_of(count: int, dtype: torch.dtype, width: int = IN) -> Tensor:
    """x of so many rows, as a batch of two where they are even."""
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(count)).to(dtype)
    return x.unflatten(0, (2, -1)) if count % 2 == 0 else x[None]


def assert_product(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """y is x times the weight: exactly in float32, in bfloat16 as nearly as the result can be written."""
    wanted = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    assert y.dtype == x.dtype and y.shape == wanted.shape
    if x.dtype == torch.float32:
        assert_same(y, wanted)
    else:
        assert distance(y, wanted) <= 1.01 * rounding(x.dtype)          # of the result, and little before that


@pytest.mark.numeric
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_a_product_is_that_of_linear(kind: type[Matrix], rows: int, dtype: torch.dtype, bias: bool) -> None:
    matrix, reference = made(kind, dtype, bias), made(Matrix, dtype, bias)
    x = rows_of(rows, dtype)
    assert_product(matrix(x), x, reference.weight, reference.bias)


@pytest.mark.parametrize(("dtype", "bias"), [
    (torch.bfloat16, True), pytest.param(torch.float32, False, marks=pytest.mark.slow),
])
def test_a_compiled_product_is_that_of_linear(dtype: torch.dtype, bias: bool) -> None:
    matrix = made(Matrix, dtype, bias)
    xs = [rows_of(rows, dtype) for rows in ROWS]
    products = torch.compile(lambda inputs: [matrix(x) for x in inputs], dynamic=False, fullgraph=True)
    with torch.inference_mode():
        for x, y in zip(xs, products(xs), strict=True):
            assert_product(y, x, matrix.weight, matrix.bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_a_product_with_chosen_columns_reads_no_others(kind: type[Matrix], dtype: torch.dtype, bias: bool) -> None:
    matrix, reference = made(kind, dtype, bias), made(Matrix, dtype, bias)
    columns = torch.tensor([5, 2, 63, 40, 7, 0])
    x = rows_of(1, dtype)
    others = torch.ones(IN, dtype=torch.bool).index_fill(0, columns, False)
    matrix.weight[:, others] = torch.nan
    y = matrix.multiply_columns(x[..., columns], columns)
    assert_product(y, x[..., columns], reference.weight[:, columns], reference.bias)
    assert matrix.reads_chosen_columns(1) == (kind is ColumnMatrix)
    assert not matrix.reads_chosen_columns(2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_a_product_with_chosen_rows_reads_no_others(dtype: torch.dtype, bias: bool) -> None:
    matrix, reference = made(Matrix, dtype, bias), made(Matrix, dtype, bias)
    rows = torch.tensor([7, 3, 39, 0])
    x = rows_of(1, dtype)
    matrix.weight[torch.ones(len(matrix.weight), dtype=torch.bool).index_fill(0, rows, False)] = torch.nan
    chosen = None if reference.bias is None else reference.bias[rows]
    assert_product(matrix.multiply_rows(x, rows), x, reference.weight[rows], chosen)
    assert matrix.reads_chosen_rows(1) and not matrix.reads_chosen_rows(2)


@pytest.mark.parametrize(
    ("kind", "dtype"), [*itertools.product(KINDS, DTYPES), (Matrix, torch.float16)]
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_copies_are_indices_into_the_whole(kind: type[Matrix], dtype: torch.dtype, bias: bool) -> None:
    matrix = made(kind, dtype, bias)
    rows, columns = torch.tensor([7, 3, 39, 0]), torch.tensor([1, 63, 30, 2, 5])
    below = matrix.empty_rows(len(rows))
    below.copy_rows(matrix, rows)
    beside = matrix.empty_columns(len(columns))
    beside.copy_columns(matrix, columns)
    assert type(below) is type(beside) is kind
    assert torch.equal(below.weight, matrix.weight[rows])
    assert torch.equal(beside.weight, matrix.weight[:, columns])
    for copy in (below, beside):            # in the layout of the whole, and the whole as it was
        assert (copy.weight.stride(0) == 1) == (kind is ColumnMatrix)
        assert (copy.out_features, copy.in_features) == copy.weight.shape
    assert torch.equal(matrix.weight, made(Matrix, dtype, bias).weight)
    if bias:
        assert torch.equal(below.bias, matrix.bias[rows])
        assert torch.equal(beside.bias, matrix.bias)
    else:
        assert below.bias is None and beside.bias is None


@pytest.mark.parametrize("size", [IN, IN - 8, IN - 1], ids=["words", "part", "odd"])
@pytest.mark.parametrize(
    ("kind", "dtype"), [*itertools.product(KINDS, DTYPES), (Matrix, torch.float16)]
)
def test_a_copy_of_what_changed_writes_nothing_else(kind: type[Matrix], dtype: torch.dtype, size: int) -> None:
    matrix = made(kind, dtype, bias=True)
    matrix = type(matrix).of(matrix.weight[:, :size], matrix.bias)
    before, after = torch.tensor([7, 3, 39, 0]), torch.tensor([7, 5, 39, 2])
    changed, stays = torch.tensor([1, 3]), torch.tensor([0, 2])
    below, beside = matrix.empty_rows(4), matrix.empty_columns(4)
    below.copy_rows(matrix, before)
    beside.copy_columns(matrix, before)
    below.weight[stays], beside.weight[:, stays] = 7.0, 7.0
    below.copy_rows(matrix, after, changed)
    beside.copy_columns(matrix, after, changed)
    assert torch.equal(below.weight[changed], matrix.weight[after[changed]])
    assert torch.equal(beside.weight[:, changed], matrix.weight[:, after[changed]])
    assert bool((below.weight[stays] == 7).all()) and bool((beside.weight[:, stays] == 7).all())
    assert torch.equal(below.bias, matrix.bias[after]) and torch.equal(beside.bias, matrix.bias)


@pytest.mark.numeric
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_are_those_of_the_columns_and_rows(kind: type[Matrix], dtype: torch.dtype) -> None:
    matrix, values = made(kind, dtype), made(Matrix, dtype).weight.double()
    for norms, dim in ((matrix.column_norms(), 0), (matrix.row_norms(), 1)):
        assert norms.dtype == torch.float32
        assert_same(norms, values.square().sum(dim=dim).sqrt().float())
    assert torch.equal(matrix.values().double(), values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_are_those_of_the_weight(kind: type[Matrix], dtype: torch.dtype, size: int) -> None:
    matrix = made(kind, dtype)
    assert matrix.read_bytes() == OUT * IN * size
    assert matrix.read_bytes(rows=3) == 3 * IN * size
    assert matrix.read_bytes(columns=5) == OUT * 5 * size
    assert matrix.read_bytes(rows=3, columns=5) == 15 * size
    assert matrix.read_bytes(rows=0) == 0
    assert Matrix.of(matrix.weight, matrix.bias).held_bytes() == (OUT * IN + OUT) * size


@pytest.mark.numeric
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_chosen_rows_and_columns_equal_compact_copies(kind: type[Matrix], rows: int, bias: bool) -> None:
    matrix, chosen = made(kind, bias=bias), torch.tensor([7, 3, 39, 0, 12])
    pairs = [
        (ChosenRows(matrix, len(chosen)), matrix.empty_rows(len(chosen)), "copy_rows", IN),
        (ChosenColumns(matrix, len(chosen)), matrix.empty_columns(len(chosen)), "copy_columns", len(chosen)),
    ]
    for looked_up, copy, become, width in pairs:
        x = rows_of(rows, torch.float32, width)
        for one in (looked_up, copy):
            getattr(one, become)(matrix, chosen)
        assert_same(looked_up(x), copy(x))
        assert looked_up.held_bytes() == 0


@pytest.mark.numeric
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_stacked_matrices_are_parts_of_one_and_stay_what_they_were(kind: type[Matrix], bias: bool) -> None:
    parts, references = ([made(one, bias=bias, out=out) for out in (8, 4, 4)] for one in (kind, Matrix))
    whole, x = type(parts[0]).stack(parts), rows_of(3, torch.float32)
    assert type(whole) is kind
    assert_same(whole(x), torch.cat([one(x) for one in references], dim=-1))
    for part, reference in zip(parts, references, strict=True):
        assert torch.equal(part.weight, reference.weight)
        assert part.weight.untyped_storage().data_ptr() == whole.weight.untyped_storage().data_ptr()


def test_a_model_takes_another_kind_of_matrix_and_shared_parameters_stay_shared() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(OUT, IN), "inner": nn.ModuleList([Matrix(IN, OUT, bias=False)])})
    matrix = model["inner"][0]
    matrix.weight = model["embed"].weight.requires_grad_(False)
    values = matrix.weight.clone()
    replace_matrices(model, ColumnMatrix.from_rows)
    replaced = model["inner"][0]
    assert type(replaced) is ColumnMatrix and replaced.weight.stride(0) == 1
    assert replaced.weight is model["embed"].weight
    assert torch.equal(replaced.weight, values)
    assert set(model.state_dict()) == {"embed.weight", "inner.0.weight"}


def test_columns_without_a_copy_add_a_bias_that_is_set_later() -> None:
    """As FLAP sets one in place of pruned channels: in place of a bias of the whole matrix, it would be lost."""
    whole = Matrix.of(torch.randn(5, 7), torch.randn(5))
    columns, x = torch.tensor([1, 4, 6]), torch.randn(2, 3)
    chosen = ChosenColumns(whole, len(columns))
    chosen.copy_columns(whole, columns)
    assert_same(chosen(x), x @ whole.weight[:, columns].t() + whole.bias)
    chosen.bias = torch.arange(5.0)
    assert_same(chosen(x), x @ whole.weight[:, columns].t() + whole.bias + torch.arange(5.0))
