"""tools/gpu_check.py runs to its end without a GPU, as a rehearsal, and tells what is wrong."""

from contextlib import redirect_stdout
from io import StringIO
from types import SimpleNamespace
from typing import Any

import gpu_check
import pytest
import torch
from builders import exit_status

from popengine.bench import main as bench
from popengine.benchmark import benchmark
from popengine.benchmark.shapes import SHAPES


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model in place of the rehearsal's, timed in this process, which has PyTorch."""
    monkeypatch.setattr(benchmark, "SUMMED_BYTES", 1 << 22)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    monkeypatch.setitem(SHAPES, "smollm2-135m", SHAPES["smollm2-135m"] | sizes | heads)
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--device", "cpu"])


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_rehearsal_checks_every_family_and_prints_the_table(
    compiled: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], **_: Any) -> None:
        assert command[1:3] == ["-m", "popengine.bench"]
        left_out = "0.2" if compiled else "--compile"       # to compile each of the three takes long
        with redirect_stdout(StringIO()):
            assert exit_status(bench, *(word for word in command[3:] if word != left_out)) == 0

    monkeypatch.setattr(gpu_check, "subprocess", SimpleNamespace(run=run, DEVNULL=None))
    assert gpu_check.main() == 0
    said = capsys.readouterr().out
    assert "this is a rehearsal on the cpu" in said
    assert all(f"ok    {name}: dense " in said for name in gpu_check.FAMILIES)
    rows = [line.split(" | ") for line in said.splitlines() if line.startswith("| ")][1:]
    assert {row[1] for row in rows} == {"plain", "int8"} and {len(row) for row in rows} == {8}
    assert any("transformers" in row[0] for row in rows) and len(rows) >= 7


def test_a_wrong_family_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_check, "timed", lambda *_: [])
    monkeypatch.setattr(gpu_check, "table", lambda _: "")
    monkeypatch.setattr(gpu_check, "FAMILIES", {name: gpu_check.FAMILIES[name] for name in ("llama", "mixtral")})
    load = gpu_check.load_model

    def broken(checkpoint: Any, dtype: torch.dtype, device: torch.device) -> Any:
        model, form = load(checkpoint, dtype, device)
        if checkpoint.config["model_type"] == "mixtral":
            model.model.norm.weight[:] *= 1.001
        return model, form

    monkeypatch.setattr(gpu_check, "load_model", broken)
    assert gpu_check.main() == 1
    said = capsys.readouterr().out
    assert "ok    llama" in said and "WRONG mixtral" in said and "Wrong on this device: mixtral." in said
