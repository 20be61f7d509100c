"""Where output goes: full disks, closed streams, terminals of few letters, and files that are none."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import REPOSITORY, exit_status, one_line_error
from hypothesis import given, settings
from hypothesis import strategies as st

from popengine import bench, compare, gates, generate, score
from popengine.command_line.parser import OneLineParser
from popengine.command_line.start import run_as_command
from popengine.compare import main
from weights.errors import InputError, one_line
from weights.output_file import check_output

PROGRAM = """
import sys
from popengine.command_line.parser import OneLineParser
from popengine.command_line.start import run_as_command
from weights.errors import InputError
def run(flags):
    print(sys.stdin.read() + "é▁\\u202e" * {length})
    if {fails}:
        raise InputError("a name\\n\\x1b[2Jé\\ud800" * {length})
run_as_command(run, OneLineParser("x", "", "", ""), [])
"""


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    out=st.sampled_from(["full", "closed", "gone", "read"]), err=st.sampled_from(["full", "closed", "read"]),
    stdin=st.sampled_from(["</dev/null", "<&-"]), encoding=st.sampled_from(["utf-8", "ascii", "latin-1"]),
    length=st.sampled_from([1, 50_000]), fails=st.booleans(),
)
def test_output_that_cannot_be_written_is_one_line_at_most(
    out: str, err: str, stdin: str, encoding: str, length: int, fails: bool
) -> None:
    words = {"full": ">/dev/full", "closed": ">&-", "gone": "| true", "read": ""}
    streams = f"{stdin} {'2' + words[err] if err != 'read' else ''} {words[out] if out != 'gone' else ''}"
    command = f'"$0" -c "$1" {streams} {"| true; exit ${PIPESTATUS[0]}" if out == "gone" else ""}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, PROGRAM.format(length=length, fails=fails)], capture_output=True,
        cwd=REPOSITORY, env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}, timeout=60, check=False,
    )
    said = done.stderr.decode(encoding)
    assert done.returncode in ((0, 2, 141) if out == "gone" else (2,) if fails or out != "read" else (0,)), said
    assert "Traceback" not in said and "Exception ignored" not in said and "\x1b" not in said
    assert said == "" or (said.startswith("error: ") and said.count("\n") == 1)
    if err == "read":
        assert (done.returncode == 2) == (said != "")
    if out == "read":
        assert ("é" if encoding != "ascii" else "\\xe9") in done.stdout.decode(encoding)


def test_a_message_is_one_printable_line_whatever_it_quotes() -> None:
    assert str(InputError("a\nb\x1b[2J\u202e\ud800")) == "a b\\x1b[2J\\u202e\\ud800"
    assert len(one_line("x" * 10**7)) < 1010


def test_what_is_not_a_file_is_never_replaced(
    tmp_path: Path, text: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, Path("/dev/null")):
        with pytest.raises(InputError, match="is not a file, and is not replaced by one"):
            check_output(path)
    with pytest.raises(InputError, match="cannot be written: No such file"):
        check_output(tmp_path / "no" / "folder")
    common = ["--ckpt", checkpoint, "--text", text]
    for name, command, words in [
        ("table.md", compare, ["--out", tmp_path]), ("perplexity.png", compare, ["--out", tmp_path]),
        ("progress.jsonl", compare, ["--out", tmp_path]), ("gates.json", gates, ["--out", tmp_path]),
        ("saved", score, ["--calibration-text", text, "--save-calibration", tmp_path / "saved"]),
        ("out.json", bench, ["--json", tmp_path / "out.json"]),
    ]:
        os.mkfifo(tmp_path / name)
        words = [*(common if command is not bench else common[:2]), *words]
        assert "is not a file, and is not replaced by one" in one_line_error(command.main, capsys, *words)
        assert (tmp_path / name).is_fifo()
        (tmp_path / name).unlink()


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), RuntimeError("can't start new thread"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"), None,
])
def test_too_little_memory_is_one_line_however_it_is_said(
    error: Exception | None, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: Any) -> None:
        if error is not None:
            raise error
        torch.empty(2**60)              # PyTorch's own words

    with pytest.raises(SystemExit) as ended:
        run_as_command(run, OneLineParser("test", "", "", ""), [])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: this machine has too little memory for that")


def test_no_input_may_be_a_pipe(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for words in (["--text", pipe], ["--text", __file__, "--calibration-text", pipe, "--method", "flap"],
                  ["--text", __file__, "--calibration", pipe, "--method", "flap"]):
        error = one_line_error(score.main, capsys, "--ckpt", checkpoint, *words)
        assert "pipe" in error
    for name in ("config.json", "tokenizer_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        folder = tmp_path / f"with {name}"
        folder.mkdir()
        for file in checkpoint.iterdir():
            (folder / file.name).symlink_to(file)
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        # A chat template is read when a chat is to be rendered: a text is scored without one.
        command, words = (score, ["--text", __file__])
        if name.endswith(".jinja"):
            command, words = (generate, ["--prompt", "a"])
        error = one_line_error(command.main, capsys, "--ckpt", folder, *words)
        assert "not a file" in error or "no tokenizer" in error


@pytest.fixture(scope="module")
def compared(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list, Path]:
    """A comparison that was made, and the words that make it."""
    out = tmp_path_factory.mktemp("compared")
    words = ["--ckpt", checkpoint, "--text", text, "--out", out, "--methods", "dense", "pop", "--windows", 1,
             "--prompt-tokens", 12, "--score-tokens", 6, "--no-plots", "--quiet"]
    assert exit_status(main, *words) == 0
    return words, out


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(line=st.integers(1, 4), name=st.sampled_from(["losses", "agreed", "divergences", "ids", "key", "extra"]),
       value=st.sampled_from([None, 3, "x", [], [1.5], [float("nan")] * 6, {"a": 1}, [10**400] * 6, [True] * 6]))
def test_a_progress_file_that_was_edited_is_measured_again(
    compared: tuple[list, Path], line: int, name: str, value: object
) -> None:
    words, out = compared
    wanted, progress = (out / "table.json").read_text(), out / "progress.jsonl"
    lines = progress.read_text().splitlines()
    record = json.loads(lines[line])
    lines[line] = json.dumps(record | ({name: value} if name in record or name == "extra" else {}))
    progress.write_text("\n".join(lines) + "\n")
    assert exit_status(main, *words) == 0
    found = json.loads((out / "table.json").read_text())
    if name != "agreed":            # six times true is a record like another
        assert found["rows"] == json.loads(wanted)["rows"]
