"""What popengine info says of a checkpoint, from its headers alone."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from builders import LLAVA_TINY, MIXTRAL_TINY, exit_status, one_line_error, ours

from models.cost_model import layer_weights
from models.families.llava import LlavaForConditionalGeneration
from models.matrices.plain import Matrix
from models.pruning.resolve import resolve
from popengine.engine.loading import load
from popengine.images.vision import Vision
from popengine.info import main
from popengine.studies.settings import PruningSettings
from weights.errors import InputError
from weights.safetensors_files import SafetensorsCheckpoint

status, error = partial(exit_status, main), partial(one_line_error, main)


@pytest.fixture
def info(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The JSON object of a checkpoint, none of whose tensors may be read."""
    def found(folder: Path) -> dict[str, Any]:
        with monkeypatch.context() as patch:
            patch.setattr(SafetensorsCheckpoint, "read", None)
            assert status(folder, "--json") == 0
        return json.loads(capsys.readouterr().out)

    return found


@pytest.mark.parametrize("folder", [LLAVA_TINY, MIXTRAL_TINY], ids=["llava", "mixtral"])
def test_it_says_what_loading_then_finds(info: Any, folder: Path) -> None:
    found = info(folder)
    model = ours(folder)
    assert found["parameters"] == sum(one.numel() for one in model.parameters())
    assert found["memory_bytes"]["float32"] == 4 * found["parameters"]
    assert found["memory_bytes"]["bfloat16"] == 2 * found["parameters"]
    assert found["memory_bytes"]["int4"] < found["memory_bytes"]["int8"] < found["memory_bytes"]["bfloat16"]
    language_model = model.language_model if isinstance(model, LlavaForConditionalGeneration) else model
    most = found["ffn_share_of_layer"]
    resolve(PruningSettings.paper(prune_ratio=most - 1e-3), layer_weights(language_model))
    with pytest.raises(InputError, match="must stay below"):
        resolve(PruningSettings.paper(prune_ratio=most), layer_weights(language_model))
    state = language_model.new_state(1, 10, resolve(PruningSettings.paper(), layer_weights(language_model)))
    held = sum(buffer.numel() * 4 for buffer in state.cache.keys + state.cache.values)
    assert found["cache_bytes_per_token"] == held // 10
    assert found["problem"] is None


def test_it_says_what_quantised_matrices_become(
    info: Any, default_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert info(default_gguf)["auto_weights"] == "Q8_0 as int8, Q4_1 as int4"
    assert info(LLAVA_TINY)["auto_weights"] == "plain"
    assert status(default_gguf) == 0
    assert "packed      Q8_0 as int8, Q4_1 as int4 (int4, int8 in groups: the file" in capsys.readouterr().out


def test_packed_forms_take_what_is_said(info: Any, tmp_path: Path) -> None:
    found, engine = info(LLAVA_TINY), load(LLAVA_TINY, weights="int8", dtype="bfloat16")
    assert isinstance(engine.pictures, Vision)
    modules = {module for module in engine.pictures.model.modules() if isinstance(module, Matrix)}
    packed = sum(module.held_bytes() for module in modules)
    plain = set(engine.pictures.model.parameters()) - {one for module in modules for one in module.parameters()}
    held = packed + sum(one.numel() * one.itemsize for one in plain)
    assert held == pytest.approx(found["memory_bytes"]["int8"], rel=0.03)


def test_people_read_the_same(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("--ckpt", checkpoint) == 0
    out = capsys.readouterr().out
    for said in ("LlamaForCausalLM", "million in 3 layers", "int8", "--prune-ratio below", "system, user, assistant",
                 "<|end|> ends an answer", "| <|system|>Be brief.<|end|><|user|>Hello<|end|>", "supported   yes"):
        assert said in out, said
    for folder, said in ((MIXTRAL_TINY, "8 a layer, 2 for each token"), (LLAVA_TINY, "36 tokens each")):
        assert status(folder) == 0
        assert said in capsys.readouterr().out


@pytest.mark.parametrize(("change", "named"), [
    ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
    ({"num_hidden_layers": 4}, "layers.3"),
])
def test_what_is_not_supported_is_said_and_no_error(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], named: str
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "changed"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    assert status(folder) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("supported   no: ")
    assert named in last


def test_what_is_no_checkpoint_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert str(tmp_path) in error(capsys, tmp_path)
    assert "no such path" in error(capsys, tmp_path / "nowhere")
    assert "one checkpoint" in error(capsys, tmp_path, "--ckpt", tmp_path)
