"""The score command as a user runs it, and what its numbers are."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import complete_checkpoint, exit_status, one_line_error
from tolerance import SMOLLM2, tolerated

from popengine import compare
from popengine.engine.engine import Engine
from popengine.engine.loading import load
from popengine.evaluation.scoring import (
    Text,
    Window,
    WindowScore,
    cut_windows,
    dense_log_probabilities,
    log_probabilities,
    score_window,
    summarise,
)
from popengine.score import main
from popengine.studies.settings import DENSE, PruningSettings
from weights.errors import InputError


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    return load(checkpoint, device="cpu")


status, error = partial(exit_status, main), partial(one_line_error, main)


def report(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    assert status(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


SMALL = ("--prompt-tokens", 24, "--score-tokens", 16, "--windows", 3, "--paper")


def test_dense_scores_are_those_of_one_forward_pass(engine: Engine) -> None:
    ids = torch.randint(200, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    window = Window(ids[:24], ids[24:])
    with torch.inference_mode():
        wanted = engine.model(torch.tensor([ids]))[0].log_softmax(-1)
        for step_by_step in (True, False):
            log_p = log_probabilities(engine, window, engine.resolve(DENSE), step_by_step)
            score = score_window(log_p, dense_log_probabilities(engine.model, window), window)
            losses = [-float(wanted[23 + place, token]) for place, token in enumerate(window.continuation)]
            assert score.losses == pytest.approx(losses, abs=tolerated(float(wanted.abs().max())))
            assert all(score.agreed)
            assert score.divergences == pytest.approx([0] * 16, abs=tolerated(1))


@pytest.mark.parametrize("method", ["pop", "frozen", "all-channels", "flap"])
def test_parallel_and_step_by_step_report_the_same(
    method: str, checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--ckpt", checkpoint, "--text", text, "--method", method, "--ffn-ratio", 0.4, *SMALL]
    flags += ["--calibration-text", text] if method == "flap" else ["--head-ratio", 0.5, "--candidate-width", 0.5]
    parallel = report(capsys, *flags)
    steps = report(capsys, *flags, "--step-by-step")
    assert parallel["mean_loss"] == pytest.approx(steps["mean_loss"], abs=tolerated(steps["mean_loss"]))
    assert parallel["divergence"] == pytest.approx(steps["divergence"], abs=tolerated(steps["mean_loss"]))
    assert parallel["agreement"] == pytest.approx(steps["agreement"], abs=1.01 / 48)      # of one token, a tie
    assert (parallel["evaluation"], steps["evaluation"]) == ("parallel", "step by step")
    assert report(capsys, *flags) == parallel
    assert parallel["perplexity"] == pytest.approx(math.exp(parallel["mean_loss"]))
    assert parallel["weight_share"] <= 1
    assert parallel["divergence"] > 0.001


def test_the_default_checkpoint_step_by_step_and_in_parallel(default_checkpoint_path: Path) -> None:
    """The trained model, where activations have outliers."""
    engine = load(default_checkpoint_path, dtype="float32", device="cpu")
    ids = engine.tokenizer.encode(Path(__file__).read_text(encoding="utf-8"), add_special_tokens=False)
    window = Window(ids[:64], ids[64:80])
    pruning = engine.resolve(PruningSettings.paper(ffn_ratio=0.4))
    with torch.inference_mode():
        dense = dense_log_probabilities(engine.model, window)
        means = [
            summarise([score_window(log_probabilities(engine, window, pruning, steps), dense, window)]).mean_loss
            for steps in (True, False)
        ]
    assert means[0] == pytest.approx(means[1], abs=tolerated(means[1], SMOLLM2))


def test_windows_are_spread_over_the_text_without_overlap(engine: Engine) -> None:
    text = Text("numbers", "", list(range(100)))
    windows = cut_windows(text, engine.tokenizer, 20, 10, 3)
    assert [window.ids[0] for window in windows] == [0, 35, 70]
    assert all(len(window.prompt) == 20 and len(window.continuation) == 10 for window in windows)
    assert windows[-1].ids[-1] == 99
    with pytest.raises(InputError, match=r"has 100 tokens.*3 windows at most"):
        cut_windows(text, engine.tokenizer, 20, 10, 4)


def test_summary_of_known_losses() -> None:
    scores = [WindowScore([1.0, 3.0], [True, False], [0.5, 0.1]), WindowScore([4.0, 4.0], [True, True], [0.0, 0.2])]
    summary = summarise(scores)
    assert (summary.mean_loss, summary.agreement) == (3.0, 0.75)
    assert summary.perplexity == pytest.approx(math.exp(3))
    assert summary.standard_error == pytest.approx(1.0)  # deviation sqrt(2) of two windows, over sqrt(2)
    assert summary.divergence == pytest.approx(0.2)


def test_a_saved_calibration_scores_the_same(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--ckpt", checkpoint, "--text", text, "--method", "wanda-sp", *SMALL]
    file = tmp_path / "made.safetensors"
    made = report(capsys, *flags, "--calibration-text", text, "--save-calibration", file)
    assert "counting.txt" in made["calibration"]
    assert report(capsys, *flags, "--calibration", file) == made
    other = complete_checkpoint(tmp_path / "other", intermediate_size=96)
    capsys.readouterr()                         # transformers draws a bar when it saves
    assert "another model" in error(capsys, "--ckpt", other, *flags[2:], "--calibration", file)


def test_bad_input_is_one_line(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--ckpt", checkpoint, "--text", text]
    short = tmp_path / "short.txt"
    short.write_text("only a few words")
    assert "has 16 tokens" in error(capsys, "--ckpt", checkpoint, "--text", short, *SMALL)
    assert "no such file" in error(capsys, *flags, *SMALL, "--calibration", tmp_path / "none").lower()
    assert "cannot be read" in error(capsys, "--ckpt", checkpoint, "--text", tmp_path / "none", *SMALL)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert "not UTF-8" in error(capsys, "--ckpt", checkpoint, "--text", tmp_path / "latin", *SMALL)
    assert "the methods are dense, pop" in error(capsys, *flags, "--method", "popp")
    assert "--calibration-text" in error(capsys, *flags, *SMALL, "--method", "flap")
    assert "windows must be at least 1" in error(capsys, *flags, "--windows", 0)
    assert "context of 256" in error(capsys, *flags, "--prompt-tokens", 250)
    assert "not both" in error(capsys, *flags, "--prune-ratio", 0.2, "--ffn-ratio", 0.2)
    assert "--text" in error(capsys, "--ckpt", checkpoint)


def test_reports_name_the_rule_and_the_width(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--ckpt", checkpoint, "--text", text, *SMALL)
    assert exit_status(main, *flags, "--ratio", 0.3) == 0
    assert "pruning     rule pop, width 0.1, ratio 0.3" in capsys.readouterr().out
    assert exit_status(main, *flags, "--rule", "up") == 0
    assert "pruning     rule up, ratio 0.2" in capsys.readouterr().out
    assert exit_status(main, *flags, "--method", "magnitude") == 0
    assert "pruning     method magnitude, ratio 0.2" in capsys.readouterr().out
    words = ("--methods", "dense", "pop", "frozen", "--no-plots", "--out", tmp_path)
    assert exit_status(compare.main, *flags, *words) == 0
    assert "In all rows: width 0.1, min evidence 0." in capsys.readouterr().out
