"""The bench command: what it reports, the arithmetic behind its columns, and one clear line for what is wrong."""

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from builders import LLAVA_TINY, SIZES, exit_status, one_line_error
from safetensors.torch import save_file
from tiny_gguf import TinyLlama
from tiny_gguf import write_gguf as write_tiny
from tolerance import assert_same

from models.cost_model import layer_weights
from models.experts import MixtureOfExperts
from models.families.picture_model import PictureModel
from models.pruning.resolve import resolve
from models.registry import architecture
from popengine.bench import main
from popengine.benchmark import benchmark
from popengine.benchmark import products as bench_products
from popengine.benchmark import shapes as bench_shapes
from popengine.benchmark.benchmark import Entry, rows
from popengine.benchmark.engines import AbsentPeer, Generated, LlamaCppEngine, gguf_bytes_per_token, write_gguf
from popengine.benchmark.table import describe
from popengine.engine.loading import load
from popengine.engine.results import regions
from popengine.studies.calibration import calibrate, save_calibration
from popengine.studies.settings import PruningSettings
from weights.checkpoint import open_checkpoint

status = partial(exit_status, main)


@pytest.fixture(scope="module", autouse=True)
def small_array() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "SUMMED_BYTES", 1 << 22)
        yield


@pytest.fixture(scope="module")
def result(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run against a peer that is installed and one that is not."""
    file = tmp_path_factory.mktemp("report") / "bench.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(library(file.parent, "raise ImportError('it is not here')")))
        arguments = ["--ckpt", checkpoint, "-p", 20, "-n", 8, "--prune-ratio", 0.4, "--dtype", "float32"]
        arguments += ["--rounds", 3, "--against", "transformers,llama.cpp", "--json", file]
        assert status(*arguments) == 0
    return json.loads(file.read_text())


def library(folder: Path, source: str) -> Path:
    """Write a module named llama_cpp, which the process of this peer imports, and return its folder."""
    (folder / "llama_cpp.py").write_text(source)
    return folder


# A model that says 3, 4, 5 ... after any prompt, and prints, as the library does.
COUNTING = """
import ctypes
class Llama:
    ctx, said = None, 3
    def __init__(self, *_, **__): print("loading")
    def n_vocab(self): return 16
    def reset(self): Llama.said = 3
    def eval(self, ids):
        print("eval", ids)
        self.logits = (ctypes.c_float * 16)()
        self.logits[Llama.said] = 1
        Llama.logits = ctypes.cast(self.logits, ctypes.POINTER(ctypes.c_float))
        Llama.said += 1
def llama_get_logits_ith(ctx, place): return Llama.logits
"""


def test_every_setting_and_peer_has_a_row_and_an_absent_peer_is_named(result: dict[str, Any]) -> None:
    (group,) = result["dtypes"]
    assert [row["engine"] for row in group["rows"]] == [
        "popengine eager, dense", "popengine eager, POP 0.4", "transformers",
    ]  # fmt: skip
    assert list(group["absent"]) == ["llama.cpp"]
    assert "not installed" in group["absent"]["llama.cpp"]
    text = describe(result, benchmark.SUMMED_BYTES)
    assert "absent: llama.cpp: llama-cpp-python is not installed" in text
    assert f"{result['threads']} threads for every engine" in text
    assert " ".join(result["command"]) in text
    assert torch.__version__ in text
    assert "width 0.5 under rules that have one" in text


def test_methods_and_what_is_left_out_have_rows_of_their_own(checkpoint: Path, tmp_path: Path) -> None:
    engine, saved, file = load(checkpoint, dtype="float32"), tmp_path / "made.safetensors", tmp_path / "bench.json"
    save_calibration(calibrate(engine.model, [[*range(30)]], "numbers"), engine.model, saved)
    arguments = ["--ckpt", checkpoint, "-p", 20, "-n", 4, "--prune-ratio", 0.4, "--dtype", "float32", "--rounds", 1]
    arguments += ["--leave-out", "1.mlp", "--method", "shortgpt", "probe-pruning", "--calibration", saved]
    assert status(*arguments, "--json", file) == 0
    (group,) = json.loads(file.read_text())["dtypes"]
    names = [row["engine"].removeprefix("popengine eager, ") for row in group["rows"]]
    assert names == [
        "dense", "POP 0.4", "dense, without 1.mlp", "POP 0.4, without 1.mlp", "shortgpt 0.4", "probe-pruning 0.4"
    ]
    dense, _, less, _, shortgpt, probed = (row["weight_bytes_per_token"] for row in group["rows"])
    assert shortgpt < dense > less and probed < dense
    works = [row["prompt_work"][0] for row in group["rows"]]
    assert max(works[2], works[4], works[5]) < works[0]


def test_rows_hold_together(result: dict[str, Any], checkpoint: Path) -> None:
    (group,) = result["dtypes"]
    dense, pop, transformers = group["rows"]
    for row in group["rows"]:
        times = row["decode_ms_per_token"]
        assert 0 < times["first_quartile"] <= times["median"] <= times["third_quartile"]
        assert row["gb_per_s"] == pytest.approx(row["weight_bytes_per_token"] / times["median"] / 1e6)
        assert row["bandwidth_share"] == pytest.approx(row["gb_per_s"] / group["bandwidth_gb_per_s"]["median"])
    # Attention and lm_head whole; of gate and up the retained channels and the candidates, of down those that win.
    engine = load(checkpoint, dtype="float32")
    own = regions(engine.model, engine.resolve(PruningSettings(prune_ratio=0.4)))
    hidden, layers = SIZES["hidden_size"], SIZES["num_hidden_layers"]
    attention = layers * hidden * 2 * (hidden + hidden // 2) + 261 * hidden
    assert dense["weight_bytes_per_token"] == 4 * (attention + layers * 3 * hidden * SIZES["intermediate_size"])
    rows = 2 * (own.retained + own.candidate) + own.retained + own.picked
    assert pop["weight_bytes_per_token"] == 4 * (attention + layers * hidden * rows)
    assert transformers["weight_bytes_per_token"] == dense["weight_bytes_per_token"]
    assert pop["partition_ms"] > 0
    assert dense["partition_ms"] == 0
    assert transformers["partition_ms"] is None


def test_peer_decodes_the_same_tokens(result: dict[str, Any]) -> None:
    dense, *_, transformers = result["dtypes"][0]["rows"]
    assert dense["tokens_as_first_row"] == transformers["tokens_as_first_row"] == 8


def test_prompts_that_skip_layers_stand_beside_those_that_do_not(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["--ckpt", checkpoint, "-p", 20, "-n", 4, "--prune-ratio", 0.4, "--dtype", "float32", "--rounds", 2]
    assert status(*arguments, "--prefill-skip", "2/3", "--boundary-tokens", 2, "--json", tmp_path / "bench.json") == 0
    assert "of products with weights" in capsys.readouterr().out
    lines = json.loads((tmp_path / "bench.json").read_text())["dtypes"][0]["rows"]
    assert [line["engine"] for line in lines] == [
        "popengine eager, dense", "popengine eager, POP 0.4",
        "popengine eager, dense, 2 layers skipped", "popengine eager, POP 0.4, 2 layers skipped",
    ]  # fmt: skip
    dense, _, skips, both = lines
    for line in lines:
        assert line["prompt"]["speedup"] == pytest.approx(dense["prefill_ms"]["median"] / line["prefill_ms"]["median"])
    hidden, channels = SIZES["hidden_size"], SIZES["intermediate_size"]
    whole = hidden * (3 * hidden + 3 * channels)            # of one layer: q, k, v and o, with half as many key heads
    linear = 3 * 20 * whole + 261 * hidden
    skipped = 20 * whole + 2 * (20 * hidden * hidden + 2 * (whole - hidden * hidden)) + 261 * hidden
    pairs = 20 * 21 // 2
    assert dense["prompt_work"] == [linear, 3 * 2 * hidden * pairs]
    assert skips["prompt_work"] == [skipped, 2 * hidden * (pairs + 2 * (19 + 20))]
    assert skips["prompt"]["ideal_linear"] == pytest.approx(linear / skipped)
    assert skips["prompt"]["ideal_speedup"] == pytest.approx(sum(dense["prompt_work"]) / sum(skips["prompt_work"]))
    assert both["prompt"]["ideal_speedup"] > skips["prompt"]["ideal_speedup"]       # down_proj of the prompt is pruned


class Silent:
    """A contender that is never asked to do anything."""

    load_s = 1.0

    def __init__(self, name: str) -> None:
        self.name = name


def made_up(name: str, ratio: float | None, step_ms: float, weight_bytes: int | None, tokens: list[int]) -> Entry:
    mode, settings = (None, None) if ratio is None else ("eager", PruningSettings.paper(prune_ratio=ratio))
    entry = Entry(Silent(name), mode, settings, weight_bytes_per_token=weight_bytes)  # type: ignore[arg-type]
    partition = {"scores_ms": 2.0, "sort_ms": 3.0, "copy_ms": 6.0} if ratio else {}
    # One step in three is slow: a median does not mind.
    entry.turns = [Generated(tokens, 100.0, [step_ms, step_ms, 9 * step_ms], **partition) for _ in range(3)]
    entry.held_bytes, entry.turn_bytes = 1000, 200
    return entry


def test_arithmetic_of_the_columns() -> None:
    entries = [
        made_up("dense", 0.0, 20.0, 400_000_000, [1, 2, 3]),
        made_up("POP", 0.4, 16.0, 250_000_000, [1, 2, 3]),
        made_up("peer", None, 40.0, 600_000_000, [1, 2, 4]),
    ]
    dense, pop, peer = rows(entries, bandwidth_gb_per_s=25.0)
    assert dense["gb_per_s"] == pytest.approx(20.0)
    assert dense["bandwidth_share"] == pytest.approx(0.8)
    assert (dense["speedup"], dense["ideal_speedup"]) == (1.0, 1.0)
    assert dense["break_even_tokens"] is None
    assert pop["speedup"] == pytest.approx(20 / 16)
    assert pop["ideal_speedup"] == pytest.approx(400 / 250)
    assert pop["partition_ms"] == pytest.approx(11.0)
    assert pop["break_even_tokens"] == math.ceil(11 / 4)
    assert pop["step_time_over"] == {"peer": pytest.approx(0.4)}
    assert pop["prefill_time_over"] == {"peer": pytest.approx(1.11)}
    assert pop["peak_memory_bytes"] == 1200
    assert peer["gb_per_s"] == pytest.approx(15.0)
    assert (peer["speedup"], peer["step_time_over"]) == (None, {})
    assert (dense["tokens_as_first_row"], pop["tokens_as_first_row"], peer["tokens_as_first_row"]) == (3, None, 2)


def test_a_partition_that_never_pays_has_no_break_even() -> None:
    entries = [made_up("dense", 0.0, 20.0, 400, [1]), made_up("POP", 0.4, 21.0, 250, [1])]
    assert rows(entries, bandwidth_gb_per_s=25.0)[1]["break_even_tokens"] is None


def test_a_shape_is_timed_on_random_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 99, "max_position_embeddings": 4096}
    monkeypatch.setitem(bench_shapes.SHAPES, "small", bench_shapes.SHAPES["llama-3.2-1b"] | small)
    shape = ["--shape", "small", "-p", 12, "-n", 4, "--rounds", 1]
    assert status(*shape, "--prune-ratio", 0.2, 0.4, "--dtype", "bfloat16") == 0
    out = capsys.readouterr().out
    assert "random weights of the shape small" in out
    assert "POP 0.2" in out
    assert "POP 0.4" in out


@pytest.mark.parametrize("name", sorted(bench_shapes.SHAPES))
def test_shapes_are_readable_configs(name: str) -> None:
    """Of the size that the name says; of a mixture: the weights that one token meets."""
    config = bench_shapes.SHAPES[name]
    with torch.device("meta"):
        model = architecture(config, name).from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    language_model = model.language_model if isinstance(model, PictureModel) else model
    for layer in language_model.model.layers:
        if isinstance(layer.mlp, MixtureOfExperts):
            idle = len(layer.mlp.experts) - layer.mlp.experts_per_token
            parameters -= idle * sum(parameter.numel() for parameter in layer.mlp.experts[0].parameters())
    words = name.split("-")[-1].split("x")[-1]
    size = float(words.removesuffix("b").removesuffix("m")) / (1000 if words.endswith("m") else 1)
    assert 0.95 * size < parameters / 1e9 < 1.26 * size


@pytest.mark.parametrize("name", ["qwen2-vl-7b", "qwen2.5-vl-7b"])
def test_ratios_of_the_paper_come_from_the_shapes_of_qwen_vl(name: str) -> None:
    """Table 8, from config.json alone: the tower does not count."""
    config = bench_shapes.SHAPES[name]
    with torch.device("meta"):
        model = architecture(config, name).from_config(config)
    weights = layer_weights(model.language_model)
    assert (weights.attention / 1e6, weights.ffn / 1e6) == pytest.approx((29.36, 203.69), abs=0.006)
    for ratio, wanted in ((0.2, 22.9), (0.4, 45.8)):
        assert 100 * resolve(PruningSettings.paper(ratio), weights).ffn_ratio == pytest.approx(wanted, abs=0.0501)


def test_a_shape_with_a_tower_is_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = bench_shapes.qwen_vl("qwen3-vl", (64, 128, 3, 4, 2, 260, True), (32, 48, 3, [0, 2]))
    small["vision_config"]["num_heads"] = 2
    monkeypatch.setitem(bench_shapes.SHAPES, "small", small)
    assert status("--shape", "small", "-p", 12, "-n", 4, "--rounds", 1, "--prune-ratio", 0.1) == 0
    assert "POP 0.1" in capsys.readouterr().out


def test_prompts_with_pictures_are_timed_with_fewer_of_their_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bench.json"
    assert status(
        "--ckpt", LLAVA_TINY, "-p", 100, "-n", 4, "-b", 2, "--rounds", 1, "--dtype", "float32", "--prune-ratio", 0,
        "--pictures", 2, "--visual-tokens", "1/2", 3, "--visual-tokens-by", "diversity", "--json", file,
    ) == 0
    assert "visual tokens 1/2 by diversity" in capsys.readouterr().out
    lines = json.loads(file.read_text())["dtypes"][0]["rows"]
    assert [line["visual_tokens"] for line in lines] == ["all", "1/2", 3.0]
    whole, half, few = (line["prompt_work"][0] for line in lines)
    assert (whole - few) / (whole - half) == pytest.approx((72 - 6) / (72 - 36))


@pytest.mark.parametrize("tied", [True, False])
def test_weights_for_llama_cpp_are_in_its_order(tmp_path: Path, tied: bool) -> None:
    source = TinyLlama(tied=tied)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 260, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": source.head_dim, "rms_norm_eps": 1e-5, "rope_theta": 50000.0, "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(source.tensors, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as opened:
        file = write_gguf(opened, "F32", tmp_path / "model.gguf")
    written = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(file).tensors}
    assert_same(written.pop("rope_freqs.weight"), torch.ones(16))
    expected = source.gguf_tensors()
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(written[name], tensor), name


def test_a_peer_reads_the_bytes_of_its_own_weights(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp's .gguf, and transformers' plain weights beside packed ones of ours."""
    kind = gguf.GGMLQuantizationType
    layers = 2 * 64 * (128 + 64 + 64 + 128 + 3 * 96)                # q, k, v, o and three of the network
    for tied, name, bits in ((True, kind.Q4_1, 5), (False, kind.Q8_0, 8.5), (False, kind.F16, 16)):
        source = TinyLlama(tied=tied)
        metadata = source.metadata() | {"llama.expert_count": 8, "llama.expert_used_count": 2}
        file = write_tiny(tmp_path / "tiny.gguf", metadata, source.gguf_tensors(), name)
        assert gguf_bytes_per_token([file]) == (260 * 64 + layers) * bits / 8           # the head, once
        experts = {"blk.0.ffn_gate_exps.weight": torch.randn(8, 96, 64)}
        file = write_tiny(tmp_path / "experts.gguf", metadata, source.gguf_tensors() | experts, name)
        assert gguf_bytes_per_token([file]) == (260 * 64 + layers + 2 * 96 * 64) * bits / 8

    monkeypatch.setenv("PYTHONPATH", str(library(tmp_path, COUNTING)))
    assert LlamaCppEngine(file, None, 8, 1, tmp_path).bytes_per_token == gguf_bytes_per_token([file])

    out = tmp_path / "bench.json"
    arguments = ["--ckpt", checkpoint, "-p", 12, "-n", 3, "--prune-ratio", 0, "--dtype", "bfloat16", "--rounds", 1]
    assert status(*arguments, "--weights", "int8", "--against", "transformers", "--json", out) == 0
    ours, theirs = json.loads(out.read_text())["dtypes"][0]["rows"]
    hidden, layers = SIZES["hidden_size"], SIZES["num_hidden_layers"]
    whole = layers * hidden * 3 * (hidden + SIZES["intermediate_size"]) + 261 * hidden
    assert ours["weight_bytes_per_token"] < theirs["weight_bytes_per_token"] == 2 * whole


def test_llama_cpp_generates_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = TinyLlama(tied=True)
    file = write_tiny(tmp_path / "tiny.gguf", source.metadata(), source.gguf_tensors(), gguf.GGMLQuantizationType.F16)
    monkeypatch.setenv("PYTHONPATH", str(library(tmp_path, COUNTING)))
    peer = LlamaCppEngine(file, None, 8, 1, tmp_path)
    for _ in range(2):
        found = peer.generate([[1, 2]], 4)
        assert found.tokens == [3, 4, 5, 6]
        assert len(found.step_ms) == 3
        assert found.answer_s == pytest.approx((found.prefill_ms + sum(found.step_ms)) / 1000)
    assert peer.generate([[1, 2]], 8, steps=1).tokens == [3, 4]
    process = peer.process
    del peer
    process.wait(timeout=60)

    library(tmp_path, COUNTING.replace('print("eval", ids)', "import os; os._exit(4)"))
    peer = LlamaCppEngine(file, None, 8, 1, tmp_path)
    with pytest.raises(AbsentPeer, match="ended with status 4"):
        peer.generate([[1, 2]], 4)
    with pytest.raises(AbsentPeer, match="ended with status 4"):        # a later turn
        peer.generate([[1, 2]], 4)
    library(tmp_path, COUNTING.replace('print("loading")', "raise ValueError('no such type')"))
    with pytest.raises(AbsentPeer, match=r"does not load a .gguf of these weights \(no such type\)"):
        LlamaCppEngine(file, None, 8, 1, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prune-ratio", 0.99], "prune ratio 0.99 is more than the feed-forward networks hold"),
        (["--dtype", "float8"], "dtype must be one of float32, bfloat16, float16, not 'float8'"),
        (["--against", "tensorrt"], "there is no peer named 'tensorrt'; peers are transformers, llama.cpp"),
        (["--shape", "llama"], "give a checkpoint or a shape, not both"),
        (["-n", 1], "new tokens must be at least 2, not 1"),
        (["-p", 0], "prompt tokens must be at least 1, not 0"),
        (["-p", 250, "-n", 64], "more than the context of 256"),
        (["--rounds", 0], "rounds must be at least 1, not 0"),
        (["--threads", 0], "threads must be at least 1, not 0"),
        (["--device", "tpu"], "device must be"),
        (["--prefill-skip", "1/3", "3/2"], "prefill skip must be at least 0 and below 1, not 3/2"),
        (["--prefill-skip", "1/3", "--boundary-tokens", 0], "boundary tokens must be at least 1, not 0"),
        (["--json", "/nowhere/bench.json"], "/nowhere/bench.json cannot be written"),
        (["--visual-tokens", "1/2"], "give --pictures a number of them"),
        (["--pictures", 1], "this checkpoint is a text model"),
        (["--pictures", -1], "pictures must be a number of at least 0"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_input_ends_in_one_line(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], arguments: list[Any], message: str
) -> None:
    assert message in one_line_error(main, capsys, "--ckpt", checkpoint, *arguments)


def test_an_unknown_shape_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    error = one_line_error(main, capsys, "--shape", "llama-9000")
    assert "there is no shape named 'llama-9000'; shapes are" in error


def test_the_table_of_products(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_products, "SUMMED_BYTES", 1 << 22)
    arguments = ["--ckpt", checkpoint, "--dtype", "float32", "bfloat16", "--weights", "plain", "int8", "--products"]
    assert status(*arguments, "--json", tmp_path / "products.json") == 0
    found, text = json.loads((tmp_path / "products.json").read_text()), capsys.readouterr().out
    assert f"{found['bandwidth_gb_per_s']:.1f} GB/s" in text and torch.__version__ in text
    hidden, channels = SIZES["hidden_size"], SIZES["intermediate_size"]
    for kind, size in (("float32", 4), ("bfloat16", 2)):
        rows = found["products"][f"{kind} {channels} x {hidden}"]
        assert [row["product"] for row in rows] == ["columns added up", "torch.mv"]
        assert [row["chosen"] for row in rows] == [False, True]             # gate and up, without a folder of the user
        for row in rows:
            assert row["gb_per_s"] == pytest.approx(channels * hidden * size / row["microseconds"] / 1e3)
    (packed,) = found["products"][f"int8 {channels} x {hidden}"]
    assert packed["product"] == "packed" and packed["chosen"]
    assert packed["gb_per_s"] == pytest.approx(channels * (hidden + 2) / packed["microseconds"] / 1e3)


@pytest.mark.slow
def test_the_table_of_compiled_products(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_products, "SUMMED_BYTES", 1 << 22)
    arguments = ["--ckpt", checkpoint, "--dtype", "bfloat16", "--weights", "int8", "--products", "--compile"]
    assert status(*arguments, "--json", tmp_path / "products.json") == 0
    rows = json.loads((tmp_path / "products.json").read_text())["products"]["int8 80 x 48"]
    assert [row["product"] for row in rows] == ["packed", "8 streams", "packed"]
    assert [row["product"] for row in rows if row["chosen"]] == ["packed", "8 streams"]


def test_products_of_packed_weights_need_half_precision(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--ckpt", checkpoint, "--products", "--weights", "int4", "--dtype", "float32")
    assert "no product to time" in one_line_error(main, capsys, *arguments)


def test_products_are_timed_on_a_cpu_only(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--products" in one_line_error(main, capsys, "--ckpt", checkpoint, "--products", "--device", "cuda")
