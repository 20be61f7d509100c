"""Packed weights: every product is that of the values they stand for, and a packed model is the plain one on them."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import MIXTRAL_TINY, SETTINGS, complete_checkpoint, generated, one_line_error
from safetensors.torch import load_file, save_file
from tiny_qwen_vl import complete_qwen, picture
from tolerance import assert_rounds_no_worse, assert_same, distance, rounding
from torch import Tensor

from models.cost_model import all_copy_bytes, bytes_per_token
from models.matrices import packed, products
from models.matrices.forms import ChosenColumns, ChosenRows
from models.matrices.packed import GroupedInt8Embedding, GroupedInt8Matrix, Int4Matrix, Int8Embedding, Int8Matrix
from models.matrices.plain import Matrix
from popengine.engine.engine import Engine
from popengine.engine.loading import load
from popengine.generate import main
from popengine.studies.settings import DENSE, PruningSettings
from weights.checkpoint import open_checkpoint
from weights.four_bit_layouts import Layout, borrow_evidence
from weights.gguf_blocks import BLOCKS, FOUR_BIT_TYPES, READERS
from weights.groups import Groups, group, transposed

ROOT = Path(__file__).resolve().parents[3]

# With packed products, and the last with unpacked values.
ROWS = (1, 2, 3, 9, 17, 40, 41)
KINDS = ("int8", "int4")
SHAPES = ((64, 64), (80, 96), (192, 128))
# Of eight bits: any.
ODD_SHAPES = ((37, 41), (5, 16), (64, 100))


def made(kind: str, out: int = 80, columns: int = 96, dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> Any:
    torch.manual_seed(0)
    weight, offset = torch.randn(out, columns) / columns**0.5, torch.randn(out).to(dtype) if bias else None
    if kind == "int8":
        return Int8Matrix.nearest(weight, dtype, offset)
    return Int4Matrix.of_groups(group(weight, 32), dtype, offset)


def assert_product(y: Tensor, x: Tensor, matrix: Matrix) -> None:
    bias = None if matrix.bias is None else matrix.bias.float()
    wanted = F.linear(x.float(), matrix.values().float(), bias)
    assert y.dtype == x.dtype and y.shape == wanted.shape
    # The sum is rounded, and what the row's scale makes of it; sums of 128 terms in float32, some 11 times.
    assert distance(y, wanted) <= (16 if x.dtype == torch.float32 else 2.02) * rounding(x.dtype)


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("kind", "out", "columns"),
    [*((kind, *shape) for kind in KINDS for shape in SHAPES), *(("int8", *shape) for shape in ODD_SHAPES)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_those_of_the_values(kind: str, out: int, columns: int, dtype: torch.dtype) -> None:
    for bias in (True, False):
        matrix = made(kind, out, columns, dtype, bias)
        for rows in ROWS:
            x = torch.randn(1, rows, columns).to(dtype)
            assert_product(matrix(x), x, matrix)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_products_are_those_of_the_values(kind: str) -> None:
    matrix = made(kind)
    product = torch.compile(lambda x: matrix(x), dynamic=False)
    for rows in (1, 3, 4):
        x = torch.randn(1, rows, 96).bfloat16()
        with torch.inference_mode():
            assert_product(product(x), x, matrix)


@pytest.mark.numeric
@pytest.mark.parametrize("kind", KINDS)
def test_unpacking_in_stretches_changes_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, x = made(kind, 192, 128), torch.randn(1, 41, 128).bfloat16()
    whole = matrix(x)
    monkeypatch.setattr(packed, "STRETCH", 1)
    assert_same(matrix(x), whole, roundings=4)              # each rounds its sum, and what a scale makes of it
    monkeypatch.undo()
    assert torch.equal(matrix(x), whole)


@pytest.mark.numeric
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("out", "columns"), SHAPES)
def test_copies_are_indices_into_the_whole(kind: str, out: int, columns: int) -> None:
    matrix = made(kind, out, columns)
    rows, chosen = torch.randperm(out)[: out // 2 + 3].sort().values, torch.randperm(columns)[:37].sort().values
    below, beside = matrix.empty_rows(len(rows)), matrix.empty_columns(len(chosen))
    below.copy_rows(matrix, rows)
    beside.copy_columns(matrix, chosen)
    assert torch.equal(below.values(), matrix.values()[rows]) and torch.equal(below.bias, matrix.bias[rows])
    assert torch.equal(beside.bias, matrix.bias) and isinstance(beside, Int8Matrix)
    wanted = matrix.values()[:, chosen]
    x = torch.randn(1, 1, 37).bfloat16()
    assert_product(beside(x), x, beside)
    if kind == "int8":
        assert torch.equal(beside.values(), wanted)
    else:           # four bits have become eight, with a scale per row, which comes from all columns of their groups
        exact = exact_values(matrix)
        step = 1.01 * exact.abs().amax(dim=1, keepdim=True) / 127
        assert ((exact_values(beside) - exact[:, chosen]).abs() <= 0.51 * step).all()


@pytest.mark.numeric
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("out", "columns"), SHAPES)
def test_a_copy_of_what_changed_is_a_whole_copy(kind: str, out: int, columns: int) -> None:
    """Four bits are copied whole; so is every scale."""
    matrix = made(kind, out, columns)
    places, changed = torch.randperm(min(out, columns)), torch.tensor([1, 4, 5])
    before, after = places[:9], places[:9].index_copy(0, changed, places[9:12])
    copies = matrix.empty_rows(9), matrix.empty_columns(9), matrix.empty_rows(9), matrix.empty_columns(9)
    for below, beside, given in ((copies[0], copies[1], [before, after]), (copies[2], copies[3], [after])):
        for number, chosen in enumerate(given):
            below.copy_rows(matrix, chosen, changed if number else None)
            beside.copy_columns(matrix, chosen, changed if number else None)
    assert torch.equal(copies[0].values(), copies[2].values()) and torch.equal(copies[1].values(), copies[3].values())
    assert torch.equal(copies[0].bias, copies[2].bias)


@pytest.mark.numeric
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outs", [(64, 64, 128), (80, 16, 40)], ids=["blocks", "parts"])
def test_stacked_matrices_are_one(kind: str, outs: tuple[int, ...]) -> None:
    parts = [made(kind, out) for out in outs]
    values = [part.values().clone() for part in parts]
    whole = type(parts[0]).stack(parts)
    assert torch.equal(whole.values(), torch.cat(values))
    assert all(torch.equal(part.values(), before) for part, before in zip(parts, values, strict=True))
    x = torch.randn(1, 3, 96).bfloat16()
    assert_same(whole(x), torch.cat([part(x) for part in parts], dim=-1), roundings=4)


@pytest.mark.numeric
@pytest.mark.parametrize("block", [64, 32])
@pytest.mark.parametrize("halves", [True, False])
def test_numbers_come_back_from_every_layout(block: int, halves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "layout", lambda: (block, halves))
    given = group(torch.randn(80, 96), 32)
    matrix = Int4Matrix.of_groups(given, torch.float32)
    assert torch.equal(matrix.numbers()[:, :80].t(), given.numbers)
    assert_same(matrix.values(), given.values())


def slow_values(matrix: Int4Matrix) -> Tensor:
    """The values of a matrix from its integers and groups, in float64 [out, in]."""
    groups = matrix.groups[:, : matrix.out_features].double()                       # [G, out, 2]
    numbers = matrix.numbers()[:, : matrix.out_features].double().unflatten(0, (len(groups), -1))   # [G, g, out]
    values = (numbers - 8) * groups[:, None, :, 0] + groups[:, None, :, 1]
    if isinstance(matrix, GroupedInt8Matrix):
        values = values[:, :16] + values[:, 16:] / 16
    return values.flatten(0, 1).t()


@pytest.mark.numeric
@pytest.mark.parametrize("block", [64, 32])
@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_many_rows_multiply_by_the_values_in_every_layout(
    block: int, halves: bool, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one stretch and in several, in the dtype of the activations and in float32."""
    monkeypatch.setattr(packed, "layout", lambda: (block, halves))
    for out in (5, 80, 200):
        for dtype in (torch.float32, torch.bfloat16):
            offset, x = torch.randn(out).to(dtype), torch.randn(1, 41, 256).to(dtype)
            matrix: Any = eight_bits(out, 256, size, dtype)[0] if size == 16 else Int4Matrix.of_groups(
                group(torch.randn(out, 256), size), dtype, offset
            )
            wanted = F.linear(x.double(), slow_values(matrix), None if matrix.bias is None else offset.double())
            for stretch in (1, 1 << 14, 1 << 20):
                for computed in (dtype, torch.float32):
                    monkeypatch.setattr(packed, "STRETCH", stretch)
                    monkeypatch.setattr(packed, "product_dtype", lambda x, computed=computed: computed)
                    y = matrix(x)
                    assert y.dtype == dtype and y.shape == (1, 41, out)
                    assert distance(y, wanted) <= (1e-5 if dtype == torch.float32 else 2.02 * rounding(dtype))


