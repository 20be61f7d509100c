"""The command as a user runs it: what it prints, and one clear line with exit status 2 for everything that is wrong."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from builders import complete_checkpoint, exit_status, one_line_error

from popengine.command_line.interrupts import insistent_interrupts
from popengine.generate import main

status, error = partial(exit_status, main), partial(one_line_error, main)
JSON_FIELDS = {
    "text", "token_ids", "prompt_token_ids", "finish_reason", "pruning", "timing", "weight_bytes_per_token",
    "dense_weight_bytes_per_token", "peak_memory_bytes", "dtype", "device",
}
PRUNING_FIELDS = {
    "ratio", "ffn_ratio", "candidate_width", "head_ratio", "prefill", "retained", "candidate", "pruned", "picked",
}
TIMING_FIELDS = {"load_s", "prefill_ms", "partition_ms", "decode_ms_per_token", "decode_tokens_per_s"}


@pytest.fixture
def own_checkpoint(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_text_goes_to_stdout_and_statistics_to_stderr(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("--ckpt", checkpoint, "--prompt", "Hello", "-n", 8, "--ignore-eos") == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    for word in ("prompt", "prefill", "partition", "decode", "tokens/s", "retained", "candidate", "picked", "pruned",
                 "of dense", "at peak", "rule pop, width 0.5"):
        assert word in err, word


def test_statistics_give_the_true_reason_for_reading_everything(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--ckpt", checkpoint, "--prompt", "Hello", "-n", 8, "--ignore-eos")
    for flags, said in (
        (("--min-evidence", 1000, "--paper", "--ffn-ratio", 0.5), "100.0% of dense, as every step gathered evidence"),
        (("--min-evidence", 0, "--ffn-ratio", 0.2, "--candidate-width", 1, "--weights", "int8", "--dtype", "bfloat16"),
         "100.0% of dense, as copies"),
        (("--prune-ratio", 0), "per FFN, all of which run"),
    ):
        assert status(*asked, *flags) == 0
        err = capsys.readouterr().err
        assert said in err and ("rule pop" in err) is ("all of which" not in said), err


def test_quiet_prints_the_text_alone(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("--ckpt", checkpoint, "--prompt", "Hello", "-n", 8, "--quiet") == 0
    out, err = capsys.readouterr()
    assert out
    assert err == ""


def test_json_has_the_fields_of_the_contract(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--ffn-ratio", 0.5, "--candidate-width", 0.2, "--head-ratio", 0.5, "--prefill", "dense"]
    flags += ["--dtype", "bfloat16", "--min-evidence", 0]
    assert status("--ckpt", checkpoint, "--prompt", "Hello", "-n", 8, "--json", "--ignore-eos", *flags) == 0
    out, err = capsys.readouterr()
    assert err == ""
    report = json.loads(out)
    assert report.keys() >= JSON_FIELDS
    assert report["pruning"].keys() >= PRUNING_FIELDS
    assert report["timing"].keys() >= TIMING_FIELDS
    assert report["pruning"]["ffn_ratio"] == 0.5
    assert report["pruning"]["prefill"] == "dense"
    assert (report["dtype"], report["device"]) == ("bfloat16", "cpu")
    assert len(report["token_ids"]) == 8
    assert report["finish_reason"] == "length"
    assert report["weight_bytes_per_token"] < report["dense_weight_bytes_per_token"]


def test_a_single_token_has_no_decode_time_and_still_valid_json(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status("--ckpt", checkpoint, "--prompt", "Hello", "-n", 1, "--json") == 0
    assert json.loads(capsys.readouterr().out)["timing"]["decode_ms_per_token"] is None


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def configured(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def templated(template: str) -> Callable[[Path], None]:
    return write("chat_template.jinja", template)


def truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


ESCAPE = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
BROKEN = {
    "config missing": (remove("config.json"), "config.json"),
    "config is no JSON": (write("config.json", "{"), "config.json"),
    "config is a list": (write("config.json", "[1]"), "config.json"),
    "architecture": (configured(architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel.*LlamaForCausalLM"),
    "architectures is a number": (configured(architectures=3), "architecture"),
    "feature": (configured(rope_parameters={"rope_type": "longrope"}), "longrope"),
    "shape": (configured(intermediate_size=81), "gate_proj"),
    "absurd size": (configured(hidden_size=10**9), "."),
    "missing keys": (configured(num_hidden_layers=4), "layers.3"),
    "unexpected keys": (configured(num_hidden_layers=2), "layers.2"),
    "weights missing": (remove("model.safetensors"), "safetensors"),
    "weights truncated": (truncated, "model.safetensors"),
    "weights are no safetensors": (write("model.safetensors", b"\xff" * 64), "model.safetensors"),
    "pickle only": (pickled, "pytorch_model.bin|pickle"),
    "tokenizer missing": (remove("tokenizer.json"), "tokenizer"),
    "tokenizer broken": (write("tokenizer.json", "{}"), "tokenizer.json"),
    "template raises": (templated("{{ raise_exception('no system turns') }}"), "no system turns"),
    "template escapes": (templated(ESCAPE), "chat template"),
    "template is no template": (templated("{% if %}"), "chat template"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints(own_checkpoint: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    change, named = BROKEN[name]
    change(own_checkpoint)
    said = error(capsys, "--ckpt", own_checkpoint, "--prompt", "Hello", "-n", 4)
    assert re.search(named, said), said


ADVICE: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "unknown dtype": (configured(dtype="fp16"), ["--dtype", "float32"]),
    "dtype of another type": (configured(dtype=16), ["--dtype", "bfloat16"]),
    "no template is the default": (
        write("tokenizer_config.json", '{"chat_template": [{"name": "tool_use", "template": "x"}]}'), ["--raw"]
    ),
    "template of another type": (write("chat_template.json", '{"chat_template": 3}'), ["--raw"]),
    "template is not UTF-8": (write("chat_template.jinja", b"\xff"), ["--raw"]),
    "template is no template": (templated("{% if %}"), ["--raw"]),
    "template raises": (templated("{{ raise_exception('no') }}"), ["--raw"]),
}


@pytest.mark.parametrize("name", ADVICE)
def test_what_an_error_advises_helps(own_checkpoint: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    change, flags = ADVICE[name]
    change(own_checkpoint)
    said = error(capsys, "--ckpt", own_checkpoint, "--prompt", "Hello", "-n", 4)
    assert flags[0] in said or name == "dtype of another type", said
    assert status("--ckpt", own_checkpoint, "--prompt", "Hello", "-n", 4, *flags) == 0


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--prune-ratio", "0.2", "--ffn-ratio", "0.2"], "not both"),
        (["--prune-ratio", "1.5"], "prune ratio"),
        (["--prune-ratio", "0.95"], "must stay below"),
        (["--prune-ratio", "abc"], "prune-ratio"),
        (["--ffn-ratio", "nan"], "ffn ratio"),
        (["--candidate-width", "-1"], "candidate width"),
        (["--head-ratio", "1"], "head ratio"),
        (["--prefill", "half"], "prefill"),
        (["-n", "0"], "at least 1"),
        (["-n", "ten"], "max-new-tokens"),
        (["-n", "300"], "300.*256"),
        (["--dtype", "int8"], "dtype"),
        (["--device", "cuda:99"], "cuda"),
        (["--device", "toaster"], "toaster"),
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "0"], "top-p"),
        (["--seed", "x"], "seed"),
        (["--max-seq-len", "0"], "context"),
        (["--no-such-flag"], "no-such-flag"),
        (["--image", "nowhere.png"], "."),
    ],
)
def test_bad_flags(checkpoint: Path, capsys: pytest.CaptureFixture[str], flags: list[str], named: str) -> None:
    said = error(capsys, "--ckpt", checkpoint, "--prompt", "Hello", *flags)
    assert re.search(named, said), said


def test_bad_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such path" in error(capsys, "--ckpt", tmp_path / "nowhere", "--prompt", "x")
    assert str(tmp_path) in error(capsys, "--ckpt", tmp_path, "--prompt", "x")
    (tmp_path / "file.txt").write_text("x")
    assert "file.txt" in error(capsys, "--ckpt", tmp_path / "file.txt", "--prompt", "x")


def test_bad_prompts(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "empty" in error(capsys, "--ckpt", checkpoint, "--prompt", "")
    assert "UTF-8" in error(capsys, "--ckpt", checkpoint, "--prompt", os.fsdecode(b"caf\xe9"))
    assert "--prompt" in error(capsys, "--ckpt", checkpoint)


def command(*arguments: Any, **options: Any) -> "subprocess.Popen[bytes]":
    full = [sys.executable, "-m", "popengine.generate", *map(str, arguments)]
    return subprocess.Popen(full, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_a_prompt_can_come_from_standard_input(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    process = command("--ckpt", checkpoint, "--prompt", "-", "-n", 4, "--json", stdin=subprocess.PIPE)
    out, err = process.communicate("häuser\n".encode())
    assert process.returncode == 0, err
    assert json.loads(out)["prompt_token_ids"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    assert "not UTF-8" in error(capsys, "--ckpt", checkpoint, "--prompt", "-")


def test_interrupting_a_stream_exits_130_without_a_traceback(tmp_path: Path) -> None:
    folder = complete_checkpoint(tmp_path, max_position_embeddings=100_000)
    process = command("--ckpt", folder, "--prompt", "Hello", "-n", 50_000, "--ignore-eos", start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.read(1)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    folder = complete_checkpoint(tmp_path, max_position_embeddings=100_000)
    process = command("--ckpt", folder, "--prompt", "Hello", "-n", 50_000, "--ignore-eos")
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=30) == 141


@pytest.mark.parametrize("name", ["models", "weights"])
def test_a_package_in_the_way_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    process = command("--prompt", "Hello", cwd=tmp_path)
    out, err = process.communicate()
    assert (process.returncode, out, err.count(b"\n")) == (2, b"", 1)
    assert f"`{name}`".encode() in err
    assert str(tmp_path / name).encode() in err


def test_the_console_script_does_not_mind_the_current_directory(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("raise SystemExit('imported the wrong package')")
    script = Path(sys.executable).with_name("popengine-generate")
    done = subprocess.run(
        [script, "--ckpt", checkpoint, "--prompt", "Hello", "-n", "3"], cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_an_interrupt_that_was_swallowed_comes_again() -> None:
    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt), insistent_interrupts():
        with contextlib.suppress(KeyboardInterrupt):        # as a destructor would
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        time.sleep(5)
    assert time.perf_counter() - began < 3
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
