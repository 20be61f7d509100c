"""Choices of products: the fastest is chosen, kept and read again; every choice computes the same model."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import complete_checkpoint, random_reference, resolved
from tolerance import assert_same, distance, rounding
from torch import Tensor
from transformers import LlamaConfig

from models.llama import LlamaForCausalLM
from models.matrices import candidates
from models.matrices.candidates import COMPILED, PLAIN, fastest, in_turns
from models.matrices.forms import ColumnMatrix, RowMatrix
from models.matrices.packed import Int4Matrix, Int8Matrix
from models.matrices.plain import Matrix, replace_matrices
from models.packages import step_functions
from models.registry import architecture
from popengine.engine import choices, packages
from popengine.engine.choices import Choices, Times, lay_out, set_streams
from popengine.engine.loading import load
from popengine.engine.packages import Packages
from popengine.studies.settings import DENSE, PruningSettings
from weights.groups import group

SIZES = {"hidden_size": 64, "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": 2}
DEFAULT, OTHER = PLAIN


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the choices, and small weights that are measured too."""
    monkeypatch.setattr(choices, "cache_folder", lambda name: tmp_path / name)
    monkeypatch.setattr(choices, "LEAST_BYTES", 0)
    return tmp_path / "products"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Measurements take no time, and end as the test says: the last entry is the fastest. Names of what was timed."""
    seen: list[Any] = []

    def found(calls: dict[str, Any], *_: Any) -> Times:
        for call in calls.values():
            call(0), call(1)
        seen.append([*calls])
        return {name: [1.0 - 0.2 * (name == OTHER)] * 4 for name in calls}

    monkeypatch.setattr(choices, "in_turns", found)
    monkeypatch.setattr(choices, "compiled_calls", lambda kind, *_: dict.fromkeys(COMPILED[kind], lambda number: None))
    return seen


def tiny(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    config = LlamaConfig(**{"vocab_size": 96, "num_key_value_heads": 2} | SIZES)
    model: Any = architecture(config.to_dict(), "config.json").from_config(config.to_dict())
    model.load_state_dict(random_reference(config).state_dict(), strict=False)
    return model.to(dtype).eval().requires_grad_(False)


def classes(model: LlamaForCausalLM) -> set[type]:
    return {type(one) for one in model.modules() if isinstance(one, Matrix)}


def test_the_fastest_is_chosen_and_a_tie_keeps_the_default() -> None:
    assert fastest({"a": [1.0, 1.1], "b": [0.5, 0.6], "c": [0.4, 0.5]}) == "c"
    assert fastest({"a": [1.0, 1.0], "b": [0.95, 0.92]}) == "a"             # not clearly
    assert fastest({"a": [1.0, 1.0, 1.0], "b": [0.5, 1.2, 1.2]}) == "a"     # faster once
    assert fastest({"a": [1.0, 1.0, 1.0], "b": [1.0, 0.5, 0.5, 0.5], "c": [2.0]}) == "b"
    assert fastest({"a": [1.0]}) == "a"


def test_turns_are_timed_with_another_weight_each() -> None:
    now, numbers = [0.0], []

    def call(seconds: float) -> Callable[[int], Any]:
        def one(number: int) -> None:
            now[0] += seconds
            numbers.append(number)

        return one

    times = in_turns({"slow": call(2.0), "fast": call(1.0)}, 10.0, lambda: now[0])
    assert numbers == [*range(len(numbers))]
    # The first call of each is not counted; after the least number of rounds, time is up.
    assert times == {"slow": [2.0] * 4, "fast": [1.0] * 4}
    assert len(in_turns({"fast": call(0.0)}, 10.0, lambda: now[0])["fast"]) == candidates.MOST_ROUNDS


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_every_eager_candidate_is_the_product(dtype: torch.dtype, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(40, 64, generator=generator) / 8).to(dtype)
    b, x = torch.randn(40, generator=generator).to(dtype), torch.randn(1, 1, 64, generator=generator).to(dtype)
    wanted = x.double() @ weight.double().t() + (b.double() if bias else 0)
    for kind in PLAIN.values():
        y = kind.from_rows(Matrix.of(weight.clone(), b if bias else None))(x)
        assert y.dtype == dtype and y.shape == (1, 1, 40)
        if dtype == torch.float32:
            assert_same(y, wanted.float())
        else:       # the product is rounded, and then its sum with the bias
            assert distance(y, wanted.float()) <= 2.02 * rounding(dtype)


@pytest.mark.numeric
@pytest.mark.parametrize("streams", [1, 2, 4, 8])
@torch.inference_mode()
def test_every_number_of_streams_is_the_product(streams: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(1024, 48, generator=generator), torch.randn(1, 48, generator=generator)
    plain, packed = Matrix.of(weight, None), Int8Matrix.nearest(weight, torch.float32)
    for matrix in (plain, packed):
        matrix.set_streams(streams)
        run = torch.compile(lambda x, matrix=matrix: matrix(x), fullgraph=True, dynamic=False, backend="aot_eager")
        assert_same(run(x), x @ matrix.values().t())


def test_packed_streams_compile_to_the_packed_product() -> None:
    matrix = Int8Matrix.nearest(torch.randn(1024, 48), torch.bfloat16)
    seen: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        seen.append(str(graph.graph))
        return graph

    for streams, packed in ((8, False), (0, True)):
        matrix.set_streams(streams)
        torch.compile(lambda x: matrix(x), fullgraph=True, dynamic=False, backend=backend)(torch.ones(1, 48).bfloat16())
        assert ("_weight_int8pack_mm" in seen[-1]) == packed
        torch._dynamo.reset()


def test_a_choice_is_kept_and_read_again(folder: Path, measured: list[Any]) -> None:
    model = tiny()
    lay_out(model, Choices())
    assert classes(model) == {RowMatrix}
    # The head; q, k and v together; o; gate and up, whose default is the other layout; down.
    assert measured == [[*PLAIN]] * 3 + [[*reversed(PLAIN)]] + [[*PLAIN]]
    (file,) = folder.iterdir()
    assert set(json.loads(file.read_text())["choices"]) == {
        f"eager float32 {shape}" for shape in ("128 x 64", "64 x 64", "1024 x 64", "64 x 1024", "96 x 64")
    }
    again = tiny()
    lay_out(again, Choices())
    assert classes(again) == {RowMatrix} and len(measured) == 5
    other = tiny(torch.bfloat16)            # another format has choices of its own
    lay_out(other, Choices())
    assert len(measured) == 10 and len(list(folder.iterdir())) == 1


def test_small_weights_and_users_without_a_folder_have_the_default(
    measured: list[Any], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    def nowhere(name: str) -> Path:
        raise choices.InputError("there is no folder")

    model = tiny()
    with monkeypatch.context() as patch:
        patch.setattr(choices, "LEAST_BYTES", 1 << 20)
        lay_out(model, Choices())
    assert has_defaults(model) and not measured
    model = tiny()
    monkeypatch.setattr(choices, "cache_folder", nowhere)
    lay_out(model, Choices())
    assert has_defaults(model) and not measured and not folder.exists()


def has_defaults(model: LlamaForCausalLM) -> bool:
    """Return True if every matrix has the layout in which a partition copies whole lines."""
    return all(
        type(one) is (RowMatrix if name.endswith(("gate_proj", "up_proj")) else ColumnMatrix)
        for name, one in model.named_modules() if isinstance(one, Matrix)
    )


def empty(path: Path, patch: pytest.MonkeyPatch) -> None:
    path.write_bytes(b"")


def no_json(path: Path, patch: pytest.MonkeyPatch) -> None:
    path.write_bytes(b"\xff{")


def deep(path: Path, patch: pytest.MonkeyPatch) -> None:
    path.write_text("[" * 100_000)


def a_list(path: Path, patch: pytest.MonkeyPatch) -> None:
    path.write_text("[1]")


def numbers(path: Path, patch: pytest.MonkeyPatch) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"choices": dict.fromkeys(content["choices"], 1)}))


def unknown_names(path: Path, patch: pytest.MonkeyPatch) -> None:
    path.write_text(path.read_text().replace(OTHER, "something else"))


def another_format(path: Path, patch: pytest.MonkeyPatch) -> None:
    path.write_text(path.read_text().replace(choices.FORMAT, "popengine products 0"))


def writable(path: Path, patch: pytest.MonkeyPatch) -> None:
    path.chmod(0o620)


def of_another_user(path: Path, patch: pytest.MonkeyPatch) -> None:
    own = os.geteuid() + 1
    patch.setattr(os, "geteuid", lambda: own)


def a_folder(path: Path, patch: pytest.MonkeyPatch) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("harm", [
    empty, no_json, deep, a_list, numbers, unknown_names, another_format, writable, of_another_user, a_folder,
])
def test_a_file_that_cannot_be_used_is_measured_anew(
    folder: Path, measured: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    harm: Callable[[Path, pytest.MonkeyPatch], None],
) -> None:
    lay_out(tiny(), Choices())
    (file,) = folder.iterdir()
    harm(file, monkeypatch)
    model = tiny()
    lay_out(model, Choices())
    assert len(measured) == 10 and classes(model) == {RowMatrix}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("what", ["processor", "machine"])
def test_another_machine_measures_anew(measured: list[Any], monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    lay_out(tiny(), Choices())
    monkeypatch.setattr(choices, what, lambda: "another" if what == "processor" else ["another"])
    lay_out(tiny(), Choices())
    assert len(measured) == 10


def test_threads_are_part_of_the_name() -> None:
    before = torch.get_num_threads()
    one = Choices().path
    try:
        torch.set_num_threads(before + 1)
        assert Choices().path != one
    finally:
        torch.set_num_threads(before)
    assert Choices().path == one


@pytest.fixture(scope="module")
def checkpoint_of_512(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return complete_checkpoint(tmp_path_factory.mktemp("wide"), hidden_size=64, intermediate_size=512)


@pytest.mark.parametrize("settings", [DENSE, PruningSettings.paper(ffn_ratio=0.4, candidate_width=0.3),
                                      PruningSettings(rule="all-channels", ffn_ratio=0.5)], ids=["dense", "pop", "all"])
@torch.inference_mode()
def test_a_loaded_model_with_each_choice_gives_the_same_logits(
    checkpoint_of_512: Path, monkeypatch: pytest.MonkeyPatch, settings: PruningSettings
) -> None:
    found = []
    for name, kind in PLAIN.items():
        monkeypatch.setattr(Choices, "choose", lambda self, key, table, measure, name=name: name)
        engine = load(checkpoint_of_512, dtype="float32", compile=False)
        assert classes(engine.model) == {kind}
        state = engine.new_state(1, 40, engine.resolve(settings))
        first = engine.model.prefill(engine.model.embed(torch.arange(5, 40)[None]), state)
        found.append(torch.cat([first, *(engine.model.decode(torch.tensor([t]), state) for t in (50, 60, 70))]))
    assert_same(found[1], found[0])


def test_chosen_columns_of_a_matrix_stored_by_rows_are_read_from_a_copy_by_columns() -> None:
    model = tiny()
    for one in model.modules():
        if hasattr(one, "down_proj"):
            one.down_proj = RowMatrix.from_rows(one.down_proj)
            pruning = PruningSettings(rule="all-channels", ffn_ratio=0.5)
            state = model.new_state(1, 16, resolved(model, pruning))
            break
    down = state.layers[0].ffn.down
    assert type(down) is ColumnMatrix and down.reads_chosen_columns(1)
    assert torch.equal(down.weight, model.model.layers[0].mlp.down_proj.weight)


def test_streams_are_chosen_per_format_or_shape_and_reach_copies_and_stacks(measured: list[Any], folder: Path) -> None:
    model = tiny()
    layer = model.model.layers[0]
    layer.mlp.down_proj = Int4Matrix.of_groups(group(layer.mlp.down_proj.weight, 32), torch.float32)
    model.lm_head = Int8Matrix.nearest(model.lm_head.weight, torch.float32)
    kept = Choices()
    kept.known |= {"compiled float32": "4 streams", "compiled int8 96 x 64": "packed"}
    kept.keep()
    set_streams(model, Choices(), measures=False)
    assert not measured
    assert layer.mlp.gate_proj.streams == layer.mlp.gate_proj.empty_rows(5).streams == 4
    assert layer.self_attn.together().streams == layer.self_attn.o_proj.empty_columns(4).streams == 4
    assert model.lm_head.streams == model.lm_head.empty_rows(5).streams == 0
    assert layer.mlp.down_proj.empty_columns(32).streams == Matrix.streams       # int8, of an int4 matrix


def test_compiled_products_are_measured_on_the_largest_weight_of_a_network(
    measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(choices, "compiled_calls", lambda kind, weights, _: (seen.append(weights[0].shape), {
        name: lambda number: None for name in COMPILED[kind]
    })[1])
    model = tiny()
    set_streams(model, Choices(), measures=True)
    assert seen[0] in (torch.Size([1024, 64]), torch.Size([64, 1024])) and len(seen) == 1
    set_streams(tiny(), Choices(), measures=True)                           # kept
    assert len(seen) == 1


def test_a_slow_compiler_compiles_no_further_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    calls = {name: (lambda number, name=name: seen.append(name)) for name in COMPILED["float32"]}
    monkeypatch.setattr(choices, "compiled_calls", lambda *_: calls)
    assert list(choices.measure_compiled("float32", [])) == list(COMPILED["float32"]) == list(dict.fromkeys(seen))
    ticks = iter([0.0, 1.0, 14.0, *[16.0] * 9])
    monkeypatch.setattr(choices.time, "perf_counter", lambda: next(ticks))
    assert list(choices.measure_compiled("float32", [])) == ["8 streams", "4 streams"]


def test_compiled_int8_is_measured_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of gate and up the packed product wins, of the other shapes the written-out one."""
    seen = []

    def times(kind: str, weights: list[Tensor]) -> Times:
        seen.append(tuple(weights[0].shape))
        packed = 0.1 if len(weights[0]) == 1024 else 10.0
        return {"8 streams": [1.0], "packed": [packed]}

    monkeypatch.setattr(choices, "measure_compiled", times)
    model = tiny()
    replace_matrices(model, lambda matrix: Int8Matrix.nearest(matrix.weight, torch.float32))
    set_streams(model, Choices(), measures=True)
    assert len(seen) == 5                                                   # qkv, o, gate and up, down, head
    network, attention = model.model.layers[0].mlp, model.model.layers[0].self_attn
    assert network.gate_proj.streams == network.up_proj.streams == 0
    assert {one.streams for one in (network.down_proj, attention.q_proj, attention.o_proj, model.lm_head)} == {8}


def test_a_broken_compiler_leaves_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(choices, "compiled_calls", broken)
    model = tiny()
    set_streams(model, Choices(), measures=True)
    assert {one.streams for one in model.modules() if isinstance(one, Matrix)} == {Matrix.streams}
    assert not Choices().known              # measured again when there is a compiler


@torch.inference_mode()
def test_packages_of_another_choice_have_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "cache_folder", lambda name: tmp_path / name)

    def keys(streams: int) -> list[str]:
        model = tiny()
        for one in model.modules():
            if isinstance(one, Matrix):
                one.set_streams(streams)
        functions = step_functions(model, model.new_state(1, 128, resolved(model, DENSE)), dense=False).all
        return [Packages().key(one) for one in functions]

    default, other = keys(Matrix.streams), keys(4)
    assert default == keys(Matrix.streams)
    assert default[1] != other[1] and default[-1] != other[-1]