@pytest.mark.parametrize(("slow", "chosen"), [("bfloat16", torch.float32), ("float32", torch.bfloat16)])
def test_float32_multiplies_where_half_precision_is_slow(
    slow: str, chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "mm", lambda x, weight: time.sleep(0.02 * (x.dtype == getattr(torch, slow))))
    assert products.fast_dtype.__wrapped__(torch.bfloat16) == chosen
    assert products.product_dtype(torch.ones(1)) == torch.float32


@pytest.mark.numeric
@pytest.mark.parametrize("block", [64, 32])
@pytest.mark.parametrize("halves", [True, False])
def test_rows_are_copied_in_every_layout(block: int, halves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order, as POP puts candidates after retained rows, and in more than one stretch of columns."""
    monkeypatch.setattr(packed, "layout", lambda: (block, halves))
    monkeypatch.setattr(packed, "COPIED_AT_ONCE", 40)
    given, rows = group(torch.randn(176, 96), 32), torch.randperm(176)[:83]
    matrix = Int4Matrix.of_groups(given, torch.bfloat16, torch.randn(176))
    copy = matrix.empty_rows(len(rows))
    copy.copy_rows(matrix, rows)
    assert torch.equal(copy.numbers()[:, :83].t(), given.numbers[rows])
    assert torch.equal(copy.groups[:, :83], matrix.groups[:, rows]) and torch.equal(copy.bias, matrix.bias[rows])


def test_nearest_numbers_are_half_a_step_off_at_most() -> None:
    weight = torch.randn(40, 128)
    weight[3], weight[4, :32] = 0, 0.25
    eight = Int8Matrix.nearest(weight, torch.bfloat16)
    assert ((eight.weight * eight.scale[:, None].float() - weight).abs() <= 0.51 * eight.scale[:, None].float()).all()
    for size in (32, 64, 128):
        four = group(weight, size)
        step = four.scale.repeat_interleave(size, dim=1)
        assert ((four.values() - weight).abs() <= 0.6 * step + 0.01 * weight.abs()).all()
        # Products read scales in bfloat16, which must not lose anything more.
        rounded, exact = (Int4Matrix.of_groups(four, dtype).groups.float() for dtype in (torch.bfloat16, torch.float32))
        assert torch.equal(rounded, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_number_of_a_row_exceeds_127(dtype: torch.dtype) -> None:
    """Whatever a scale is rounded to: every mantissa of a row's largest value to 12 bits, and float16's smallest."""
    largest = torch.arange(1, 2, 1 / 4096).unsqueeze(1) * torch.tensor([127.0, 1.0, 1e-6])          # [4096, 3]
    weight = torch.stack([largest.flatten(), -largest.flatten(), largest.flatten() / 3], dim=1)
    made = Int8Matrix.nearest(weight, dtype)
    assert torch.equal(made.scale, (weight[:, 0] / 127).to(dtype))
    step = made.scale.double().clamp(min=1e-30).unsqueeze(1)
    wanted = (weight.double() / step).round().clamp(-127, 127)
    assert torch.equal(made.numbers().double(), wanted)


def test_rows_that_are_rounded_together_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight = torch.randn(100, 96)
    given = group(weight, 32)
    by_columns = Groups(*(one.t().contiguous().t() for one in (given.numbers, given.scale, given.minimum)))
    for part, values in ((weight, weight), (given, given.values()), (by_columns, given.values())):
        for at_once in (1, 7 * 96, 1 << 18):
            monkeypatch.setattr(packed, "QUANTISED_AT_ONCE", at_once)
            made = Int8Matrix.with_room(100, 96, torch.empty(0, dtype=torch.bfloat16), None)
            cuts = slice(0, 64), slice(64, 100)
            made.fill(part[cut] if isinstance(part, Tensor) else part.part(0, cut) for cut in cuts)
            scale = (values.abs().amax(dim=1) / 127).bfloat16()
            assert torch.equal(made.scale, scale)
            assert torch.equal(made.numbers().float(), (values / scale.float().unsqueeze(1)).round())


def test_groups_are_the_same_by_rows_and_by_columns() -> None:
    torch.manual_seed(0)
    given = group(torch.randn(83, 96), 32)
    by_columns = Groups(*(one.t().contiguous().t() for one in (given.numbers, given.scale, given.minimum)))
    assert not by_columns.numbers.is_contiguous() and by_columns.by_rows().numbers.is_contiguous()
    assert torch.equal(by_columns.values(), given.values()) and by_columns.values().is_contiguous()
    assert torch.equal(by_columns.part(0, slice(5, 20)).values(), given.values()[5:20])
    one, other = (Int4Matrix.of_groups(groups, torch.bfloat16) for groups in (given, by_columns))
    assert torch.equal(one.weight, other.weight) and torch.equal(one.groups, other.groups)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float32, torch.bfloat16])
def test_matrices_are_transposed_in_memory(dtype: torch.dtype) -> None:
    for shape in ((1, 1), (1, 9), (9, 1), (7, 13), (64, 100), (3, 32, 40), (1, 130, 48), (2, 3, 17, 33)):
        given = torch.randint(0, 100, shape).to(dtype)
        for x in (given, given.flip(-1), given.transpose(-1, -2).contiguous().transpose(-1, -2)):
            assert torch.equal(transposed(x), x.transpose(-1, -2)) and transposed(x).is_contiguous()


def test_packing_leaves_the_values_that_it_is_given_as_they_are() -> None:
    weight = torch.randn(40, 128)
    given = weight.clone()
    Int8Matrix.nearest(weight, torch.bfloat16)
    assert torch.equal(weight, given)


def test_bytes_are_what_a_product_reads() -> None:
    eight, four = made("int8", 80, 96), made("int4", 80, 96)
    assert eight.read_bytes() == 80 * 96 + 80 * 2 and eight.read_bytes(rows=7) == 7 * (96 + 2)
    assert eight.read_bytes(columns=10) == 80 * 10 + 80 * 2
    assert four.read_bytes() == 80 * (96 // 2 + 3 * 4) and four.read_bytes(columns=10) == 80 * (10 + 2)


def eight_bits(out: int, columns: int, size: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Tensor]:
    """A matrix of eight bits in groups, as Q8_0 (32) and Q6_K (16) have them, and its values. float32 [out, in]"""
    torch.manual_seed(0)
    bits = 8 if size == 32 else 6
    numbers = torch.randint(0, 2**bits, (out, columns), dtype=torch.uint8)
    scale = (torch.rand(out, columns // size) - 0.5) / 50
    given = Groups(numbers, scale, -(2 ** (bits - 1)) * scale)
    return GroupedInt8Matrix.of_stretches(out, columns, torch.empty(0, dtype=dtype), [given]), given.values()


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.006), (torch.float32, 1e-5)])
def test_eight_bits_in_groups_multiply_copy_and_stack(size: int, dtype: torch.dtype, bound: float) -> None:
    """Rounding a scale, and a result, to the 8 bits of bfloat16 costs 2^-9 each at most; float32 costs nothing."""
    matrix, values = eight_bits(80, 96, size, dtype)
    for rows in ROWS:
        x = torch.randn(1, rows, 96).to(dtype)
        wanted = F.linear(x.float(), values)
        assert (matrix(x).float() - wanted).norm() / wanted.norm() < bound
    rows, columns = torch.randperm(80)[:37], torch.randperm(96)[:41]
    below, beside = matrix.empty_rows(len(rows)), matrix.empty_columns(len(columns))
    below.copy_rows(matrix, rows)
    beside.copy_columns(matrix, columns)
    assert torch.equal(below.values(), matrix.values()[rows])
    wanted = matrix.values()[:, columns].float()
    step = wanted.abs().amax(dim=1, keepdim=True) / 127
    assert ((exact_values(beside) - wanted).abs() <= 0.52 * step).all()
    other = eight_bits(48, 96, size, dtype)[0]
    before = matrix.values(), other.values()
    assert torch.equal(GroupedInt8Matrix.stack([matrix, other]).values(), torch.cat(before))
    torch.testing.assert_close(matrix.column_norms(), torch.linalg.vector_norm(values, dim=0), atol=0, rtol=0.006)
    tokens = torch.tensor([[3, 0], [79, 3]])
    assert torch.equal(GroupedInt8Embedding(matrix)(tokens), matrix.values()[tokens])


def test_an_embedding_looks_up_rows() -> None:
    matrix, tokens = made("int8"), torch.tensor([[3, 0], [79, 3]])
    assert torch.equal(Int8Embedding(matrix)(tokens), matrix.values()[tokens])


@pytest.mark.parametrize("kind", READERS)
def test_blocks_of_gguf_files_are_read_as_gguf_dequantises_them(kind: str) -> None:
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    assert BLOCKS[kind] == (block, size)
    random = np.random.default_rng(0)
    raw = random.integers(0, 256, (18, size), dtype=np.uint8)
    # Scales in half precision stand first, but for Q6_K's. Random bytes would be infinities among them.
    some = random.random((18, 2)) - 0.5
    if kind == "Q6_K":
        raw[:, -2:] = some[:, :1].astype(np.float16).view(np.uint8)
    else:
        raw[:, :4 if kind in ("Q4_1", "Q4_K", "Q5_1", "Q5_K") else 2] = (
            some if kind in ("Q4_1", "Q4_K", "Q5_1", "Q5_K") else some[:, :1]
        ).astype(np.float16).view(np.uint8)
    groups = READERS[kind](torch.from_numpy(raw.flatten()), 6)
    assert torch.equal(groups.values(), torch.from_numpy(gguf.dequantize(raw.reshape(6, -1), number)))
    assert (groups.numbers.max() < 16) == (kind in FOUR_BIT_TYPES)
    one = torch.cat([torch.zeros(3, dtype=torch.uint8), torch.from_numpy(raw[0])])[3:]      # at an odd address
    assert torch.equal(READERS[kind](one, 1).values()[0], groups.values().flatten()[:block])


# Models


STRONG, USUAL = PruningSettings.paper(ffn_ratio=0.7), PruningSettings.paper(ffn_ratio=0.4)
WIDE = PruningSettings.paper(ffn_ratio=0.26, candidate_width=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return complete_checkpoint(tmp_path_factory.mktemp("packed"), hidden_size=64, intermediate_size=96)


def exact_values(matrix: Any) -> Tensor:
    """What a packed matrix stands for, not rounded to half precision. float32 [out, in]"""
    if isinstance(matrix, Int8Matrix):
        return matrix.numbers().float() * matrix.scale.float()[:, None]
    exact = Int4Matrix.packed(matrix.weight, matrix.groups.float(), matrix.out_features, None)
    return exact.values()


def made_plain(engine: Engine, like: Engine) -> Engine:
    """`engine` with the values that the packed matrices of `like` stand for."""
    modules = dict(engine.model.named_modules())
    for name, matrix in like.model.named_modules():
        if isinstance(matrix, Int8Matrix | Int4Matrix):
            modules[name].weight.data.copy_(exact_values(matrix))
    if isinstance(like.model.model.embed_tokens, Int8Embedding):
        engine.model.model.embed_tokens.weight.data.copy_(exact_values(like.model.lm_head))
    return engine


@pytest.mark.parametrize("checkpoint", ["llama", "mixtral"])
def test_a_model_of_int8_is_the_plain_one_on_its_values(folder: Path, checkpoint: str) -> None:
    """In float32, where products of many rows and of few unpack alike, whatever is pruned."""
    path = folder if checkpoint == "llama" else MIXTRAL_TINY
    int8 = load(path, weights="int8", dtype="float32")
    plain = made_plain(load(path, weights="plain", dtype="float32"), int8)
    prompts = [list(range(5, 35)), list(range(40, 52))]
    kinds = SETTINGS | {"dense": DENSE, "skipped": PruningSettings.paper(0.3, prefill_skip=0.5, prior=8)}
    for name, settings in kinds.items():
        for own in (prompts[:1], prompts):
            assert generated(int8, own, 12, settings) == generated(plain, own, 12, settings), name


@pytest.mark.parametrize("form", KINDS)
def test_copies_are_made_where_they_save_enough_and_bytes_are_those_that_a_step_reads(folder: Path, form: str) -> None:
    """A copy of most columns of four bits saves little, because it has eight, and one of nearly all channels too."""
    engine, packed_down = load(folder, weights=form), (Int8Matrix, ChosenColumns)[form == "int4"]
    dense = bytes_per_token(engine.model, engine.resolve(DENSE))
    kinds = (STRONG, form, Int8Matrix), (USUAL, form, packed_down), (WIDE, "whole", ChosenColumns)
    for settings, rows, down in kinds:
        pruning = engine.resolve(settings)
        state = engine.model.new_state(1, 40, pruning)
        saved = 0
        for layer, one in zip(engine.model.model.layers, state.layers, strict=True):
            assert isinstance(one.ffn.gate, ChosenRows) == (rows == "whole") and type(one.ffn.down) is down
            for name in ("gate", "up", "down"):
                whole, used = getattr(layer.mlp, f"{name}_proj"), getattr(one.ffn, name)
                saved += whole.read_bytes() - getattr(used, "whole", used).read_bytes()
            assert (one.ffn.copied_bytes() == 0) == (rows == "whole")
        read = bytes_per_token(engine.model, pruning, 1, state)
        assert dense - read == saved and (saved == 0) == (rows == "whole")
        copied = all_copy_bytes(engine.model, pruning)
        held = sum(one.ffn.weights.held_bytes() for one in state.layers)
        assert copied <= held <= copied + len(state.layers) * 64 * 100 * 2      # rows and columns are padded


@pytest.mark.slow
def test_compiled_steps_without_copies_serve_every_prompt(folder: Path, short_calls: None) -> None:
    engine = load(folder, weights="int4", compile=True)
    prompts = [torch.randint(0, 256, (20,), generator=torch.Generator().manual_seed(seed)).tolist() for seed in (0, 1)]
    first, other, again = (generated(engine, [prompt], 12, WIDE) for prompt in (*prompts, prompts[0]))
    assert first == again != other


@pytest.mark.numeric
@pytest.mark.parametrize("form", KINDS)
def test_a_packed_model_is_as_exact_as_a_plain_one_in_bfloat16(folder: Path, form: str) -> None:
    """Both beside the same values in float32: what is more is the packed products' and copies' own."""
    engine = load(folder, weights=form)
    assert engine.dtype == torch.bfloat16
    others = [made_plain(load(folder, weights="plain", dtype=dtype), engine) for dtype in ("float32", "bfloat16")]
    for settings in (DENSE, PruningSettings.paper(ffn_ratio=0.4, prefill="dense"), USUAL, STRONG, WIDE):
        together: list[list[Tensor]] = [[], [], []]         # over prompts: of one, either may come out the better
        for seed in range(12):
            tokens = torch.randint(0, 256, (1, 30), generator=torch.Generator().manual_seed(seed))
            logits = []
            for one in (engine, *others):
                with torch.inference_mode():
                    state = one.model.new_state(1, 40, one.resolve(settings))
                    found = [one.model.prefill(one.model.embed(tokens), state)]
                    found += [one.model.decode(torch.tensor([token]), state) for token in (7, 8)]
                    logits.append(torch.stack(found).float())
            for place, one in enumerate(logits):
                together[place].append(one)
        ours, exact, half = map(torch.stack, together)
        assert_rounds_no_worse(ours, half, exact)


def test_the_default_file_stays_packed_and_equals_its_own_numbers(default_gguf: Path) -> None:
    engine = load(default_gguf)
    assert engine.weights == "Q8_0 as int8, Q4_1 as int4" and engine.dtype == torch.bfloat16
    assert load(default_gguf, dtype="float32").weights == "plain"
    with open_checkpoint(default_gguf) as checkpoint:
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj"):
            matrix = engine.model.model.layers[7].get_submodule(name)
            stored = checkpoint.read(f"model.layers.7.{name}.weight")
            assert isinstance(matrix, Int4Matrix)
            assert (matrix.values() - stored).norm() / stored.norm() < 0.006
        stored = checkpoint.read("model.embed_tokens.weight")
        assert (engine.model.lm_head.values() - stored).norm() / stored.norm() < 0.012


# GPTQ and AWQ, written out number by number


def written(numbers: Tensor, groups: Groups, method: str, borrows: bool = False) -> dict[str, Tensor]:
    """A matrix in the layout of a method. numbers [out, in]; zeros are whole: minimum = -scale * zero

    borrows  GPTQ's zeros less one as GPTQModel writes them, else each four bits for itself
    """
    zeros = (-groups.minimum / groups.scale).round().int().t()                      # [G, out]
    order = range(8) if method == "gptq" else (0, 2, 4, 6, 1, 3, 5, 7)

    def joined(eights: Tensor, order: Any) -> Tensor:
        words = torch.zeros(eights.shape[:-1], dtype=torch.int64)
        for place, index in enumerate(order):
            words |= eights[..., index].long() << (4 * place)
        return torch.where(words >= 2**31, words - 2**32, words).int()

    if method == "gptq":
        zeros = zeros if borrows else (zeros - 1) & 15
        qweight = joined(numbers.t().reshape(-1, 8, len(numbers)).transpose(1, 2), order)       # [in / 8, out]
    else:
        qweight = joined(numbers.t().reshape(numbers.shape[1], -1, 8), order)       # [in, out / 8]
    found = {"qweight": qweight, "qzeros": joined(zeros.reshape(len(zeros), -1, 8), order),
             "scales": groups.scale.t().half()}
    if borrows:
        less = (found["qzeros"].long() - 0x11111111) % 2**32
        found["qzeros"] = torch.where(less >= 2**31, less - 2**32, less).int()
    if method == "gptq":
        found["g_idx"] = torch.arange(numbers.shape[1], dtype=torch.int32) // groups.size
    return {key: tensor.contiguous() for key, tensor in found.items()}


def quantised(
    folder: Path, source: Path, method: str, size: int = 32, borrows: bool = False, **changes: Any
) -> dict[str, Tensor]:
    """A checkpoint of `source` in the layout of a method; returns the values of its matrices."""
    generator, values = torch.Generator().manual_seed(0), {}
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight") and "visual" not in name]:
        out, columns = tensors.pop(name).shape
        scale = (torch.rand(out, columns // size, generator=generator) * 0.05 + 0.01).half().float()
        zeros = torch.randint(0, 16, scale.shape, generator=generator)
        # Weights of some groups have one sign (those with a zero of 0 or 15), others lie around 0.
        spread = torch.randn(out, columns, generator=generator) * 3 + zeros.repeat_interleave(size, dim=1)
        numbers = spread.round().clamp(0, 15).to(torch.uint8)
        groups = Groups(numbers, scale, -scale * zeros)
        values[name] = groups.values()
        tensors |= {
            f"{name.removesuffix('weight')}{key}": part
            for key, part in written(numbers, groups, method, borrows).items()
        }
    about = {"quant_method": method, "bits": 4, "group_size": size} | changes
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": about}
    for file in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        if (source / file).exists():
            (folder / file).write_bytes((source / file).read_bytes())
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return values


@pytest.mark.parametrize(("method", "borrows"), [("gptq", False), ("gptq", True), ("awq", False)])
def test_gptq_and_awq_are_read_number_by_number(tmp_path: Path, folder: Path, method: str, borrows: bool) -> None:
    values = quantised(tmp_path, folder, method, borrows=borrows)
    plain, four = load(tmp_path, weights="plain", dtype="float32"), load(tmp_path)
    assert four.weights == f"{method.upper()} as int4"
    for name, wanted in values.items():
        module = name.removesuffix(".weight")
        assert torch.equal(plain.model.get_submodule(module).weight, wanted)
        matrix = four.model.get_submodule(module)
        assert isinstance(matrix, Int4Matrix)
        assert (matrix.values() - wanted).norm() / wanted.norm() < 0.01             # of terms rounded to 8 bits
    assert isinstance(four.generate("Hello", max_new_tokens=3)[0].text, str)


@pytest.mark.parametrize("borrows", [False, True])
def test_zeros_of_0_are_told_from_those_that_borrow(borrows: bool) -> None:
    """By numbers that min-max quantisation makes of normal weights, some groups of one sign; without any there is no
    difference."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    for one_sign in (True, False):
        if one_sign:
            weight.unflatten(1, (-1, 32))[::5].abs_()
        groups = weight.unflatten(1, (-1, 32))
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = ((high - low) / 15).half().float()
        zeros = (-low / scale).round()
        zeros = zeros if one_sign else zeros.clamp(1, 15)
        numbers = (groups / scale[..., None] + zeros[..., None]).round().clamp(0, 15).to(torch.uint8).flatten(1)
        given = Groups(numbers, scale, -scale * zeros)
        stored = written(numbers, given, "gptq", borrows)
        evidence = borrow_evidence(stored["qweight"], stored["qzeros"])
        assert (evidence > 0) == (borrows and one_sign) and (evidence < 0) == (not borrows and one_sign)
        read = Layout("gptq", less_one=True, borrows=evidence > 0).groups(
            stored["qweight"], stored["qzeros"], stored["scales"]
        )
        assert torch.equal(read.values(), given.values())
        weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(4))


