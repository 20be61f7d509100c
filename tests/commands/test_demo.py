"""The demo: both answers are the engine's own, its table says what was measured, and no answer steers the terminal."""

import io
import os
import re
from functools import partial
from pathlib import Path

import pytest
from builders import exit_status, one_line_error

from popengine import demo, load
from popengine.demo import main
from popengine.evaluation import side_by_side
from popengine.evaluation.side_by_side import Screen, answer_in_turns, begun, columns, table
from popengine.studies.settings import DENSE, PruningSettings

status, error = partial(exit_status, main), partial(one_line_error, main)
HALF = PruningSettings.paper(ffn_ratio=0.5)


def test_answers_in_turns_are_those_of_two_runs(checkpoint: Path) -> None:
    engine = load(checkpoint, device="cpu", dtype="float32")
    alone = [engine.generate("Hello there", max_new_tokens=12, pruning=one)[0] for one in (DENSE, HALF)]
    for answer, one in zip(answer_in_turns(*begun(engine, "Hello there", 12, HALF), None), alone, strict=True):
        assert (answer.text, answer.token_ids) == (one.text, one.token_ids)
        assert len(answer.milliseconds) == len(answer.token_ids) - 1 and min(answer.milliseconds) > 0
        assert answer.statistics.weight_bytes_per_token == one.statistics.weight_bytes_per_token


def test_the_table_has_the_measured_numbers(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(checkpoint, device="cpu", dtype="float32")
    dense, pruned = answer_in_turns(*begun(engine, "Hello there", 12, HALF), None)
    for of_pruned in (1.0, 4.0):
        times = {id(dense): 2.0, id(pruned): of_pruned}
        monkeypatch.setattr(side_by_side, "typical", lambda one, times=times: times[id(one)])
        *rows, _, sentence = table([(dense, pruned)])
        ratio = pruned.statistics.weight_bytes_per_token / dense.statistics.weight_bytes_per_token
        assert f"({ratio:.2f})" in rows[2] and f"({of_pruned / 2:.2f} of dense)" in rows[2]
        same = re.search(r"the first (\d+) of (\d+)", rows[2])
        assert same is not None and dense.token_ids[: int(same[1])] == pruned.token_ids[: int(same[1])]
        assert ("saves no time here" in sentence) is (of_pruned > 2)


def test_it_says_why_nothing_was_pruned_and_which_prompts_were_short(checkpoint: Path) -> None:
    engine = load(checkpoint, device="cpu", dtype="float32")
    patient = PruningSettings(ffn_ratio=0.5, min_evidence=10_000)
    pair = answer_in_turns(*begun(engine, "Hello there", 6, patient), None)
    assert pair[0].token_ids == pair[1].token_ids
    assert "Prompt 1 is short: steps ran dense until 10000 tokens" in table([pair])[-1]
    refreshing = PruningSettings.paper(ffn_ratio=0.5, dense_every=2)
    refreshed = answer_in_turns(*begun(engine, "Hello there", 6, refreshing), None)
    assert refreshed[1].statistics.dense_steps and "is short" not in table([refreshed])[-1]
    one_token = answer_in_turns(*begun(engine, "Hello there", 1, HALF), None)
    assert "No step was timed" in table([one_token])[-1]


def test_control_characters_do_not_reach_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for width in (120, 60):
        monkeypatch.setattr(side_by_side.shutil, "get_terminal_size", lambda width=width: os.terminal_size((width, 20)))
        out = io.StringIO()
        screen = Screen(out)
        screen.show(["a\x1b[2Jb", "\x07c"], last=True)
        assert "\x1b[2J" not in out.getvalue() and "\x07" not in out.getvalue() and "a[2Jb" in out.getvalue()
    lines = columns(["word " * 60, "short"], 100)
    assert all(len(line) <= 100 for line in lines) and sum("word" in line for line in lines) > 4


def test_a_long_answer_is_drawn_in_full_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side.shutil, "get_terminal_size", lambda: os.terminal_size((100, 10)))
    out = io.StringIO()
    screen, text = Screen(out), "\n".join(f"line {number}" for number in range(30))
    screen.show([text, text])
    assert "line 0 " not in out.getvalue() and screen.drawn == 8
    screen.show([text, text], last=True)
    assert "line 0 " in out.getvalue()


def test_the_command_prints_both_answers_and_the_table(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--ckpt", checkpoint, "--prompt", "Hello", "--prompt", "And then", "-n", 6, "--ffn-ratio", 0.5]
    assert status(*arguments, "--min-evidence", 0) == 0
    out = capsys.readouterr().out
    assert out.count("dense: ") == 2 == out.count("pruned: ") and "ms per token" in out
    assert "A larger model" not in out          # said beside the small default model alone


def test_the_larger_model_is_taken_if_it_is_there(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "LARGE_FILE", checkpoint)
    assert status("--prompt", "Hello", "-n", 3, "--min-evidence", 0) == 0
    out = capsys.readouterr().out
    assert f"The model is {checkpoint.name}" in out and "A larger model" not in out


def test_bad_input_is_one_line(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "prune ratio" in error(capsys, "--ckpt", checkpoint, "--prune-ratio", 2)
    assert "at least 1" in error(capsys, "--ckpt", checkpoint, "-n", 0)
