"""Input sparsity (TEAL, WINA): its products, whole models beside slow ones, bytes, and what it refuses."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import slow_masked
import torch
import torch.nn.functional as F
from builders import (
    MIXTRAL,
    MODELS,
    QWEN2_MOE,
    SIZES,
    complete_checkpoint,
    exit_status,
    left_padded,
    one_line_error,
    prefilled,
    resolved,
    saved_pair,
    stored_by_columns,
)
from slow_masked import in_model_order, masked_decode
from slow_pop import slow_order
from tolerance import assert_same
from torch import Tensor
from transformers import LlamaConfig

from models.cost_model import all_copy_bytes, bytes_per_token, cache_bytes
from models.feed_forward import FeedForward
from models.llama import LlamaForCausalLM
from models.matrices.forms import ChosenRows, ColumnMatrix, MixedMatrix, RowMatrix
from models.matrices.packed import Int4Matrix, Int8Matrix
from models.matrices.plain import Matrix, replace_matrices
from popengine import compare, generate, score
from popengine.engine.loading import load
from popengine.engine.memory_plan import state_within
from popengine.evaluation.comparison import configurations
from popengine.studies.by_name import Request, pruning_for
from popengine.studies.input_shares import KINDS, USUAL_INPUTS, InputShares, read_input_shares
from popengine.studies.input_sparsity import ChosenInputs
from popengine.studies.known_text import evaluate
from popengine.studies.settings import DENSE, INPUT_METHODS, PruningSettings
from weights.errors import InputError
from weights.groups import group

POPPED = {"prune_ratio": None, "ffn_ratio": 0.4, "candidate_width": 0.3}
FAMILIES = MODELS | {"mixtral": MIXTRAL, "qwen2_moe": QWEN2_MOE}


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    """In float64, where no rounding moves a score past another."""
    return saved_pair(tmp_path_factory.mktemp(request.param), FAMILIES[request.param])[1].double()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return saved_pair(tmp_path_factory.mktemp("llama"), LlamaConfig(**SIZES))[1].double()


@pytest.fixture(scope="module", params=["mixtral", "qwen2_moe"])
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return saved_pair(tmp_path_factory.mktemp(request.param), FAMILIES[request.param])[1].double()


def settings_of(method: str, shares: str = USUAL_INPUTS, **others: Any) -> PruningSettings:
    fixed = {"prune_ratio": 0.0, "input_sparsity": shares, "input_score": method} | others
    return PruningSettings.paper(**fixed)


def masked(x: Tensor, norms: Tensor, count: int) -> Tensor:
    """x with zeros for all but the `count` inputs of each row with the largest score. x [..., in], norms [in]"""
    kept = torch.zeros_like(x).flatten(0, -2)
    for row, own in zip(x.flatten(0, -2), kept, strict=True):
        own[slow_order((row.float().abs() * norms).tolist())[:count]] = 1
    return x * kept.view_as(x)


def products_of(model: LlamaForCausalLM) -> Iterator[tuple[str, list[Matrix]]]:
    """The kind of each product, and its matrices."""
    yield "head", [model.lm_head]
    for layer in model.model.layers:
        attention = layer.self_attn
        yield "qkv", [attention.q_proj, attention.k_proj, attention.v_proj]
        yield "o", [attention.o_proj]
    for ffn in (one for one in model.modules() if isinstance(one, FeedForward)):
        yield from (("gate", [ffn.gate_proj]), ("up", [ffn.up_proj]), ("down", [ffn.down_proj]))


@contextmanager
def inputs_masked(model: LlamaForCausalLM, settings: PruningSettings) -> Iterator[None]:
    """Within it, every product of the slow step (slow_masked.py) gets zeros for inputs that are left out."""
    masks: dict[Any, tuple[Tensor, int]] = {}
    for kind, matrices in products_of(model):
        weight = torch.cat([matrix.weight.float() for matrix in matrices])
        norms = weight.norm(dim=0) if settings.input_score == "wina" else torch.ones(weight.shape[1])
        share = getattr(settings.input_shares or InputShares(), kind)
        masks |= {matrix: (norms, max(1, round((1 - share) * weight.shape[1]))) for matrix in matrices}

    def times(matrix: Any, x: Tensor) -> Tensor:
        return F.linear(masked(x, *masks[matrix]) if matrix in masks else x, matrix.weight, matrix.bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slow_masked, "times", times)
        yield


def steps_of(model: LlamaForCausalLM, tokens: Tensor, settings: PruningSettings, prompt: int = 12) -> Tensor:
    """Logits after the prompt and after every step. int64 [B, T] -> [B, 1 + T - prompt, V]"""
    first, state = prefilled(model, tokens[:, :prompt], settings)
    return torch.stack([first, *(model.decode(token, state) for token in tokens[:, prompt:].T)], dim=1)


def assert_steps_are_the_slow_ones(model: LlamaForCausalLM, settings: PruningSettings, batch: int = 2) -> None:
    tokens, _ = left_padded([18] * batch, SIZES["vocab_size"])
    _, state = prefilled(model, tokens[:, :12], settings)
    slow = model.new_state(batch, 64, resolved(model, DENSE))
    in_model_order(state, slow)
    for token in tokens[:, 12:].T:
        logits = model.decode(token, state)
        with inputs_masked(model, settings):
            assert_same(logits, masked_decode(model, token, state, slow))


def matrices(bias: Tensor | None) -> Iterator[tuple[Any, Tensor]]:
    """One matrix of every kind [32, 64], and its values."""
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    yield Matrix.of(weight, bias), weight
    yield ColumnMatrix.of(weight.t().contiguous().t(), bias), weight
    for packed in (Int8Matrix.nearest(weight, bias=bias, dtype=weight.dtype),
                   Int4Matrix.of_groups(group(weight, 32), weight.dtype, bias)):
        yield packed, packed.values()
    halves = [ColumnMatrix.of(half.t().contiguous().t(), None) for half in weight.split(16)]
    yield MixedMatrix(halves), weight
    rows = ChosenRows(ColumnMatrix.of(weight.t().contiguous().t(), bias), 32)
    rows.copy_rows(rows.whole, torch.arange(32))
    yield rows, weight


@pytest.mark.numeric
@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("weighted", [False, True], ids=["teal", "wina"])
def test_a_product_is_that_of_the_masked_inputs(weighted: bool, rows: int) -> None:
    x = torch.randn(1, rows, 64, generator=torch.Generator().manual_seed(rows))
    bias = torch.randn(32, generator=torch.Generator().manual_seed(1))
    for matrix, values in matrices(bias):
        norms = values.norm(dim=0) if weighted else None
        added = 0 if isinstance(matrix, MixedMatrix) else bias
        wanted = masked(x, torch.ones(64) if norms is None else norms, 40) @ values.T + added
        assert_same(ChosenInputs(matrix, 40, norms)(x), wanted)


@pytest.mark.parametrize("rows", [1, 3])
def test_of_equal_scores_the_earlier_input_is_kept(rows: int) -> None:
    for matrix, values in matrices(None):
        x = torch.ones(rows, 64)
        x[:, 50:] = 2                   # 14 are kept for their score, 6 of the others for their place
        kept = torch.cat([torch.arange(6), torch.arange(50, 64)])
        assert_same(ChosenInputs(matrix, 20, None)(x), x[:, kept] @ values[:, kept].T)


def test_one_row_reads_no_column_of_an_input_that_is_left_out() -> None:
    weight = torch.randn(32, 64)
    x = torch.randn(1, 1, 64)
    x[..., 10:20] /= 1e6
    weight[:, 10:20] = torch.nan
    y = ChosenInputs(ColumnMatrix.of(weight.t().contiguous().t(), None), 54, None)(x)
    assert y.isfinite().all()


@pytest.mark.numeric
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("method", INPUT_METHODS)
@pytest.mark.parametrize("family", FAMILIES, indirect=True)
@torch.inference_mode()
def test_steps_are_those_of_a_slow_model(family: LlamaForCausalLM, method: str, batch: int) -> None:
    """In every family, experts included. Of two sequences each chooses its own inputs."""
    assert_steps_are_the_slow_ones(family, settings_of(method), batch)


@pytest.mark.numeric
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["biases", "query_key_norm", "mixtral"], indirect=True)
@torch.inference_mode()
def test_each_kind_of_product_has_its_own_share(family: LlamaForCausalLM, kind: str) -> None:
    settings, tokens = settings_of("wina", f"{kind}=0.5"), left_padded([18], SIZES["vocab_size"])[0]
    assert_steps_are_the_slow_ones(family, settings)
    assert (steps_of(family, tokens, settings) - steps_of(family, tokens, DENSE)).abs().max() > 1e-3


@pytest.mark.numeric
@pytest.mark.parametrize(("width", "shares"), [
    (0.3, USUAL_INPUTS), (0.3, "0.4,down=0.3"), (0.0, USUAL_INPUTS), (0.0, "0.4,down=0"), (2.0, USUAL_INPUTS),
])
@pytest.mark.parametrize("method", INPUT_METHODS)
@pytest.mark.parametrize("family", ["grouped_query", "biases", "gemma3", "mixtral", "qwen2_moe"], indirect=True)
@torch.inference_mode()
def test_beside_pop_steps_are_those_of_a_slow_model(
    family: LlamaForCausalLM, method: str, width: float, shares: str
) -> None:
    """down_proj keeps the smaller number: of the channels that POP finishes, or of its own share."""
    assert_steps_are_the_slow_ones(family, settings_of(method, shares, **POPPED | {"candidate_width": width}))


@pytest.mark.parametrize("settings", [settings_of("wina"), settings_of("teal", prune_ratio=0.3)], ids=["wina", "pop"])
@torch.inference_mode()
def test_a_known_text_at_once_is_its_steps(
    settings: PruningSettings, model: LlamaForCausalLM, mixture: LlamaForCausalLM
) -> None:
    for one in (model, mixture):
        tokens, _ = left_padded([24], SIZES["vocab_size"])
        _, state = prefilled(one, tokens[:, :12], settings)
        assert_same(evaluate(one, tokens[0, 12:], state), steps_of(one, tokens, settings)[0, 1:])


@pytest.mark.numeric
@pytest.mark.parametrize("settings", [settings_of("wina"), settings_of("teal", prune_ratio=0.3)], ids=["wina", "pop"])
@torch.inference_mode()
def test_weights_by_columns_and_by_rows_take_the_same_steps(
    settings: PruningSettings, model: LlamaForCausalLM
) -> None:
    by_columns, tokens = stored_by_columns(model), left_padded([20], SIZES["vocab_size"])[0]
    assert_same(steps_of(by_columns, tokens, settings), steps_of(deepcopy(model).float(), tokens, settings))


@torch.inference_mode()
def test_a_share_of_0_is_the_dense_model_bit_for_bit(model: LlamaForCausalLM) -> None:
    tokens = left_padded([20], SIZES["vocab_size"])[0]
    for one in (model, stored_by_columns(model)):
        assert torch.equal(steps_of(one, tokens, settings_of("wina", "0")), steps_of(one, tokens, DENSE))
    state = model.new_state(1, 64, resolved(model, settings_of("wina", "o=0.3")))
    layer, network = state.layers[0], model.model.layers[0].mlp
    assert isinstance(layer.attention.step_o, ChosenInputs)  # type: ignore[attr-defined]
    assert layer.attention.step_qkv is layer.attention.qkv and state.lm_head is model.lm_head  # type: ignore[attr-defined]
    assert layer.ffn.step_gate is network.gate_proj and layer.ffn.step_down is network.down_proj  # type: ignore[attr-defined]


@torch.inference_mode()
def test_the_prompt_runs_whole(model: LlamaForCausalLM) -> None:
    tokens = left_padded([20], SIZES["vocab_size"])[0]
    assert torch.equal(prefilled(model, tokens, settings_of("teal"))[0], prefilled(model, tokens, DENSE)[0])
    alone, both = PruningSettings.paper(**POPPED), settings_of("teal", **POPPED)
    assert torch.equal(prefilled(model, tokens, both)[0], prefilled(model, tokens, alone)[0])


@torch.inference_mode()
def test_wina_of_down_proj_alone_is_the_rule_all_channels(model: LlamaForCausalLM) -> None:
    tokens = left_padded([20], SIZES["vocab_size"])[0]
    wanted = steps_of(model, tokens, PruningSettings.paper(ffn_ratio=0.45, rule="all-channels"))
    assert_same(steps_of(model, tokens, settings_of("wina", "down=0.45")), wanted)


@torch.inference_mode()
def test_the_two_scores_differ_where_norms_do(model: LlamaForCausalLM) -> None:
    tokens = left_padded([20], SIZES["vocab_size"])[0]
    shares = USUAL_INPUTS + ",head=0.3"
    teal, wina = (steps_of(model, tokens, settings_of(method, shares)) for method in INPUT_METHODS)
    assert (teal - wina)[:, 1:].abs().max() > 1e-3
    alike = deepcopy(model)
    for matrix in (one for _, together in products_of(alike) for one in together):
        matrix.weight.copy_(matrix.weight.sign() * 0.125)
    alike.derived.clear()                       # norms of the weights before
    for layer in alike.model.layers:
        layer.mlp.derived.clear()
        layer.self_attn.derived.clear()
    teal, wina = (steps_of(alike, tokens, settings_of(method, shares)) for method in INPUT_METHODS)
    assert torch.equal(teal, wina)


def test_bytes_are_those_of_the_columns_that_one_token_reads(model: LlamaForCausalLM) -> None:
    rows, columns = deepcopy(model).float(), stored_by_columns(model)
    settings = settings_of("wina", "0.25,o=0.5,down=0.75,head=0.5")
    hidden, channels, keys = SIZES["hidden_size"], SIZES["intermediate_size"], 2 * 2 * 12
    kept = hidden * 3 // 4
    of_layer = kept * (hidden + keys) + hidden // 2 * hidden + 2 * kept * channels + channels // 4 * hidden
    head = SIZES["vocab_size"] * hidden // 2
    pruning = resolved(columns, settings)
    assert bytes_per_token(columns, pruning) == 4 * (3 * of_layer + head)
    dense = bytes_per_token(columns, resolved(columns, DENSE))
    assert bytes_per_token(rows, resolved(rows, settings)) == bytes_per_token(columns, pruning)
    for two_rows in (columns, rows):
        assert bytes_per_token(two_rows, resolved(two_rows, settings), batch=2) == dense
    assert bytes_per_token(model, resolved(model, settings)) == bytes_per_token(model, resolved(model, DENSE))
    both = resolved(columns, settings_of("wina", "0.25,o=0.5,down=0.75,head=0.5", **POPPED))
    active = round(0.6 * channels) + round(0.15 * channels)
    of_layer += 2 * kept * (active - channels)
    assert bytes_per_token(columns, both) == 4 * (3 * of_layer + head)


@torch.inference_mode()
@pytest.mark.parametrize("ratio", [0.0, 0.4])
def test_copies_by_columns_are_planned_for_until_they_exist(
    model: LlamaForCausalLM, mixture: LlamaForCausalLM, ratio: float
) -> None:
    settings = PruningSettings.paper(ffn_ratio=ratio, candidate_width=0.3, input_sparsity="0.3,o=0,head=0.3")
    for one in (deepcopy(model).float(), deepcopy(mixture).float()):
        pruning = resolved(one, settings)
        planned = pruning.rule.form_bytes(one)
        needed = cache_bytes(one, 1, 32, pruning) + all_copy_bytes(one, pruning) + planned
        if one.model.layers[0].mlp.__class__ is FeedForward:
            with pytest.raises(InputError, match="copies of weights another"):
                state_within(needed - 1, one, 1, 32, pruning)
        state = state_within(needed, one, 1, 32, pruning)
        for token in range(24):                                     # an expert copies at its first token
            one.prefill(one.embed(torch.tensor([[token, token + 1]])), state)
            one.decode(torch.tensor([token]), state)
        made = [
            matrix for module in one.modules() for name, matrix in getattr(module, "derived", {}).items()
            if name.endswith("by columns")
        ]
        assert planned == sum(matrix.read_bytes() for matrix in made) > 0
        assert pruning.rule.form_bytes(one) == 0
        assert ratio == 0 or len(made) == 1 + len(one.model.layers)                 # head, and q, k, v of every layer
    assert resolved(model, settings).rule.form_bytes(model) == 0                    # float64 has no such copies


@torch.inference_mode()
@pytest.mark.parametrize("ratio", [None, 0.4])
def test_where_eager_steps_multiply_by_rows_chosen_inputs_have_copies_by_columns(
    model: LlamaForCausalLM, ratio: float | None
) -> None:
    settings = PruningSettings.paper(ffn_ratio=ratio or 0.0, candidate_width=0.3, input_sparsity="0.3,head=0.3")
    columns, rows = stored_by_columns(model), deepcopy(model).float()
    replace_matrices(rows, RowMatrix.from_rows)
    tokens, logits, read = torch.tensor([[5, 6, 7, 8, 9, 10]]), [], []
    for own in (columns, rows):
        pruning = resolved(own, settings)
        _, state = prefilled(own, tokens, pruning)
        logits.append(own.decode(torch.tensor([11]), state))
        read.append(bytes_per_token(own, pruning))
        assert type(state.layers[0].ffn.step_gate.matrix) is ColumnMatrix  # type: ignore[attr-defined]
        assert type(state.lm_head.matrix) is ColumnMatrix
    assert_same(logits[1], logits[0])
    assert read[0] == read[1]


def test_bytes_of_experts_count_what_is_read_of_those_that_run_whole(mixture: LlamaForCausalLM) -> None:
    model, tokens = stored_by_columns(mixture), left_padded([14], SIZES["vocab_size"])[0]
    pruning = resolved(model, settings_of("teal", "gate=0.5,up=0.5"))
    _, state = prefilled(model, tokens[:, :12], pruning)
    model.decode(tokens[:, 12], state)
    saved = bytes_per_token(model, resolved(model, DENSE)) - bytes_per_token(model, pruning, 1, state)
    ffn = model.model.layers[0].mlp.experts[0]
    each = SIZES["hidden_size"] // 2 * 2 * ffn.channels * 4
    shared = 0 if model.model.layers[0].mlp.shared_expert is None else SIZES["hidden_size"] * 56 * 4
    assert saved == 3 * (2 * each + shared)


@pytest.mark.parametrize(("settings", "ratio"), [
    (settings_of("teal", "0.3"), 0.3),
    (settings_of("teal", "down=0.6"), 0.6 * 80 / (3 * 80 + 144)),
    (settings_of("teal", "o=0.5,qkv=0.25"), (0.5 * 48 + 0.25 * 96) / (3 * 80 + 144)),
    (settings_of("teal", "0.3,qkv=0,o=0", prune_ratio=None, ffn_ratio=0.4),
     (2 * (1 - 0.6 * 0.7) + 0.4) / 3 * 240 / 384),
])
def test_the_prune_ratio_is_the_share_of_the_weights_left_out(
    settings: PruningSettings, ratio: float, model: LlamaForCausalLM
) -> None:
    assert resolved(model, settings).ratio == pytest.approx(ratio)


@pytest.mark.parametrize(("words", "shares"), [
    ("", None), ("0", None), ("0,down=0", None), ("0.3", InputShares(0.3, 0.3, 0.3, 0.3, 0.3)),
    ("1/4", InputShares(0.25, 0.25, 0.25, 0.25, 0.25)), ("down=0.6", InputShares(down=0.6)),
    ("0.2, o=0.3, down=0.6", InputShares(0.2, 0.3, 0.2, 0.2, 0.6)),
    ("head=1/4", InputShares(head=0.25)), ("0.2,head=0.3", InputShares(0.2, 0.2, 0.2, 0.2, 0.2, 0.3)),
])
def test_shares_are_read(words: str, shares: InputShares | None) -> None:
    assert read_input_shares(words) == shares == PruningSettings(input_sparsity=words).input_shares


@pytest.mark.parametrize(
    "words",
    ["1", "-0.1", "nan", "much", "down", "q=0.3", "=0.3", "0.3,0.4", "o=0.3,0.2", "o=0.1,o=0.2", "o=1", ",", "0.3,"],
)
def test_shares_that_are_none_are_refused(words: str) -> None:
    with pytest.raises(InputError, match="input sparsity must be a share below 1"):
        PruningSettings(input_sparsity=words)


@pytest.mark.parametrize(("settings", "named"), [
    ({"rule": "up"}, "combines with rule pop, not with rule up"), ({"head_ratio": 0.5}, "prunes no heads"),
    ({"unseen_experts": "dense"}, "leaves no expert whole"), ({"input_score": "size"}, "input score must be one of"),
])
def test_settings_that_do_not_combine_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        PruningSettings(input_sparsity="0.3", **settings)


def test_methods(model: LlamaForCausalLM) -> None:
    for method in INPUT_METHODS:
        found = pruning_for(method, Request(model, PruningSettings.paper(0.4))).settings
        assert (found.input_sparsity, found.input_score, found.prune_ratio) == (USUAL_INPUTS, method, 0)
    given = PruningSettings.paper(0.4, input_sparsity="0.3")
    assert pruning_for("wina", Request(model, given)).settings.input_sparsity == "0.3"
    assert pruning_for("frozen", Request(model, given)).settings.input_sparsity == "0.3"
    assert pruning_for("dense", Request(model, given)).settings.input_sparsity == ""
    with pytest.raises(InputError, match="method magnitude leaves out no inputs: give no --input-sparsity"):
        pruning_for("magnitude", Request(model, given))
    with pytest.raises(InputError, match="this method leaves out inputs: give --input-sparsity a share above 0"):
        pruning_for("teal", Request(model, PruningSettings.paper(input_sparsity="0")))


def test_a_comparison_gives_each_method_its_shares() -> None:
    flags = compare.parser().parse_args(["--out", "x", "--methods", "dense", "pop", "random", *INPUT_METHODS])
    rows = [(one.method, one.settings.input_sparsity) for one in configurations(flags, False, False)]
    assert rows == [("dense", ""), ("pop", ""), ("random", ""), ("teal", USUAL_INPUTS), ("wina", USUAL_INPUTS)]
    flags = compare.parser().parse_args([
        "--out", "x", "--methods", "pop", "random", "wina", "--input-sparsity", "0", "0.3", "--prune-ratio", "0.2",
        "0.4",
    ])
    labels = [one.label for one in configurations(flags, False, False)]
    assert labels == [
        "pop 20 %, width 0.5, inputs off 0", "pop 20 %, width 0.5, inputs off 0.3", "pop 40 %, width 0.5, inputs off 0",
        "pop 40 %, width 0.5, inputs off 0.3", "random 20 %", "random 40 %", "wina, inputs off 0.3",
    ]


def test_commands_take_it_and_say_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, text = complete_checkpoint(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("a text of some words, " * 20)
    given = ["--ckpt", str(folder), "--prompt", "Hello", "-n", "4", "--ignore-eos", "--prune-ratio", "0"]
    assert exit_status(generate.main, *given, "--input-sparsity", "0.2,down=0.6", "--input-score", "teal") == 0
    said = capsys.readouterr().err
    assert "inputs    every step leaves out 0.2 of qkv, o, gate, up, 0.6 of down, by teal\n" in said
    assert "all of which run" in said and "100.0% of dense" not in said
    assert exit_status(generate.main, *given, "--input-sparsity", "0.3", "--dtype", "float16") == 0
    assert "100.0% of dense, as only plain weights stored by columns, multiplied by one token, are read in part" in (
        capsys.readouterr().err
    )
    scored = ["--ckpt", str(folder), "--text", str(text), "--windows", "1", "--prompt-tokens", "20"]
    scored += ["--score-tokens", "20"]
    assert exit_status(score.main, *scored, "--method", "wina", "--quiet") == 0
    assert "every step leaves out 0.2 of qkv, gate, up, 0.3 of o, 0.6 of down, by wina" in capsys.readouterr().out
    assert "not '2'" in one_line_error(generate.main, capsys, *given, "--input-sparsity", "2")
    assert "leaves out no inputs" in one_line_error(
        score.main, capsys, *scored, "--method", "random", "--input-sparsity", "0.3"
    )


@pytest.mark.slow
@pytest.mark.parametrize("settings", [settings_of("wina"), settings_of("teal", prune_ratio=0.3)], ids=["wina", "pop"])
@torch.inference_mode()
def test_compiled_steps_are_the_eager_ones(settings: PruningSettings, tmp_path: Path, short_calls: None) -> None:
    folder = complete_checkpoint(tmp_path)
    eager, compiled = load(folder, compile=False), load(folder, compile=True)
    logits, read = [], []
    for engine in (eager, compiled):
        state = engine.new_state(1, 32, engine.resolve(settings))
        engine.prepare(state)
        first = engine.model.prefill(engine.model.embed(torch.tensor([[5, 6, 7, 8, 9, 10]])), state)
        steps = [engine.decode(torch.tensor([token]), state) for token in range(11, 21)]
        logits.append(torch.cat([first, *steps]))
        read.append(bytes_per_token(engine.model, engine.resolve(settings)))
    assert engine.kind_of_steps(state) in ("package", "compiled")
    assert_same(logits[1], logits[0])
    assert read[1] == read[0] < bytes_per_token(compiled.model, compiled.dense)