def test_biases_of_zeros_beside_four_bits_are_left_out(tmp_path: Path, folder: Path, capsys: Any) -> None:
    quantised(tmp_path, folder, "gptq")
    tensors, name = load_file(tmp_path / "model.safetensors"), "model.layers.0.mlp.up_proj"
    wanted = load(tmp_path).generate("Hello", max_new_tokens=5)[0].text
    bias = torch.zeros(tensors[f"{name}.scales"].shape[1]).half()
    save_file(tensors | {f"{name}.bias": bias}, tmp_path / "model.safetensors")
    assert load(tmp_path).generate("Hello", max_new_tokens=5)[0].text == wanted
    bias[3] = 0.5
    save_file(tensors | {f"{name}.bias": bias}, tmp_path / "model.safetensors")
    assert f"1 unexpected: {name}.bias" in one_line_error(main, capsys, "--ckpt", tmp_path, "--prompt", "Hi")


def test_four_bits_beside_a_vision_tower(tmp_path: Path) -> None:
    """As Qwen2.5-VL is released by AWQ: the tower stays as it is."""
    source, folder = complete_qwen(tmp_path / "plain", "qwen2.5"), tmp_path / "awq"
    folder.mkdir()
    values = quantised(folder, source, "awq")
    four = load(folder)
    assert four.weights == "AWQ as int4"
    name, wanted = next(iter(values.items()))
    matrix = four.model.get_submodule(name.replace("language_model.", "").removesuffix(".weight"))
    assert (matrix.values() - wanted).norm() / wanted.norm() < 0.01
    answer = four.generate("Hello", images=[picture(24, 16)], max_new_tokens=3)[0]
    assert answer.statistics.image_tokens == 6


def test_what_cannot_be_read_exactly_is_refused(tmp_path: Path, folder: Path, capsys: Any) -> None:
    def refused(**changes: Any) -> str:
        quantised(tmp_path, folder, "gptq", **changes)
        return one_line_error(main, capsys, "--ckpt", tmp_path, "--prompt", "Hi")

    assert "quantised to 8 bits by gptq; only 4 are read" in refused(bits=8)
    assert "is quantised ('bitsandbytes')" in refused(quant_method="bitsandbytes")
    assert "the AWQ layout 'gemv'" in refused(quant_method="awq", version="gemv")
    assert "group_size is '32', not a number of columns" in refused(group_size="32")
    error = refused(group_size=64)
    assert "has group_size 64, but model.layers." in error and error.endswith("that is groups of 32\n")
    assert "has group_size -1, but model.layers." in refused(group_size=-1)
    quantised(tmp_path, folder, "gptq")
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    save_file(tensors | {f"{name}.g_idx": tensors[f"{name}.g_idx"].flip(0)}, tmp_path / "model.safetensors")
    assert "desc_act" in one_line_error(main, capsys, "--ckpt", tmp_path, "--prompt", "Hi")
    save_file(tensors | {f"{name}.scales": tensors[f"{name}.scales"][:, 1:].clone()}, tmp_path / "model.safetensors")
    assert "do not fit each other" in one_line_error(main, capsys, "--ckpt", tmp_path, "--prompt", "Hi")
    save_file(tensors | {f"{name}.weight": torch.zeros(96, 64)}, tmp_path / "model.safetensors")
    error = one_line_error(main, capsys, "--ckpt", tmp_path, "--prompt", "Hi")
    assert f"holds both {name}.weight and {name}.qweight" in error
    del tensors[f"{name}.qzeros"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert f"{name} lacks one of qweight" in one_line_error(main, capsys, "--ckpt", tmp_path, "--prompt", "Hi")


def test_bad_forms_end_in_one_line(tmp_path: Path, folder: Path, capsys: Any) -> None:
    error = one_line_error(main, capsys, "--ckpt", folder, "--prompt", "Hi", "--weights", "int3")
    assert "weights must be one of auto, plain, int8, int4, not 'int3'" in error
    complete_checkpoint(tmp_path)                                                   # of hidden size 48
    error = one_line_error(main, capsys, "--ckpt", tmp_path, "--prompt", "Hi", "--weights", "int4")
    assert "has 48 columns, which groups of 32 do not divide: use weights int8" in error


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux")
def test_the_default_run_takes_little_memory_beside_torch(default_gguf: Path) -> None:
    """As `make run`: loading, a prompt of 170 tokens, steps. In a process of its own: 180 to 225 MB were measured.

    The least of three runs: what of the file and of PyTorch's own code lies in memory is up to the system, and moves it
    by 50 MB.
    """
    script = (
        "import re, torch; peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        f"before = peak(); import popengine; engine = popengine.load({str(default_gguf)!r})\n"
        f"prompt = open({str(ROOT / 'popengine' / 'demo_note.txt')!r}).read()\n"
        "engine.generate(prompt, max_new_tokens=3, pruning=popengine.PruningSettings.paper(candidate_width=0.5))\n"
        "print(peak() - before)"
    )
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
        if int(run.stdout) < 240_000:
            return
    raise AssertionError(f"{run.stdout.strip()} kB")
